"""Temporal attention over the features of each date, in front of any decoder of smp."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .convlstm import recomputed, seen_first
from .encoder import SENSORS, SeriesEncoder
from .strips import arrange, is_transformed

UTAE = 'utae'
WIDTHS = (64, 64, 64, 128)
"""Channels of U-TAE's encoder at full resolution, a half, a quarter and an eighth."""
STEM = 32
"""Channels at full resolution beside an encoder whose first features are the bands."""
PIXELS = 2**18
"""Pixels of the dates that are encoded at once, where that changes no number.

Four times as many for maps on a GPU, which would wait for the host to start it on so few.
"""


class TemporalAttention(nn.Module):
    """Lightweight temporal attention at each pixel: what a series shows, and what each date weighs.

    Each head has one learnt query, keys from all channels, and a share of the channels as values.
    Normalisation is over the channels of a pixel and date, so that no date changes another.

    Garnot and Landrieu, "Lightweight Temporal Self-attention for Classifying Satellite Images Time
    Series", 2020, https://doi.org/10.1007/978-3-030-65742-0_12, without its dropout.
    """

    def __init__(
        self, channels: int, heads: int = 16, key_channels: int = 4, width: int = 256
    ) -> None:
        """Initialize a new TemporalAttention instance.

        Args:
            channels: Number of channels of the features.
            heads: Number of heads.
            key_channels: Number of channels of the keys of a head.
            width: Number of channels that the heads share, a multiple of *heads*.
        """
        super().__init__()
        self.heads, self.width = heads, width
        self.embed = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.key = nn.Linear(width, heads * key_channels)
        self.query = nn.Parameter(torch.randn(heads, key_channels) * key_channels**-0.5)
        self.out = nn.Sequential(nn.Linear(width, channels), nn.LayerNorm(channels), nn.ReLU())

    def forward(self, x: Tensor, seen: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the dates.

        Args:
            x: Features of shape (B, T, C, H, W).
            seen: Dates that count, booleans of shape (B, T).
            positions: When the dates were, in days or in slots, of shape (B, T).

        Returns:
            Features of shape (B, C, H, W), and the weights of the dates (B, T, heads, H, W), which
            add up to 1, or to 0 where no date counts.
        """
        values = self.embed(x.movedim(2, -1))
        precise = torch.promote_types(values.dtype, torch.float32)
        values = values + self._encode(positions.to(precise))[:, :, None, None].to(values.dtype)
        keys = self.key(values).unflatten(-1, self.query.shape)
        scores = (keys * self.query).sum(-1) * self.query.shape[1] ** -0.5
        counts = seen[:, :, None, None, None]
        scores = scores.to(precise)
        scores = scores.masked_fill(~counts, torch.finfo(torch.float32).min)
        weights = scores.softmax(1).to(values.dtype) * counts
        heads = values.unflatten(-1, (self.heads, self.width // self.heads))
        attended = (heads * weights[..., None]).sum(1).flatten(-2)
        return self.out(attended).movedim(-1, 1), weights.movedim(-1, 2)

    def _encode(self, positions: Tensor) -> Tensor:
        """Sines and cosines of the positions (B, T, width), the same for all heads."""
        pairs = self.width // self.heads // 2
        exponents = torch.arange(pairs, dtype=positions.dtype, device=positions.device) / pairs
        angles = positions[..., None] * 1000**-exponents
        return torch.cat([angles.sin(), angles.cos()], -1).repeat(1, 1, self.heads)


def weigh(features: Tensor, weights: Tensor) -> Tensor:
    """Add up features over the dates, each share of the channels with the weights of a head.

    Args:
        features: Features of shape (B, T, C, H, W).
        weights: Weights of the dates of shape (B, T, heads, h, w), enlarged to H and W. Where the
            heads do not divide C, neighbouring heads are averaged.

    Returns:
        Features of shape (B, C, H, W).
    """
    channels, heads = features.shape[2], weights.shape[2]
    if channels == 0:  # smp's encoders without features at a stride
        return features[:, 0]
    groups = math.gcd(channels, heads)
    weights = weights.unflatten(2, (groups, heads // groups)).mean(3)
    enlarged = F.interpolate(weights.flatten(0, 1), features.shape[-2:], mode='bilinear')
    enlarged = enlarged.unflatten(0, weights.shape[:2])[:, :, :, None].to(features.dtype)
    shares = features.unflatten(2, (groups, channels // groups))
    return (shares * enlarged).sum(1).flatten(1, 2)


class DateEncoder(nn.Module):
    """U-TAE's encoder of a single date, padded with zeros: the first features at full resolution.

    Garnot and Landrieu, "Panoptic Segmentation of Satellite Image Time Series with Convolutional
    Temporal Attention Networks", ICCV 2021, https://doi.org/10.1109/ICCV48922.2021.00483.
    """

    def __init__(self, in_channels: int, depth: int) -> None:
        """Build it for a number of bands, to halve the image *depth* times, at most 3."""
        super().__init__()
        self.out_channels = list(WIDTHS[: depth + 1])
        self.stages = nn.ModuleList([_stem(in_channels, WIDTHS[0])])
        for old, new in zip(self.out_channels, self.out_channels[1:], strict=False):
            self.stages.append(_Halve(old, new))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of images (N, C, H, W), from the finest to the coarsest."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class _Halve(nn.Module):
    """Halves the image, unless *stride* is 1, and adds a convolution to what another one gives."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        self.down = _conv(in_channels, in_channels, stride)
        self.first = _conv(in_channels, out_channels)
        self.second = _conv(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.down(x))
        y: Tensor = x + self.second(x)
        return y


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
    return nn.Sequential(conv, nn.GroupNorm(4, out_channels), nn.ReLU())


def _stem(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(_conv(in_channels, out_channels), _conv(out_channels, out_channels))


class AttentionEncoder(SeriesEncoder):
    """Encoder of Sentinel-2 and Sentinel-1 time series by attention, for any decoder of smp.

    A spatial encoder sees each date. :class:`TemporalAttention` reads its coarsest features, and
    its weights, enlarged, weigh the features of the other levels. The sensors are the bands of one
    image a slot, or *late*, each sensor has an encoder and attention of its own, and thereby its
    own dates, and their features are concatenated at each level.

    The spatial encoder is one of smp, so that weights of single dates serve series, or ``'utae'``,
    U-TAE's own. Of the latter, attention is at an eighth of the resolution, as there, and levels
    below, which the depth of a model of smp may ask for, see what it gives.

    Slots that were not seen are neither encoded nor attended to: they cost nothing. Compiled or
    exported, where shapes must not depend on data, they are encoded and then masked; a batch norm
    that trains must not see them, so its encoder is compiled with graph breaks. Dates are at the
    days that :class:`ImageSeries` says, at days of the year if planes hold them (*day_of_year*),
    and otherwise at the number of slots seen before.

    Garnot and Landrieu, ICCV 2021, https://doi.org/10.1109/ICCV48922.2021.00483.
    """

    def __init__(
        self,
        spatial_encoder: str,
        sensors: Mapping[str, int] = SENSORS,
        late: bool = False,
        day_of_year: bool = False,
        full_resolution: bool = False,
        depth: int = 5,
        output_stride: int = 32,
    ) -> None:
        """Initialize a new AttentionEncoder instance.

        Args:
            spatial_encoder: Name of the smp (or 'tu-' timm) encoder, or 'utae'.
            sensors: As in :class:`SeriesEncoder`.
            late: Whether each sensor has an encoder and attention of its own.
            day_of_year: As in :class:`SeriesEncoder`; positions of the dates, not read as bands.
            full_resolution: Whether the head sees features at full resolution: the first ones of
                the spatial encoder, or of two convolutions if those are the bands themselves.
                Always so for 'utae'.
            depth: Number of stages of the spatial encoder.
            output_stride: Stride of its last features, 8, 16 or 32.

        Raises:
            ValueError: If *output_stride* is below 32 and the spatial encoder cannot be dilated.
        """
        super().__init__(sensors, day_of_year, full_resolution or spatial_encoder == UTAE)
        self.groups = {name: [name] for name in sensors} if late else {'series': [*sensors]}
        self.recompute_gates = False
        self.output_stride = min(output_stride, 2**depth)
        self.spatial, self.attention = nn.ModuleDict(), nn.ModuleDict()
        self.stem, self.coarser = nn.ModuleDict(), nn.ModuleList()
        each: list[list[int]] = []
        for group, members in self.groups.items():
            bands = sum(sensors[name] for name in members)
            if spatial_encoder == UTAE:
                encoder: Any = DateEncoder(bands, min(depth, len(WIDTHS) - 1))
            else:
                options: Any = {'depth': depth, 'output_stride': output_stride}
                encoder = smp.encoders.get_encoder(spatial_encoder, in_channels=bands, **options)
            self.spatial[group] = encoder
            self.attention[group] = TemporalAttention(encoder.out_channels[-1])
            if full_resolution and encoder.out_channels[0] == bands and spatial_encoder != UTAE:
                self.stem[group] = _stem(bands, STEM)
            first = STEM if group in self.stem else encoder.out_channels[0]
            each.append([first, *encoder.out_channels[1:]])
        self.out_channels = [sum(level) for level in zip(*each, strict=True)]
        for level in range(len(WIDTHS), depth + 1) if spatial_encoder == UTAE else ():
            stride = 2 if 2**level <= self.output_stride else 1
            self.coarser.append(_Halve(self.out_channels[-1], WIDTHS[-1], stride))
            self.out_channels.append(WIDTHS[-1])

    def _spatial_parts(self) -> list[tuple[str, Any, dict[str, int]]]:
        return [
            (f'spatial.{group}', self.spatial[group], {n: self._bands(n) for n in members})
            for group, members in self.groups.items()
        ]

    def _bands(self, sensor: str) -> int:
        return self.sensors[sensor] - self.planes

    def _features(
        self, series: dict[str, Tensor], seen: dict[str, Tensor], days: Tensor | None
    ) -> list[Tensor]:
        each = [self._read(group, series, seen, days) for group in self.groups]
        features = [torch.cat(level, dim=1) for level in zip(*each, strict=True)]
        for stage in self.coarser:
            features.append(stage(features[-1]))
        return features

    def _read(
        self, group: str, series: dict[str, Tensor], seen: dict[str, Tensor], days: Tensor | None
    ) -> list[Tensor]:
        """Features of one group of sensors, without the dates."""
        members = self.groups[group]
        bands = [
            series[n][:, :, : self._bands(n)].where(seen[n][..., None, None, None], 0)
            for n in members
        ]
        images, each = torch.cat(bands, dim=2), torch.stack([seen[n] for n in members], -1)
        valid, positions = each.any(-1), self._positions(members, series, each, days)
        if not self._is_dense(group, images) and not valid.all():
            valid, images, positions = seen_first(valid, images, positions)
            longest = max(1, int(valid.sum(1).max()))
            valid, images, positions = (x[:, :longest] for x in (valid, images, positions))
        *finer, coarsest = [
            f.unflatten(0, valid.shape) for f in self._encode(group, images.flatten(0, 1), valid)
        ]
        attended, weights = self.attention[group](coarsest, valid, positions)
        return [*(weigh(features, weights) for features in finer), attended]

    def _positions(
        self, members: list[str], series: dict[str, Tensor], valid: Tensor, days: Tensor | None
    ) -> Tensor:
        """Days (B, T) of the first sensor that saw a slot, or the number of slots before it."""
        if days is not None:
            known = days[..., [[*self.sensors].index(n) for n in members]]
        elif self.planes:
            planes = torch.stack([series[n][:, :, -2:, 0, 0] for n in members], -1).float()
            days = torch.atan2(planes[:, :, 0], planes[:, :, 1]) * (365.25 / (2 * math.pi))
            known = (days - 0.875) % 365.25 + 0.875  # 1..366, which is 0.75 in the next year
        else:
            return (valid.any(-1).cumsum(1) - 1).float()
        return known.gather(-1, valid.int().argmax(-1, keepdim=True))[..., 0].float()

    def _encode(self, group: str, images: Tensor, seen: Tensor) -> list[Tensor]:
        """Features of images (N, C, H, W); those that were not seen are 0."""
        if self._is_dense(group, images):
            return self._levels(group, images)
        index = seen.flatten().nonzero()[:, 0]
        if len(index) == len(images):
            return self._encode_parts(group, images)
        # In no statistics, but in the graph, which is that of other batches. Batch norms that wait
        # for other processes take no images, forwards and backwards.
        if len(index) == 0 and not _has_batch_statistics(self.spatial[group], nn.SyncBatchNorm):
            with torch.no_grad(), _BuffersKept(self.spatial[group]):
                levels = self._encode_parts(group, images)
            parts = [*self.spatial[group].parameters(), *self.stem.parameters()]
            return [0 * level + 0 * sum(p.sum() for p in parts) for level in levels]
        return [
            level.new_zeros(len(images), *level.shape[1:]).index_copy(0, index, level)
            for level in self._encode_parts(group, images[index])
        ]

    def _encode_parts(self, group: str, images: Tensor) -> list[Tensor]:
        """Encode a few dates at a time, if that saves memory and changes no number."""
        spatial, learning = self.spatial[group], torch.is_grad_enabled()
        recompute = self.recompute_gates and learning and not torch.compiler.is_compiling()
        at_once = len(images)
        if (recompute or not learning) and not _has_batch_statistics(spatial):
            pixels = PIXELS if recompute or not images.is_cuda else 4 * PIXELS
            at_once = max(1, pixels // (images.shape[-2] * images.shape[-1]))
        call: Any = self._levels
        if recompute:
            call = partial(
                recomputed, self, call, context_fn=lambda: (nullcontext(), _BuffersKept(spatial))
            )
        parts = [call(group, part) for part in images.split(at_once)]
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    def _is_dense(self, group: str, images: Tensor) -> bool:
        """Whether every slot is encoded, so that no shape depends on data."""
        if images.is_meta or isinstance(images, FakeTensor):
            return True
        fixed = torch.compiler.is_compiling() or is_transformed()
        return fixed and not _has_batch_statistics(self.spatial[group])

    def _levels(self, group: str, images: Tensor) -> list[Tensor]:
        images = arrange(images)
        features: list[Tensor] = self.spatial[group](images)
        return [self.stem[group](images), *features[1:]] if group in self.stem else features


def _has_batch_statistics(
    module: nn.Module, kind: type[nn.Module] = nn.modules.batchnorm._BatchNorm
) -> bool:
    return any(isinstance(part, kind) and part.training for part in module.modules())


class _BuffersKept:
    """Undoes what a second forward pass does to running statistics, as often as there is one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.kept = [(buffer, buffer.clone()) for buffer in self.module.buffers()]

    def __exit__(self, *_: object) -> None:  # with an error where the pass has what it needs
        with torch.no_grad():
            for buffer, value in self.kept:
                buffer.copy_(value)
