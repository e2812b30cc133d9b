"""Names of the backbones in segmentation_models_pytorch and TorchGeo."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from inspect import signature
from typing import Any, Literal

import segmentation_models_pytorch as smp
import timm
import torchgeo.models.api
from torch import nn
from torchvision.models._api import WeightsEnum

from .attention import UTAE, AttentionEncoder
from .convlstm import Norm
from .encoder import SENSORS, ConvLSTMInceptionEncoder, SeriesEncoder
from .resolution import watch_models

LISTED = ('vgg16', 'resnet18', 'resnet34', 'resnet50', 'efficientnet-b0', 'mit_b0')
"""Spatial encoders whose backbones are listed; those of all others can be named as well."""


class NoWeights(WeightsEnum):
    """No weights are published for the backbones."""


@dataclass(frozen=True)
class Backbone:
    """What a name of a backbone says.

    Attributes:
        spatial_encoder: Name of an encoder of smp, 'tu-' and the name of a timm model, or 'utae'.
        sensors: Number of bands of each sensor, in the order of the image's channels.
        inception: Whether the features of the first date are added; of 'convlstm' only.
        day_of_year: Whether the day of the year follows the bands of each sensor.
        hidden_channels: Number of channels of the states of each recurrent layer.
        tower_channels: Number of channels of each tower of the Inception module.
        front: What reads the series, 'convlstm' or 'attention'; 'utae' has the latter.
        late: Whether each sensor has an encoder and dates of its own; of 'attention' only.
        norm: Running statistics of the recurrent layers: 'shared', 'step' or 'none'.
        full_resolution: Whether the head sees features at full resolution.
    """

    spatial_encoder: str
    sensors: Mapping[str, int]
    inception: bool = True
    day_of_year: bool = False
    hidden_channels: int = 32
    tower_channels: int = 32
    front: Literal['convlstm', 'attention'] = 'convlstm'
    late: bool = False
    norm: Norm = 'shared'
    full_resolution: bool = False

    @property
    def name(self) -> str:
        """The name, which :func:`parse_name` reads.

        For instance 'vgg16_convlstm_inception', 'vgg16_convlstm_s1',
        'vgg16_convlstm_inception_s2x4_s1_doy', 'resnet18_convlstm_inception_h64_t16',
        'vgg16_convlstm_inception_stepnorm_fullres', 'resnet18_attention_late_fullres' or
        'utae_late'.
        """
        # smp looks at the start of a name: 'tu-' goes to timm, 'vgg' gets a centre block in the
        # U-Net.
        parts = [re.sub('^tu-', 'timm_', self.spatial_encoder)]
        flags = {k: word for word, (k, value) in _WORDS.items() if getattr(self, k) == value}
        if self.spatial_encoder == UTAE:
            flags.pop('full_resolution', None)  # always
        else:
            parts.append(self.front)
        parts += [flags.pop(k) for k in ('inception', 'late') if k in flags]
        if list(self.sensors.items()) != list(SENSORS.items()):
            parts += (
                s if SENSORS.get(s) == bands else f'{s}x{bands}'
                for s, bands in self.sensors.items()
            )
        parts += (f'{c}{getattr(self, k)}' for c, k in _SIZES.items() if getattr(self, k) != 32)
        return '_'.join([*parts, *flags.values()])

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the encoder's class: the options that the front has."""
        known = signature(_ENCODERS[self.front]).parameters
        return {name: value for name, value in vars(self).items() if name in known}

    @property
    def channels(self) -> int:
        """Number of channels of a slot."""
        return sum(bands + 2 * self.day_of_year for bands in self.sensors.values())


_WORDS: Mapping[str, tuple[str, Any]] = {
    'inception': ('inception', True),
    'late': ('late', True),
    'stepnorm': ('norm', 'step'),
    'nonorm': ('norm', 'none'),
    'fullres': ('full_resolution', True),
    'doy': ('day_of_year', True),
}
_SIZES: Mapping[str, str] = {'h': 'hidden_channels', 't': 'tower_channels'}
_ENCODERS: Mapping[str, type[SeriesEncoder]] = {
    'convlstm': ConvLSTMInceptionEncoder,
    'attention': AttentionEncoder,
}


def spatial_encoders() -> list[str]:
    """Names of smp's own encoders, without those that it calls deprecated (``timm-``)."""
    return [
        name
        for name, entry in smp.encoders.encoders.items()
        if not issubclass(entry['encoder'], SeriesEncoder) and not name.startswith('timm-')
    ]


