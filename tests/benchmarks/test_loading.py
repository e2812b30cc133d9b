import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from benchmarks import loading, startup
from torchgeo_s1s2.datasets import MultiSenGE, pack
from torchgeo_s1s2.datasets.synthetic import write_synthetic


@pytest.fixture(scope='module')
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('loading')
    write_synthetic(folder / 'data', 16, {'31UFQ': 2}, incomplete=0, progress=False)
    arguments = ['--root', str(folder / 'data'), '--output', str(folder / 'out')]
    loading.main([*arguments, '--rounds', '1', '--passes', '2', '--starts', '60', '120'])
    return folder / 'out'


def results(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / 'results.json').read_text())
    return content


def test_the_table_holds_every_reader_and_epoch(output: Path) -> None:
    content, text = results(output), (output / 'table.md').read_text()
    assert text.startswith('# Synthetic data')
    for r in content['reading']:
        assert f'| {r["reader"]} | {r["ms"]:.1f} | {r["ratio"]:.2f} |' in text
    base = next(r for r in content['reading'] if r['reader'] == loading.BASELINE)
    assert base['ratio'] == base['cpu_ratio'] == 1
    assert set(loading.TARGETS) < {r['reader'] for r in content['reading']}
    assert [e['workers'] for e in content['epochs']] == [0, 2, 0, 2]
    assert all(e['peak_mib'] > 0 and e['files'] > 2 for e in content['epochs'])
    starts = {(s['contestant'], s['images']) for s in content['starts']}
    assert len(starts) == 2 * len(startup.STARTS)
    assert '## Starting' in text
    assert (output / 'loading.png').stat().st_size < 60_000


def test_all_readers_see_the_same_pixels(output: Path) -> None:
    plain = MultiSenGE(output.parent / 'data', classes=10, raw=True)
    copy = pack(plain, output / 'raw', progress=False)
    packed = MultiSenGE(plain.root, classes=10, raw=True, packed=copy)
    by_rasterio, best, ours, ours_packed, series, everything = loading.readers(
        plain, packed
    ).values()
    for i in (0, 1):
        image = plain[i]['image'].numpy()
        for read in (by_rasterio, best):
            images: Any = read(i)
            assert np.array_equal(np.stack(images[:4]), image[:, :10])
            assert np.array_equal(np.stack(images[4:8]), image[:, 10:])
        for read in (ours, ours_packed):
            sample: Any = read(i)
            assert np.array_equal(sample['image'].numpy(), image)
        found: Any = series(i)
        (s2, s1), labels = found
        assert np.array_equal(s2['image'].numpy(), image[:, :10])
        assert np.array_equal(s1['image'].numpy(), image[:, 10:])
        with rasterio.open(loading.series_paths(plain, i)['ground_reference'][0]) as src:
            assert np.array_equal(labels['mask'].numpy(), src.read(1))
            assert np.array_equal(images[8], src.read())
        (s2, s1), _ = everything(i)  # type: ignore[misc]
        dates = [len(plain.catalog.times(i, sensor)) for sensor in ('s2', 's1')]
        assert [len(s2['image']), len(s1['image'])] == dates
        assert dates[1] > 20


def test_ratios_are_of_the_same_turn() -> None:
    """A clock that runs twice as fast in every other turn changes no ratio."""
    seconds = [0.0]
    clock = {'unit': 1.0}

    def reader(units: float) -> loading.Reader:
        def read(index: int) -> None:
            if units == 1:
                clock['unit'] = 3 - clock['unit']
            seconds[0] += units * clock['unit']

        return read

    contestants = {loading.BASELINE: reader(1), 'half': reader(0.5), 'triple': reader(3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading.time, 'perf_counter', lambda: seconds[0])
        patch.setattr(loading.time, 'process_time', lambda: 2 * seconds[0])
        rows = loading.measure_reading(contestants, patches=3, rounds=2)
    assert [r['ratio'] for r in rows] == [1, 0.5, 3]
    assert [r['cpu_ratio'] for r in rows] == [1, 0.5, 3]
    assert rows[1]['ms'] == pytest.approx(750)
