"""Names of the backbones in segmentation_models_pytorch and TorchGeo."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torchgeo.models.api
from torch import nn
from torchvision.models._api import WeightsEnum

from .encoder import SENSORS, ConvLSTMInceptionEncoder

LISTED = (
    'vgg16',
    'resnet18',
    'resnet34',
    'resnet50',
    'efficientnet-b0',
    'mobilenet_v2',
    'densenet121',
    'mit_b0',
)
"""Spatial encoders whose backbones are listed; those of all others can be named as well."""


class NoWeights(WeightsEnum):
    """No weights are published for the backbones."""


class _Names(dict[Any, Any]):
    """Dictionary of a library that also knows names which it does not list."""

    def __init__(self, listed: Mapping[Any, Any], resolve: Callable[[Any], Any]) -> None:
        super().__init__(listed)
        self._resolve = resolve

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._resolve(key) is not None

    def __missing__(self, key: Any) -> Any:
        value = self._resolve(key)
        if value is None:
            raise KeyError(key)
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default


def spatial_encoders() -> list[str]:
    """Names of smp's own encoders, without those that it calls deprecated (``timm-``)."""
    return [
        name
        for name, entry in smp.encoders.encoders.items()
        if entry['encoder'] is not ConvLSTMInceptionEncoder and not name.startswith('timm-')
    ]


def backbone_name(
    spatial_encoder: str,
    sensors: Mapping[str, int] = SENSORS,
    inception: bool = True,
    day_of_year: bool = False,
    hidden_channels: int = 32,
    tower_channels: int = 32,
) -> str:
    """Name of a combination of options of :func:`register_encoder`.

    For instance 'vgg16_convlstm_inception', 'vgg16_convlstm_s1', 'vgg16_convlstm_inception_doy',
    'vgg16_convlstm_inception_s2x4_s1' or 'resnet18_convlstm_inception_h64_t16'.
    """
    # smp looks at the start of a name: 'tu-' goes to timm, 'vgg' gets a centre block in the U-Net.
    parts = [spatial_encoder.replace('tu-', 'timm_', 1), 'convlstm']
    if inception:
        parts.append('inception')
    if list(sensors.items()) != list(SENSORS.items()):
        parts += (s if SENSORS.get(s) == bands else f'{s}x{bands}' for s, bands in sensors.items())
    if hidden_channels != 32:
        parts.append(f'h{hidden_channels}')
    if tower_channels != 32:
        parts.append(f't{tower_channels}')
    if day_of_year:
        parts.append('doy')
    return '_'.join(parts)


@cache
def parse_name(name: object) -> dict[str, Any] | None:
    """Arguments of :class:`ConvLSTMInceptionEncoder` that a name says, None for other names."""
    if not isinstance(name, str) or '_convlstm' not in name:
        return None
    spatial, _, rest = name.partition('_convlstm')
    if spatial.startswith('timm_'):
        spatial = spatial.replace('timm_', 'tu-', 1)
    options: dict[str, Any] = {'spatial_encoder': spatial, 'inception': False}
    sensors: dict[str, int] = {}
    for part in rest.split('_')[1:]:
        sensor, _, bands = part.rpartition('x')
        if part in ('inception', 'doy'):
            options['inception' if part == 'inception' else 'day_of_year'] = True
        elif part in SENSORS or (sensor and bands.isdecimal()):
            sensors |= {part: SENSORS[part]} if part in SENSORS else {sensor: int(bands)}
        elif part[:1] in ('h', 't') and part[1:].isdecimal():
            options['hidden_channels' if part[0] == 'h' else 'tower_channels'] = int(part[1:])
    options['sensors'] = sensors or dict(SENSORS)
    fits = _knows(spatial) and _has_sizes(options) and backbone_name(**options) == name
    return options if fits else None


def _knows(spatial_encoder: str) -> bool:
    if spatial_encoder.startswith('tu-'):
        return bool(timm.is_model(spatial_encoder.removeprefix('tu-')))
    return spatial_encoder in spatial_encoders()


def _has_sizes(options: Mapping[str, Any]) -> bool:
    sizes = [options.get(name, 32) for name in ('hidden_channels', 'tower_channels')]
    return min([*options['sensors'].values(), *sizes], default=0) >= 1


