"""Normalisation and augmentation of batches of series."""

from collections.abc import Sequence
from typing import Any

import kornia.augmentation as K
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
    """Flips, quarter turns and crops, the same ones for every date, sensor and the mask.

    kornia takes no (B, T, C, H, W) beside a (B, H, W) mask, so time is folded into the channels.
    Each flip has probability 1/2 and a turn is any of 0, 90, 180 or 270 degrees. Quarter turns are
    left out where the images are not square.
    """

    def __init__(self, size: int | tuple[int, int] | None = None, turns: bool = True) -> None:
        """Build the augmentation.

        Args:
            size: Height and width of a random crop in pixels; None keeps the patches whole.
            turns: Whether to flip and turn.
        """
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size
        self.turns = turns
        self.crop = _sequential(K.RandomCrop(self.size)) if self.size else nn.Identity()
        self.flip = _sequential(K.RandomHorizontalFlip(), K.RandomVerticalFlip())
        self.turn = _sequential(K.RandomRotation90((0, 3), p=1.0))

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Augment image and mask of a batch.

        Args:
            batch: A batch with ``image`` (B, T, C, H, W) without NaN and ``mask`` (B, H, W).

        Returns:
            The batch with both changed alike.

        Raises:
            ValueError: If the crop is larger than the images.
        """
        image, mask = batch['image'], batch['mask']
        self._check_size(*image.shape[-2:])
        folded = {'image': image.flatten(1, 2), 'mask': mask}
        folded = self.crop(folded)
        if self.turns:
            folded = self.flip(folded)
            square = folded['image'].shape[-1] == folded['image'].shape[-2]
            folded = self.turn(folded) if square else folded
        out = folded['image'].unflatten(1, image.shape[1:3])
        return {**batch, 'image': out, 'mask': folded['mask'].to(mask)}

    def _check_size(self, height: int, width: int) -> None:
        if self.size and (self.size[0] > height or self.size[1] > width):
            raise ValueError(
                f'patch_size {self.size} is larger than the patches, {(height, width)}; make it '
                'smaller, or leave it out to train on whole patches'
            )


def _sequential(*augmentations: Any) -> nn.Module:
    return K.AugmentationSequential(*augmentations, data_keys=None, keepdim=True)
