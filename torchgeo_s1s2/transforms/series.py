"""Normalisation and augmentation of batches of series."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class NormalizeSeries(nn.Module):
    """Normalise each channel with its own statistics, then fill what is missing with the mean.

    This is the last place that can tell what is missing from what is average, so ``valid`` and
    ``acquisition_times`` get to know here of slots that hold nothing, in a crop for instance: it
    comes after the crops, and before whatever changes values. Afterwards such a slot is 0
    everywhere, which is how backbones recognise it that are given the image alone.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        """Keep the statistics.

        Args:
            mean: Mean of each of the C channels, in the units of the samples.
            std: Standard deviation of each channel, above 0.

        Raises:
            ValueError: If they differ in number, are not finite, or a standard deviation is not
                above 0.
        """
        super().__init__()
        for name, value in (('mean', mean), ('std', std)):
            channels = torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, channels, persistent=False)
        finite = self.mean.isfinite().all() and self.std.isfinite().all()
        if len(self.mean) != len(self.std) or not finite or not (self.std > 0).all():
            raise ValueError(
                f'mean is {mean}, std {std}: expected as many, finite and with std above 0'
            )

    def forward(self, batch: dict[str, Any], channels: Sequence[int]) -> dict[str, Any]:
        """Normalise the image of a batch.

        Args:
            batch: A batch whose ``image`` is (B, T, C, H, W), NaN where missing. Slots from
                ``length`` (B,) on, where TorchGeo pads series with it, are missing too.
            channels: Number of channels of each of the S sensors, in their order.

        Returns:
            The batch with a finite ``image``, and with ``valid`` (B, T, S) False and
            ``acquisition_times`` -1 where a sensor saw no pixel, where the batch has them.
        """
        image = _image_of(batch)
        if 'length' in batch:
            image = image.where(unpadded(batch)[..., None, None, None], torch.nan)
        if 'valid' in batch:
            parts = image.split(list(channels), 2)
            seen = torch.stack([part.isfinite().flatten(2).any(2) for part in parts], 2)
            batch = {**batch, **_only(batch, seen)}
        normalized = (image - self.mean.to(image)) / self.std.to(image)
        return {**batch, 'image': normalized.nan_to_num_(0.0, 0.0, 0.0)}


class SeriesDropout(nn.Module):
    """Drop dates and whole sensors at random, never everything of a sample.

    A model that is trained with it reads Sentinel-1 alone, Sentinel-2 alone, or both, and series
    with gaps. What is dropped looks as if it had never been observed: NaN in the image, False in
    ``valid`` and -1 in ``acquisition_times``, so it comes before the normalisation.

    Each sensor that saw a sample is dropped with probability ``sensor``; if that took all of them,
    one is kept, each with the same chance. Each date of the sensors that stay is dropped with
    probability ``date``; if that took all of them, one date of one sensor is kept, each with the
    same chance. With two sensors a sample therefore lacks a given one with probability
    p - p^2 / 2. Draws come from PyTorch's generator, which ``seed_everything`` seeds.
    """

    def __init__(self, date: float = 0.1, sensor: float = 0.1) -> None:
        """Keep the probabilities.

        Args:
            date: Probability of each date of each sensor, 0..1.
            sensor: Probability of each sensor, 0..1.

        Raises:
            ValueError: If a probability is out of range.
        """
        super().__init__()
        for name, value in (('date', date), ('sensor', sensor)):
            if not 0 <= value <= 1:
                raise ValueError(f'{name} is {value}; a probability lies in 0..1')
        self.date, self.sensor = date, sensor

    def forward(self, batch: dict[str, Any], channels: Sequence[int]) -> dict[str, Any]:
        """Drop from a batch.

        Args:
            batch: A batch with ``image`` (B, T, C, H, W), ``valid`` and ``acquisition_times``
                (B, T, S).
            channels: Number of channels of each of the S sensors, in their order.

        Returns:
            The batch with fewer observations.
        """
        _image_of(batch)
        valid = batch['valid']
        keep = _thin(valid.any(1), self.sensor)[:, None] & valid
        keep = _thin(keep.flatten(1), self.date).view_as(valid)
        return keep_observations(batch, keep, channels)


def keep_observations(
    batch: dict[str, Any], keep: Tensor, channels: Sequence[int]
) -> dict[str, Any]:
    """Make all other observations of a batch look as if they had never been made.

    Args:
        batch: A batch as :class:`SeriesDropout` takes it.
        keep: Which observations to keep of those that were made, (B, T, S) or broadcast to it.
        channels: Number of channels of each of the S sensors, in their order.

    Returns:
        The batch: NaN in ``image``, False in ``valid`` and -1 in ``acquisition_times`` elsewhere.
    """
    kept = _only(batch, keep)
    parts = _image_of(batch).split(list(channels), 2)
    seen = [
        part.where(kept['valid'][:, :, s, None, None, None], torch.nan)
        for s, part in enumerate(parts)
    ]
    return {**batch, **kept, 'image': torch.cat(seen, 2)}


