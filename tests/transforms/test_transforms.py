from typing import Any

import numpy as np
import pytest
import torch

from torchgeo_s1s2.transforms import AugmentSeries, DayOfYear, NormalizeSeries, SeriesDropout
from torchgeo_s1s2.transforms.series import count_observations


def coded_batch(size: int, height: int, width: int) -> dict[str, Any]:
    """Batch whose mask tells row and column, and its image adds 10,000 for each plane."""
    place = torch.arange(height * width).view(height, width)
    planes = 10_000 * torch.arange(size * 3 * 4).view(size, 3, 4, 1, 1)
    return {'image': (planes + place).float(), 'mask': place.expand(size, -1, -1), 'crs': 32631}


def planes_of(batch: dict[str, Any]) -> torch.Tensor:
    """Number of each plane, the same in all of its pixels only if they moved as the mask did."""
    return (batch['image'] - batch['mask'][:, None, None]) / 10_000


def test_normalize_agrees_with_numpy_and_fills_with_the_mean() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(5, 2, (2, 3, 4, 5, 6)).astype(np.float32)
    image[0, 1] = np.nan
    image[1, 2, 3, 4, 5] = np.nan
    image[1, 1, 0, 0, :2] = np.inf, -np.inf
    mean, std = np.array([1, 2, 3, 4.0]), np.array([1, 0.5, 2, 4.0])
    batch = {'image': torch.from_numpy(image.copy()), 'mask': torch.zeros(2, 5, 6)}
    out = NormalizeSeries(mean.tolist(), std.tolist())(batch, (3, 1))
    expected = (image - mean[:, None, None]) / std[:, None, None]
    expected = np.where(np.isfinite(expected), expected, 0)
    np.testing.assert_allclose(out['image'], expected, rtol=1e-5)
    assert not out['image'][0, 1].any()
    np.testing.assert_array_equal(batch['image'], image)
    assert out['mask'] is batch['mask']


@pytest.mark.parametrize(
    ('mean', 'std'), [(0, [1]), (0, [1, 0]), (0, [1, np.nan]), (0, [1, np.inf]), (np.nan, [1, 1])]
)
def test_normalize_refuses_what_does_not_normalise(mean: float, std: list[float]) -> None:
    with pytest.raises(ValueError, match='expected as many, finite and with std above 0'):
        NormalizeSeries([0.0, mean], std)


def test_normalize_tells_what_holds_nothing() -> None:
    """The first sensor has one pixel left in slot 1, and nothing in slot 2."""
    batch = observed(1, [[True, True], [True, False], [True, True]])
    batch['image'][0, 1, :3] = torch.nan
    batch['image'][0, 1, 2, 1, 0] = 5
    batch['image'][0, 2, :3] = torch.inf
    out = NormalizeSeries([0.0] * 4, [1.0] * 4)(batch, (3, 1))
    assert out['valid'].tolist() == [[[True, True], [True, False], [False, True]]]
    assert out['acquisition_times'].tolist() == [[[10, 11], [20, -1], [-1, 31]]]
    assert batch['valid'][0, 2, 0]
    del batch['acquisition_times']
    again = NormalizeSeries([0.0] * 4, [1.0] * 4)(batch, (3, 1))
    assert again['valid'].equal(out['valid'])


def test_padded_slots_are_missing() -> None:
    batch = {'image': torch.zeros(2, 3, 4, 2, 2), 'length': torch.tensor([3, 1])}
    out = NormalizeSeries([2.0] * 4, [1.0] * 4)(batch, (3, 1))
    assert out['image'][..., 0, 0, 0].tolist() == [[-2, -2, -2], [-2, 0, 0]]


@pytest.mark.parametrize('width', [6, 5])
def test_turns_and_flips_move_everything_together(width: int) -> None:
    """In all eight ways, and what is not square in the four that keep its shape."""
    torch.manual_seed(0)
    batch = coded_batch(96, 6, width)
    out = AugmentSeries()(batch)
    expected = torch.arange(96 * 12).view(96, 3, 4, 1, 1).expand(-1, -1, -1, 6, width)
    assert torch.equal(planes_of(out), expected.float())
    assert out['mask'].dtype == torch.int64
    assert out['crs'] == 32631
    mask, turns = batch['mask'][0].numpy(), range(4) if width == 6 else (0, 2)
    ways = {np.rot90(m, turn).tobytes() for m in (mask, mask[:, ::-1]) for turn in turns}
    assert {mask.numpy().tobytes() for mask in out['mask']} == ways


def observed(size: int, valid: Any = True) -> dict[str, Any]:
    """Batch of three slots, with three channels of one sensor and one of another."""
    seen = torch.as_tensor(valid).expand(size, 3, 2)
    times = torch.tensor([[10, 11], [20, 21], [30, 31]]).expand(size, 3, 2)
    image = torch.ones(size, 3, 4, 2, 2)
    image[:, :, :3][~seen[..., 0]] = torch.nan
    image[:, :, 3:][~seen[..., 1]] = torch.nan
    return {'image': image, 'valid': seen, 'acquisition_times': times.where(seen, -1)}


