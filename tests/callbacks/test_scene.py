from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import rasterio
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from numpy.typing import NDArray
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform as warp_points
from torch.utils.data import DataLoader, Dataset
from torchgeo.datasets import stack_samples

from torchgeo_s1s2.callbacks import SceneWriter
from torchgeo_s1s2.callbacks.geotiff import PredictedWindow
from torchgeo_s1s2.callbacks.scene import (
    BLOCK,
    BlendBuffer,
    Grid,
    Parts,
    Place,
    Remaining,
    blend_weights,
    clip,
    locate,
    pieces,
    write_cogs,
    write_mosaic,
)
from torchgeo_s1s2.datasets.classes import ClassScheme, LandCoverClass

SCHEME = ClassScheme(
    (
        LandCoverClass('Town', (255, 0, 0), (1,)),
        LandCoverClass('Field', (0, 255, 0), (2,)),
        LandCoverClass('Water', (0, 0, 255), (3,)),
    ),
    ids=(1, 4, 7),
)
GRID = Grid(32631, 10, -10, 0, 0)
LEFT, TOP = 500000, 5500000


def corner(row: int, col: int, epsg: int = 32631) -> tuple[int, Affine]:
    return epsg, from_origin(LEFT + 10 * col, TOP - 10 * row, 10, 10)


def starts(size: int, window: int, stride: int, shift: int = 0) -> list[int]:
    return [shift + s for s in range(-stride, size, stride) if shift + s + window > 0]


def scene(size: int, classes: int = 3) -> NDArray[np.float32]:
    """Smooth random probabilities (K, size, size)."""
    noise = torch.rand(1, classes, 8, 8, generator=torch.Generator().manual_seed(1))
    zoomed = torch.nn.functional.interpolate(8 * noise, size=size, mode='bilinear')
    return zoomed.softmax(1)[0].numpy()


def blended(
    folder: Path, window: int, tiles: Iterable[tuple[int, int, NDArray[np.float32]]]
) -> Parts:
    """Sums of windows of (row, col, probabilities)."""
    buffer = BlendBuffer()
    for row, col, probabilities in tiles:
        grid, place = locate(*corner(row, col), window, window)
        buffer.add(grid, place, probabilities)
    buffer.save(folder / 'part-00000-00000.npz')
    return Parts(folder)


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
        epsg, transform = corner(row, col)
        return {
            'probabilities': self.probabilities[:, row : row + 64, col : col + 64],
            'valid_count': count,
            'transform': torch.tensor(transform, dtype=torch.float64),
            'crs': torch.tensor(epsg),
        }


class Task(LightningModule):
    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == self.stop_after:
            raise RuntimeError('power cut')
        return batch


