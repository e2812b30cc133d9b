import math
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from conftest import ORIGINS, S1_DATES, S2_DATES, write_patch
from pyproj import CRS, Transformer
from rasterio.enums import Resampling
from rasterio.warp import reproject
from torch.utils.data import DataLoader
from torchgeo.datasets import stack_samples
from torchgeo.samplers import (
    GriddedPatchSampler,
    RandomPatchSampler,
    RandomPeriodSampler,
    RandomTimedeltaSampler,
    SequentialPeriodSampler,
    SequentialTimedeltaSampler,
)

from torchgeo_s1s2.datasets import (
    AllDates,
    DateRule,
    EvenlySpaced,
    MonthlySeries,
    MultiSenGE,
    RandomDates,
)
from torchgeo_s1s2.errors import S1S2Warning

LABELS_6_2 = torch.where(torch.arange(32) < 16, 5, 1).expand(32, 32)


def seconds(dates: tuple[str, ...]) -> list[int]:
    return [int(pd.Timestamp(d, tz='UTC').timestamp()) for d in dates]


def test_patch_by_number(two_zones: Path) -> None:
    dataset = MultiSenGE(two_zones, split='test')
    sample = dataset[1]
    image = sample['image']
    assert image.shape == (4, 12, 32, 32)
    t, b = torch.meshgrid(torch.arange(4), torch.arange(10), indexing='ij')
    expected = (1000 * t + 100 * b)[..., None, None] + torch.arange(32)
    torch.testing.assert_close(image[:, :10], (expected * 1e-4).expand(4, 10, 32, 32))
    torch.testing.assert_close(image[:, 10], torch.full((4, 32, 32), -10.0))
    torch.testing.assert_close(image[:, 11], torch.full((4, 32, 32), -20.0))
    assert torch.equal(sample['mask'], LABELS_6_2)
    assert sample['valid'].all()
    assert sample['acquisition_times'].T.tolist() == [seconds(S2_DATES), seconds(S1_DATES)]
    assert sample['transform'].tolist() == [10, 0, 500330, 0, -10, 5500000, 0, 0, 1]
    assert sample['bounds'][:6].tolist() == [500330, 500650, 10, 5499680, 5500000, 10]
    # To the end of the last day, as TorchGeo has it.
    first, after = seconds(('20200704', '20201112'))
    assert sample['bounds'][6:].tolist() == pytest.approx([first, after - 1e-6, 1])
    assert sample['crs'] == 32631
    assert sample['index'] == 1
    assert dataset.name(1) == '31UEQ_33_0'


def test_patches_of_two_zones_keep_their_grids(two_zones: Path) -> None:
    dataset = MultiSenGE(two_zones, split='all', transforms=lambda s: s | {'mask': -s['mask']})
    assert dataset.crs == CRS.from_epsg(32631)
    assert [int(dataset[i]['crs']) for i in range(3)] == [32631, 32631, 32632]
    assert dataset[-1]['transform'][2] == 300000
    torch.testing.assert_close(dataset[2]['image'], dataset[0]['image'])
    assert torch.equal(dataset[2]['mask'], -LABELS_6_2)
    for index in (3, -4):
        with pytest.raises(IndexError, match=f'index: {index} not found'):
            dataset[index]
    with pytest.raises(TypeError, match='float'):
        dataset[0.5]


@pytest.mark.parametrize(
    ('options', 'channels'),
    [
        ({'sensors': ['s1']}, [10, 11]),
        ({'sensors': ['s2']}, list(range(10))),
        ({'sensors': ['s1', 's2']}, list(range(12))),
        ({'bands': ['VH', 'B08', 'B02']}, [0, 6, 11]),
    ],
)
def test_sensors_and_bands(two_zones: Path, options: dict[str, Any], channels: list[int]) -> None:
    everything = MultiSenGE(two_zones, split='test')[0]
    chosen = MultiSenGE(two_zones, split='test', **options)[0]
    assert torch.equal(chosen['image'], everything['image'][:, channels])
    sensors = sorted({int(c >= 10) for c in channels})
    assert torch.equal(chosen['valid'], everything['valid'][:, sensors])
    assert torch.equal(chosen['acquisition_times'], everything['acquisition_times'][:, sensors])


