"""Normalisation and augmentation of batches of series."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class NormalizeSeries(nn.Module):
    """Normalise each channel with its own statistics, then fill what is missing with the mean.

    After it a slot that a sensor did not see is 0 everywhere, which is how the backbones of this
    package recognise it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        """Keep the statistics.

        Args:
            mean: Mean of each of the C channels, in the units of the samples.
            std: Standard deviation of each channel, above 0.
        """
        super().__init__()
        for name, value in (('mean', mean), ('std', std)):
            channels = torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, channels, persistent=False)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalise the image of a batch.

        Args:
            batch: A batch whose ``image`` is (B, T, C, H, W), NaN where missing.

        Returns:
            The batch with a finite ``image``.
        """
        image = batch['image']
        normalized = (image - self.mean.to(image)) / self.std.to(image)
        return {**batch, 'image': normalized.nan_to_num_(0.0)}


class AugmentSeries(nn.Module):
    """Crops, mirrors and quarter turns, the same ones for every date, sensor and the mask.

    Each of the eight positions of a square is as likely as the others, and each of the four that
    keep the shape of what is not square. Pixels are moved and never interpolated: kornia's quarter
    turn warps, takes no (B, T, C, H, W) beside a (B, H, W) mask, and needs several times as long.
    """

    def __init__(self, size: int | tuple[int, int] | None = None, turns: bool = True) -> None:
        """Keep the settings.

        Args:
            size: Height and width of a random crop in pixels; None keeps the patches whole.
            turns: Whether to mirror and turn.

        Raises:
            ValueError: If a crop has no pixels.
        """
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size
        self.turns = turns
        if self.size and min(self.size) < 1:
            raise ValueError(f'patch_size is {self.size}; it must be 1 or more')

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Augment image and mask of a batch.

        Args:
            batch: A batch with ``image`` (B, T, C, H, W) and ``mask`` (B, H, W).

        Returns:
            The batch with both changed alike; everything else, ``transform`` and ``bounds``
            included, still tells of the whole patch.

        Raises:
            ValueError: If the crop is larger than the images.
        """
        height, width = batch['image'].shape[-2:]
        moves = [self._draw(height, width) for _ in batch['mask']]
        moved = {
            key: torch.stack([m.apply(x) for m, x in zip(moves, batch[key], strict=True)])
            for key in ('image', 'mask')
        }
        return {**batch, **moved}

    def _draw(self, height: int, width: int) -> '_Move':
        rows, columns = self.size or (height, width)
        if rows > height or columns > width:
            raise ValueError(
                f'patch_size {self.size} is larger than the patches, {(height, width)}; make it '
                'smaller, or leave it out to train on whole patches'
            )
        top, left = _randint(height - rows + 1), _randint(width - columns + 1)
        window = slice(top, top + rows), slice(left, left + columns)
        if not self.turns:
            return _Move(window)
        turns = _randint(4) if rows == columns else 2 * _randint(2)
        return _Move(window, mirror=bool(_randint(2)), turns=turns)


class _Move(NamedTuple):
    """A window of an image, mirrored from left to right or not, and then turned by 90 degrees."""

    window: tuple[slice, slice]
    mirror: bool = False
    turns: int = 0

    def apply(self, image: Tensor) -> Tensor:
        """Move an image (..., H, W)."""
        image = image[..., *self.window]
        return (image.flip(-1) if self.mirror else image).rot90(self.turns, (-2, -1))


def _randint(high: int) -> int:
    return int(torch.randint(high, ()))
