import math
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import SCHEME, quiet_trainer, read_raster
from lightning.pytorch import LightningDataModule, LightningModule
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform as warp_points
from torch.utils.data import DataLoader, Dataset
from torchgeo.datasets import stack_samples
from torchgeo.samplers import GriddedPatchSampler

from torchgeo_s1s2.callbacks import SceneWriter
from torchgeo_s1s2.callbacks import scene as scenes
from torchgeo_s1s2.callbacks.geotiff import PredictedWindow
from torchgeo_s1s2.callbacks.layers import map_layers, write_layers
from torchgeo_s1s2.callbacks.scene import (
    BLOCK,
    BlendBuffer,
    Parts,
    Place,
    _content,
    _digest,
    clip,
    mosaic_grid,
    write_mosaic,
)
from torchgeo_s1s2.datamodules.series import spread
from torchgeo_s1s2.datasets import MultiSenGE
from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.datasets.rasters import Grid, crs_of
from torchgeo_s1s2.errors import MapError, S1S2Warning

LEFT, TOP = 500000, 5500000


def predicted(
    row: int, col: int, probabilities: Any, seen: Any = None, epsg: int = 32631
) -> PredictedWindow:
    corner = from_origin(LEFT + 10 * col, TOP - 10 * row, 10, 10)
    seen = None if seen is None else torch.as_tensor(seen)
    height, width = probabilities.shape[1:]
    grid = Grid(crs_of(epsg), corner, width, height)
    return PredictedWindow(torch.as_tensor(probabilities), grid, seen)


def scene(size: int, classes: int = 3) -> NDArray[np.float32]:
    """Smooth random probabilities (K, size, size)."""
    noise = torch.rand(1, classes, 8, 8, generator=torch.Generator().manual_seed(1))
    zoomed = torch.nn.functional.interpolate(8 * noise, size=size, mode='bilinear')
    return zoomed.softmax(1)[0].numpy()


def blended(folder: Path, windows: Iterable[PredictedWindow], epsg: int = 32631) -> Parts:
    """Sums of windows, each second one by another rank."""
    buffers, parts = (BlendBuffer(), BlendBuffer()), Parts([])
    for i, window in enumerate(windows):
        buffers[i % 2].add(parts.place(window.grid), window)
    paths = [folder / f'part-{epsg}-{rank:05}.npz' for rank in range(2)]
    for buffer, path in zip(buffers, paths, strict=True):
        if buffer.places:
            buffer.save(path, parts.lattices, {})
    return Parts(filter(Path.exists, paths))


def write_map(folder: Path, parts: Parts, epsg: int) -> Grid:
    extent = parts.extent(epsg)
    grid = extent.on(parts.lattices[epsg])
    write_layers(folder, str(epsg), map_layers(SCHEME), grid, parts.pixels(extent, SCHEME.ids))
    return grid


def image(parts: Parts) -> list[NDArray[Any]]:
    """Class, confidence and observations of the whole extent."""
    extent = parts.extent(32631)
    out = [np.full((extent.height, extent.width), v, np.int64) for v in (0, 255, 0)]
    for window, values in parts.pixels(extent, SCHEME.ids):
        for layer, value in zip(out, values, strict=True):
            layer[window.toslices()] = value
    return out


class Windows(Dataset[dict[str, Any]]):
    """Windows of 64 pixels, half overlapping, that see the same 160 x 160 pixels."""

    classes = SCHEME
    places = tuple((r, c) for r in (0, 32, 64, 96) for c in (0, 32, 64, 96))

    def __init__(self) -> None:
        self.probabilities = torch.from_numpy(scene(160))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, col = self.places[index]
        count = torch.full((64, 64), 5)
        count[:, : max(0, 16 - col)] = 0  # nothing was seen west of column 16
        transform = from_origin(LEFT + 10 * col, TOP - 10 * row, 10, 10)
        return {
            'probabilities': self.probabilities[:, row : row + 64, col : col + 64],
            'valid_count': count,
            'transform': torch.tensor(transform, dtype=torch.float64),
            'crs': torch.tensor(32631),
        }


