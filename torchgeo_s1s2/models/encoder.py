"""Time series of two sensors in front of any spatial encoder."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Self

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from torchgeo_s1s2.transforms.series import day_of_year, unpadded

from .convlstm import ConvLSTM, Norm, Unscripted
from .inception import Inception
from .strips import arrange

SENSORS: Mapping[str, int] = {'s2': 10, 's1': 2}
BANDS: Mapping[str, list[str]] = {
    's2': ['B2', 'B3', 'B4', 'B5', 'B6', 'B7', 'B8', 'B8A', 'B11', 'B12'],
    's1': ['VV', 'VH'],
}
"""Bands of the sensors, where these are all that an encoder reads of them."""
PRETRAINED: Mapping[int, list[str]] = {
    13: ['B1', 'B2', 'B3', 'B4', 'B5', 'B6', 'B7', 'B8', 'B8A', 'B9', 'B10', 'B11', 'B12'],
    2: BANDS['s1'],
}
"""Bands of TorchGeo's weights by their number, where nothing else says which they are."""


class ImageSeries(NamedTuple):
    """A series and which of its slots were observed, for any smp model around a series encoder.

    smp's models hand what they are called with to their encoder, so ``model(ImageSeries(image,
    valid))`` works wherever ``model(image)`` does: compiled, exported, on several processes.

    Attributes:
        image: Series of shape (B, T, C, H, W) or (B, T * C, H, W).
        valid: Booleans of shape (B, T, S), whether each of the S sensors saw a slot, or (B, T) for
            all sensors alike. If None, a slot of a sensor that is 0 everywhere counts as empty.
        days: Day of each slot (B, T, S), or (B, T) for all sensors alike, counted from the
            beginning of the year in which the series begins, or None. Only attention reads it.
    """

    image: Tensor
    valid: Tensor | None = None
    days: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the image, at which smp's models look."""
        return self.image.shape

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Self:
        """Take the image, and what a batch says of its slots.

        Args:
            batch: A batch with ``image``, and perhaps ``valid`` as above, ``acquisition_times``
                (B, T, S) in seconds since 1970 and, as TorchGeo pads series, ``length`` (B,), the
                number of slots before the padding.

        Returns:
            The series.

        Raises:
            ValueError: If there is a ``length``, and the image does not tell its slots.
        """
        valid, times = batch.get('valid'), batch.get('acquisition_times')
        if batch.get('length') is not None:
            inside = unpadded(batch)
            own = inside if valid is None else valid
            valid = own & inside.view(*inside.shape, *[1] * (own.ndim - 2))
        return cls(batch['image'], valid, None if times is None else _days(times))


def _days(times: Tensor) -> Tensor:
    """Days (B, T, S) from the beginning of the year in which a series begins, 1 for its first."""
    first = torch.where(times < 0, times.amax(), times).flatten(1).amin(1)
    first = first.view(-1, *[1] * (times.ndim - 1))
    return (times - first).add(first % 86400).div(86400, rounding_mode='floor') + day_of_year(first)


