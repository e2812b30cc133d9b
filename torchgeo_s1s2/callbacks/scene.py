"""Maps of whole scenes from overlapping windows, in bounded memory."""

import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import rasterio.shutil
import torch
from affine import Affine
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window
from torch.utils.data import Sampler
from torchgeo.datasets import GeoDataset

from torchgeo_s1s2.callbacks.geotiff import MapWriter, PredictedWindow, predict_datasets
from torchgeo_s1s2.callbacks.layers import (
    CONFIDENCE,
    OBSERVATIONS,
    Layer,
    class_layer,
    classify,
)
from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.files import whole

BLOCK = 512
"""Height and width in pixels of the blocks that a scene is summed in."""

_GDAL_OPTIONS = {'GDAL_CACHEMAX': 128}  # MB; otherwise a share of the machine's memory
_COG_OPTIONS = {'driver': 'COG', 'compress': 'deflate', 'blocksize': 512, 'bigtiff': 'if_safer'}

Block = tuple[int, int, int]  # EPSG code, row and column of blocks
Pixels = Iterable[tuple[Window, Sequence[NDArray[Any]]]]


class Grid(NamedTuple):
    """Pixel grid of a scene: pixel (row, col) begins at ((col + x) * xres, (row + y) * yres)."""

    epsg: int
    xres: float
    yres: float
    x: float
    y: float

    def transform(self, row: int, col: int) -> Affine:
        """Affine transform of a raster whose upper left pixel is (row, col)."""
        return Affine(
            self.xres, 0, (col + self.x) * self.xres, 0, self.yres, (row + self.y) * self.yres
        )

    def check(self, other: 'Grid') -> None:
        """Raise a ValueError unless both are one grid, within a thousandth of a pixel."""
        if not np.allclose(self, other, rtol=1e-9, atol=1e-3):
            raise ValueError(
                f'the windows of EPSG:{self.epsg} lie on different pixel grids, {self} and {other};'
                ' a scene needs one: predict with a single resolution, and a stride in whole pixels'
            )


class Place(NamedTuple):
    """Pixels of a window on the grid of its scene."""

    epsg: int
    row: int
    col: int
    height: int
    width: int


def locate(epsg: int, transform: Affine, height: int, width: int) -> tuple[Grid, Place]:
    """Find the grid of a window and its pixels there.

    Args:
        epsg: EPSG code of the CRS.
        transform: Affine transform of the window.
        height: Height in pixels.
        width: Width in pixels.

    Raises:
        ValueError: If the window is not north up.
    """
    if transform.b or transform.d or transform.a <= 0 or transform.e >= 0:
        raise ValueError(f'a window of a scene must be north up, its transform is {transform}')
    x, y = transform.c / transform.a, transform.f / transform.e
    # The quarter keeps whole and half pixels, the usual origins, away from the step of floor.
    col, row = math.floor(x + 0.25), math.floor(y + 0.25)
    grid = Grid(epsg, transform.a, transform.e, x - col, y - row)
    return grid, Place(epsg, row, col, height, width)


def clip(extent: Place, grid: Grid, bounds: tuple[float, float, float, float]) -> Place:
    """Leave out the pixels of an extent that lie wholly beyond bounds.

    Args:
        extent: Pixels on the grid.
        grid: Their pixel grid.
        bounds: Least x and y, largest x and y.
    """
    xmin, ymin, xmax, ymax = bounds
    left, right = (x / grid.xres - grid.x for x in (xmin, xmax))
    top, bottom = (y / grid.yres - grid.y for y in (ymax, ymin))
    row, col = max(extent.row, math.floor(top + 1e-3)), max(extent.col, math.floor(left + 1e-3))
    last_row = min(extent.row + extent.height, math.ceil(bottom - 1e-3))
    last_col = min(extent.col + extent.width, math.ceil(right - 1e-3))
    return Place(extent.epsg, row, col, last_row - row, last_col - col)


def blend_weights(height: int, width: int) -> NDArray[np.float32]:
    """Hann window at the pixel centres, (height, width): above 0 and at most 1."""
    y, x = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (height, width))
    return np.outer(y, x).astype(np.float32)