def parse_name(name: object) -> Backbone | None:
    """What a name says, None for names of others."""
    backbone = _parse(name) if isinstance(name, str) else None
    return backbone if backbone and _knows(backbone.spatial_encoder) else None


@cache
def _parse(name: str) -> Backbone | None:
    front = next((f for f in _ENCODERS if f'_{f}' in name), None)
    spatial, _, rest = name.partition(f'_{front}' if front else '_')
    if (front is None) != (spatial == UTAE):
        return None
    options: dict[str, Any] = {'front': front or 'attention', 'inception': False}
    options['full_resolution'] = front is None
    sensors: dict[str, int] = {}
    for word in filter(None, rest.split('_')):
        sensor, _, bands = word.rpartition('x')
        if word in _WORDS:
            options |= [_WORDS[word]]
        elif word in SENSORS or (sensor and bands.isdecimal()):
            sensors |= {word: SENSORS[word]} if word in SENSORS else {sensor: int(bands)}
        elif word[0] in _SIZES and word[1:].isdecimal():
            options[_SIZES[word[0]]] = int(word[1:])
    spatial = re.sub('^timm_', 'tu-', spatial)
    backbone = Backbone(spatial, sensors or dict(SENSORS), **options)
    return backbone if _fits(backbone) and backbone.name == name else None


def _fits(backbone: Backbone) -> bool:
    """Whether there is such a backbone."""
    sizes = *backbone.sensors.values(), backbone.hidden_channels, backbone.tower_channels
    default = Backbone(backbone.spatial_encoder, backbone.sensors, False, front=backbone.front)
    foreign = vars(backbone).keys() - backbone.arguments.keys()
    strange = any(getattr(backbone, k) != getattr(default, k) for k in foreign)
    return min(sizes) >= 1 and not strange


def _knows(spatial_encoder: str) -> bool:
    if spatial_encoder.startswith('tu-'):
        return bool(timm.is_model(spatial_encoder.removeprefix('tu-')))
    return spatial_encoder == UTAE or spatial_encoder in spatial_encoders()


def register_encoder(
    spatial_encoder: str, sensors: Mapping[str, int] = SENSORS, *args: Any, **options: Any
) -> str:
    """Check options, list the backbone in smp and TorchGeo, and return its name.

    Both libraries know every such name, listed or not. smp silently drops options that it does not
    know, so they are in the name.

    With *day_of_year*, the two channels of :class:`~torchgeo_s1s2.transforms.DayOfYear` follow the
    bands of each sensor: C is 16, {'s2': 12, 's1': 4}, unless *sensors* says otherwise. Recurrent
    layers read them like any other channel, attention takes them for the positions of the dates.

    Args:
        spatial_encoder: Name of an encoder of smp, 'utae', or 'tu-' and the name of a timm model;
            the latter two have no pretrained weights here.
        sensors: Number of bands of each sensor, in the order of the image's channels.
        *args: The other attributes of :class:`Backbone`, in their order or by name.
        **options: By name.

    Returns:
        The name, for ``encoder_name`` in smp and ``backbone`` in TorchGeo.

    Raises:
        ValueError: If smp has no such encoder, *sensors* is empty, a name of a sensor has no
            letter or holds '_', a size is below 1, or an option is not one of the front.
    """
    if not _knows(spatial_encoder):
        raise ValueError(
            f"unknown spatial encoder '{spatial_encoder}', expected one of "
            f"{', '.join(spatial_encoders())}, {UTAE}, or 'tu-' and the name of a timm model"
        )
    counts = sensors.values() if isinstance(sensors, Mapping) else ()
    if not counts or not all(isinstance(bands, int) and bands > 0 for bands in counts):
        raise ValueError(f'sensors is {sensors}, expected at least one with its band count')
    backbone = Backbone(spatial_encoder, dict(sensors), *args, **options)
    if spatial_encoder == UTAE:
        backbone = replace(backbone, front='attention', full_resolution=True)
    if backbone.front == 'attention':
        backbone = replace(backbone, inception=False)
    name = backbone.name
    if parse_name(name) != backbone:
        raise ValueError(
            f"the name '{name}' does not say {vars(backbone)}: sensors must not hold '_' nor be "
            'the name of another option, sizes are whole numbers from 1, and options are of the '
            "front: norm is 'shared', 'step' or 'none', late, inception, day_of_year and "
            'full_resolution are True or False'
        )
    for table in _tables():
        table.setdefault(name, table[name])
    return name


def is_misspelt(name: str) -> bool:
    """Whether nothing has a name that looks like one of a backbone that reads series."""
    meant = name.startswith(UTAE) or any(f'_{front}' in name for front in _ENCODERS)
    return meant and name not in smp.encoders.encoders