class SeriesEncoder(Unscripted):
    """What the encoders of series share: sensors, what was seen, and weights of single dates.

    A slot that a sensor did not see changes nothing. :class:`ImageSeries` says which slots were
    seen. Of an image alone, a slot of a sensor whose bands hold nothing but zeros counts as not
    seen: a pipeline that passes nothing else has to fill what is missing with exactly 0 after
    normalisation.

    A name from :func:`register_encoder` brings an encoder into any smp model or TorchGeo task.
    """

    _is_torch_scriptable = False
    _is_torch_exportable = True
    _is_torch_compilable = True

    spatial: Any
    out_channels: list[int]
    """Number of channels of each feature map."""
    output_stride: int
    """Stride of the last feature map."""

    def __init__(
        self, sensors: Mapping[str, int], day_of_year: bool, full_resolution: bool
    ) -> None:
        """Keep what the encoders share.

        Args:
            sensors: Number of bands of each sensor, in the order of the image's channels.
            day_of_year: Whether two channels with the day of the year follow the bands of each
                sensor. They do not tell whether a slot was seen.
            full_resolution: Whether the head of a model of smp sees the first features, which smp's
                decoders drop; see :class:`~torchgeo_s1s2.models.resolution.FullResolution`.
        """
        super().__init__()
        self.planes = 2 * day_of_year
        self.sensors = {name: bands + self.planes for name, bands in sensors.items()}
        self.channels = sum(self.sensors.values())
        self.full_resolution = full_resolution

    def set_recompute_gates(self, recompute_gates: bool = True) -> None:
        """Choose whether the backward pass computes again what is large: less memory, more time.

        That is the gates of recurrent layers, or the features of the dates, a few at a time; where
        the spatial encoder trains a batch norm, all dates are encoded at once.

        Args:
            recompute_gates: Whether to; the numbers are the same.
        """
        for part in self.modules():
            if hasattr(part, 'recompute_gates'):
                part.recompute_gates = recompute_gates  # type: ignore[assignment]

    def _features(
        self, series: dict[str, Tensor], seen: dict[str, Tensor], days: Tensor | None
    ) -> list[Tensor]:
        """Features of the series (B, T, channels, H, W) of each sensor, whose slots were seen."""
        raise NotImplementedError

    def _spatial_parts(self) -> list[tuple[str, Any, dict[str, int]]]:
        """Names of the spatial encoders, themselves, and the bands of sensors that they read."""
        raise NotImplementedError

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
                f'({self._describe_sensors()}): number of time slots times {self.channels}. '
                "Other sensors and bands are named as in backbone_kwargs={'sensors': {'s2': 10}}"
            )

    def make_dilated(self, output_stride: int) -> None:
        """Keep the spatial encoder, which is built dilated; smp calls it.

        Args:
            output_stride: Stride of the last feature map, 8 or 16.
        """

    def forward(
        self, x: Tensor | ImageSeries, valid: Tensor | None = None, days: Tensor | None = None
    ) -> list[Tensor]:
        """Compute the features of a time series.

        Args:
            x: Series of shape (B, T, C, H, W) or (B, T * C, H, W), C being the channels of all
                sensors in their order, or an :class:`ImageSeries`. T is free.
            valid: Which slots were seen, as in :class:`ImageSeries`.
            days: When they were, as in :class:`ImageSeries`.

        Returns:
            Features, from the finest to the coarsest.

        Raises:
            ValueError: If a shape does not fit the sensors.
            RuntimeError: If TorchScript traces the encoder.
        """
        if torch.jit.is_tracing():
            self.__prepare_scriptable__()
        if isinstance(x, ImageSeries):
            x, valid, days = x
        series = self._split(x)
        if days is not None:
            days = _columns('the days or acquisition times have', days, series)
        return self._features(series, self._seen(series, valid), days)

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
        bands: Sequence[str] = (),
    ) -> Any:
        """Load the weights of the encoder, of a model around it, or of the spatial encoder only.

        Args:
            state_dict: Weights; keys of a model around the encoder start with ``encoder.``. Weights
                of the spatial encoder alone leave the other layers as they are. If they are for
                images of another number of channels, the first convolution takes those of
                TorchGeo's Sentinel-2 (13 bands) and Sentinel-1 for the same bands, if it reads
                bands, and repeats all others, as ImageNet's, scaled down, as smp does.
            strict: Whether the keys must be the same.
            assign: Whether the tensors replace the parameters, instead of being copied.
            bands: Bands of Sentinel-2 or Sentinel-1 that weights of images are for, such as B8A or
                VV, if their number does not tell. Bands that they lack begin with zeros.

        Returns:
            Missing and unexpected keys where known.

        Raises:
            ValueError: If the weights are for bands of a sensor that the encoder does not read.
        """
        parts = tuple(f'{name}.' for name, _ in self.named_children())
        for weights in (rename(state_dict, {'encoder.': ''}), state_dict):
            if any(key.startswith(parts) for key in weights):
                return super().load_state_dict(weights, strict, assign)
        results = [
            # smp's encoders drop their classifier in a method of theirs, which may take no options.
            spatial.load_state_dict(fitted)
            if strict
            else nn.Module.load_state_dict(spatial, fitted, strict=False)
            for _, spatial, read in self._spatial_parts()
            if (fitted := _fit_channels(state_dict, spatial.state_dict(), read, bands)) is not None
        ]
        if not results:
            raise ValueError(
                'no weight can be loaded: they are for 10 bands of s2 or 2 of s1, and the encoder '
                f'reads {self._describe_sensors()}'
            )
        return results[-1]

    def spatial_weights(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Weights of a spatial encoder alone by their names here, for the bands that are read."""
        return {
            f'{name}.{key}': value
            for name, spatial, bands in self._spatial_parts()
            for key, value in (_fit_channels(state_dict, spatial.state_dict(), bands) or {}).items()
        }

    def _seen(self, series: dict[str, Tensor], valid: Tensor | None) -> dict[str, Tensor]:
        """Slots that each sensor saw, booleans of shape (B, T)."""
        if valid is None:
            bands = {name: s[:, :, : s.shape[2] - self.planes] for name, s in series.items()}
            return {name: (s != 0).flatten(2).any(dim=-1) for name, s in bands.items()}
        if valid.dtype != torch.bool:
            raise ValueError(f'valid has type {valid.dtype}, expected booleans')
        return dict(zip(series, _columns('valid has', valid, series).unbind(-1), strict=True))

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


def _columns(what: str, value: Tensor, series: Mapping[str, Tensor]) -> Tensor:
    """What is known of each sensor (B, T, S), or of all of them alike (B, T), as the former."""
    shape = *next(iter(series.values())).shape[:2], len(series)
    if value.shape not in (shape, shape[:2]):
        raise ValueError(
            f'{what} shape {tuple(value.shape)}, expected (B, T, S) = {shape}, a column for each '
            f'sensor ({", ".join(series)}), or (B, T)'
        )
    return value if value.ndim == 3 else value[..., None].expand(shape)


class ConvLSTMInceptionEncoder(SeriesEncoder):
    """Encoder of Sentinel-2 and Sentinel-1 time series, for any decoder of smp.

    A :class:`ConvLSTM` for each sensor reads its series and an :class:`Inception` module the first
    date of each sensor. Their features are concatenated and go through a spatial encoder of smp,
    whose features are returned.

    A slot that a sensor did not see leaves the recurrent state as it was, and the first date is the
    first observed one; see :class:`SeriesEncoder`.

    Wenger et al., Remote Sensing 2023, https://doi.org/10.3390/rs15010151. What improves on it is
    an option: *norm* and *full_resolution*.
    """

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
        norm: Norm = 'shared',
        full_resolution: bool = False,
    ) -> None:
        """Initialize a new ConvLSTMInceptionEncoder instance.

        Args:
            spatial_encoder: Name of the smp (or 'tu-' timm) encoder.
            sensors: As in :class:`SeriesEncoder`.
            inception: Whether the features of the first date are added.
            day_of_year: As in :class:`SeriesEncoder`.
            hidden_channels: Number of channels of the states of each recurrent layer.
            tower_channels: Number of channels of each tower of the Inception module.
            depth: Number of stages of the spatial encoder.
            output_stride: Stride of its last features, 8, 16 or 32.
            norm: Running statistics of the recurrent layers, as in :class:`ConvLSTM`.
            full_resolution: Whether the head sees the input of the spatial encoder, too.

        Raises:
            ValueError: If *output_stride* is below 32 and the spatial encoder cannot be dilated, or
                *norm* has no such value.
        """
        super().__init__(sensors, day_of_year, full_resolution)
        layers = {n: ConvLSTM(c, hidden_channels, norm=norm) for n, c in self.sensors.items()}
        self.convlstm = nn.ModuleDict(layers)
        self.inception = Inception(self.channels, tower_channels) if inception else None
        front = hidden_channels * len(layers)
        if self.inception is not None:
            front += self.inception.out_channels
        self.spatial = smp.encoders.get_encoder(
            spatial_encoder, in_channels=front, depth=depth, output_stride=output_stride
        )
        self.output_stride = self.spatial.output_stride
        first = front if full_resolution else self.spatial.out_channels[0]
        self.out_channels = [first, *self.spatial.out_channels[1:]]

    def _features(
        self, series: dict[str, Tensor], seen: dict[str, Tensor], days: Tensor | None
    ) -> list[Tensor]:
        parts = [layer(series[name], seen[name]) for name, layer in self.convlstm.items()]
        if self.inception is not None:
            first = [_first_valid(series[name], seen[name]) for name in self.sensors]
            parts.append(self.inception(arrange(torch.cat(first, dim=1))))
        front = torch.cat([arrange(part) for part in parts], dim=1)
        features: list[Tensor] = self.spatial(front)
        return [front, *features[1:]] if self.full_resolution else features

    def _spatial_parts(self) -> list[tuple[str, Any, dict[str, int]]]:
        return [('spatial', self.spatial, {})]


def _fit_channels(
    weights: Mapping[str, Any],
    own: Mapping[str, Tensor],
    sensors: Mapping[str, int],
    bands: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Weights of images for other channels; None if they are of a sensor that is not read.

    Sensors are those whose bands the encoder, with its *own* weights, reads; none if it reads
    features. Only what reads these is fitted.
    """
    fitted = dict(weights)
    given = [band.upper().replace('B0', 'B') for band in bands]
    mine = [BANDS[s] if len(BANDS.get(s, ())) == n else [''] * n for s, n in sensors.items()]
    places = {band: place for place, band in enumerate(chain(*mine))}
    width = next((like.shape[1] for like in own.values() if like.ndim == 4), 0)
    for key, like in own.items():
        weight = weights.get(key)
        if weight is None or weight.ndim != 4 or like.ndim != 4 or like.shape[1] != width:
            continue
        old = weight.shape[1]
        if old == width and not given:
            continue
        known = given or PRETRAINED.get(old, [])
        if not sensors or not known:  # as smp does
            fitted[key] = weight[:, torch.arange(width) % old] * (old / width)
        elif not (columns := [number for number, band in enumerate(known) if band in places]):
            return None
        else:
            fitted[key] = torch.zeros_like(like)
            fitted[key][:, [places[known[number]] for number in columns]] = weight[:, columns]
    return fitted


def _first_valid(series: Tensor, valid: Tensor) -> Tensor:
    """First valid slot (B, C, H, W) of each sample of a series, 0 where no slot is valid."""
    first = valid.int().argmax(dim=1)
    image = series[torch.arange(series.shape[0], device=series.device), first]
    return image.where(valid.any(1)[:, None, None, None], 0)


def rename(state_dict: Mapping[str, Any], prefixes: Mapping[str, str]) -> dict[str, Any]:
    """Weights whose names begin with some prefixes, with what stands for each prefix instead."""
    return {
        new + key.removeprefix(old): value
        for key, value in state_dict.items()
        for old, new in prefixes.items()
        if key.startswith(old)
    }


def series_encoder(model: Any) -> SeriesEncoder | None:
    """Encoder of a model, if it is one that reads series.

    Args:
        model: Model of smp, or any other module.

    Returns:
        The encoder, or None.
    """
    encoder = getattr(model, 'encoder', None)
    return encoder if isinstance(encoder, SeriesEncoder) else None


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
    for part in module.modules() if frozen else ():
        part.train = partial(_stay, part)  # type: ignore[method-assign]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Change the mode of those parts only that have been unfrozen since."""
    for part in module.children():
        # A batch norm that was put in the place of another one, as nn.SyncBatchNorm is, was not.
        part.train(mode and any(p.requires_grad for p in part.parameters()))
    return module
