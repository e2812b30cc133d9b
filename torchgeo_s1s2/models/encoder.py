"""Time series of two sensors in front of any spatial encoder, and its registration."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import segmentation_models_pytorch as smp
import timm
import torch
import torchgeo.models.api
from segmentation_models_pytorch.encoders import TimmUniversalEncoder
from torch import Tensor, nn
from torchvision.models._api import WeightsEnum

from .convlstm import ConvLSTM
from .strips import arrange
from .inception import Inception

SENSORS: Mapping[str, int] = {'s2': 10, 's1': 2}


class NoWeights(WeightsEnum):
    """No weights are published for the registered backbones."""


class ConvLSTMInceptionEncoder(nn.Module):
    """Encoder of Sentinel-2 and Sentinel-1 time series, for any decoder of smp.

    A :class:`ConvLSTM` for each sensor reads its series and an :class:`Inception` module the first
    date of each sensor. Their features are concatenated and go through a spatial encoder of smp,
    whose features are returned.

    A slot of a sensor that holds nothing but zeros counts as not observed: it leaves the recurrent
    state as it was, and the first date is the first observed one. A pipeline has to fill what is
    missing with exactly 0 after normalisation, as the data modules of this package do, and then
    needs to pass nothing but the image.

    A name from :func:`register_encoder` brings it into any smp model or TorchGeo task.

    Wenger et al., Remote Sensing 2023, https://doi.org/10.3390/rs15010151.
    """

    def __init__(
        self,
        spatial_encoder: str,
        sensors: Mapping[str, int] = SENSORS,
        inception: bool = True,
        depth: int = 5,
        output_stride: int = 32,
    ) -> None:
        """Initialize a new ConvLSTMInceptionEncoder instance.

        Args:
            spatial_encoder: Name of the smp (or 'tu-' timm) encoder.
            sensors: Number of channels of each sensor, in the order of the image's channels.
            inception: Whether the features of the first date are added.
            depth: Number of stages of the spatial encoder.
            output_stride: Stride of its last features, 8, 16 or 32.

        Raises:
            ValueError: If *output_stride* is below 32 and the spatial encoder cannot be dilated.
        """
        super().__init__()
        self.sensors = dict(sensors)
        self.channels = sum(sensors.values())
        layers = {name: ConvLSTM(channels) for name, channels in sensors.items()}
        self.convlstm = nn.ModuleDict(layers)
        self.inception = Inception(self.channels) if inception else None
        front_channels = sum(layer.hidden_channels for layer in layers.values())
        if self.inception is not None:
            front_channels += self.inception.out_channels
        self.spatial: Any = smp.encoders.get_encoder(
            spatial_encoder, in_channels=front_channels, depth=depth, output_stride=output_stride
        )
        self._spatial_frozen = False

    @property
    def out_channels(self) -> list[int]:
        """Number of channels of each feature map."""
        return list(self.spatial.out_channels)

    @property
    def output_stride(self) -> int:
        """Stride of the last feature map."""
        return int(self.spatial.output_stride)

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Check the number of channels of the image; smp calls it.

        Args:
            in_channels: Number of slots times the number of channels of all sensors. The number of
                slots is free when the model runs.
            pretrained: Unused; the number of channels does not touch the spatial encoder.

        Raises:
            ValueError: If *in_channels* is not a multiple of the number of channels.
        """
        if in_channels < 1 or in_channels % self.channels:
            raise ValueError(
                f'in_channels is {in_channels}, expected a multiple of {self.channels} '
                f'({self._describe_sensors()}): number of time slots times {self.channels}'
            )

    def make_dilated(self, output_stride: int) -> None:
        """Replace strides of the spatial encoder with dilation.

        Args:
            output_stride: Wanted stride of the last feature map, 8 or 16.
        """
        if not isinstance(self.spatial, TimmUniversalEncoder):  # timm builds them dilated
            self.spatial.make_dilated(output_stride)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the features of a time series.

        Args:
            x: Series of shape (B, T, C, H, W) or (B, T * C, H, W), C being the channels of all
                sensors in their order. T is free.

        Returns:
            Features of the spatial encoder, from the finest to the coarsest.

        Raises:
            ValueError: If the shape does not fit the sensors.
        """
        features: list[Tensor] = self.spatial(self._front(x))
        return features

    def set_checkpoint(self, checkpoint: bool = True) -> None:
        """Choose whether the recurrent layers compute their gates again in the backward pass.

        Args:
            checkpoint: As in :class:`ConvLSTM`.
        """
        for layer in self.convlstm.modules():
            if isinstance(layer, ConvLSTM):
                layer.checkpoint = checkpoint

    def freeze_spatial(self, frozen: bool = True) -> None:
        """Freeze the spatial encoder, or unfreeze it.

        Frozen, neither its weights nor its batch-norm statistics change, also after ``train()``.
        The recurrent layers and the Inception module in front of it always learn.

        Args:
            frozen: Whether to freeze.
        """
        self._spatial_frozen = frozen
        self.spatial.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; a frozen spatial encoder stays in evaluation mode.

        Args:
            mode: Whether to set training mode.

        Returns:
            The encoder.
        """
        super().train(mode)
        self.spatial.train(mode and not self._spatial_frozen)
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the weights of the encoder, of a model around it, or of the spatial encoder only.

        Args:
            state_dict: Weights; keys of a model around the encoder start with ``encoder.``. Weights
                of the spatial encoder alone leave the layers in front of it as they are, and if
                they are for images of another number of channels, as ImageNet's are, the first
                convolution repeats them over the features, scaled down, as smp does.
            strict: Whether the keys must be the same.
            assign: Whether the tensors replace the parameters, instead of being copied.

        Returns:
            Missing and unexpected keys where known.
        """
        prefix = 'encoder.'
        if any(key.startswith(f'{prefix}spatial.') for key in state_dict):
            state_dict = {
                key.removeprefix(prefix): value
                for key, value in state_dict.items()
                if key.startswith(prefix)
            }
        if any(key.startswith('spatial.') for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        own = self.spatial.state_dict()
        fitted = {
            key: _repeat_channels(value, own[key]) if key in own else value
            for key, value in state_dict.items()
        }
        # smp's encoders drop their classifier here, and some take no options.
        options = {} if strict else {'strict': False}
        return self.spatial.load_state_dict(fitted, **options)

    def _front(self, x: Tensor) -> Tensor:
        """Input of the spatial encoder."""
        series = self._split(x)
        valid = {name: (s != 0).flatten(2).any(dim=-1) for name, s in series.items()}
        parts = [layer(series[name], valid[name]) for name, layer in self.convlstm.items()]
        if self.inception is not None:
            first = [first_valid(series[name], valid[name]) for name in self.sensors]
            parts.append(self.inception(arrange(torch.cat(first, dim=1))))
        return torch.cat([arrange(part) for part in parts], dim=1)

    def _split(self, x: Tensor) -> dict[str, Tensor]:
        """Series of each sensor, of shape (B, T, channels, H, W)."""
        if x.ndim == 4 and x.shape[1] % self.channels == 0:
            x = x.unflatten(1, (x.shape[1] // self.channels, self.channels))
        if x.ndim != 5 or x.shape[2] != self.channels or x.shape[1] == 0:
            raise ValueError(
                f'image has shape {tuple(x.shape)}, expected (B, T, {self.channels}, H, W) or '
                f'(B, T * {self.channels}, H, W) with at least one slot '
                f'and the channels {self._describe_sensors()}'
            )
        return dict(zip(self.sensors, x.split(list(self.sensors.values()), dim=2), strict=True))

    def _describe_sensors(self) -> str:
        return ' + '.join(f'{channels} {name}' for name, channels in self.sensors.items())


def _repeat_channels(weight: Tensor, like: Tensor) -> Tensor:
    """Repeat a convolution's input channels to the number that *like* has, as smp does."""
    if weight.ndim != 4 or weight.shape[1] == like.shape[1]:
        return weight
    old, new = weight.shape[1], like.shape[1]
    return weight[:, torch.arange(new) % old] * (old / new)


