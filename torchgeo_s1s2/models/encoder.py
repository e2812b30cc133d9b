"""Time series of two sensors in front of any spatial encoder."""

from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, Self

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.encoders import TimmUniversalEncoder
from torch import Tensor, nn

from .convlstm import ConvLSTM
from .inception import Inception
from .strips import arrange

SENSORS: Mapping[str, int] = {'s2': 10, 's1': 2}


class ImageSeries(NamedTuple):
    """A series and which of its slots were observed, for any smp model around a series encoder.

    smp's models hand what they are called with to their encoder, so ``model(ImageSeries(image,
    valid))`` works wherever ``model(image)`` does: compiled, exported, on several processes.

    Attributes:
        image: Series of shape (B, T, C, H, W) or (B, T * C, H, W).
        valid: Booleans of shape (B, T, S), whether each of the S sensors saw a slot, or (B, T) for
            all sensors alike. If None, a slot of a sensor that is 0 everywhere counts as empty.
    """

    image: Tensor
    valid: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the image, at which smp's models look."""
        return self.image.shape

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Self:
        """Take the image, and what a batch says of its slots.

        Args:
            batch: A batch with ``image``, and perhaps ``valid`` as above or, as TorchGeo pads
                series, ``length`` (B,), the number of slots before the padding.

        Returns:
            The series.
        """
        image, valid, length = batch['image'], batch.get('valid'), batch.get('length')
        if length is not None and image.ndim == 5:
            inside = torch.arange(image.shape[1], device=image.device) < length[:, None]
            if valid is None:
                valid = inside
            else:
                valid = valid & inside.view(*inside.shape, *[1] * (valid.ndim - 2))
        return cls(image, valid)