def change_name(name: str, **options: Any) -> str:
    """Name of a backbone with some options of :class:`Backbone` changed.

    Args:
        name: Name of a backbone.
        **options: What to change, such as ``norm='step', full_resolution=True``.

    Returns:
        The new name, which is registered.

    Raises:
        ValueError: If there is no such backbone or option.
    """
    backbone = parse_name(name)
    known = [f.name for f in fields(Backbone)]
    if backbone is None or not set(options) <= set(known):
        raise ValueError(
            f'backbone {name!r} with the options {options}, expected a backbone that reads series: '
            "'utae', or a spatial encoder (of smp, or 'timm_' and the name of a timm model) and "
            "'_convlstm' or '_attention', then in this order what is wanted of '_inception' or "
            "'_late', sensors such as '_s2_s1x4', '_h64', '_t16', '_stepnorm' or '_nonorm', "
            f"'_fullres', '_doy'; and some of the options {', '.join(known)}"
        )
    new = register_encoder(**(vars(backbone) | options))
    got = vars(parse_name(new))
    if lost := [k for k in options if got[k] != options[k]]:
        raise ValueError(f'{name!r} has no choice of {", ".join(lost)}; leave that out')
    return new


def register_encoders() -> None:
    """List the paper's model, its ablations and what improves on it for :data:`LISTED`.

    That is ``{spatial}_convlstm_inception``, ``{spatial}_convlstm`` (without Inception),
    ``{spatial}_convlstm_s1`` and ``{spatial}_convlstm_s2`` (one sensor),
    ``{spatial}_convlstm_inception_stepnorm_fullres``, ``{spatial}_attention_fullres``, and
    ``utae`` and ``utae_late``. Every other name is resolved when it is used.
    """
    watch_models()
    for spatial in LISTED:
        register_encoder(spatial)
        register_encoder(spatial, inception=False)
        register_encoder(spatial, norm='step', full_resolution=True)
        register_encoder(spatial, front='attention', full_resolution=True)
        for sensor, bands in SENSORS.items():
            register_encoder(spatial, {sensor: bands}, inception=False)
    for late in (False, True):
        register_encoder(UTAE, late=late)


class _Names(dict[Any, Any]):
    """Dictionary of a library that also knows names which it does not list."""

    def __init__(self, listed: Mapping[Any, Any], value: Callable[[Backbone], Any]) -> None:
        super().__init__(listed)
        self._value = value

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._parse(key) is not None

    def __missing__(self, key: Any) -> Any:
        if (backbone := self._parse(key)) is None:
            raise KeyError(key)
        return self._value(backbone)

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    @staticmethod
    def _parse(key: Any) -> Backbone | None:
        """Backbone of a name, or of what :func:`_builder` gives for it."""
        return parse_name(key.args[0] if isinstance(key, partial) and key.args else key)


def _tables() -> list[_Names]:
    """Dictionaries from which smp and TorchGeo take names, made to know ours.

    Neither has a public registry, so this puts a dictionary of ours into the place of
    ``segmentation_models_pytorch.encoders.encoders``, and of the private ``_model`` and
    ``_model_weights`` of ``torchgeo.models.api``.
    """
    places: list[tuple[Any, str, Callable[[Backbone], Any]]] = [
        (smp.encoders, 'encoders', _entry),
        (torchgeo.models.api, '_model', _builder),
        (torchgeo.models.api, '_model_weights', lambda _: NoWeights),
    ]
    for module, name, value in places:
        table = getattr(module, name, None)
        if not isinstance(table, dict):
            raise RuntimeError(
                f'{module.__name__} has no dictionary {name!r}, into which torchgeo_s1s2 writes '
                'the names of its backbones; install the versions named in its pyproject.toml'
            )
        if not isinstance(table, _Names):
            setattr(module, name, _Names(table, value))
    return [getattr(module, name) for module, name, _ in places]


def _entry(backbone: Backbone) -> dict[str, Any]:
    """What smp wants to know of an encoder."""
    spatial = dict.get(smp.encoders.encoders, backbone.spatial_encoder, {})  # listed ones only
    return {
        'encoder': _ENCODERS[backbone.front],
        'params': backbone.arguments,
        'pretrained_settings': spatial.get('pretrained_settings', {}),
    }


def _builder(backbone: Backbone) -> Callable[..., nn.Module]:
    return partial(smp.encoders.get_encoder, backbone.name, in_channels=backbone.channels)