def predict(root: Path, writer: SceneWriter, task: LightningModule | None = None) -> None:
    trainer = Trainer(
        accelerator='cpu',
        callbacks=[writer],
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(task or Task(), DataLoader(Windows(), 4, collate_fn=stack_samples))


def read(folder: Path, name: str) -> NDArray[Any]:
    with rasterio.open(folder / name) as src:
        return cast(NDArray[Any], src.read(1))


def test_weights_by_hand() -> None:
    # sin^2 of 22.5 and 67.5 degrees
    side = np.array([0.1464466, 0.8535534, 0.8535534, 0.1464466])
    np.testing.assert_allclose(blend_weights(4, 1)[:, 0], side, rtol=1e-6)
    np.testing.assert_allclose(blend_weights(4, 4), np.outer(side, side), rtol=1e-6)


@pytest.mark.parametrize('shift', [0.0, 5.0, 0.004, -0.004, 4.996])
def test_locate_does_not_jump_at_whole_and_half_pixels(shift: float) -> None:
    origin = Affine(10, 0, 600000 + shift, 0, -10, 5400000 + shift)
    grid, place = locate(32631, origin, 3, 4)
    assert place == (32631, -540000 - (shift > 1), 60000, 3, 4)
    assert grid.transform(place.row, place.col).almost_equals(origin, 1e-6)


def test_window_that_is_not_north_up_is_refused() -> None:
    with pytest.raises(ValueError, match='north up'):
        locate(32631, Affine(10, 1, 0, 0, -10, 0), 2, 2)


def test_other_grid_is_refused() -> None:
    buffer = BlendBuffer()
    values = np.full((3, 2, 2), 1 / 3, np.float32)
    buffer.add(*locate(32631, from_origin(0, 0, 10, 10), 2, 2), values)
    with pytest.raises(ValueError, match='different pixel grids'):
        buffer.add(*locate(32631, from_origin(3, 0, 10, 10), 2, 2), values)


def test_pieces_cover_each_pixel_once() -> None:
    place = Place(32631, -5, BLOCK - 3, 10, BLOCK + 7)
    seen = np.zeros((10, BLOCK + 7), int)
    for (_, row, col), (rows, cols), outside in pieces(place):
        seen[outside] += 1
        assert row * BLOCK + rows.start == place.row + outside[0].start
        assert col * BLOCK + cols.start == place.col + outside[1].start
        assert rows.stop <= BLOCK
        assert cols.stop <= BLOCK
    assert (seen == 1).all()


def test_two_windows_blend_by_hand(tmp_path: Path) -> None:
    buffer = BlendBuffer()
    left = np.array([[[0.9] * 4] * 4, [[0.1] * 4] * 4, [[0.0] * 4] * 4], np.float32)
    right = np.array([[[0.1] * 4] * 4, [[0.9] * 4] * 4, [[0.0] * 4] * 4], np.float32)
    buffer.add(*locate(*corner(0, 0), 4, 4), left, np.full((4, 4), 2))
    seen = np.full((4, 4), 3)
    seen[0] = 0
    buffer.add(*locate(*corner(0, 2), 4, 4), right, seen)
    buffer.save(tmp_path / 'part-0.npz')
    classes, confidence, observations = image(Parts(tmp_path))
    # weights in columns 2 and 3: 0.854 and 0.146 of the left, 0.146 and 0.854 of the right window
    assert classes[1].tolist() == [1, 1, 1, 4, 4, 4]
    assert confidence[1].tolist() == [90, 90, 78, 78, 90, 90]
    assert observations[1].tolist() == [2, 2, 3, 3, 3, 3]
    assert classes[0].tolist() == [1, 1, 1, 1, 0, 0]
    assert confidence[0].tolist() == [90, 90, 90, 90, 255, 255]
    assert observations[0].tolist() == [2, 2, 2, 2, 0, 0]


def test_constant_scene_gives_a_constant_map(tmp_path: Path) -> None:
    constant = np.broadcast_to(np.array([0.2, 0.7, 0.1], np.float32)[:, None, None], (3, 64, 64))
    places = starts(600, 64, 24)
    parts = blended(tmp_path, 64, ((r, c, constant) for r in places for c in places))
    classes, confidence, _ = image(parts)
    assert set(np.unique(classes)) == {4}
    assert set(np.unique(confidence)) == {70}


def test_translated_grid_changes_few_pixels(tmp_path: Path) -> None:
    """A model that errs at the edges of its windows: less than 1 % of the pixels may change."""
    size, window = 320, 64
    truth = np.pad(scene(size), ((0, 0), (96, 96), (96, 96)), mode='edge')
    doubt = np.clip(1 - blend_weights(window, window) * 4, 0, 1)  # up to 1 at the edge

    def mapped(name: str, shift: int, stride: int) -> NDArray[Any]:
        (tmp_path / name).mkdir()
        places = starts(size, window, stride, shift)
        tiles = (
            (
                r,
                c,
                (
                    truth[:, r + 96 :, c + 96 :][:, :window, :window] * (1 - doubt) + doubt / 3
                ).astype(np.float32),
            )
            for r in places
            for c in places
        )
        parts = blended(tmp_path / name, window, tiles)
        extent = parts.extent(32631)
        row, col = -550000 - extent.row, 50000 - extent.col
        return image(parts)[0][row : row + size, col : col + size]

    here, there = mapped('here', 0, 32), mapped('there', 13, 32)
    assert here.shape == there.shape == (size, size)
    assert len(np.unique(here)) == 3
    assert (here != there).mean() < 0.01


def test_ranks_together_give_the_map_of_one(tmp_path: Path) -> None:
    truth = scene(700)
    tiles = [
        (r, c, truth[:, r : r + 100, c : c + 100]) for r in range(0, 601, 50) for c in (0, 60, 600)
    ]
    (tmp_path / 'one').mkdir()
    one = blended(tmp_path / 'one', 100, tiles)
    (tmp_path / 'two').mkdir()
    for rank in range(2):
        buffer = BlendBuffer()
        for row, col, probabilities in tiles[rank::2]:
            buffer.add(*locate(*corner(row, col), 100, 100), probabilities)
        buffer.save(tmp_path / 'two' / f'part-{rank:05}-00000.npz')
    two = Parts(tmp_path / 'two')
    assert two.places == one.places
    for a, b in zip(image(one), image(two), strict=True):
        assert (a != b).mean() < 1e-4  # float sums in another order may break a tie otherwise


def test_memory_is_bounded_by_the_buffer(tmp_path: Path) -> None:
    writer = SceneWriter(tmp_path, buffer_size=12, classes=SCHEME)
    (tmp_path / 'parts').mkdir()
    values = torch.full((3, 256, 256), 1 / 3)
    most = 0
    for row in range(0, 2048, 128):
        for col in range(0, 1024, 128):
            writer.write(PredictedWindow(values, corner(row, col)[1], 32631), SCHEME, None)
            most = max(most, writer._buffer.nbytes)
    block = 5 * BLOCK * BLOCK * 4
    assert most <= 12 * 2**20
    assert len(Parts(tmp_path / 'parts')._files) * block > 4 * 12 * 2**20


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
    parts = blended(tmp_path, 1100, [(0, 0, values)])
    pixels = parts.pixels(parts.extent(32631), SCHEME.ids)
    write_cogs(tmp_path, 'scene', SCHEME, GRID, parts.extent(32631), pixels)
    files = sorted(tmp_path.glob('scene*.tif'))
    assert len(files) == 3
    for file in files:
        valid, errors, warnings = cogeo.cog_validate(file, strict=True)
        assert valid, (file, errors, warnings)


def test_interrupted_run_resumes(tmp_path: Path) -> None:
    predict(tmp_path / 'whole', SceneWriter())
    folder = tmp_path / 'broken'
    with pytest.raises(RuntimeError, match='power cut'):
        predict(folder, SceneWriter(buffer_size=1), Task(stop_after=2))
    assert [f.name for f in (folder / 'maps').iterdir()] == ['parts']
    assert len(Parts(folder / 'maps' / 'parts').places) == 8
    predict(folder, SceneWriter(resume=True))
    for name in ('32631.tif', '32631_confidence.tif', '32631_observations.tif'):
        resumed, at_once = read(folder / 'maps', name), read(tmp_path / 'whole' / 'maps', name)
        assert (resumed != at_once).mean() < 1e-3
    assert not (folder / 'maps' / 'parts').exists()


def test_parts_of_another_run_are_dropped_without_resume(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match='power cut'):
        predict(tmp_path, SceneWriter(buffer_size=1), Task(stop_after=2))
    parts = tmp_path / 'maps' / 'parts'
    with pytest.raises(RuntimeError, match='power cut'):
        predict(tmp_path, SceneWriter(), Task(stop_after=0))
    assert not list(parts.iterdir())


def test_remaining_windows_leave_out_what_is_done() -> None:
    windows = [(slice(x, x + 640), slice(TOP - 640, TOP)) for x in (LEFT, LEFT + 320, LEFT + 640)]
    done = {locate(*corner(0, 32), 64, 64)[1]}
    grid = 32631, 10.0, 10.0
    assert list(Remaining(windows, done, grid, 1)) == [windows[0], windows[2]]
    every = {locate(*corner(0, c), 64, 64)[1] for c in (0, 32, 64)}
    assert list(Remaining(windows, every, grid, 2)) == windows[:2]


def test_sampler_of_the_datamodule_gives_what_remains(tmp_path: Path) -> None:
    buffer = BlendBuffer()
    buffer.add(*locate(*corner(0, 0), 64, 64), np.full((3, 64, 64), 1 / 3, np.float32))
    (tmp_path / 'parts').mkdir()
    buffer.save(tmp_path / 'parts' / 'part-00000-00000.npz')
    datamodule: Any = LightningDataModule()
    crs = SimpleNamespace(to_epsg=lambda: 32631)
    datamodule.predict_dataset = SimpleNamespace(crs=crs, res=(10.0, 10.0))
    windows = [(slice(x, x + 640), slice(TOP - 640, TOP)) for x in (LEFT, LEFT + 320)]
    datamodule.predict_sampler = windows
    trainer = Trainer(accelerator='cpu', logger=False, default_root_dir=tmp_path)
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    SceneWriter(tmp_path, resume=True).setup(trainer, Task(), 'predict')
    assert list(datamodule.predict_sampler) == windows[1:]


def test_mosaic_joins_two_zones(tmp_path: Path) -> None:
    grids = {}
    for epsg, left, percent in ((32631, 720000, 0.6), (32632, 280000, 0.9)):
        grid, place = locate(epsg, from_origin(left, TOP, 10, 10), 200, 200)
        buffer = BlendBuffer()
        other = (1 - percent) / 2
        sure = [percent, other, other] if epsg == 32631 else [other, percent, other]
        values = np.broadcast_to(np.array(sure, np.float32)[:, None, None], (3, 200, 200))
        buffer.add(grid, place, values)
        folder = tmp_path / str(epsg)
        folder.mkdir()
        buffer.save(folder / 'part-0.npz')
        pixels = Parts(folder).pixels(place, SCHEME.ids)
        write_cogs(tmp_path, str(epsg), SCHEME, grid, place, pixels)
        grids[epsg] = grid
    write_mosaic(tmp_path, 32631, grids, SCHEME)
    (x,), (y,) = warp_points('EPSG:32632', 'EPSG:32631', [281000], [TOP - 1000])
    points = [(720500, TOP - 500), (x, y), (719000, TOP + 90000)]
    with rasterio.open(tmp_path / 'mosaic.tif') as src:
        assert src.crs.to_epsg() == 32631
        assert [int(v[0]) for v in src.sample(points)] == [1, 4, 0]
        assert src.transform.c % 10 == 0
    with rasterio.open(tmp_path / 'mosaic_confidence.tif') as src:
        assert [int(v[0]) for v in src.sample(points[:2])] == [60, 90]


def test_an_extent_is_clipped_to_whole_pixels_of_the_data() -> None:
    extent = Place(32631, -550010, 49990, 120, 120)  # ten pixels more on each side
    exact = (LEFT, TOP - 1000, LEFT + 1000, TOP)
    assert clip(extent, GRID, exact) == Place(32631, -550000, 50000, 100, 100)
    assert clip(extent, GRID, (LEFT - 1e5, TOP - 1e5, LEFT + 1e5, TOP + 1e5)) == extent
    partly = (LEFT + 14, TOP - 1000, LEFT + 986, TOP)  # a pixel that is cut stays
    assert clip(extent, GRID, partly) == Place(32631, -550000, 50001, 100, 98)


def test_buffer_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match='buffer_size is 0'):
        SceneWriter(buffer_size=0)
