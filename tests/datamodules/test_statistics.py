import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import ORIGINS, S1_DATES, S2_DATES, random_images, write_patch, write_raster

from torchgeo_s1s2.datamodules.statistics import Statistics, count_labels, statistics_path
from torchgeo_s1s2.datasets import ClassScheme, LandCoverClass, MonthlySeries, MultiSenGE
from torchgeo_s1s2.errors import ImplausibleValuesError, S1S2Warning

LABELS = np.array([[6] * 8, [2] * 8, [6] * 8, [0] * 8] * 2, np.uint8)


@pytest.fixture(scope='module')
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patches of noise with holes, and a date that the series does not use."""
    root, rng = tmp_path_factory.mktemp('noise'), np.random.default_rng(0)
    for x in (0, 9):
        s2, s1 = random_images(rng, 8).values()
        s2[S2_DATES[1]][:, :3] = -10000
        s1[S1_DATES[2]][1, 5:] = 0
        s2['20200730'] = np.full((10, 8, 8), 30000, np.int16)
        s1['20200610'] = np.full((2, 8, 8), 1e6, np.float32)
        write_patch(root, '31UEQ', x, 0, 8, s2, s1, LABELS)
    return root


def compute(root: Path, series: MonthlySeries | None = None, **options: Any) -> Statistics:
    return Statistics.compute(MultiSenGE(root, 'test', series, **options))


def series_in_numpy(root: Path) -> np.ndarray:
    """Channels and values (12, N) of the dates of the series, NaN without a value."""

    def stack(sensor: str, dates: tuple[str, ...]) -> np.ndarray:
        paths = (f'31UEQ_{d}_{sensor.upper()}_{x}_0.tif' for d, x in product(dates, (0, 9)))
        images = (rasterio.open(root / sensor / path).read().astype(float) for path in paths)
        return np.concatenate([image.reshape(len(image), -1) for image in images], axis=1)

    s2, s1 = stack('s2', S2_DATES), stack('s1', S1_DATES)
    s2[s2 == -10000] = np.nan
    s1[s1 == 0] = np.nan
    return np.concatenate([s2 / 10_000, 10 * np.log10(s1)])


def test_mean_and_std_are_of_the_dates_of_the_series_only(noise: Path) -> None:
    statistics = compute(noise)
    values = series_in_numpy(noise)
    np.testing.assert_allclose(statistics.mean, np.nanmean(values, 1), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, np.nanstd(values, 1), rtol=1e-5)
    assert statistics.bands == MultiSenGE.all_bands
    # Of 128 pixels 64 are arable, class 5, 32 sparse built-up, class 1, and 32 without a label.
    assert statistics.pixels == (0, 32, 0, 0, 0, 64, *[0] * 8)


def test_a_worker_reads_the_same(noise: Path) -> None:
    dataset = MultiSenGE(noise, 'test')
    assert Statistics.compute(dataset, 1) == Statistics.compute(dataset)


def test_a_band_that_varies_little_around_a_large_mean(tmp_path: Path) -> None:
    """0.9 and 0.9001 in turn: a sum of squares in single precision would lose the deviation."""
    image = np.where(np.indices((8, 8)).sum(0) % 2, 9000, 9001).astype(np.int16)
    write_patch(tmp_path, '31UEQ', size=8, s2=dict.fromkeys(S2_DATES, np.stack([image] * 10)))
    statistics = compute(tmp_path, sensors=['s2'])
    assert statistics.std[0] == pytest.approx(0.00005, rel=1e-3)


def test_a_band_of_one_value_is_told_and_not_divided_by_nothing(tmp_path: Path) -> None:
    image = random_images(np.random.default_rng(0), 8)['s2'][S2_DATES[0]]
    image[4] = 1000
    write_patch(tmp_path, '31UEQ', size=8, s2=dict.fromkeys(S2_DATES, image))
    with pytest.warns(S1S2Warning, match=r'one value in all .*: B06\. They tell nothing'):
        statistics = compute(tmp_path, sensors=['s2'])
    assert statistics.bands[4] == 'B06'
    assert (statistics.mean[4], statistics.std[4]) == (pytest.approx(0.1), 1)


PUBLISHED = 365.65572762, 42.46117546, 71.36785131, 350.52613946, 168.5718001, 1.41730604
"""The weights of Wenger et al. 2023 for 6 classes."""


@pytest.mark.parametrize(
    ('pixels', 'expected'),
    [
        # 1/1, 1/2 and 1/4 have the sum 7/4.
        ((100, 200, 0, 400), (4000 / 7, 2000 / 7, 0, 1000 / 7)),
        (tuple(round(1e9 / weight) for weight in PUBLISHED), PUBLISHED),
    ],
)
def test_class_weights_by_hand(pixels: tuple[int, ...], expected: tuple[float, ...]) -> None:
    weights = Statistics((), (), (), pixels).class_weights
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match='no training pixel has a label'):
        _ = Statistics((), (), (), (0, 0)).class_weights


def test_a_file_beside_the_data_is_written_once_and_used(noise: Path) -> None:
    dataset = MultiSenGE(noise, 'test', sensors=['s1'])
    path = statistics_path(dataset)
    assert path.parent == noise
    first = Statistics.beside(dataset)
    content = json.loads(path.read_text())
    assert content['bands'] == ['VV', 'VH']
    assert content['labels'] == [[0, 32], [2, 32], [6, 64]]
    assert Statistics.load(path).std == first.std
    path.write_text(json.dumps(content | {'mean': [1.0, 2.0]}))
    assert Statistics.beside(dataset).mean == (1.0, 2.0)
    path.write_text(json.dumps({key: content[key] for key in content if key != 'labels'}))
    assert Statistics.beside(dataset) == first
    assert [p.name for p in noise.glob('statistics_*')] == [path.name]


def test_another_process_has_the_same_file(noise: Path) -> None:
    """What tells settings apart holds no address of this process."""
    dataset = MultiSenGE(noise, 'test')
    assert ' at 0x' not in repr([dataset.series, dataset.readings])


def test_other_settings_have_another_file(noise: Path) -> None:
    datasets = [
        MultiSenGE(noise, 'test'),
        MultiSenGE(noise, 'test', sensors=['s2']),
        MultiSenGE(noise, 'test', raw=True),
        MultiSenGE(noise, 'test', offset=-100),
        MultiSenGE(noise, 'test', nodata={'s2': 0}),
        MultiSenGE(noise, 'test', series=MonthlySeries(months=(7, 8))),
        MultiSenGE(noise, 'test', series=MonthlySeries(s1_per_slot=2)),
    ]
    assert len({statistics_path(dataset) for dataset in datasets}) == 7
    for same in (MultiSenGE(noise, 'all'), MultiSenGE(noise, 'test', classes=10)):
        assert statistics_path(same) == statistics_path(datasets[0])


def add_30(folder: Path) -> None:
    for path in folder.iterdir():
        with rasterio.open(path, 'r+') as dst:
            dst.write(dst.read() + 30)


def add_a_nearer_date(root: Path) -> None:
    path = root / 's1' / f'31UEQ_{S2_DATES[0]}_S1_0_0.tif'
    write_raster(path, np.full((2, 8, 8), 1, np.float32), *ORIGINS['31UEQ'])


def tag_labels_beside(root: Path) -> None:
    path = root / 'ground_reference' / '31UEQ_GR_0_0.tif.aux.xml'
    band = '<PAMRasterBand band="1"><NoDataValue>6</NoDataValue></PAMRasterBand>'
    path.write_text(f'<PAMDataset>{band}</PAMDataset>')


@pytest.mark.filterwarnings('ignore:.*no label file names')
@pytest.mark.parametrize(
    ('change', 'bands'),
    [
        (tag_labels_beside, {1}),
        (lambda root: add_30(root / 's2'), {10, 2, 1}),
        (add_a_nearer_date, {10, 2, 1}),
        (lambda root: add_30(root / 'ground_reference'), {1}),
        (lambda root: None, set()),
    ],
)
def test_statistics_follow_the_files_that_made_them(
    tmp_path: Path,
    windows_read: list[tuple[int, ...]],
    change: Callable[[Path], None],
    bands: set[int],
) -> None:
    write_patch(tmp_path, '31UEQ', size=8, **random_images(np.random.default_rng(0), 8, 4000))
    before = Statistics.beside(MultiSenGE(tmp_path, 'test'))
    change(tmp_path)
    del windows_read[:]
    after = Statistics.beside(MultiSenGE(tmp_path, 'test'))
    assert {shape[0] for shape in windows_read} == bands
    assert (after != before) == bool(bands)
    assert after == compute(tmp_path)


def test_a_link_to_nothing_is_left_out(tmp_path: Path) -> None:
    write_patch(tmp_path, '31UEQ', size=8)
    path = tmp_path / 's1' / '31UEQ_20200904_S1_0_0.tif'
    path.unlink()
    path.symlink_to('/nowhere')
    dataset = MultiSenGE(tmp_path, 'test')
    with pytest.warns(S1S2Warning, match=f'{path} cannot be read.*Another date takes its place'):
        statistics = Statistics.beside(dataset)
    assert statistics.mean[-2:] == pytest.approx((-10, -20), abs=1e-3)


@pytest.mark.filterwarnings('ignore:.*cannot be read')
@pytest.mark.parametrize('num_workers', [0, 1])
def test_statistics_follow_what_takes_the_place_of_an_unreadable_image(
    tmp_path: Path, num_workers: int, windows_read: list[tuple[int, ...]]
) -> None:
    power = np.full((2, 8, 8), 0.1, np.float32)
    write_patch(tmp_path, '31UEQ', size=8, s1=dict.fromkeys((*S1_DATES, '20200920'), power))
    damaged, other = (
        tmp_path / 's1' / f'31UEQ_{day}_S1_0_0.tif' for day in ('20200904', '20200920')
    )
    damaged.write_bytes(b'damaged')

    def mean() -> float:
        dataset = MultiSenGE(tmp_path, 'test', sensors=['s1'])
        return Statistics.beside(dataset, num_workers).mean[0]

    assert mean() == pytest.approx(-10, abs=1e-3)
    del windows_read[:]
    assert mean() == pytest.approx(-10, abs=1e-3)
    assert not windows_read
    write_raster(other, 1e4 * power, *ORIGINS['31UEQ'])
    assert mean() == pytest.approx((3 * -10 + 30) / 4, abs=1e-3)


def test_other_classes_read_nothing(noise: Path, windows_read: list[tuple[int, ...]]) -> None:
    first = Statistics.beside(MultiSenGE(noise, 'test'))
    del windows_read[:]
    wood = LandCoverClass('Wood', 'green', (6,))
    schemes: dict[Any, tuple[int, ...]] = {6: (0, 32, 0, 0, 0, 64), ClassScheme((wood,)): (64,)}
    for classes, pixels in schemes.items():
        other = Statistics.beside(MultiSenGE(noise, 'test', classes=classes))
        assert other.pixels == pixels
        assert other.mean == first.mean
    assert not windows_read


def test_what_has_no_label_is_not_counted(tmp_path: Path) -> None:
    """A tag, and a patch without a label raster; windows of 512 do not share a pixel."""
    labels = np.repeat([[6, 255]], 300, 1).repeat(16, 0).astype(np.uint8)
    labels = np.pad(labels, ((0, 600 - 16), (0, 0)), constant_values=255)
    write_patch(tmp_path, '31UEQ', size=600, labels=labels, labels_options={'nodata': 255})
    write_patch(tmp_path, '31UEQ', 700, size=8)
    (tmp_path / 'ground_reference' / '31UEQ_GR_700_0.tif').unlink()
    with pytest.warns(S1S2Warning, match='1 of ground_reference'):
        dataset = MultiSenGE(tmp_path, 'test', MonthlySeries(months=(7,)))
    assert count_labels(dataset) == [[6, 16 * 300]]


def test_statistics_are_made_window_by_window(
    tmp_path: Path, windows_read: list[tuple[int, ...]]
) -> None:
    write_patch(tmp_path, '31UEQ', size=600)
    statistics = compute(tmp_path, MonthlySeries(months=(7,)))
    sizes = {shape[1:] for shape in windows_read}
    assert sizes == {(512, 512), (512, 88), (88, 512), (88, 88)}
    # Columns are 0..599, times 1e-4: the mean is 299.5, the variance (600 ** 2 - 1) / 12.
    assert statistics.mean[0] == pytest.approx(0.02995)
    assert statistics.std[0] == pytest.approx(1e-4 * np.sqrt((600**2 - 1) / 12))
    assert statistics.labels == ((2, 180_000), (6, 180_000))


@pytest.mark.parametrize(
    'content',
    [
        '',
        '[]',
        '{"bands": ["VV"]}',
        '{"bands": ["VV"], "mean": 1, "std": [1], "pixels": [1]}',
        '{"bands": ["VV"], "mean": [1, 2], "std": [1], "pixels": [1]}',
        '{"bands": ["VV"], "mean": ["x"], "std": [1], "pixels": [1]}',
        '{"bands": ["VV"], "mean": [1], "std": [0], "pixels": [1]}',
        '{"bands": ["VV"], "mean": [Infinity], "std": [1], "pixels": [1]}',
        '{"bands": ["VV"], "mean": [1], "std": [NaN], "pixels": [1]}',
    ],
)
def test_malformed_file_names_itself(tmp_path: Path, content: str) -> None:
    path = tmp_path / 'statistics_0.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=r'is not a file of statistics.*delete it') as error:
        Statistics.load(path)
    assert str(path) in str(error.value)


def test_a_band_without_a_value_is_named(tmp_path: Path) -> None:
    dark = np.stack([np.ones((8, 8), np.float32), np.zeros((8, 8), np.float32)])
    write_patch(tmp_path, '31UEQ', size=8, s1=dict.fromkeys(S1_DATES, dark))
    with pytest.raises(ValueError, match=r"bands \['VH'\] have no value in the 1 training patches"):
        compute(tmp_path)


LATE, LOWEST = '20200904', float(np.finfo('float32').min)
KINDS: dict[str, tuple[str, str, Callable[[np.ndarray, str], Any], dict, str, dict]] = {
    'reflectance': (
        's2', 'float32', lambda v, d: v * 1e-4, {}, 'unit="reflectance"', {'unit': 'reflectance'},
    ),
    'dn, said to be reflectance': (
        's2', 'int16', lambda v, d: v, {'unit': 'reflectance'}, 'give unit="dn"', {'unit': 'dn'},
    ),
    'baseline 04.00': (
        's2', 'uint16', lambda v, d: v + 1000, {}, 'offset=-1000', {'offset': -1000},
    ),
    'baseline 04.00 from a day on': (
        's2', 'uint16', lambda v, d: v + 1000 * (d >= LATE), {},
        "the first of 2020-09-04.*offset={'2020-09-04': -1000}", {'offset': {'2020-09-04': -1000}},
    ),
    'bright ground': (
        's2', 'uint16', lambda v, d: v + 1000, {}, 'offset=0', {'offset': 0},
    ),
    'an offset too much': (
        's2', 'int16', lambda v, d: v // 10, {'offset': -1000}, 'leave offset out', {},
    ),
    'no data without a tag': (
        's2', 'int16', lambda v, d: np.where(np.arange(8) < 3, -9999, v), {},
        "nodata={'s2': -9999}", {'nodata': {'s2': -9999}},
    ),
    'zeros without a tag': (
        's2', 'int16', lambda v, d: np.where(np.arange(8) < 3, 0, v), {},
        "37.5% of the pixels of Sentinel-2 hold 0 in all bands.*nodata={'s2': 0}",
        {'nodata': {'s2': 0}},
    ),
    'zeros without a tag below an offset': (
        's2', 'int16', lambda v, d: np.where(np.arange(8) < 3, 0, v + 1000), {'offset': -1000},
        "hold 0 in all bands", {'nodata': {'s2': 0}, 'offset': -1000},
    ),
    'the highest number of 16 bits': (
        's2', 'float32', lambda v, d: np.where(np.arange(8) < 1, 32767, v * 1.0), {},
        "nodata={'s2': 32767}", {'nodata': {'s2': 32767}},
    ),
    'no data without a tag below an offset': (
        's2', 'int16', lambda v, d: np.where(np.arange(8) < 1, -9999, v + 1000), {'offset': -1000},
        "nodata={'s2': -9999}", {'nodata': {'s2': -9999}, 'offset': -1000},
    ),
    'the lowest number': (
        's2', 'float32', lambda v, d: np.where(np.arange(8) < 3, LOWEST, v), {},
        r"nodata={'s2': -3.40282e\+38}", {'nodata': {'s2': -3.40282e38}},
    ),
    'the highest whole number': (
        's2', 'int32', lambda v, d: np.where(np.arange(8) < 3, 2**31 - 1, v * 1.0), {},
        r"nodata={'s2': 2.14748e\+09}", {'nodata': {'s2': 2.14748e9}},
    ),
    'the highest number of Sentinel-1': (
        's1', 'float32', lambda v, d: np.where(np.arange(8) < 1, -LOWEST, v), {},
        r"nodata={'s1': 3.40282e\+38}", {'nodata': {'s1': 3.40282e38}},
    ),
    'dB': (
        's1', 'float32', lambda v, d: 10 * np.log10(v), {}, "unit={'s1': 'db'}", {'unit': 'db'},
    ),
    'power, said to be dB': (
        's1', 'float32', lambda v, d: v, {'unit': 'db'}, 'unit="linear"', {'unit': 'linear'},
    ),
    'amplitude': (
        's1', 'uint16', lambda v, d: 1000 * np.sqrt(v), {}, 'unit="amplitude"',
        {'unit': 'amplitude'},
    ),
    'VH before VV': (
        's1', 'float32', lambda v, d: v * np.array([0.1, 1])[:, None, None], {},
        r"VH is above VV, .* file_bands={'s1': \['VH', 'VV'\]}",
        {'file_bands': {'s1': ['VH', 'VV']}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ('sensor', 'dtype', 'spoil', 'given', 'advice', 'mended'), KINDS.values(), ids=KINDS.keys()
)
def test_implausible_values_are_refused_with_advice_that_helps(
    tmp_path: Path,
    sensor: str,
    dtype: str,
    spoil: Callable[[np.ndarray, str], Any],
    given: dict[str, Any],
    advice: str,
    mended: dict[str, Any],
) -> None:
    for x in (0, 9):
        images = random_images(np.random.default_rng(x), 8, 4000)
        images[sensor] = {d: spoil(v, d).astype(dtype) for d, v in images[sensor].items()}
        write_patch(tmp_path, '31UEQ', x, 0, 8, **images)
    with pytest.raises(ImplausibleValuesError, match=advice):
        compute(tmp_path, **given)
    compute(tmp_path, **mended)


def test_colours_are_no_reflectance(tmp_path: Path) -> None:
    images = random_images(np.random.default_rng(0), 8, 4000)
    images['s2'] = {d: (v // 16).astype(np.uint8) for d, v in images['s2'].items()}
    write_patch(tmp_path, '31UEQ', 0, 0, 8, **images)
    with pytest.raises(ImplausibleValuesError, match=r'no value above 255.*colours of 8 bits'):
        compute(tmp_path)


def test_an_offset_of_some_images_is_told(tmp_path: Path) -> None:
    for x, offset in ((0, 0), (9, 1000)):
        images = random_images(np.random.default_rng(x), 8, 4000)
        images['s2'] = {d: v + np.int16(offset) for d, v in images['s2'].items()}
        write_patch(tmp_path, '31UEQ', x, 0, 8, **images)
    with pytest.warns(S1S2Warning, match=r'in 4 of 8 Sentinel-2 images .*gdal_edit -offset -1000'):
        compute(tmp_path)


@pytest.mark.parametrize('days', [S2_DATES, S2_DATES[:1]])
def test_usual_values_of_any_ground_are_taken(tmp_path: Path, days: tuple[str, ...]) -> None:
    """Water, snow, a desert and a wood; a uniform image tells nothing of an offset."""
    rng = np.random.default_rng(0)
    grounds = {'water': (10, 400), 'snow': (300, 12000), 'desert': (800, 5000), 'wood': (100, 3000)}
    for low, high in grounds.values():
        image = {d: rng.integers(low, high, (10, 8, 8)).astype(np.int16) for d in days}
        write_patch(tmp_path, '31UEQ', size=8, s2=image)
        compute(tmp_path, MonthlySeries(months=(7,)) if len(days) == 1 else MonthlySeries())