def _only(batch: dict[str, Any], keep: Tensor) -> dict[str, Tensor]:
    """``valid`` and, if it has them, ``acquisition_times`` of a batch without the others."""
    valid, name = keep & batch['valid'], 'acquisition_times'
    return {'valid': valid} | ({name: batch[name].where(valid, -1)} if name in batch else {})


class DayOfYear(nn.Module):
    """Append to the bands of each sensor when in the year it saw each slot.

    Two planes, sin(a) and cos(a) with a = 2 pi d / 365.25, where d is the UTC day of the year and
    1 for 1 January. They are 0, as are the bands, where the sensor did not see the slot; so this
    comes after the normalisation.
    """

    def forward(self, batch: dict[str, Any], channels: Sequence[int]) -> dict[str, Any]:
        """Append the planes.

        Args:
            batch: A batch with ``image`` (B, T, C, H, W) and ``acquisition_times`` (B, T, S).
            channels: Number of bands of each of the S sensors, in their order.

        Returns:
            The batch with an ``image`` (B, T, C + 2 * S, H, W).
        """
        image, times = _image_of(batch), batch['acquisition_times']
        angle = 2 * math.pi / 365.25 * day_of_year(times)
        planes = torch.stack([angle.sin(), angle.cos()], -1).where(times[..., None] >= 0, 0)
        planes = planes.to(image)[..., None, None].expand(*planes.shape, *image.shape[-2:])
        parts = [
            part
            for s, bands in enumerate(image.split(list(channels), 2))
            for part in (bands, planes[:, :, s])
        ]
        return {**batch, 'image': torch.cat(parts, 2)}


class AugmentSeries(nn.Module):
    """Mirrors and quarter turns, the same ones for every date, sensor and the mask.

    Each of the eight positions of a square is as likely as the others, and each of the four that
    keep the shape of what is not square. Pixels are moved and never interpolated: kornia's quarter
    turn warps, takes no (B, T, C, H, W) beside a (B, H, W) mask, and needs several times as long.
    """

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Augment image and mask of a batch.

        Args:
            batch: A batch with ``image`` (B, T, C, H, W) and ``mask`` (B, H, W).

        Returns:
            The batch with both changed alike; everything else, ``transform`` and ``bounds``
            included, still tells of the patch as it was.
        """
        height, width = _image_of(batch).shape[-2:]
        square = height == width
        moves = [(_randint(2), _randint(4) if square else 2 * _randint(2)) for _ in batch['mask']]
        moved = {
            key: torch.stack([_move(x, *m) for x, m in zip(batch[key], moves, strict=True)])
            for key in ('image', 'mask')
        }
        return {**batch, **moved}


def _move(image: Tensor, mirror: int, turns: int) -> Tensor:
    """Mirror an image (..., H, W) from left to right or not, and then turn it by 90 degrees."""
    return (image.flip(-1) if mirror else image).rot90(turns, (-2, -1))


def _thin(candidates: Tensor, probability: float) -> Tensor:
    """Drop candidates (B, N) with a probability, but never all of a row."""
    score = torch.rand(candidates.shape, device=candidates.device).where(candidates, -1)
    best = score == score.amax(1, keepdim=True)
    return candidates & ((score >= probability) | best)


def day_of_year(seconds: Tensor) -> Tensor:
    """UTC day of the year, 1..366, of seconds since 1970."""
    days = seconds.div(86400, rounding_mode='floor')
    year = 1970 + (days / 365.2425).floor().long() + 1  # this one or the next
    year = year - (_first_day(year) > days).long()
    return days - _first_day(year - (_first_day(year) > days).long()) + 1


def _first_day(year: Tensor) -> Tensor:
    """Days from 1970 to the first of January of a year."""
    past = year - 1
    leaps = past // 4 - past // 100 + past // 400 - 477
    return 365 * (year - 1970) + leaps


def _randint(high: int) -> int:
    return int(torch.randint(high, ()))


def _image_of(batch: Mapping[str, Any]) -> Tensor:
    """Image of a batch; that of a sample, or with time folded into its channels, is refused."""
    image: Tensor = batch['image']
    if image.ndim != 5:
        raise ValueError(
            f'the image is of shape {tuple(image.shape)}, which does not tell slots from '
            'channels; give a batch with one of (B, T, C, H, W)'
        )
    return image


def unpadded(batch: Mapping[str, Any]) -> Tensor:
    """Slots before the ``length`` (B,) from which on TorchGeo pads series, booleans (B, T).

    Raises:
        ValueError: If the image does not tell its slots.
    """
    image = _image_of(batch)
    return torch.arange(image.shape[1], device=image.device) < batch['length'][:, None]


def count_observations(image: Tensor, channels: Sequence[int]) -> Tensor:
    """Count the dates on which a sensor saw a pixel, over all sensors.

    Args:
        image: (B, T, C, H, W), NaN where missing.
        channels: Number of channels of each sensor, in their order.

    Returns:
        Integers of shape (B, H, W), 0..T * number of sensors.
    """
    seen = [part.isfinite().any(2) for part in image.split(list(channels), 2)]
    return torch.stack(seen).sum((0, 2))