def test_several_s1_images_are_averaged_in_linear_power(tmp_path: Path) -> None:
    powers = {'20200705': 0.1, '20200707': 0.5, '20200708': 0.01}
    s1 = {day: np.full((2, 8, 8), power, np.float32) for day, power in powers.items()}
    s1['20200707'][:, 0, 0] = 0
    write_patch(tmp_path, '31UEQ', size=8, s1=s1)
    series = MonthlySeries(months=(7,), s1_per_slot=2)
    image = MultiSenGE(tmp_path, split='test', series=series)[0]['image']
    assert image[0, 10, 4, 4] == pytest.approx(10 * np.log10(0.3), abs=1e-5)
    assert image[0, 10, 0, 0] == pytest.approx(-10, abs=1e-5)
    # Of those that can be read, if one cannot.
    (tmp_path / 's1' / '31UEQ_20200707_S1_0_0.tif').write_bytes(b'')
    with pytest.warns(S1S2Warning, match='20200707_S1'):
        image = MultiSenGE(tmp_path, 'test', series)[0]['image']
    assert image[0, 10, 4, 4] == pytest.approx(10 * np.log10(0.055), abs=1e-5)


def test_window_over_two_patches_is_a_mosaic(two_zones: Path) -> None:
    """Columns 22..31 of one patch, the pixel between them, and 0..8 of the next."""
    dataset = MultiSenGE(two_zones, split='test')
    window = dataset[500220:500420, 5499680:5500000]
    left, right = dataset[0], dataset[1]
    assert window['image'].shape == (4, 12, 32, 20)
    torch.testing.assert_close(window['image'][..., :10], left['image'][..., 22:])
    assert window['image'][..., 10].isnan().all()
    torch.testing.assert_close(window['image'][..., 11:], right['image'][..., :9])
    assert (window['mask'][:, 10] == 255).all()
    assert torch.equal(window['mask'][:, :10], left['mask'][:, 22:])


def test_window_in_another_crs_agrees_with_rasterio(two_zones: Path) -> None:
    crs = CRS.from_epsg(32632)
    dataset = MultiSenGE(two_zones, split='test', crs=crs)
    x, y, _ = dataset.bounds
    assert x.start % 10 == 0
    sample = dataset[x.start : x.stop, y.start : y.stop]
    expected = np.full(sample['mask'].shape, 255, np.uint8)
    for name in ('31UEQ_GR_0_0.tif', '31UEQ_GR_33_0.tif'):
        with rasterio.open(two_zones / 'ground_reference' / name) as src:
            reproject(
                rasterio.band(src, 1),
                expected,
                dst_crs=crs.to_wkt(),
                dst_transform=rasterio.Affine(*sample['transform'][:6].tolist()),
                dst_nodata=255,
                init_dest_nodata=False,
                resampling=Resampling.nearest,
            )
    assert np.array_equal(sample['mask'], dataset.classes.remap(expected))
    labelled = sample['mask'] != 255
    assert 2 * 32 * 32 * 0.95 < labelled.sum() < 2 * 32 * 32 * 1.05
    assert sample['image'][:, 10][:, labelled].nanmean() == pytest.approx(-10, abs=1e-3)


@pytest.mark.parametrize(
    ('x', 'message'),
    [
        (slice(300000, 300080, 0), 'expected finite bounds and resolutions above 0'),
        (slice(300080, 300000, -10), 'expected finite bounds and resolutions above 0'),
        (slice(300000, math.inf, 10), 'expected finite bounds and resolutions above 0'),
        (slice(500000, 500004), 'holds no pixel of 10'),
        (slice(0, 100), 'not found in dataset with bounds'),
    ],
)
def test_windows_that_are_none_are_refused(two_zones: Path, x: slice, message: str) -> None:
    dataset = MultiSenGE(two_zones, split='test')
    with pytest.raises(IndexError, match=message):
        dataset[x]


