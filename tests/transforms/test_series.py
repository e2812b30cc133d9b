from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from torchgeo_s1s2.transforms import AugmentSeries, NormalizeSeries

Array = NDArray[np.float32]


def coded_batch(size: int, height: int, width: int) -> dict[str, Any]:
    """Batch whose mask tells row and column, and its image adds 10,000 for each plane."""
    place = torch.arange(height * width).view(height, width)
    planes = 10_000 * torch.arange(size * 3 * 4).view(size, 3, 4, 1, 1)
    return {'image': (planes + place).float(), 'mask': place.expand(size, -1, -1), 'crs': 32631}


def planes_of(batch: dict[str, Any]) -> torch.Tensor:
    """Number of each plane, the same in all of its pixels only if they moved as the mask did."""
    return (batch['image'] - batch['mask'][:, None, None]) / 10_000


def dihedral(image: Array) -> Iterator[bytes]:
    for flipped in (image, image[:, ::-1]):
        for turns in range(4):
            yield np.rot90(flipped, turns).tobytes()


def test_normalize_agrees_with_numpy_and_fills_with_the_mean() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(5, 2, (2, 3, 4, 5, 6)).astype(np.float32)
    image[0, 1] = np.nan
    image[1, 2, 3, 4, 5] = np.nan
    mean, std = np.array([1, 2, 3, 4.0]), np.array([1, 0.5, 2, 4.0])
    batch = {'image': torch.from_numpy(image.copy()), 'mask': torch.zeros(2, 5, 6)}
    out = NormalizeSeries(mean.tolist(), std.tolist())(batch)
    expected = (image - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(out['image'], np.nan_to_num(expected), rtol=1e-5)
    assert not out['image'][0, 1].any()
    np.testing.assert_array_equal(batch['image'], image)
    assert out['mask'] is batch['mask']


def test_turns_and_flips_move_everything_together() -> None:
    torch.manual_seed(0)
    batch = coded_batch(96, 6, 6)
    out = AugmentSeries()(batch)
    expected = torch.arange(96 * 12).view(96, 3, 4, 1, 1).expand(-1, -1, -1, 6, 6)
    assert torch.equal(planes_of(out), expected.float())
    assert out['mask'].dtype == torch.int64
    assert out['crs'] == 32631
    seen = {mask.numpy().tobytes() for mask in out['mask']}
    assert seen == set(dihedral(batch['mask'][0].numpy()))


def test_images_that_are_not_square_are_flipped_only() -> None:
    torch.manual_seed(0)
    batch = coded_batch(48, 4, 6)
    out = AugmentSeries()(batch)
    mask = batch['mask'][0].numpy()
    flips = {m.tobytes() for m in (mask, mask[::-1], mask[:, ::-1], mask[::-1, ::-1])}
    assert {m.numpy().tobytes() for m in out['mask']} == flips
    assert planes_of(out).diff(dim=-1).eq(0).all()


@pytest.mark.parametrize(('size', 'shape'), [(4, (4, 4)), ((3, 5), (3, 5))])
def test_crops_are_the_same_window_of_everything(size: Any, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    batch = coded_batch(200, 6, 7)
    out = AugmentSeries(size, turns=False)(batch)
    height, width = shape
    corner = out['mask'][:, :1, :1]
    window = corner + 7 * torch.arange(height)[:, None] + torch.arange(width)
    assert torch.equal(out['mask'], window)
    expected = torch.arange(200 * 12).view(200, 3, 4, 1, 1).expand(-1, -1, -1, height, width)
    assert torch.equal(planes_of(out), expected.float())
    corners = {7 * row + col for row in range(7 - height) for col in range(8 - width)}
    assert set(corner.flatten().tolist()) == corners


def test_without_turns_and_crop_nothing_moves() -> None:
    batch = coded_batch(4, 5, 5)
    out = AugmentSeries(turns=False)(batch)
    assert torch.equal(out['image'], batch['image'])
    assert torch.equal(out['mask'], batch['mask'])


def test_labels_survive_a_crop_and_a_turn() -> None:
    """255 and 0 are the only values, so any blending would show."""
    mask = (torch.rand(16, 9, 9) > 0.5).long() * 255
    out = AugmentSeries(7)({'image': torch.zeros(16, 1, 1, 9, 9), 'mask': mask})
    assert set(out['mask'].unique().tolist()) == {0, 255}


def test_a_crop_larger_than_the_patches() -> None:
    with pytest.raises(ValueError, match=r'patch_size \(8, 8\) is larger than the patches, \(6, 9'):
        AugmentSeries(8)(coded_batch(1, 6, 9))


def test_the_seed_decides() -> None:
    def once() -> torch.Tensor:
        torch.manual_seed(3)
        mask: torch.Tensor = AugmentSeries(4)(coded_batch(8, 6, 6))['mask']
        return mask

    assert torch.equal(once(), once())