def register_encoder(
    spatial_encoder: str,
    sensors: Mapping[str, int] = SENSORS,
    inception: bool = True,
    day_of_year: bool = False,
    hidden_channels: int = 32,
    tower_channels: int = 32,
) -> str:
    """Check options, list the backbone in smp and TorchGeo, and return its name.

    Both libraries know every such name, listed or not. smp silently drops options that it does not
    know, so they are in the name.

    With *day_of_year*, two channels follow the bands of each sensor: the sine and the cosine of
    the day of the year of its acquisition, as an angle, constant in a slot and 0 where the slot is
    not observed. An image then has C = 16 channels a slot, {'s2': 12, 's1': 4} unless *sensors*
    says otherwise. The layers read them like any other channel.

    Args:
        spatial_encoder: Name of an encoder of smp, or 'tu-' and the name of a timm model; the
            latter has no pretrained weights here.
        sensors: Number of bands of each sensor, in the order of the image's channels.
        inception: Whether the features of the first date are added.
        day_of_year: Whether the day of the year follows the bands of each sensor.
        hidden_channels: Number of channels of the states of each recurrent layer.
        tower_channels: Number of channels of each tower of the Inception module.

    Returns:
        The name, for ``encoder_name`` in smp and ``backbone`` in TorchGeo.

    Raises:
        ValueError: If smp has no such encoder, *sensors* is empty, a name of a sensor has no
            letter or holds '_', or a size is below 1.
    """
    if not _knows(spatial_encoder):
        raise ValueError(
            f"unknown spatial encoder '{spatial_encoder}', expected one of "
            f"{', '.join(spatial_encoders())}, or 'tu-' and the name of a timm model"
        )
    if not sensors or min(sensors.values()) < 1:
        raise ValueError(f'sensors is {dict(sensors)}, expected at least one with its band count')
    sizes = hidden_channels, tower_channels
    name = backbone_name(spatial_encoder, sensors, inception, day_of_year, *sizes)
    if parse_name(name) is None:
        raise ValueError(
            f"the name '{name}' cannot be read back: sensors {list(sensors)} must not hold '_' nor "
            'be the name of another option, and sizes are at least 1'
        )
    for table in _tables():
        table.setdefault(name, table[name])
    return name


def register_encoders() -> None:
    """List the paper's model and its ablations for the encoders in :data:`LISTED`.

    That is ``{spatial}_convlstm_inception``, ``{spatial}_convlstm_inception_doy`` (with the day of
    the year), ``{spatial}_convlstm`` (without Inception), ``{spatial}_convlstm_s1`` and
    ``{spatial}_convlstm_s2`` (one sensor). Every other name is resolved when it is used.
    """
    for spatial in LISTED:
        register_encoder(spatial)
        register_encoder(spatial, day_of_year=True)
        register_encoder(spatial, inception=False)
        for sensor, bands in SENSORS.items():
            register_encoder(spatial, {sensor: bands}, inception=False)


def _tables() -> list[_Names]:
    """Dictionaries from which smp and TorchGeo take names, made to know ours.

    Neither has a public registry, so this puts a dictionary of ours into the place of
    ``segmentation_models_pytorch.encoders.encoders``, and of the private ``_model`` and
    ``_model_weights`` of ``torchgeo.models.api``.
    """
    places: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (smp.encoders, 'encoders', _entry),
        (torchgeo.models.api, '_model', _builder),
        (torchgeo.models.api, '_model_weights', _weights),
    ]
    for module, name, resolve in places:
        table = getattr(module, name, None)
        if not isinstance(table, dict):
            raise RuntimeError(
                f'{module.__name__} has no dictionary {name!r}, into which torchgeo_s1s2 writes '
                'the names of its backbones; install the versions named in its pyproject.toml'
            )
        if not isinstance(table, _Names):
            setattr(module, name, _Names(table, resolve))
    return [getattr(module, name) for module, name, _ in places]


@cache
def _entry(name: object) -> dict[str, Any] | None:
    """What smp wants to know of an encoder."""
    options = parse_name(name)
    if options is None:
        return None
    spatial = smp.encoders.encoders.get(options['spatial_encoder'], {})
    settings = spatial.get('pretrained_settings', {})
    return {
        'encoder': ConvLSTMInceptionEncoder,
        'params': options,
        'pretrained_settings': settings,
    }


@cache
def _builder(name: object) -> Callable[..., nn.Module] | None:
    options = parse_name(name)
    if options is None:
        return None
    planes = 2 * options.get('day_of_year', False)
    channels = sum(bands + planes for bands in options['sensors'].values())
    return partial(smp.encoders.get_encoder, name, in_channels=channels)


def _weights(key: object) -> type[WeightsEnum] | None:
    """Weights of a name or of what builds it."""
    name = key.args[0] if isinstance(key, partial) and key.args else key
    return None if parse_name(name) is None else NoWeights
