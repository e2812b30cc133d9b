"""Initial weights of a segmentation model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchgeo.models import get_weight
from torchvision.models import WeightsEnum

from torchgeo_s1s2.models import series_encoder
from torchgeo_s1s2.models.encoder import rename
from torchgeo_s1s2.models.fuselstm import PREFIXES
from torchgeo_s1s2.models.norm import share_with_steps


def load_weights(model: Any, weights: WeightsEnum | str | Path) -> Mapping[str, Any]:
    """Load weights into a model of smp.

    Everything of a checkpoint that fits by name and shape is loaded; what does not is said.

    Args:
        model: The model.
        weights: A weight enum of a backbone, its name, or the path of a file: the checkpoint of a
            segmentation task, the state dict of a model of smp or of a FuseLSTM, or the checkpoint
            of a backbone from TorchGeo.

    Returns:
        The checkpoint, empty for a weight enum.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint cannot be read, or nothing in it fits.
    """
    weights = str(weights) if isinstance(weights, Path) else weights
    if isinstance(weights, str) and Path(weights).exists():
        checkpoint = _read(weights)
        _load_fitting(model, _named_as_in(model, checkpoint, weights), weights)
        return checkpoint
    if isinstance(weights, str) and weights.endswith(('.ckpt', '.pt', '.pth')):
        raise FileNotFoundError(f'there is no checkpoint {weights}; correct the path in weights')
    try:
        enum = weights if isinstance(weights, WeightsEnum) else get_weight(weights)
    except ValueError as error:
        raise ValueError(
            f"weights is {weights!r}, expected 'imagenet', the path of a checkpoint that is there, "
            'or the name of a weight enum, such as ResNet18_Weights.SENTINEL2_ALL_MOCO'
        ) from error
    state = enum.get_state_dict(progress=True, check_hash=True, weights_only=True)
    model.encoder.load_state_dict(state)
    return {}


def trained_classes(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Names of the classes that a checkpoint of the task was trained on, if it says so."""
    names = checkpoint.get('classes') or checkpoint.get('hyper_parameters', {}).get('labels')
    return list(names) if names else None


def trained_ground(checkpoint: Mapping[str, Any]) -> str:
    """Ground that a checkpoint was trained on, as its data module said it, '' if it did not."""
    states = (state for state in checkpoint.values() if isinstance(state, Mapping))
    return next((str(state['ground']) for state in states if 'ground' in state), '')


def _read(path: str) -> Mapping[str, Any]:
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if isinstance(checkpoint, Mapping):
            return checkpoint
        found = type(checkpoint).__name__
    except Exception as error:  # whatever the bytes of another kind of file lead to
        unsafe = re.search(r'GLOBAL (\S+)', str(error))
        found = f'{type(error).__name__}: {error}'.partition('\n')[0]
        if unsafe:
            found = f'it holds {unsafe[1]}, which PyTorch does not load for safety'
    raise ValueError(
        f'{path} holds no weights by name ({found}); give the checkpoint of a task, or what '
        'torch.save wrote of model.state_dict()'
    )


def _named_as_in(model: Any, checkpoint: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """Weights of a checkpoint, by their names in a model of smp."""
    parts = [f'{part}.' for part, _ in model.named_children()]
    encoder = series_encoder(model)
    namings = (
        {f'model.{part}': part for part in parts},
        {part: part for part in parts},
        PREFIXES,
        {'model.backbone.model.': 'encoder.'},
        {'model.': 'encoder.'},
    )
    for number, naming in enumerate(namings):
        named = rename(checkpoint.get('state_dict', checkpoint), naming)
        if encoder is not None and number > 2:  # of images
            images = rename(named, {'encoder.': ''})
            named = rename(encoder.spatial_weights(images), {'': 'encoder.'})
        if any(name.startswith('encoder.') for name in named):
            return named
    raise ValueError(
        f'{path} is neither the checkpoint of a task nor the state dict of a model of smp: it '
        f'holds {_some(checkpoint)}'
    )


def _load_fitting(model: Any, given: Mapping[str, Tensor], path: str) -> None:
    """Load what fits a model by name and shape, and say what does not."""
    own: dict[str, Tensor] = model.state_dict()
    given = {k: share_with_steps(v, own[k]) if k in own else v for k, v in given.items()}
    fitting = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    if not any(v.ndim for v in fitting.values()):  # a batch norm's counter fits anywhere
        raise ValueError(
            f'{path}: no weight fits the model by name and shape. It holds {_some(given)}; the '
            f'model has {_some(own)}. Give the same model and backbone as in the checkpoint'
        )
    model.load_state_dict(fitting, strict=False)
    reasons = {
        'left out, of another shape': [k for k in given if k in own and k not in fitting],
        'left out, not in the model': [k for k in given if k not in own],
        'initial values kept, not in the checkpoint': [k for k in own if k not in given],
    }
    parts = [f'{reason}: {_some(names)}' for reason, names in reasons.items() if names]
    say = rank_zero_warn if parts else rank_zero_info
    say('; '.join([f'{path}: loaded {len(fitting)} of {len(given)} tensors', *parts]))


def _some(names: Any, most: int = 4) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(names[:most]) or 'nothing') + more
