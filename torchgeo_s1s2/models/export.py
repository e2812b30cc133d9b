"""Models for use without this package: torch.export and ONNX."""

import copy
import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torchgeo.datasets import DependencyNotFoundError

from .encoder import SeriesEncoder, series_encoder

_LEAST = 128  # pixels, which PAN's pyramid needs
_AXES = {'batch': 0, 'slots': 1, 'height': 3, 'width': 4}


def export_program(model: nn.Module) -> ExportedProgram:
    """Export a segmentation model of series with :func:`torch.export.export`.

    Takes an image of shape (B, T, C, H, W) and returns logits of shape (B, K, H, W). B, T, H and W
    are free, H and W multiples of the encoder's stride; the program refuses images of a single
    stride, such as 32 x 32 pixels.

    Args:
        model: smp model around a :class:`SeriesEncoder`, or the ``model`` of a task.
            It is left in evaluation mode.

    Returns:
        The program; :func:`torch.export.save` writes it.

    Raises:
        TypeError: If the encoder is another one.
    """
    encoder = _series_encoder(model)
    steps = {'height': encoder.output_stride, 'width': encoder.output_stride}
    free = {axis: steps.get(name, 1) * Dim(name) for name, axis in _AXES.items()}
    # No size is 1, which would be fixed, or that of another axis, which would be taken for it.
    here = _on_cpu(model)
    image = _example(here, batch=2, slots=3, size=(_LEAST, _LEAST + 1))
    program = torch.export.export(here, (image,), dynamic_shapes=(free,))
    return program if here is model else move_to_device_pass(program, _device(model))


def export_onnx(model: nn.Module, path: str | Path) -> None:
    """Write a segmentation model of series to an ONNX file, weights included.

    Its input ``image`` has the shape (B, T, C, H, W): normalised, and 0 where something is missing,
    as the data modules give it. Its output ``logits`` has the shape (B, K, H, W). B, T, H and W are
    free, H and W multiples of the encoder's stride; the recurrence is an ONNX Scan. Before the file
    is written, ONNX Runtime has to give the logits of the model for other sizes than those of the
    export.

    Needs the optional dependencies ``onnx``.

    Args:
        model: smp model around a :class:`SeriesEncoder`, or the ``model`` of a task.
            It is left in evaluation mode.
        path: File to write.

    Raises:
        DependencyNotFoundError: If onnxscript or onnxruntime is not installed.
        RuntimeError: If ONNX Runtime gives other logits.
        TypeError: If the encoder is another one.
    """
    for name in ('onnxscript', 'onnxruntime'):
        if importlib.util.find_spec(name) is None:
            raise DependencyNotFoundError(
                f"{name} is not installed; run: pip install 'torchgeo-s1s2[onnx]'"
            )
    here = _on_cpu(model)
    try:
        onnx_program = torch.onnx.export(
            export_program(here),
            input_names=['image'],
            output_names=['logits'],
            dynamic_shapes=({axis: name for name, axis in _AXES.items()},),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise _refused(model, 'PyTorch cannot convert it') from error
    assert onnx_program is not None
    _check_runtime(here, onnx_program.model_proto.SerializeToString())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    onnx_program.save(path, external_data=False)


def _refused(model: nn.Module, why: str) -> RuntimeError:
    return RuntimeError(
        f'cannot export {type(model).__name__} with free sizes: {why}; use another architecture, '
        'such as Unet'
    )


def _device(model: nn.Module) -> torch.device:
    return next(_series_encoder(model).parameters()).device


def _on_cpu(model: nn.Module) -> nn.Module:
    """The model in evaluation mode; a copy where it is on a GPU, whose kernels limit free sizes."""
    on_gpu = _device(model).type not in ('cpu', 'meta')
    model.eval()
    return copy.deepcopy(model).cpu() if on_gpu else model


def _series_encoder(model: nn.Module) -> SeriesEncoder:
    encoder = series_encoder(model)
    if encoder is not None:
        return encoder
    raise TypeError(
        f'cannot export {type(model).__name__}, expected an smp model around a '
        'series encoder such as ConvLSTMInceptionEncoder; of a task, give its model: task.model'
    )


def _example(model: nn.Module, batch: int, slots: int, size: tuple[int, int]) -> Tensor:
    """Random image of at least a size, in whole strides, whose first slot is missing."""
    encoder = _series_encoder(model)
    stride = encoder.output_stride
    shape = batch, slots, encoder.channels, *(stride * math.ceil(n / stride) for n in size)
    image = next(model.parameters()).new_empty(shape).normal_()
    image[0, 0] = 0
    return image


@torch.no_grad()
def _check_runtime(model: nn.Module, file: bytes) -> None:
    """Compare ONNX Runtime with the model at sizes that the export did not see."""
    import onnxruntime

    image = _example(model, batch=1, slots=4, size=(_LEAST + 1, _LEAST))
    try:
        (logits,) = onnxruntime.InferenceSession(file).run(None, {'image': image.numpy()})
    except Exception as error:  # its own have no class of their own
        raise _refused(model, 'ONNX Runtime cannot run it') from error
    expected = model(image)
    difference = (expected - torch.from_numpy(logits)).abs().max().item()
    # The runtime computes in the file's precision; what the model rounds more is not its fault.
    epsilon = max(torch.finfo(expected.dtype).eps, 1e-6)
    if not difference <= 100 * epsilon * max(1, expected.abs().max().item()):
        shape = tuple(image.shape)
        why = f'ONNX Runtime differs from it by {difference:.2g} for an image of shape {shape}'
        raise _refused(model, why)
