"""Models; importing them registers the backbones in segmentation_models_pytorch and TorchGeo."""

from .attention import AttentionEncoder, TemporalAttention
from .convlstm import ConvLSTM
from .encoder import (
    ConvLSTMInceptionEncoder,
    ImageSeries,
    SeriesEncoder,
    freeze,
    series_encoder,
    spatial_encoder,
)
from .export import export_onnx, export_program
from .fuselstm import FuseLSTM, fuselstm_to_unet, unet_to_fuselstm
from .inception import Inception
from .registry import Backbone, change_name, register_encoder, register_encoders

__all__ = (
    'AttentionEncoder',
    'Backbone',
    'ConvLSTM',
    'ConvLSTMInceptionEncoder',
    'FuseLSTM',
    'ImageSeries',
    'Inception',
    'SeriesEncoder',
    'TemporalAttention',
    'change_name',
    'export_onnx',
    'export_program',
    'freeze',
    'fuselstm_to_unet',
    'register_encoder',
    'register_encoders',
    'series_encoder',
    'spatial_encoder',
    'unet_to_fuselstm',
)

register_encoders()
