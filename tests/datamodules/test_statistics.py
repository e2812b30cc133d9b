import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import S1_DATES, S2_DATES, write_patch

from torchgeo_s1s2.datamodules.statistics import Statistics, statistics_path
from torchgeo_s1s2.datasets import MonthlySeries, MultiSenGE

LABELS = np.array([[6] * 8, [2] * 8, [6] * 8, [0] * 8] * 2, np.uint8)


@pytest.fixture(scope='module')
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patches of noise with holes, and a date that the series does not use."""
    root, rng = tmp_path_factory.mktemp('noise'), np.random.default_rng(0)
    for x in (0, 9):
        s2 = {d: rng.integers(1, 9000, (10, 8, 8)).astype(np.int16) for d in S2_DATES}
        s1 = {d: rng.uniform(0.01, 1, (2, 8, 8)).astype(np.float32) for d in S1_DATES}
        s2[S2_DATES[1]][:, :3] = -10000
        s1[S1_DATES[2]][1, 5:] = 0
        s2['20200730'] = np.full((10, 8, 8), 30000, np.int16)
        s1['20200610'] = np.full((2, 8, 8), 1e6, np.float32)
        write_patch(root, '31UEQ', x, 0, 8, s2, s1, LABELS)
    return root


def series_in_numpy(root: Path) -> np.ndarray:
    """Channels and values (12, N) of the dates of the series, NaN without a value."""
    import rasterio

    def stack(sensor: str, dates: tuple[str, ...]) -> np.ndarray:
        paths = [
            root / sensor / f'31UEQ_{d}_{sensor.upper()}_{x}_0.tif' for x in (0, 9) for d in dates
        ]
        images = []
        for path in paths:
            with rasterio.open(path) as src:
                images.append(src.read().astype(np.float64))
        return np.concatenate([image.reshape(len(image), -1) for image in images], axis=1)

    s2, s1 = stack('s2', S2_DATES), stack('s1', S1_DATES)
    s2[s2 == -10000] = np.nan
    s1[s1 == 0] = np.nan
    return np.concatenate([s2 / 10_000, 10 * np.log10(s1)])


def test_mean_and_std_are_of_the_dates_of_the_series_only(noise: Path) -> None:
    statistics = Statistics.compute(MultiSenGE(noise, 'test'), progress=False)
    values = series_in_numpy(noise)
    np.testing.assert_allclose(statistics.mean, np.nanmean(values, 1), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, np.nanstd(values, 1), rtol=1e-5)
    assert statistics.bands == MultiSenGE.all_bands
    # Of 128 pixels 64 are arable, class 5, 32 sparse built-up, class 1, and 32 without a label.
    assert statistics.pixels == (0, 32, 0, 0, 0, 64, *[0] * 8)


def test_a_worker_reads_the_same(noise: Path) -> None:
    dataset = MultiSenGE(noise, 'test')
    assert Statistics.compute(dataset, 1, False) == Statistics.compute(dataset, 0, False)


def test_a_band_that_varies_little_around_a_large_mean(tmp_path: Path) -> None:
    """0.9 and 0.9001 in turn: a sum of squares in single precision would lose the deviation."""
    image = np.where(np.indices((8, 8)).sum(0) % 2, 9000, 9001).astype(np.int16)
    write_patch(tmp_path, '31UEQ', size=8, s2=dict.fromkeys(S2_DATES, np.stack([image] * 10)))
    statistics = Statistics.compute(MultiSenGE(tmp_path, 'test', sensors=['s2']), progress=False)
    assert statistics.std[0] == pytest.approx(0.00005, rel=1e-3)


def test_class_weights_by_hand() -> None:
    """1/1, 1/2 and 1/4 have the sum 7/4, so the weights are 1000 * (4, 2, 1) / 7."""
    statistics = Statistics((), (), (), (100, 200, 0, 400))
    expected = torch.tensor([4000 / 7, 2000 / 7, 0, 1000 / 7])
    torch.testing.assert_close(statistics.class_weights, expected)


def test_class_weights_have_the_scale_of_the_published_ones() -> None:
    """The weights of Wenger et al. 2023 for 6 classes, from pixels in the proportion 1/weight."""
    published = torch.tensor(
        [365.65572762, 42.46117546, 71.36785131, 350.52613946, 168.5718001, 1.41730604]
    )
    pixels = (1e9 / published.double()).round().long()
    weights = Statistics((), (), (), tuple(pixels.tolist())).class_weights
    torch.testing.assert_close(weights, published, rtol=1e-6, atol=0)


def test_without_any_label_the_weights_say_so() -> None:
    with pytest.raises(ValueError, match='no training pixel has a label'):
        _ = Statistics((), (), (), (0, 0)).class_weights


def test_a_file_beside_the_data_is_written_once_and_used(noise: Path) -> None:
    dataset = MultiSenGE(noise, 'test', sensors=['s1'])
    path = statistics_path(dataset)
    assert path.parent == noise
    first = Statistics.beside(dataset)
    content = json.loads(path.read_text())
    assert content['bands'] == ['VV', 'VH']
    assert Statistics.load(path) == first
    path.write_text(json.dumps(content | {'mean': [1.0, 2.0]}))
    assert Statistics.beside(dataset).mean == (1.0, 2.0)
    assert [p.name for p in noise.glob('statistics_*')] == [path.name]


def test_other_settings_have_another_file(noise: Path) -> None:
    datasets = [
        MultiSenGE(noise, 'test'),
        MultiSenGE(noise, 'test', classes=10),
        MultiSenGE(noise, 'test', sensors=['s2']),
        MultiSenGE(noise, 'test', raw=True),
        MultiSenGE(noise, 'test', series=MonthlySeries(months=(7, 8))),
        MultiSenGE(noise, 'test', series=MonthlySeries(s1_per_slot=2)),
    ]
    assert len({statistics_path(dataset) for dataset in datasets}) == 6
    assert statistics_path(MultiSenGE(noise, 'all')) == statistics_path(datasets[0])


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
        Statistics.compute(MultiSenGE(tmp_path, 'test'), progress=False)