SAMPLERS: dict[str, Callable[[MultiSenGE], Any]] = {
    'random': lambda ds: RandomPatchSampler(ds, size=8, length=4),
    'gridded': lambda ds: GriddedPatchSampler(ds, size=16, stride=16),
    'random timedelta': lambda ds: (
        RandomPatchSampler(ds, size=8, length=4)
        @ RandomTimedeltaSampler(ds, delta=pd.Timedelta('60D'), length=4)
    ),
    'sequential timedelta': lambda ds: (
        GriddedPatchSampler(ds, size=16, stride=16)
        @ SequentialTimedeltaSampler(ds, delta=pd.Timedelta('90D'), stride=pd.Timedelta('90D'))
    ),
    'random period': lambda ds: (
        RandomPatchSampler(ds, size=8, length=4) @ RandomPeriodSampler(ds, freq='Q', length=4)
    ),
    'sequential period': lambda ds: (
        GriddedPatchSampler(ds, size=32, stride=32) @ SequentialPeriodSampler(ds, freq='M')
    ),
}
RULES = (
    MonthlySeries(missing='keep'),
    EvenlySpaced(n=2, missing='keep'),
    RandomDates(n=2, missing='keep'),
    AllDates(max_length=3, missing='keep'),
)


@pytest.fixture(scope='module')
def shared_zones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patches of zone 31 and one of zone 32 beside them, so that random windows hit one."""
    root = tmp_path_factory.mktemp('zones')
    x, y = Transformer.from_crs(32631, 32632).transform(500700, 5500000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ORIGINS, '32ULU', (32632, round(x, -1), round(y, -1)))
        for tile, column in (('31UEQ', 0), ('31UEQ', 33), ('32ULU', 0)):
            write_patch(root, tile, column)
    return root


@pytest.mark.parametrize(
    ('sampler', 'rule'),
    [*zip(SAMPLERS.values(), cycle(RULES)), *zip([*SAMPLERS.values()][2:], RULES, strict=True)],
)
def test_samplers_of_torchgeo(
    shared_zones: Path, sampler: Callable[[MultiSenGE], Any], rule: DateRule
) -> None:
    dataset = MultiSenGE(shared_zones, split='all', series=rule)
    batches = list(DataLoader(dataset, 2, sampler=sampler(dataset), collate_fn=stack_samples))
    assert len(batches) >= 2
    assert {batch['image'].shape[1:3] for batch in batches} == {(rule.length, 12)}
    assert torch.cat([(batch['mask'] != 255).flatten() for batch in batches]).any()
    bounds = torch.cat([batch['bounds'] for batch in batches])
    times = torch.cat([batch['acquisition_times'] for batch in batches])
    seen = times >= 0
    assert seen.any()
    assert (times >= bounds[:, 6, None, None])[seen].all()
    assert (times <= bounds[:, 7, None, None])[seen].all()


def test_a_period_is_chosen_from_as_if_there_were_no_other_dates(shared_zones: Path) -> None:
    window = slice(500000, 500320), slice(5499680, 5500000), slice(pd.Timestamp(2020, 8, 1), None)
    s2, s1 = seconds(S2_DATES), seconds(S1_DATES)
    expected: dict[DateRule, list[int]] = {
        MonthlySeries(missing='keep'): [-1, *s2[1:]],
        EvenlySpaced(n=2): [s2[1], s2[3]],
        EvenlySpaced(n=3): s2[1:],
        AllDates(max_length=5): [*s2[1:], -1, -1],
        RandomDates(n=3): s2[1:],
    }
    for rule, times in expected.items():
        sample = MultiSenGE(shared_zones, split='test', series=rule)[window]
        assert sample['acquisition_times'][:, 0].tolist() == times
        assert s1[0] not in sample['acquisition_times'][:, 1]
        with_a_value = sample['image'][:, [0, 10]].isfinite().float().mean((2, 3))
        assert torch.equal(with_a_value, sample['valid'].float())
    with pytest.raises(IndexError, match='no S2 date for July'):
        MultiSenGE(shared_zones, split='test')[window]


def test_a_crop_and_a_window_read_no_more_than_they_show(
    two_zones: Path, windows_read: list[tuple[int, ...]]
) -> None:
    dataset = MultiSenGE(two_zones, split='test')
    dataset.check(1)
    assert windows_read == [(10, 1, 1)] * 4 + [(2, 1, 1)] * 4 + [(1, 1, 1)]
    del windows_read[:]
    crop = dataset.crop(1, 3, 20, 5, 7)
    assert windows_read == [(10, 5, 7)] * 4 + [(2, 5, 7)] * 4 + [(1, 5, 7)]
    whole = dataset[1]
    assert torch.equal(crop['image'], whole['image'][:, :, 3:8, 20:27])
    assert torch.equal(crop['mask'], whole['mask'][3:8, 20:27])
    assert crop['transform'].tolist()[:6] == [10, 0, 500530, 0, -10, 5499970]
    del windows_read[:]
    beyond = dataset.crop(1, 30, 30, 4, 4)  # of which two by two pixels are there
    assert set(windows_read) == {(10, 2, 2), (2, 2, 2), (1, 2, 2)}
    assert beyond['image'].isfinite().sum() == 4 * 12 * 4
    assert (beyond['mask'] != 255).sum() == 4
    del windows_read[:]
    window, whole = dataset[500050:500150, 5499800:5499950], dataset[0]
    assert set(windows_read[:9]) == {(10, 15, 10), (2, 15, 10), (1, 15, 10)}
    assert torch.equal(window['image'], whole['image'][:, :, 5:20, 5:15])
    assert torch.equal(window['mask'], whole['mask'][5:20, 5:15])
    assert window['transform'][:6].tolist() == [10, 0, 500050, 0, -10, 5499950]
    assert torch.equal(window['acquisition_times'], whole['acquisition_times'])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    'cut short': lambda content: content[: len(content) // 2],
    'no raster': lambda content: b'no raster',
    'empty': lambda content: b'',
}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES.keys())
def test_an_image_that_cannot_be_read_is_left_out_if_there_is_another(
    two_zones: Path, damage: Callable[[bytes], bytes]
) -> None:
    """The Sentinel-1 image of September; those of August and November are 28 and 68 days off."""
    path = two_zones / 's1' / '31UEQ_20200904_S1_0_0.tif'
    path.write_bytes(damage(path.read_bytes()))
    dataset = MultiSenGE(two_zones, split='test')
    with pytest.warns(S1S2Warning, match=rf'{path} cannot be read.*Another date takes its place'):
        sample = dataset[0]
    august = [S1_DATES[0], S1_DATES[1], S1_DATES[1], S1_DATES[3]]
    with warnings.catch_warnings(action='error', category=S1S2Warning):  # said once
        for again in (sample, dataset[0], dataset[500000:500320, 5499680:5500000]):
            assert again['acquisition_times'][:, 1].tolist() == seconds(tuple(august))
            assert again['valid'].all()
            assert again['image'].isfinite().all()


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize(
    'name', ['s2/31UEQ_20200904_S2_0_0.tif', 'ground_reference/31UEQ_GR_0_0.tif']
)
def test_what_has_no_substitute_names_itself(
    two_zones: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    dataset, path = MultiSenGE(two_zones, split='test'), two_zones / name
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        with pytest.raises(OSError, match='Fetch the file again') as error:
            dataset[0]
        assert str(path) in str(error.value)
        assert 'previous exception' not in str(error.value)
    assert dataset[1]['valid'].all()


def test_plot_shows_series_classes_and_legend(two_zones: Path) -> None:
    dataset = MultiSenGE(two_zones, split='test')
    sample = dataset[0]
    figure = dataset.plot(sample | {'prediction': sample['mask'] * 0 + 10}, suptitle='Patch')
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles[:4] == ['S2 2020-07-06', 'S2 2020-08-05', 'S2 2020-09-04', 'S2 2020-11-08']
    assert titles[4] == 'S1 2020-07-04'
    assert titles[8:] == ['Mask', 'Prediction']
    legend = figure.axes[10].get_legend()
    assert legend is not None
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ['Sparse Built-Up', 'Arable Lands', 'Forests']
    mask = figure.axes[8].images[0]
    assert mask.cmap(mask.norm(np.array(5))) == dataset.classes.cmap(5)


def test_plot_of_a_band_that_is_missing_and_of_half_precision(two_zones: Path) -> None:
    """Sentinel-1 of one polarisation, as ``precision: bf16-true`` hands it to callbacks."""
    dataset = MultiSenGE(two_zones, split='test', sensors=['s1'])
    image = torch.stack([torch.arange(-9.0, -1).repeat(4, 8, 1), torch.full((4, 8, 8), np.nan)], 1)
    with warnings.catch_warnings(action='error'):
        figure = dataset.plot({'image': image.bfloat16()})
    red, green, blue = np.moveaxis(np.asarray(figure.axes[0].images[0].get_array()), -1, 0)
    assert red[0] == pytest.approx(np.arange(8) / 7)
    assert not green.any()
    assert not blue.any()
