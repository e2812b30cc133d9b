"""Models; importing them registers the backbones in segmentation_models_pytorch and TorchGeo."""

from .convlstm import ConvLSTM
from .encoder import ConvLSTMInceptionEncoder, register_encoder, register_encoders
from .export import export_onnx, export_program
from .fuselstm import FuseLSTM, fuselstm_to_unet, unet_to_fuselstm
from .inception import Inception

__all__ = (
    'ConvLSTM',
    'ConvLSTMInceptionEncoder',
    'FuseLSTM',
    'Inception',
    'export_onnx',
    'export_program',
    'fuselstm_to_unet',
    'register_encoder',
    'register_encoders',
    'unet_to_fuselstm',
)

register_encoders()