def pieces(place: Place) -> Iterator[tuple[Block, tuple[slice, slice], tuple[slice, slice]]]:
    """Cut a window along the blocks.

    Yields:
        A block, the pixels in the block, and the same pixels in the window.
    """
    for row, in_row, of_row in _cut(place.row, place.height):
        for col, in_col, of_col in _cut(place.col, place.width):
            yield (place.epsg, row, col), (in_row, in_col), (of_row, of_col)


def _cut(start: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    for block in range(start // BLOCK, (start + size - 1) // BLOCK + 1):
        first, last = max(start, block * BLOCK), min(start + size, (block + 1) * BLOCK)
        yield (
            block,
            slice(first - block * BLOCK, last - block * BLOCK),
            slice(first - start, last - start),
        )


class BlendBuffer:
    """Weighted sums of windows, block by block.

    A block is (K + 2, BLOCK, BLOCK) float32: the K weighted sums of probabilities, the sum of the
    weights, and the largest number of observations.

    Attributes:
        blocks: Sums of each block.
        places: Windows that are in the sums.
        grids: Pixel grid of each EPSG code.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self.blocks: dict[Block, NDArray[np.float32]] = {}
        self.places: list[Place] = []
        self.grids: dict[int, Grid] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the sums in bytes."""
        return sum(block.nbytes for block in self.blocks.values())

    def add(
        self,
        grid: Grid,
        place: Place,
        probabilities: NDArray[np.float32],
        observations: NDArray[Any] | None = None,
    ) -> None:
        """Add a window.

        Args:
            grid: Its pixel grid.
            place: Its pixels.
            probabilities: (K, H, W), 0..1; NaN where unknown.
            observations: (H, W), 0 where nothing was observed; 1 everywhere unless given.

        Raises:
            ValueError: If it lies on another grid than the windows before.
        """
        self.grids.setdefault(grid.epsg, grid).check(grid)
        count = np.ones(probabilities.shape[1:]) if observations is None else observations
        known = (count > 0) & np.isfinite(probabilities).all(0)
        weight = np.where(known, blend_weights(place.height, place.width), np.float32(0))
        sums = np.concatenate([np.nan_to_num(probabilities) * weight, weight[None]])
        for key, inside, outside in pieces(place):
            if key not in self.blocks:
                self.blocks[key] = np.zeros((len(sums) + 1, BLOCK, BLOCK), np.float32)
            block = self.blocks[key]
            block[:-1, *inside] += sums[:, *outside]
            np.maximum(block[-1, *inside], (count * known)[outside], out=block[-1, *inside])
        self.places.append(place)

    def save(self, path: Path) -> None:
        """Write the sums as one ``.npz`` file, whole or not at all, and begin empty.

        Args:
            path: File to write.
        """
        arrays: dict[str, Any] = {'_'.join(map(str, k)): b for k, b in self.blocks.items()}
        with whole(path) as temporary:
            np.savez(
                temporary, places=np.array(self.places), grids=[*self.grids.values()], **arrays
            )
        self.blocks.clear()
        self.places.clear()


class Parts:
    """Saved sums of a scene, read block by block."""

    def __init__(self, folder: Path) -> None:
        """List what is in the parts of all ranks.

        Args:
            folder: Folder of the parts.

        Raises:
            ValueError: If they do not lie on one grid.
        """
        self.places: set[Place] = set()
        self.grids: dict[int, Grid] = {}
        self._files: dict[Block, list[Path]] = defaultdict(list)
        for path in sorted(folder.glob('part-*.npz')):
            with np.load(path) as part:
                self.places |= {Place(*map(int, p)) for p in part['places']}
                for epsg, *rest in part['grids']:
                    grid = Grid(int(epsg), *rest)
                    self.grids.setdefault(grid.epsg, grid).check(grid)
                for name in set(part.files) - {'places', 'grids'}:
                    epsg, row, col = map(int, name.split('_'))
                    self._files[epsg, row, col].append(path)

    def extent(self, epsg: int) -> Place:
        """Smallest window that holds all windows of a CRS."""
        places = np.array([p for p in self.places if p.epsg == epsg])
        row, col = places[:, 1:3].min(0)
        height, width = (places[:, 1:3] + places[:, 3:]).max(0) - (row, col)
        return Place(epsg, int(row), int(col), int(height), int(width))

    def pixels(self, extent: Place, ids: Sequence[int]) -> Pixels:
        """Read a map block by block.

        Args:
            extent: Pixels of the map.
            ids: Number of each class in the map.

        Yields:
            A window of the extent, and its class, confidence and number of observations.
        """
        for key, inside, outside in pieces(extent):
            if key in self._files:
                block = self._sum(key)[:, *inside]
                rows, cols = outside
                yield Window.from_slices(rows, cols), _finish(block, ids)

    def _sum(self, key: Block) -> NDArray[np.float32]:
        total: Any = 0
        for path in self._files[key]:
            with np.load(path) as part:
                block = part['_'.join(map(str, key))]
            most = np.maximum(block[-1], total[-1]) if np.ndim(total) else block[-1]
            total = total + block
            total[-1] = most
        return total


def _finish(block: NDArray[np.float32], ids: Sequence[int]) -> tuple[NDArray[Any], ...]:
    """Class, confidence and number of observations of sums (K + 2, H, W)."""
    with np.errstate(invalid='ignore'):
        probabilities = block[:-2] / block[-2]
    classes, confidence = classify(torch.from_numpy(probabilities), None, ids)
    return classes, confidence, block[-1].astype(np.uint16)


def write_cogs(
    folder: Path, name: str, scheme: ClassScheme, grid: Grid, extent: Place, pixels: Pixels
) -> None:
    """Write class, confidence and number of observations as Cloud-Optimized GeoTIFFs.

    Args:
        folder: Folder to write to.
        name: Name of the map: ``NAME.tif``, ``NAME_confidence.tif``, ``NAME_observations.tif``.
        scheme: The classes.
        grid: Pixel grid.
        extent: Pixels of the map on the grid.
        pixels: Windows of the extent and the values of the three layers there.

    Raises:
        OSError: If a file cannot be written.
    """
    layers = class_layer(scheme), CONFIDENCE, OBSERVATIONS
    shape = extent.height, extent.width
    place = extent.epsg, grid.transform(extent.row, extent.col)
    with tempfile.TemporaryDirectory(prefix='.', dir=folder) as temporary:
        plain = [layer.path(Path(temporary), name) for layer in layers]
        with rasterio.Env(**_GDAL_OPTIONS), ExitStack() as stack:
            files = [
                stack.enter_context(layer.create(path, shape, *place, bigtiff='if_safer'))
                for layer, path in zip(layers, plain, strict=True)
            ]
            for window, values in pixels:
                for dst, value in zip(files, values, strict=True):
                    dst.write(value, 1, window=window)
        for layer, path in zip(layers, plain, strict=True):
            _write_cog(layer, path, layer.path(folder, name), shape)


def _write_cog(layer: Layer, plain: Path, path: Path, shape: tuple[int, int]) -> None:
    """Copy an uncompressed raster, and write its sidecar."""
    expected = shape[0] * shape[1] * np.dtype(layer.dtype).itemsize
    if plain.stat().st_size < expected:  # GDAL does not report a disk that fills up on closing
        raise OSError(f'{plain} has less than its {expected} bytes; is the disk full?')
    with whole(path) as temporary, rasterio.Env(**_GDAL_OPTIONS):
        rasterio.shutil.copy(plain, temporary, overview_resampling=layer.resampling, **_COG_OPTIONS)
        layer.write_category_names(temporary)


def write_mosaic(folder: Path, epsg: int, grids: Mapping[int, Grid], scheme: ClassScheme) -> None:
    """Warp the maps of all zones to one CRS: ``mosaic.tif`` and its two companions.

    Every pixel is the nearest one of a zone's map; where zones overlap, the more confident.

    Args:
        folder: Folder of the zones' maps.
        epsg: EPSG code of the mosaic, a CRS in the unit of the zones.
        grids: Pixel grid of each zone.
        scheme: The classes.
    """
    first = next(iter(grids.values()))
    grid = Grid(epsg, first.xres, first.yres, 0, 0)
    bounds = np.array([_bounds(folder / f'{zone}.tif', epsg) for zone in grids])
    (xmin, ymin), (xmax, ymax) = bounds[:, :2].min(0), bounds[:, 2:].max(0)
    row, col = math.floor(ymax / grid.yres), math.floor(xmin / grid.xres)
    height, width = math.ceil(ymin / grid.yres) - row, math.ceil(xmax / grid.xres) - col
    extent = Place(epsg, row, col, height, width)
    write_cogs(folder, 'mosaic', scheme, grid, extent, _warped(folder, grid, extent, [*grids]))


def _bounds(path: Path, epsg: int) -> tuple[float, float, float, float]:
    with rasterio.open(path) as src:
        xmin, ymin, xmax, ymax = transform_bounds(src.crs, CRS.from_epsg(epsg), *src.bounds)
    return xmin, ymin, xmax, ymax


def _warped(folder: Path, grid: Grid, extent: Place, zones: Sequence[int]) -> Pixels:
    options = {
        'crs': CRS.from_epsg(grid.epsg),
        'transform': grid.transform(extent.row, extent.col),
        'height': extent.height,
        'width': extent.width,
    }
    suffixes = '', CONFIDENCE.suffix, OBSERVATIONS.suffix
    with ExitStack() as stack:
        sources = [
            [stack.enter_context(rasterio.open(folder / f'{zone}{s}.tif')) for s in suffixes]
            for zone in zones
        ]
        maps = [[stack.enter_context(WarpedVRT(src, **options)) for src in s] for s in sources]
        for _, _, (rows, cols) in pieces(extent):
            window = Window.from_slices(rows, cols)
            values = np.array([[src.read(1, window=window) for src in m] for m in maps])
            best = np.where(values[:, 0] == 0, -1, values[:, 1].astype(int)).argmax(0)
            chosen = np.take_along_axis(values, best[None, None], 0)[0]
            yield window, [v.astype(s.dtypes[0]) for v, s in zip(chosen, sources[0], strict=True)]


class Remaining(Sampler[Any]):
    """The windows of a sampler that are not done yet.

    Attributes:
        windows: Slices of x and y, and of t if the sampler gives them.
    """

    def __init__(
        self, windows: Iterable[Any], done: set[Place], grid: tuple[int, float, float], least: int
    ) -> None:
        """Leave out what is done.

        Args:
            windows: A sampler's windows.
            done: Windows that are in the parts.
            grid: EPSG code, width and height of a pixel.
            least: Number of windows to keep, so that each rank has one.
        """
        epsg, xres, yres = grid
        todo: list[Any] = []
        finished: list[Any] = []
        for window in windows:
            x, y = window[:2]
            height, width = round((y.stop - y.start) / yres), round((x.stop - x.start) / xres)
            corner = Affine(xres, 0, x.start, 0, -yres, y.stop)
            place = locate(epsg, corner, height, width)[1]
            (finished if place in done else todo).append(window)
        self.windows = todo + finished[: max(0, least - len(todo))]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the windows."""
        return iter(self.windows)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)


class SceneWriter(MapWriter):
    """Blends overlapping windows into a map of the whole scene, one for each CRS.

    The map has the extent of the data, or of the windows if these do not tell it.
    ``EPSG.tif`` holds the class numbers with colours and names, ``EPSG_confidence.tif`` the
    probability in percent and ``EPSG_observations.tif`` the number of valid observations (1 if
    the predictions do not say), all as Cloud-Optimized GeoTIFFs. Probabilities are weighted with a
    Hann window, so overlap the windows by half or so: a
    :class:`~torchgeo.samplers.GriddedPatchSampler` with a ``stride`` in whole pixels. Each window
    counts once.

    Sums beyond ``buffer_size`` go to files in ``output_dir/parts``: 4 * (K + 2) bytes a pixel, and
    two or three times that if the buffer holds only a few rows of blocks. So
    memory depends neither on the scene nor on the order of the windows. Every rank writes its own
    parts and the first one merges them, so ranks must share the folder. An interrupted run leaves
    its parts; with ``resume`` the next run, of the same model, continues from them. A sampler in
    ``datamodule.predict_sampler``, or each in a list of them, then gives only what remains.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        mosaic: int | None = None,
        resume: bool = False,
        buffer_size: int = 512,
        classes: int | ClassScheme | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            output_dir: Folder of the maps, ``maps`` in the trainer's root folder unless given.
            mosaic: EPSG code, in the unit of the scenes, of an additional map of all of them.
            resume: Continue an interrupted run; its parts are deleted otherwise.
            buffer_size: Memory of a rank's sums, in MiB; a row of windows should fit.
            classes: Class scheme, or number of classes; that of the data set unless given.

        Raises:
            ValueError: If buffer_size is not positive.
        """
        super().__init__(output_dir, classes)
        if buffer_size <= 0:
            raise ValueError(f'buffer_size is {buffer_size}, expected a number of MiB above 0')
        self.mosaic = mosaic
        self.resume = resume
        self.buffer_size = buffer_size
        self._buffer = BlendBuffer()
        self._done: set[Place] = set()
        self._rank = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find or delete the parts of an earlier run."""
        super().setup(trainer, pl_module, stage)
        if stage != 'predict':
            return
        self._rank = trainer.global_rank
        self._buffer = BlendBuffer()
        if trainer.is_global_zero and not self.resume:
            shutil.rmtree(self._parts, ignore_errors=True)
        trainer.strategy.barrier('old parts')
        self._parts.mkdir(exist_ok=True)
        self._done = Parts(self._parts).places
        if self._done:
            self._skip_done(trainer)

    def write(self, window: PredictedWindow, scheme: ClassScheme, dataset: Any) -> None:
        """Add a window to the sums.

        Args:
            window: The prediction.
            scheme: The classes.
            dataset: Not used.

        Raises:
            ValueError: If the window lies on another pixel grid than the others.
        """
        probabilities = window.probabilities.float().cpu().numpy()
        grid, place = locate(window.epsg, window.transform, *probabilities.shape[1:])
        if place in self._done:
            return
        seen = window.observations
        self._buffer.add(grid, place, probabilities, None if seen is None else seen.cpu().numpy())
        self._done.add(place)
        if self._buffer.nbytes > self.buffer_size * 2**20:
            self._save()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts of all ranks and write the maps."""
        if self._buffer.places:
            self._save()
        trainer.strategy.barrier('all parts')
        if trainer.is_global_zero:
            self._merge(trainer)
        trainer.strategy.barrier('scenes')

    def _merge(self, trainer: Trainer) -> None:
        folder, parts, scheme = self._folder, Parts(self._parts), self._scheme_of(trainer)
        for epsg, grid in parts.grids.items():
            extent = parts.extent(epsg)
            for bounds in _bounds_of_data(trainer, epsg):  # one, that of the zone
                extent = clip(extent, grid, bounds)
            pixels = parts.pixels(extent, scheme.ids)
            write_cogs(folder, str(epsg), scheme, grid, extent, pixels)
            print(f'map of EPSG:{epsg} written to {folder / f"{epsg}.tif"}')
        if self.mosaic is not None and parts.grids:
            write_mosaic(folder, self.mosaic, parts.grids, scheme)
            print(f'mosaic written to {folder / "mosaic.tif"}')
        shutil.rmtree(self._parts)

    def _save(self) -> None:
        number = len(list(self._parts.glob(f'part-{self._rank:05}-*.npz')))
        self._buffer.save(self._parts / f'part-{self._rank:05}-{number:05}.npz')

    def _skip_done(self, trainer: Trainer) -> None:
        datamodule: Any = getattr(trainer, 'datamodule', None)
        sampler = getattr(datamodule, 'predict_sampler', None)
        dataset = getattr(datamodule, 'predict_dataset', None)
        if sampler is None or dataset is None:
            return
        if isinstance(dataset, list):
            pairs = zip(dataset, sampler, strict=True)
            datamodule.predict_sampler = [self._remaining(trainer, *pair) for pair in pairs]
        else:
            datamodule.predict_sampler = self._remaining(trainer, dataset, sampler)

    def _remaining(self, trainer: Trainer, dataset: Any, sampler: Iterable[Any]) -> 'Remaining':
        grid = dataset.crs.to_epsg(), *dataset.res
        return Remaining(sampler, self._done, grid, trainer.world_size)

    @property
    def _folder(self) -> Path:
        return self.output_dir or Path()

    @property
    def _parts(self) -> Path:
        return self._folder / 'parts'


def _bounds_of_data(trainer: Trainer, epsg: int) -> list[tuple[float, float, float, float]]:
    """Bounds of the data sets of a CRS, where they are TorchGeo's."""
    return [
        tuple(dataset.index.total_bounds)
        for dataset in predict_datasets(trainer)
        if isinstance(dataset, GeoDataset) and dataset.crs.to_epsg() == epsg
    ]
