"""What a sample of a series is filled in: slots, classes, and the times of what is there."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchgeo_s1s2.datasets.classes import NO_LABEL
from torchgeo_s1s2.datasets.sensors import Array

Place = tuple[slice, slice]
"""Rows and columns."""

EVERYWHERE: Place = slice(None), slice(None)


class Canvas:
    """What a sample is made of, filled from others; what is there is not filled again."""

    def __init__(
        self,
        length: int,
        bands: Mapping[str, Sequence[str]],
        shape: tuple[int, int],
        several: bool,
    ) -> None:
        """Begin without a value.

        Args:
            length: Number of slots T.
            bands: Bands of each sensor.
            shape: Height and width.
            several: Whether several patches fill it, so that their pixels must be counted.
        """
        self.several = several
        borders = np.cumsum([0, *map(len, bands.values())]).tolist()
        spans = zip(bands, pairwise(borders), strict=True)
        self.channels = {sensor: slice(*span) for sensor, span in spans}
        self.image = np.empty((length, borders[-1], *shape), np.float32)
        self.mask = np.full(shape, NO_LABEL)
        self.pixels: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)

    def lacks(self, sensor: str, t: int, place: Place) -> bool:
        """Whether a slot has pixels without a value in some place."""
        seen = self.pixels.get((sensor, t))
        return not seen or bool(np.isnan(self.image[t, self.channels[sensor], *place]).any())

    def add(
        self,
        sensor: str,
        t: int,
        time: int,
        value: Array,
        inside: NDArray[np.bool_] | None = None,
        place: Place = EVERYWHERE,
    ) -> None:
        """Fill a slot of a sensor where it has no value, within a mask if there is one."""
        if inside is not None:
            value = np.where(inside, value, np.float32(np.nan))
        slot = self.image[t, self.channels[sensor]]
        target = slot[:, *place]
        if (sensor, t) in self.pixels:
            known = ~np.isnan(value) & np.isnan(target)
            np.copyto(target, value, where=known)
            count = int(known.any(0).sum())
        else:
            if target.shape != slot.shape:
                slot[...] = np.nan
            target[...] = value
            count = self._count(value)
        if count:
            self.pixels[sensor, t][time] += count

    def _count(self, value: Array) -> int:
        """Number of pixels with a value; of a single patch, whether there are any."""
        if not self.several and not np.isnan(value.flat[0]):
            return 1
        return int((~np.isnan(value)).any(0).sum())

    def add_mask(
        self,
        mask: NDArray[np.int64],
        inside: NDArray[np.bool_] | None = None,
        place: Place = EVERYWHERE,
    ) -> None:
        """Fill classes where there are none, within a mask if there is one."""
        target = self.mask[place]
        free = target == NO_LABEL
        np.copyto(target, mask, where=free if inside is None else free & inside)

    def sample(self) -> dict[str, Tensor]:
        """Everything of a sample but its georeference."""
        shape = len(self.image), len(self.channels)
        times = np.full(shape, -1, np.int64)
        for s, sensor in enumerate(self.channels):
            for t in range(shape[0]):
                if seen := self.pixels.get((sensor, t)):
                    times[t, s] = _most(seen)
                else:
                    self.image[t, self.channels[sensor]] = np.nan
        return {
            'image': torch.from_numpy(self.image),
            'mask': torch.from_numpy(self.mask),
            'valid': torch.from_numpy(times >= 0),
            'acquisition_times': torch.from_numpy(times),
        }


def _most(seen: Counter[int]) -> int:
    """Time of most pixels, the earlier of two."""
    return min(seen, key=lambda time: (-seen[time], time))