def first_valid(series: Tensor, valid: Tensor) -> Tensor:
    """Select the first valid slot of each sample.

    Args:
        series: Series of shape (B, T, C, H, W).
        valid: Booleans of shape (B, T).

    Returns:
        Images of shape (B, C, H, W); slot 0 where no slot is valid.
    """
    first = valid.int().argmax(dim=1)
    return series[torch.arange(series.shape[0], device=series.device), first]


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
) -> str:
    """Name under which a combination is registered.

    Args:
        spatial_encoder: Name of the smp (or 'tu-' timm) encoder.
        sensors: Number of bands of each sensor.
        inception: Whether the features of the first date are added.
        day_of_year: Whether the day of the year follows the bands of each sensor.

    Returns:
        For instance 'vgg16_convlstm_inception', 'vgg16_convlstm_s1', 'vgg16_convlstm_inception_doy'
        or 'vgg16_convlstm_inception_s2x4_s1'.
    """
    # smp looks at the start of a name: 'tu-' goes to timm, 'vgg' gets a centre block in the U-Net.
    parts = [spatial_encoder.replace('tu-', 'timm_', 1), 'convlstm']
    if inception:
        parts.append('inception')
    if list(sensors.items()) != list(SENSORS.items()):
        parts += (s if SENSORS.get(s) == bands else f'{s}x{bands}' for s, bands in sensors.items())
    if day_of_year:
        parts.append('doy')
    return '_'.join(parts)