def test_what_is_dropped_looks_as_if_it_had_not_been_seen() -> None:
    torch.manual_seed(0)
    batch = observed(400, [[True, True], [True, True], [False, True]])
    before = {key: value.clone() for key, value in batch.items()}
    valid = (out := SeriesDropout(date=0.5, sensor=0.3)(batch, (3, 1)))['valid']
    assert not (valid & ~batch['valid']).any()
    assert torch.equal(out['acquisition_times'], batch['acquisition_times'].where(valid, -1))
    seen = torch.cat([valid[..., :1].expand(-1, -1, 3), valid[..., 1:]], 2)
    assert torch.equal(out['image'].isfinite(), seen[..., None, None].expand(400, 3, 4, 2, 2))
    assert valid.flatten(1).any(1).all()
    # Its input stays as it was, and so does everything where nothing is dropped.
    nothing = SeriesDropout(date=0, sensor=0)(batch, (3, 1))
    for key, value in before.items():
        torch.testing.assert_close(batch[key], value, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(nothing[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ('date', 'sensor', 'kept', 'share', 'error'),
    [
        # Either sensor is kept in one half, and each of the six dates in a sixth.
        (0, 1, 3, 1 / 2, 0.023),
        (1, 0, 1, 1 / 6, 0.017),
        # Gone alone, or with the other and then not the one that is kept: 0.4 - 0.4^2 / 2.
        (0, 0.4, None, 1 - 0.32, 0.021),
        (0.2, 0, None, 1 - 0.2, 0.018),
    ],
)
def test_shares_of_what_is_dropped(
    date: float, sensor: float, kept: int | None, share: float, error: float
) -> None:
    """Errors are at least four standard deviations of 8000 draws."""
    torch.manual_seed(0)
    valid = SeriesDropout(date, sensor)(observed(8000), (3, 1))['valid']
    if kept:
        assert (valid.flatten(1).sum(1) == kept).all()
    assert ((valid.float().mean(0) - share).abs() < error).all()


def test_the_only_sensor_and_the_only_date_stay() -> None:
    batch = observed(100, [[False, False], [False, True], [False, False]])
    out = SeriesDropout(date=1, sensor=1)(batch, (3, 1))
    assert torch.equal(out['valid'], batch['valid'])
    nothing = SeriesDropout(date=1, sensor=1)(observed(3, False), (3, 1))
    assert not nothing['valid'].any()


@pytest.mark.parametrize('kind', ['drop', 'move'])
def test_the_seed_decides(kind: str) -> None:
    def once() -> torch.Tensor:
        torch.manual_seed(3)
        if kind == 'move':
            return torch.as_tensor(AugmentSeries()(coded_batch(8, 6, 6))['mask'])
        return torch.as_tensor(SeriesDropout(0.5, 0.5)(observed(64), (3, 1))['valid'])

    assert torch.equal(once(), once())


@pytest.mark.parametrize(
    'transform',
    [
        AugmentSeries(),
        lambda sample: NormalizeSeries([0.0] * 4, [1.0] * 4)(sample, (3, 1)),
        lambda sample: SeriesDropout()(sample, (3, 1)),
        lambda sample: DayOfYear()(sample, (3, 1)),
    ],
)
def test_a_sample_is_no_batch(transform: Any) -> None:
    """As many dates as rows: these could be taken for samples."""
    sample = {key: value[0] for key, value in observed(1).items()}
    sample['image'], sample['mask'] = torch.ones(3, 4, 3, 3), torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r'shape \(3, 4, 3, 3\), .* give a batch with one of \(B'):
        transform(sample)


@pytest.mark.parametrize(('date', 'sensor', 'name'), [(1.1, 0, 'date'), (0, -0.1, 'sensor')])
def test_dropout_refuses_what_is_no_probability(date: float, sensor: float, name: str) -> None:
    with pytest.raises(ValueError, match=f'{name} is .*; a probability lies in 0..1'):
        SeriesDropout(date, sensor)


def test_day_of_year_by_hand() -> None:
    """1 January is day 1, and 31 December of a leap year, in its last second, day 366."""
    stamps = ['2020-01-01T00:00:00', '2020-12-31T23:59:59', '2021-03-01T12:00:00']
    days = np.array([1, 366, 60])
    seconds = torch.from_numpy(np.array(stamps, 'datetime64[s]').astype(np.int64))
    times = torch.stack([seconds, torch.tensor([-1, -1, 86400])], 1)[None]
    image = torch.arange(3 * 4 * 6.0).view(1, 3, 4, 2, 3)
    out = DayOfYear()({'image': image, 'acquisition_times': times}, (3, 1))['image']
    assert out.shape == (1, 3, 8, 2, 3)
    assert torch.equal(out[:, :, [0, 1, 2, 5]], image)
    angle = 2 * np.pi * days / 365.25
    expected = np.stack([np.sin(angle), np.cos(angle)], 1)[..., None, None] * np.ones((2, 3))
    np.testing.assert_allclose(out[0, :, 3:5], expected, atol=1e-6)
    assert not out[0, :2, 6:].any()
    # 2 January 1970 is day 2.
    np.testing.assert_allclose(out[0, 2, 6, 0, 0], np.sin(4 * np.pi / 365.25), rtol=1e-5)


def test_observations_are_counted_pixel_by_pixel() -> None:
    image = torch.zeros(1, 3, 3, 1, 4)  # three dates, two bands of one sensor and one of another
    image[0, 0, 0, 0, 1] = torch.nan  # one band is left
    image[0, 0, :2, 0, 2] = torch.nan
    image[0, :, :, 0, 3] = torch.nan
    image[0, 1, 2, 0, 2] = torch.nan
    assert count_observations(image, [2, 1]).tolist() == [[[6, 6, 4, 0]]]
