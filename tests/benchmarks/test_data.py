import tarfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import results, write_label_file, write_raster

from benchmarks import data
from torchgeo_s1s2.datasets import MultiSenGE, copy_series
from torchgeo_s1s2.datasets.synthetic import write_synthetic


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process, which saves the start of another one."""
    monkeypatch.setattr(data, 'alone', lambda function, *arguments: function(*arguments))


def test_starts_on_stand_ins(tmp_path: Path) -> None:
    """Two patches of eight images, one of which has none in November and so no series."""
    write_label_file(tmp_path, '31UEQ', 0, 0)
    write_label_file(tmp_path, '31UEQ', 257, 0, s2=('20200706', '20200805', '20200904'))
    archive = tmp_path / 'labels.tar.xz'
    with tarfile.open(archive, 'w:xz') as tar:
        tar.add(tmp_path / 'labels', 'labels')
    arguments = ['startup', '--labels', str(archive), '--output', str(tmp_path), '--rounds', '1']
    with pytest.warns(UserWarning, match='left out: 1 of 2'):
        data.main(arguments)
    rows = results(tmp_path / 'startup')
    assert [(r['start'], r['images'], r['patches with the series']) for r in rows] == [
        ('first', 15, 1),
        ('later', 15, 1),
    ]


def test_startup_wants_the_label_files(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match='--labels'):
        data.main(['startup', '--output', str(tmp_path)])


def test_all_readers_see_the_same_pixels(tmp_path: Path) -> None:
    root = write_synthetic(tmp_path / 'data', 16, {'31UFQ': 2}, incomplete=0, progress=False)
    dataset = MultiSenGE(root, 'all', raw=True)
    copied = MultiSenGE(copy_series(dataset, tmp_path / 'copy', progress=False), 'all', raw=True)
    plain, option, ours, copy = data.readers(dataset, copied).values()
    for index in range(2):
        image = dataset[index]['image'].numpy()
        for read in (plain, option):
            images: Any = read(index)
            assert len(images) == 9
            assert np.array_equal(np.stack(images[:4]), image[:, :10])
            assert np.array_equal(np.stack(images[4:8]), image[:, 10:])
        for read in (ours, copy):
            sample: Any = read(index)
            assert np.array_equal(sample['image'].numpy(), image)


def test_reading_is_compared_with_rasterio(tmp_path: Path) -> None:
    options = ['--patches', '2', '--window', '16', '--rounds', '1', '--root', str(tmp_path)]
    rows = list(data.reading(data._parser().parse_args(['reading', *options])))
    base = rows[1]
    assert base['reader'] == data.BASELINE
    for row in rows:
        ratio = row['ms a patch'] / base['ms a patch']
        assert row['time, rasterio with the option = 1'] == pytest.approx(ratio)


def test_scenes_are_mirrored(tmp_path: Path) -> None:
    small = np.arange(256**2, dtype=np.int32).reshape(1, 256, 256)
    write_raster(tmp_path / 'small.tif', small, 32631, 0, 0)
    data.mirror(tmp_path / 'small.tif', tmp_path / 'large.tif', 600)
    with rasterio.open(tmp_path / 'large.tif') as src:
        large = src.read(1)
        assert src.block_shapes == [(256, 256)]
    down = np.concatenate([small[0], small[0][::-1], small[0][:88]])
    assert np.array_equal(large, np.concatenate([down, down[:, ::-1], down[:, :88]], 1))


def test_scenes_are_read_trained_on_and_mapped(tmp_path: Path) -> None:
    options = ['--steps', '1', '--root', str(tmp_path), '--output', str(tmp_path)]
    data.main([*data.SCENES, *options, '--sizes', '256', '--window', '128'])
    for name in data.SCENES:
        for row in results(tmp_path / name):
            assert row['scene'] == '256 x 256'
            assert row['seconds'] > 0
    (trained,), (mapped,) = results(tmp_path / 'training'), results(tmp_path / 'mapping')
    assert trained['steps'] == 1
    # Windows cover the scene, and overlap.
    assert 1 <= mapped['pixels read / mapped'] <= 4
    assert len(results(tmp_path / 'crops')) == 2


def test_a_crop_is_not_read_with_its_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = list[tuple[int, ...]]()
    real = MultiSenGE.crop

    def crop(self: MultiSenGE, *window: int) -> Any:
        sample = real(self, *window)
        shapes.append((*window[1:3], *sample['image'].shape[-2:]))
        return sample

    monkeypatch.setattr(MultiSenGE, 'crop', crop)
    data.read_crops(data.write_scene(tmp_path, 256), Namespace(), whole=False)
    assert shapes == [(0, 0, 64, 64), (128, 128, 64, 64)]