class ConvLSTMInceptionEncoder(nn.Module):
    """Encoder of Sentinel-2 and Sentinel-1 time series, for any decoder of smp.

    A :class:`ConvLSTM` for each sensor reads its series and an :class:`Inception` module the first
    date of each sensor. Their features are concatenated and go through a spatial encoder of smp,
    whose features are returned.

    A slot that a sensor did not see leaves the recurrent state as it was, and the first date is the
    first observed one. :class:`ImageSeries` says which slots were seen. Of an image alone, a slot
    of a sensor whose bands hold nothing but zeros counts as not seen: a pipeline that passes
    nothing else has to fill what is missing with exactly 0 after normalisation.

    A name from :func:`register_encoder` brings it into any smp model or TorchGeo task.

    Wenger et al., Remote Sensing 2023, https://doi.org/10.3390/rs15010151.
    """

    _is_torch_scriptable = False
    _is_torch_exportable = True
    _is_torch_compilable = True

    def __init__(
        self,
        spatial_encoder: str,
        sensors: Mapping[str, int] = SENSORS,
        inception: bool = True,
        day_of_year: bool = False,
        hidden_channels: int = 32,
        tower_channels: int = 32,
        depth: int = 5,
        output_stride: int = 32,
    ) -> None:
        """Initialize a new ConvLSTMInceptionEncoder instance.

        Args:
            spatial_encoder: Name of the smp (or 'tu-' timm) encoder.
            sensors: Number of bands of each sensor, in the order of the image's channels.
            inception: Whether the features of the first date are added.
            day_of_year: Whether two channels with the day of the year follow the bands of each
                sensor. They do not tell whether a slot was seen.
            hidden_channels: Number of channels of the states of each recurrent layer.
            tower_channels: Number of channels of each tower of the Inception module.
            depth: Number of stages of the spatial encoder.
            output_stride: Stride of its last features, 8, 16 or 32.

        Raises:
            ValueError: If *output_stride* is below 32 and the spatial encoder cannot be dilated.
        """
        super().__init__()
        self.planes = 2 * day_of_year
        self.sensors = {name: bands + self.planes for name, bands in sensors.items()}
        self.channels = sum(self.sensors.values())
        layers = {name: ConvLSTM(n, hidden_channels) for name, n in self.sensors.items()}
        self.convlstm = nn.ModuleDict(layers)
        self.inception = Inception(self.channels, tower_channels) if inception else None
        front_channels = hidden_channels * len(layers)
        if self.inception is not None:
            front_channels += self.inception.out_channels
        self.spatial: Any = smp.encoders.get_encoder(
            spatial_encoder, in_channels=front_channels, depth=depth, output_stride=output_stride
        )

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

    def forward(self, x: Tensor | ImageSeries, valid: Tensor | None = None) -> list[Tensor]:
        """Compute the features of a time series.

        Args:
            x: Series of shape (B, T, C, H, W) or (B, T * C, H, W), C being the channels of all
                sensors in their order, or an :class:`ImageSeries`. T is free.
            valid: Which slots were seen, as in :class:`ImageSeries`.

        Returns:
            Features of the spatial encoder, from the finest to the coarsest.

        Raises:
            ValueError: If a shape does not fit the sensors.
        """
        if isinstance(x, ImageSeries):
            x, valid = x
        features: list[Tensor] = self.spatial(self._front(x, valid))
        return features

    def set_recompute_gates(self, recompute_gates: bool = True) -> None:
        """Choose whether the recurrent layers compute their gates again in the backward pass.

        Args:
            recompute_gates: As in :class:`ConvLSTM`.
        """
        for layer in self.convlstm.modules():
            if isinstance(layer, ConvLSTM):
                layer.recompute_gates = recompute_gates

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
        if any(key.startswith('encoder.spatial.') for key in state_dict):
            state_dict = rename(state_dict, {'encoder.': ''})
        if any(key.startswith('spatial.') for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        own = self.spatial.state_dict()
        fitted = {
            key: _repeat_channels(value, own[key]) if key in own else value
            for key, value in state_dict.items()
        }
        # smp's encoders drop their classifier in their own method, some of which take no options.
        if strict:
            return self.spatial.load_state_dict(fitted)
        own_method = 'strict' in signature(self.spatial.load_state_dict).parameters
        load = self.spatial.load_state_dict if own_method else partial(_load, self.spatial)
        return load(fitted, strict=False)

    def _front(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Input of the spatial encoder."""
        series = self._split(x)
        seen = self._seen(series, valid)
        parts = [layer(series[name], seen[name]) for name, layer in self.convlstm.items()]
        if self.inception is not None:
            first = [first_valid(series[name], seen[name]) for name in self.sensors]
            parts.append(self.inception(arrange(torch.cat(first, dim=1))))
        return torch.cat([arrange(part) for part in parts], dim=1)

    def _seen(self, series: dict[str, Tensor], valid: Tensor | None) -> dict[str, Tensor]:
        """Slots that each sensor saw, booleans of shape (B, T)."""
        if valid is None:
            bands = {name: s[:, :, : s.shape[2] - self.planes] for name, s in series.items()}
            return {name: (s != 0).flatten(2).any(dim=-1) for name, s in bands.items()}
        slots = next(iter(series.values())).shape[:2]
        if valid.ndim == 2:
            valid = valid[..., None].expand(-1, -1, len(series))
        if valid.shape != (*slots, len(series)) or valid.dtype != torch.bool:
            raise ValueError(
                f'valid has shape {tuple(valid.shape)} and type {valid.dtype}, expected booleans '
                f'of shape (B, T, S) or (B, T) with B, T = {tuple(slots)} and a column for each '
                f'sensor ({", ".join(series)})'
            )
        return dict(zip(series, valid.unbind(-1), strict=True))

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
        Images of shape (B, C, H, W); 0 where no slot is valid.
    """
    first = valid.int().argmax(dim=1)
    image = series[torch.arange(series.shape[0], device=series.device), first]
    return image.where(valid.any(1)[:, None, None, None], 0)


def rename(state_dict: Mapping[str, Any], prefixes: Mapping[str, str]) -> dict[str, Any]:
    """Take the weights whose names start with one of some prefixes, under other names.

    Args:
        state_dict: Weights.
        prefixes: Beginnings of their names, and what stands there afterwards.

    Returns:
        The renamed weights, without all others.
    """
    return {
        new + key.removeprefix(old): value
        for key, value in state_dict.items()
        for old, new in prefixes.items()
        if key.startswith(old)
    }


def series_encoder(model: Any) -> ConvLSTMInceptionEncoder | None:
    """Encoder of a model, if it is one that reads series.

    Args:
        model: Model of smp, or any other module.

    Returns:
        The encoder, or None.
    """
    encoder = getattr(model, 'encoder', None)
    return encoder if isinstance(encoder, ConvLSTMInceptionEncoder) else None


def spatial_encoder(model: Any) -> nn.Module:
    """Part of a model of smp that weights of images fit, and that ``freeze_backbone`` means.

    Args:
        model: Model of smp.

    Returns:
        What is behind the layers that read the series, or the whole encoder of other models.
    """
    encoder = series_encoder(model)
    spatial: nn.Module = model.encoder if encoder is None else encoder.spatial
    return spatial


def freeze(module: nn.Module, frozen: bool = True) -> None:
    """Freeze a module, or unfreeze it.

    Frozen, neither its weights nor its batch-norm statistics change, and it stays in evaluation
    mode when ``train()`` of a module around it is called.

    Args:
        module: The module, changed in place.
        frozen: Whether to freeze.
    """
    module.requires_grad_(not frozen)
    for part in module.modules():
        vars(part).pop('train', None)
    module.train(not frozen)
    if frozen:
        module.train = partial(_stay, module)  # type: ignore[method-assign]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _load(module: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> Any:
    return nn.Module.load_state_dict(module, state_dict, strict)