class Task(LightningModule):
    """Predicts what the batch holds; something may happen at its third batch."""

    def __init__(
        self, happens: Callable[[], Any] | None = None, weight: float = 0, turn: int = 0
    ) -> None:
        super().__init__()
        self.happens, self.turn = happens, turn
        self.weight = torch.nn.Parameter(torch.tensor(float(weight)))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if self.happens and batch_idx == 2:
            self.happens()
        return batch | {'probabilities': batch['probabilities'].roll(self.turn, 1)}


def power_cut() -> None:
    raise RuntimeError('power cut')


def predict(
    root: Path,
    writer: SceneWriter,
    task: LightningModule | None = None,
    dataset: Any = None,
) -> None:
    loader = DataLoader(dataset or Windows(), 4, collate_fn=stack_samples)
    quiet_trainer(root, callbacks=[writer]).predict(task or Task(), loader)


def interrupted(root: Path, **options: Any) -> Path:
    """Hidden folder of a run that was interrupted after 8 windows."""
    with pytest.raises(RuntimeError, match='power cut'):
        predict(root, SceneWriter(buffer_size=1, **options), Task(power_cut))
    (folder,) = (root / 'maps').glob('.torchgeo_s1s2-*')
    return folder


def read(folder: Path, name: str) -> NDArray[Any]:
    return read_raster(folder / name)[0]


@pytest.mark.parametrize(
    ('length', 'size', 'expected'),
    [(256, 256, (256, 256)), (512, 256, (224, 144)), (64, 256, (64, 64)), (1024, 256, (256, 192))],
)
def test_windows_spread_by_hand(length: int, size: int, expected: tuple[int, int]) -> None:
    assert spread(length, size) == expected