def register_encoder(
    spatial_encoder: str,
    sensors: Mapping[str, int] = SENSORS,
    inception: bool = True,
    day_of_year: bool = False,
) -> str:
    """Make a backbone known to segmentation_models_pytorch and to TorchGeo by its name.

    smp silently drops options that it does not know, so they are in the name. Registering a
    combination a second time changes nothing.

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

    Returns:
        The name, for ``encoder_name`` in smp and ``backbone`` in TorchGeo.

    Raises:
        ValueError: If smp has no such encoder, or *sensors* is empty.
    """
    _check_spatial(spatial_encoder)
    if not sensors or min(sensors.values()) < 1:
        raise ValueError(f'sensors is {dict(sensors)}, expected at least one with its band count')
    name = backbone_name(spatial_encoder, sensors, inception, day_of_year)
    channels = {sensor: bands + 2 * day_of_year for sensor, bands in sensors.items()}
    known = smp.encoders.encoders
    if name not in known:
        known[name] = {
            'encoder': ConvLSTMInceptionEncoder,
            'params': {
                'spatial_encoder': spatial_encoder,
                'sensors': channels,
                'inception': inception,
            },
            'pretrained_settings': known.get(spatial_encoder, {}).get('pretrained_settings', {}),
        }
        build = partial(smp.encoders.get_encoder, name, in_channels=sum(channels.values()))
        register_in_torchgeo(name, build)
    return name


def _check_spatial(name: str) -> None:
    known = spatial_encoders()
    if name in known or (name.startswith('tu-') and timm.is_model(name.removeprefix('tu-'))):
        return
    raise ValueError(
        f"unknown spatial encoder '{name}', expected one of {', '.join(known)}, "
        "or 'tu-' and the name of a timm model"
    )


def register_in_torchgeo(name: str, build: Callable[..., nn.Module]) -> None:
    """Make a model known to :func:`torchgeo.models.list_models` and ``get_model``.

    TorchGeo has no public registry, so this writes into the two private dictionaries of
    ``torchgeo.models.api`` from which these functions read.

    Args:
        name: Name of the model.
        build: Function that returns the model.
    """
    torchgeo.models.api._model[name] = build
    torchgeo.models.api._model_weights[name] = NoWeights
    torchgeo.models.api._model_weights[build] = NoWeights


def register_encoders() -> None:
    """Register the paper's model and its ablations for every spatial encoder of smp.

    The names are ``{spatial}_convlstm_inception``, ``{spatial}_convlstm_inception_doy`` (with the
    day of the year), ``{spatial}_convlstm`` (both sensors, no Inception), ``{spatial}_convlstm_s1``
    and ``{spatial}_convlstm_s2`` (one sensor, whose bands are then all that the image holds).
    """
    for name in spatial_encoders():
        register_encoder(name)
        register_encoder(name, day_of_year=True)
        register_encoder(name, inception=False)
        for sensor, bands in SENSORS.items():
            register_encoder(name, {sensor: bands}, inception=False)