def test_default_windows_cover_the_scene_and_cost_at_most_1_8_times_its_pixels() -> None:
    for length in (*range(72, 600, 7), *range(600, 12000, 97)):
        size, stride = spread(length, 256)
        count = max(1, -(-(length - size) // stride) + 1)
        assert size + (count - 1) * stride >= length
        assert count == 1 or stride <= size - 32
        assert (count * size / length) ** 2 <= 1.8


@pytest.mark.parametrize('shift', [0.0, 5.0, 0.004, -0.004, 4.996])
def test_lattice_does_not_jump_at_whole_and_half_pixels(shift: float) -> None:
    origin = Affine(10, 0, 600000 + shift, 0, -10, 5400000 + shift)
    grid = Grid(crs_of(32631), origin, 4, 3)
    parts = Parts([])
    place = parts.place(grid)
    assert place == (32631, -540000 - (shift > 1), 60000, 3, 4)
    assert place.on(parts.lattices[32631]).transform.almost_equals(origin, 1e-6)


@pytest.mark.parametrize(
    ('transform', 'message'),
    [(Affine(10, 1, 0, 0, -10, 0), 'north up'), (from_origin(3, 0, 10, 10), 'different pixel')],
)
def test_other_grid_is_refused(transform: Affine, message: str) -> None:
    parts = Parts([])
    parts.place(Grid(crs_of(32631), from_origin(0, 0, 10, 10), 2, 2))
    with pytest.raises(MapError, match=message):
        parts.place(Grid(crs_of(32631), transform, 2, 2))


def test_two_windows_blend_by_hand(tmp_path: Path) -> None:
    left = np.array([[[0.9] * 4] * 4, [[0.1] * 4] * 4, [[0.0] * 4] * 4], np.float32)
    right = np.array([[[0.1] * 4] * 4, [[0.9] * 4] * 4, [[0.0] * 4] * 4], np.float32)
    seen = np.full((4, 4), 3)
    seen[0] = 0
    windows = predicted(0, 0, left, np.full((4, 4), 2)), predicted(0, 2, right, seen)
    classes, confidence, observations = image(blended(tmp_path, windows))
    # sin^2 of 67.5 and 22.5 degrees, in columns 2 and 3: 0.854 and 0.146 of the left window, 0.146
    # and 0.854 of the right one
    assert classes[1].tolist() == [1, 1, 1, 4, 4, 4]
    assert confidence[1].tolist() == [90, 90, 78, 78, 90, 90]
    assert observations[1].tolist() == [2, 2, 3, 3, 3, 3]
    assert classes[0].tolist() == [1, 1, 1, 1, 0, 0]
    assert confidence[0].tolist() == [90, 90, 90, 90, 255, 255]
    assert observations[0].tolist() == [2, 2, 2, 2, 0, 0]


def test_seams_do_not_grow(tmp_path: Path) -> None:
    """A network that sees zeros beyond its windows, beside its view of the whole scene."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 3, 5, padding=2) for _ in range(4)]
    network = torch.nn.Sequential(torch.nn.Upsample(scale_factor=4), *layers).requires_grad_(False)
    scene = torch.randn(1, 3, 64, 64)

    def view(row: int, col: int, size: int) -> Any:
        pixels = scene[:, :, row // 4 : (row + size) // 4, col // 4 : (col + size) // 4]
        return (20 * network(pixels)).softmax(1)[0]

    truth = 100 * view(0, 0, 256).max(0).values.numpy()

    def error_and_jump(stride: int) -> tuple[float, float]:
        """Mean error of the confidence, and its mean change where a window ends, in percent."""
        starts = range(0, 193, stride)
        (tmp_path / str(stride)).mkdir()
        windows = (predicted(r, c, view(r, c, 64)) for r in starts for c in starts)
        error = image(blended(tmp_path / str(stride), windows))[1] - truth
        ends = [column - 1 for column in starts[1:]] + [column + 63 for column in starts[:-1]]
        return float(np.abs(error).mean()), float(np.abs(np.diff(error))[:, ends].mean())

    half, quarter, none = map(error_and_jump, (32, 48, 64))
    # Whole percents alone err by 0.25, and change by 0.33.
    assert max(quarter[0] - half[0], quarter[1] - half[1]) < 0.2
    assert none[0] > 5 * quarter[0]
    assert none[1] > 20 * quarter[1]


def test_memory_is_bounded_by_the_buffer(tmp_path: Path) -> None:
    writer = SceneWriter(tmp_path, buffer_size=12, classes=SCHEME)
    writer._unfinished = tmp_path
    values = torch.full((3, 256, 256), 1 / 3)
    most = 0
    for row in range(0, 2048, 128):
        for col in range(0, 1024, 128):
            writer.write(predicted(row, col, values), SCHEME, None)
            most = max(most, writer._buffer.nbytes)
    assert most <= 12 * 2**20
    written = Parts(tmp_path.glob('part-*.npz'))
    assert len(written._files) * 5 * BLOCK * BLOCK * 4 > 4 * 12 * 2**20


def test_trainer_writes_cogs_with_nodata(tmp_path: Path) -> None:
    predict(tmp_path, SceneWriter())
    maps = tmp_path / 'maps'
    assert sorted(f.name for f in maps.iterdir()) == [
        '32631.tif',
        '32631.tif.aux.xml',
        '32631_confidence.tif',
        '32631_observations.tif',
    ]
    truth = scene(160)
    expected = np.array(SCHEME.ids)[truth.argmax(0)]
    expected[:, :16] = 0
    classes = read(maps, '32631.tif')
    assert (classes == expected).mean() > 0.999  # a blend of equal values may break a tie
    assert (classes[:, :16] == 0).all()
    confidence = read(maps, '32631_confidence.tif')
    np.testing.assert_allclose(confidence[:, 16:], 100 * truth.max(0)[:, 16:], atol=0.51)
    assert (confidence[:, :16] == 255).all()
    observations = read(maps, '32631_observations.tif')
    assert (observations[:, :16] == 0).all()
    assert (observations[:, 16:] == 5).all()
    with rasterio.open(maps / '32631.tif') as src:
        assert src.transform == Affine(10, 0, LEFT, 0, -10, TOP)
        assert src.colormap(1)[4] == (0, 255, 0, 255)
        assert src.tags(1)['CLASS_7'] == 'Water'
        assert src.tags(ns='IMAGE_STRUCTURE')['LAYOUT'] == 'COG'


def test_cog_validator_accepts_all_three(tmp_path: Path) -> None:
    cogeo = pytest.importorskip('rio_cogeo.cogeo', reason='rio-cogeo is not installed')
    values = np.broadcast_to(np.array([0.2, 0.7, 0.1], np.float32)[:, None, None], (3, 1100, 1100))
    parts = blended(tmp_path, [predicted(0, 0, values)])
    write_map(tmp_path, parts, 32631)
    files = sorted(tmp_path.glob('32631*.tif'))
    assert len(files) == 3
    for file in files:
        valid, errors, warnings = cogeo.cog_validate(file, strict=True)
        assert valid, (file, errors, warnings)


def read_maps(root: Path) -> list[NDArray[Any]]:
    names = '32631.tif', '32631_confidence.tif', '32631_observations.tif'
    return [read(root / 'maps', name) for name in names]


@pytest.mark.parametrize(
    ('stop', 'error', 'done'),
    [
        (lambda: signal.raise_signal(signal.SIGINT), SystemExit, 8),  # Ctrl-C
        (lambda: signal.raise_signal(signal.SIGTERM), SystemExit, 12),  # the batch is finished
        (Path('/nowhere').stat, FileNotFoundError, 8),
    ],
)
@pytest.mark.parametrize('buffer_size', [512, 1])
def test_an_interrupted_run_resumes_to_the_same_map(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stop: Callable[[], Any],
    error: type[BaseException],
    done: int,
    buffer_size: int,
) -> None:
    # Where tests run in the background, it is ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    predict(tmp_path / 'whole', SceneWriter(buffer_size=buffer_size))
    with pytest.raises(error) as caught:
        predict(tmp_path, SceneWriter(buffer_size=buffer_size), Task(stop))
    signal.signal(signal.SIGINT, handler)  # Lightning ignores more of them
    assert getattr(caught.value, 'code', 1)
    capsys.readouterr()
    predict(tmp_path, SceneWriter(resume=True, buffer_size=buffer_size))
    assert f'maps: continues from {done} windows' in capsys.readouterr().out
    for resumed, at_once in zip(read_maps(tmp_path), read_maps(tmp_path / 'whole'), strict=True):
        assert np.array_equal(resumed, at_once)
    assert not list((tmp_path / 'maps').glob('.*'))


@pytest.mark.parametrize(
    ('seconds', 'found'), [(0, 'continues from 8 windows'), (300, 'nothing to continue')]
)
def test_a_killed_run_loses_what_it_did_since_it_saved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    found: str,
) -> None:
    """What is on the disk at that moment is all that the next run has."""
    monkeypatch.setattr(scenes, 'SAVE_AFTER', seconds)
    killed = Task(lambda: shutil.copytree(tmp_path / 'maps', tmp_path / 'killed' / 'maps'))
    predict(tmp_path, SceneWriter(), killed)
    predict(tmp_path / 'killed', SceneWriter(resume=True))
    assert found in capsys.readouterr().out
    for resumed, at_once in zip(read_maps(tmp_path / 'killed'), read_maps(tmp_path), strict=True):
        assert np.array_equal(resumed, at_once)


def sums(parts: Parts) -> Any:
    """Windows, and the weighted sums of all blocks that are not empty."""
    blocks = {key: np.sum([*parts._blocks(key)], 0)[:-1] for key in parts._files}
    return parts.places, {key: b.tolist() for key, b in blocks.items() if np.any(b)}


@pytest.mark.parametrize('save_at', [0, math.inf])  # after each window, or after the interrupt only
def test_an_interrupt_anywhere_leaves_sums_of_the_windows_that_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_at: float
) -> None:
    """An interrupt at each line that runs while a window is added and the sums are saved."""
    monkeypatch.setattr(scenes, 'BLOCK', 8)
    monkeypatch.setattr(scenes, 'SAVE_AFTER', -1)
    first, second = (predicted(0, col, scene(8)) for col in (2, 4))

    def interrupted(line: int) -> tuple[Any, int]:
        """Sums that are left by an interrupt at a line of the second window; lines that ran."""
        folder = tmp_path / str(line)
        folder.mkdir()
        writer = SceneWriter(folder, buffer_size=1, classes=SCHEME)
        writer._unfinished, writer._save_at = folder, save_at
        writer.write(first, SCHEME, None)
        count = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal count
            count += event == 'line' and frame.f_code.co_filename == scenes.__file__
            if count == line:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        with suppress(KeyboardInterrupt):
            writer.write(second, SCHEME, None)
        sys.settrace(before)
        writer._save()
        return sums(Parts(folder.glob('part-*'))), count

    both, lines = interrupted(10_000)
    expected = [sums(blended(tmp_path, [first])), both]
    assert [len(places) for places, _ in expected] == [1, 2]
    found = [expected.index(interrupted(line)[0]) for line in range(1, lines + 1)]
    assert set(found) == {0, 1}


def test_sums_that_cannot_be_kept_are_said_and_the_error_of_the_run_stays(tmp_path: Path) -> None:
    def full_disk() -> None:
        shutil.rmtree(tmp_path / 'maps')
        power_cut()

    with (
        pytest.warns(S1S2Warning, match=r'last 8 windows will be predicted again: .*npz cannot be'),
        pytest.raises(RuntimeError, match='power cut'),
    ):
        predict(tmp_path, SceneWriter(), Task(full_disk))


class Fewer(Windows):
    places = Windows.places[:-1]


OTHER = ClassScheme(SCHEME.classes)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'task': Task(weight=1.0)}, 'weights, then'),
        ({'dataset': Fewer()}, 'data, then'),
        ({'writer': SceneWriter(resume=True, classes=OTHER)}, 'classes, then'),
        ({'task': Task(turn=1)}, 'the predictions, by'),
    ],
)
def test_parts_made_otherwise_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = interrupted(tmp_path)
    kept = sorted(folder.iterdir())
    with pytest.raises(MapError, match=message):
        predict(tmp_path, **({'writer': SceneWriter(resume=True)} | change))
    assert sorted(folder.iterdir()) == kept
    (folder / 'part-00000-00000.npz').write_bytes(b'PK')
    with pytest.raises(MapError, match=r'part-00000-00000.npz cannot be read'):
        predict(tmp_path, SceneWriter(resume=True))


def test_data_are_others_if_an_image_is_and_not_for_what_lies_beside(two_zones: Path) -> None:
    def content() -> str:
        return _digest(_content(MultiSenGE(two_zones, 'all')))

    before = content()
    (two_zones / 'statistics_of_another_training.json').write_text('{}')
    os.utime(two_zones / 'ground_reference' / '31UEQ_GR_0_0.tif', (0, 0))
    assert content() == before
    path = two_zones / 's1' / '31UEQ_20200807_S1_0_0.tif'
    stat = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content() != before


def test_parts_are_dropped_without_resume_and_nothing_else(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    for name in ('part-mine.npz', 'notes.txt', '../parts/mine.npz'):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('of the user')
    with pytest.warns(S1S2Warning, match=r'8 parts of an interrupted run.*resume: true would'):
        predict(tmp_path, SceneWriter())
    assert sorted(p.name for p in folder.iterdir()) == ['notes.txt', 'part-mine.npz']
    assert (tmp_path / 'maps' / 'parts' / 'mine.npz').read_text() == 'of the user'


@pytest.mark.parametrize('name', ['32631.tif', '32631_confidence.tif', '32631_observations.tif/a'])
def test_what_is_no_map_of_this_package_is_not_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / 'maps' / name
    path.parent.mkdir(parents=True)
    path.write_text('of the user')
    with pytest.raises(MapError, match=r'32631.*\.tif is not a map that this package wrote'):
        predict(tmp_path, SceneWriter())
    assert path.read_text() == 'of the user'
    (tmp_path / 'maps' / name.split('/')[0]).rename(tmp_path / 'away')
    predict(tmp_path, SceneWriter(resume=True))
    assert (tmp_path / 'maps' / '32631.tif').is_file()


@pytest.mark.parametrize('resume', [False, True])
def test_runs_that_share_a_folder_do_not_touch_each_other(tmp_path: Path, resume: bool) -> None:
    """Another run, of other windows, begins and ends while the first one is at work."""

    def meanwhile() -> None:
        with pytest.warns(S1S2Warning, match='1 other runs are at work'):
            predict(tmp_path, SceneWriter(resume=resume), dataset=Fewer())
        assert read(tmp_path / 'maps', '32631.tif')[-32:, -32:].max() == 0

    predict(tmp_path / 'alone', SceneWriter())
    predict(tmp_path, SceneWriter(buffer_size=1), Task(meanwhile))
    for name in ('32631.tif', '32631_confidence.tif'):
        both, alone = (read(p / 'maps', name) for p in (tmp_path, tmp_path / 'alone'))
        assert (both != alone).mean() < 1e-3
    assert not list((tmp_path / 'maps').glob('.*'))


def test_remaining_windows_leave_out_what_is_done(tmp_path: Path) -> None:
    windows = [(slice(x, x + 640), slice(TOP - 640, TOP)) for x in range(LEFT, LEFT + 1280, 320)]
    dataset = SimpleNamespace(crs=SimpleNamespace(to_epsg=lambda: 32631), res=(10.0, 10.0))
    values = torch.full((3, 64, 64), 1 / 3)
    parts = blended(tmp_path, (predicted(0, col, values) for col in (32, 0, 64)))
    assert parts.remaining(windows, dataset, 1) == [windows[1], windows[3]]  # the first to compare
    assert parts.remaining(windows[:3], dataset, 2) == [windows[1], windows[0]]


def test_sampler_of_the_datamodule_gives_what_remains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Module(LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.predict_sampler: Any = [
                (
                    slice(LEFT + 10 * col, LEFT + 10 * col + 640),
                    slice(TOP - 10 * row - 640, TOP - 10 * row),
                )
                for row, col in Windows.places
            ]
            crs = SimpleNamespace(to_epsg=lambda: 32631)
            self.predict_dataset = SimpleNamespace(classes=SCHEME, crs=crs, res=(10.0, 10.0))

        def predict_dataloader(self) -> Any:
            places = [
                (round((TOP - y.stop) / 10), round((x.start - LEFT) / 10))
                for x, y in self.predict_sampler
            ]
            seen.append(places)
            indices = [Windows.places.index(place) for place in places]
            return DataLoader(Windows(), batch_size=4, sampler=indices, collate_fn=stack_samples)

    seen: list[Any] = []
    for stop, resume in ((power_cut, False), (None, True)):
        writer = SceneWriter(tmp_path, resume=resume, buffer_size=1)
        trainer = quiet_trainer(callbacks=[writer])
        with pytest.raises(RuntimeError, match='power cut') if stop else nullcontext():
            trainer.predict(Task(stop), datamodule=Module())
    assert 'continues from 8 of 16 windows' in capsys.readouterr().out
    assert seen[0] == list(Windows.places)
    assert seen[1] == [Windows.places[0], *Windows.places[8:]]
    assert (read(tmp_path, '32631.tif')[:, 16:] > 0).all()


def test_loaders_of_one_zone_share_its_map(two_zones: Path, tmp_path: Path) -> None:
    """Each has one of two patches of 32 pixels, between which lies one pixel."""

    class Even(LightningModule):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return torch.full((1, 3, *batch['image'].shape[-2:]), 1 / 3)

    zone = MultiSenGE(two_zones, 'all').zones()[0]
    one, other = copy(zone), copy(zone)
    one.index, other.index = zone.index[:1], zone.index[1:]
    loaders = [
        DataLoader(part, sampler=GriddedPatchSampler(part, size=16), collate_fn=stack_samples)
        for part in (one, other)
    ]
    writer = SceneWriter(tmp_path, classes=SCHEME)
    quiet_trainer(callbacks=[writer]).predict(Even(), loaders)
    seen = read(tmp_path, '32631_observations.tif') > 0
    assert seen.shape == (32, 65)
    assert np.argwhere(~seen.all(0)).tolist() == [[32]]


def test_mosaic_joins_two_zones(tmp_path: Path) -> None:
    zones = {}
    for epsg, left, sure in ((32631, 22000, (0.6, 0.2, 0.2)), (32632, -22000, (0.05, 0.9, 0.05))):
        values = np.broadcast_to(np.array(sure, np.float32)[:, None, None], (3, 200, 200))
        parts = blended(tmp_path, [predicted(0, left, values, epsg=epsg)], epsg)
        zones[epsg] = write_map(tmp_path, parts, epsg)
    (x,), (y,) = warp_points('EPSG:32632', 'EPSG:32631', [281000], [TOP - 1000])
    points = [(720500, TOP - 500), (x, y), (719000, TOP + 90000)]
    for epsg, size in ((32631, 10), (4326, 0.00011)):
        write_mosaic(tmp_path, CRS.from_epsg(epsg), zones, SCHEME)
        there = list(
            zip(*warp_points('EPSG:32631', f'EPSG:{epsg}', *zip(*points, strict=True)), strict=True)
        )
        with rasterio.open(tmp_path / 'mosaic.tif') as src:
            assert src.crs.to_epsg() == epsg
            assert [int(v[0]) for v in src.sample(there)] == [1, 4, 0]
            assert src.transform.c / src.res[0] == pytest.approx(
                round(src.transform.c / src.res[0])
            )
            assert src.res == pytest.approx((size, size), rel=0.1)
        with rasterio.open(tmp_path / 'mosaic_confidence.tif') as src:
            assert [int(v[0]) for v in src.sample(there[:2])] == [60, 90]


def test_maps_of_an_earlier_run_do_not_pass_for_new_ones(tmp_path: Path) -> None:
    maps = tmp_path / 'maps'
    predict(tmp_path, SceneWriter(mosaic=4326))
    (maps / '2020.tif').write_text('of the user')
    with warnings.catch_warnings(action='error', category=S1S2Warning):
        predict(tmp_path, SceneWriter(mosaic=4326))  # all of its maps are written anew
    with pytest.warns(S1S2Warning, match=r'3 files in .*maps are of an earlier run.*: mosaic\.tif'):
        predict(tmp_path, SceneWriter())
    assert len(list(maps.glob('*.tif'))) == 7


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'buffer_size': 0}, 'buffer_size is 0, expected a number of MiB'),
        ({'mosaic': 999999}, 'mosaic is 999999, expected an EPSG code'),
        ({'mosaic': 'EPSG:4326'}, 'mosaic is EPSG:4326, expected an EPSG code'),
        (
            {'mosaic': 4978},
            'expected an EPSG code of maps or of degrees',
        ),  # from the earth's centre
        ({'mosaic': 5773}, 'expected an EPSG code of maps or of degrees'),  # heights
    ],
)
def test_settings_that_make_no_map_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MapError, match=message):
        SceneWriter(**options)


def test_mosaic_without_a_place_is_refused() -> None:
    antimeridian = Grid(crs_of(32601), from_origin(100000, 10000, 10, 10), 14000, 10)
    with pytest.raises(MapError, match='no connected place'):
        mosaic_grid(CRS.from_epsg(4326), [antimeridian])


def test_an_extent_is_clipped_to_whole_pixels_of_the_data() -> None:
    lattice = Grid(crs_of(32631), from_origin(0, 0, 10, 10), 1, 1)
    extent = Place(32631, -550010, 49990, 120, 120)  # ten pixels more on each side
    exact = (LEFT, TOP - 1000, LEFT + 1000, TOP)
    assert clip(extent, lattice, exact) == Place(32631, -550000, 50000, 100, 100)
    assert clip(extent, lattice, (LEFT - 1e5, TOP - 1e5, LEFT + 1e5, TOP + 1e5)) == extent
    partly = (LEFT + 14, TOP - 1000, LEFT + 986, TOP)  # a pixel that is cut stays
    assert clip(extent, lattice, partly) == Place(32631, -550000, 50001, 100, 98)
