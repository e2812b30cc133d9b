"""Maps of whole scenes from overlapping windows, in bounded memory."""

import json
import math
import re
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import rasterio
import torch
from affine import Affine
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.vrt import WarpedVRT
from rasterio.warp import calculate_default_transform, transform_bounds
from rasterio.windows import Window
from torchgeo.datasets import GeoDataset

from torchgeo_s1s2.callbacks.geotiff import MapWriter, PredictedWindow, predict_datasets
from torchgeo_s1s2.callbacks.layers import (
    LAYERS,
    Pixels,
    check_replaceable,
    classify,
    is_map,
    map_layers,
    named,
    write_layers,
)
from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.datasets.rasters import Grid, crs_of
from torchgeo_s1s2.datasets.series import SeriesDataset
from torchgeo_s1s2.errors import MapError, warn
from torchgeo_s1s2.files import Workplace, stamps, whole

BLOCK = 512
"""Height and width in pixels of the blocks that a scene is summed in."""

SAVE_AFTER = 300
"""Seconds between which the sums are saved: what a run loses that is killed."""

Block = tuple[int, int, int]  # EPSG code, row and column of blocks


class Place(NamedTuple):
    """Pixels of a window on the lattice of its zone."""

    epsg: int
    row: int
    col: int
    height: int
    width: int

    def on(self, lattice: Grid) -> Grid:
        """Where the pixels lie."""
        return lattice.window(self.col, self.row, self.width, self.height)


def clip(extent: Place, lattice: Grid, bounds: tuple[float, float, float, float]) -> Place:
    """Leave out the pixels that lie wholly beyond bounds: least x and y, largest x and y."""
    t = lattice.transform
    left, right = ((x - t.c) / t.a for x in bounds[::2])
    bottom, top = ((y - t.f) / t.e for y in bounds[1::2])
    row, col = max(extent.row, math.floor(top + 1e-3)), max(extent.col, math.floor(left + 1e-3))
    last_row = min(extent.row + extent.height, math.ceil(bottom - 1e-3))
    last_col = min(extent.col + extent.width, math.ceil(right - 1e-3))
    return Place(extent.epsg, row, col, last_row - row, last_col - col)


def blend_weights(height: int, width: int) -> NDArray[np.float32]:
    """Hann window at the pixel centres, (height, width): above 0 and at most 1."""
    y, x = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (height, width))
    return np.outer(y, x).astype(np.float32)


def pieces(place: Place) -> Iterator[tuple[Block, tuple[slice, slice], tuple[slice, slice]]]:
    """Cut a window: a block, its rows and columns, and the same pixels in the window."""
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
        probe: Probabilities of the first of the windows.
        saved: Number of the windows that are on disk.
        number: Number of the part that they are saved as, among those of a rank.
    """

    def __init__(self, number: int = 0) -> None:
        """Begin empty."""
        self.blocks: dict[Block, NDArray[np.float32]] = {}
        self.places: list[Place] = []
        self.probe = np.zeros(0, np.float16)
        self.saved, self.number = 0, number
        self._adding: tuple[Place, list[Any]] | None = None

    @classmethod
    def load(cls, path: Path) -> 'BlendBuffer':
        """Go on with saved sums.

        Raises:
            MapError: If the file is damaged.
        """
        buffer = cls(int(path.stem[-5:]))
        with _opened(path) as part:
            buffer.blocks = {key: part[name] for key, name in _blocks(part)}
            buffer.places, buffer.probe = _places(part), part['probe']
        buffer.saved = len(buffer.places)
        return buffer

    @property
    def nbytes(self) -> int:
        """Memory of the sums in bytes."""
        return sum(block.nbytes for block in self.blocks.values())

    def add(self, place: Place, window: PredictedWindow) -> None:
        """Add a window at its place; one observation everywhere unless it says otherwise."""
        probabilities = window.probabilities.float().cpu().numpy()
        seen = window.observations
        count = np.ones(probabilities.shape[1:]) if seen is None else seen.cpu().numpy()
        known = (count > 0) & np.isfinite(probabilities).all(0)
        weight = np.where(known, blend_weights(place.height, place.width), np.float32(0))
        weighted = np.where(known, probabilities, 0) * weight
        sums = np.concatenate([weighted, [weight, (count * known).astype(np.float32)]])
        changes = []
        for key, inside, outside in pieces(place):
            if key not in self.blocks:
                self.blocks[key] = np.zeros((len(sums), BLOCK, BLOCK), np.float32)
            old = self.blocks[key][:, *inside]
            changes.append((old, _add(old.copy(), sums[:, *outside])))
        if not self.places:
            self.probe = probabilities.astype(np.float16)
        self._adding = place, changes
        self.finish()

    def finish(self) -> None:
        """Add the last window wholly, wherever an interrupt stopped that."""
        if self._adding:
            place, changes = self._adding
            for old, new in changes:
                old[:] = new
            if place not in self.places[-1:]:
                self.places.append(place)
            self._adding = None

    def save(self, path: Path, lattices: Mapping[int, Grid], origin: Mapping[str, str]) -> None:
        """Write the sums, where they lie and what they were made of as ``.npz``.

        Raises:
            MapError: If the file cannot be written.
        """
        arrays: dict[str, Any] = {'_'.join(map(str, k)): b for k, b in self.blocks.items()}
        transforms = [(epsg, *grid.transform[:6]) for epsg, grid in lattices.items()]
        arrays |= {'places': self.places, 'lattices': transforms, 'probe': self.probe}
        try:
            with whole(path) as temporary:
                np.savez(temporary, origin=json.dumps(origin), **arrays)
        except OSError as error:
            raise MapError(
                f'{path} cannot be written: {error}. Free space on its disk, and continue with '
                'resume: true'
            ) from error
        self.saved = len(self.places)


def _places(part: Any) -> list[Place]:
    return [Place(*map(int, place)) for place in part['places']]


def _blocks(part: Any) -> Iterator[tuple[Block, str]]:
    for name in set(part) - {'places', 'lattices', 'probe', 'origin'}:
        epsg, row, col = map(int, name.split('_'))
        yield (epsg, row, col), name


def _add(total: NDArray[np.float32], block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Add sums to others in place; of the last layer, the observations, the largest counts."""
    total[:-1] += block[:-1]
    np.maximum(total[-1], block[-1], out=total[-1])
    return total


class Parts:
    """Saved sums of a scene, read block by block.

    Attributes:
        places: Windows that are in the sums.
        probes: Probabilities of one of them.
        lattices: The one pixel grid of each zone, from the origin of its CRS, by EPSG code.
        origins: What each part was made of.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """List what is in the parts of all ranks.

        Raises:
            MapError: If one is damaged, or they do not lie on one lattice.
        """
        self.places: set[Place] = set()
        self.probes: dict[Place, NDArray[np.float16]] = {}
        self.lattices: dict[int, Grid] = {}
        self.origins: list[dict[str, str]] = []
        self._files: dict[Block, list[Path]] = defaultdict(list)
        for path in paths:
            with _opened(path) as part:
                places = _places(part)
                self.places.update(places)
                self.probes = self.probes or {places[0]: part['probe']}
                self.origins.append(json.loads(str(part['origin'])))
                for epsg, *transform in part['lattices']:
                    self.place(Grid(crs_of(int(epsg)), Affine(*transform), 0, 0))
                for key, _ in _blocks(part):
                    self._files[key].append(path)

    def place(self, grid: Grid) -> Place:
        """Pixels of a window; the first one of a zone gives the lattice.

        Raises:
            MapError: If it is not north up, or lies on another lattice than the windows before.
        """
        t, epsg = grid.transform, grid.epsg or 0
        if t.b or t.d or t.a <= 0 or t.e >= 0:
            raise MapError(f'a window of a scene must be north up, its transform is {t}')
        # The quarter keeps whole and half pixels, the usual origins, away from the step of floor.
        col, row = math.floor(t.c / t.a + 0.25), math.floor(t.f / t.e + 0.25)
        lattice = self.lattices.setdefault(epsg, grid.window(-col, -row, 0, 0))
        offset = grid.offset_in(lattice)
        if offset is None:
            raise MapError(
                f'the windows of EPSG:{epsg} lie on different pixel grids, {grid.transform!r} and '
                f'{lattice.transform!r}; a scene needs one: predict with a single resolution, and '
                'a stride in whole pixels'
            )
        return Place(epsg, offset[1], offset[0], grid.height, grid.width)

    def check_origin(self, origin: Mapping[str, str]) -> None:
        """Check that the parts were made of the same model, settings and data.

        Raises:
            MapError: If not; the message names what differs.
        """
        for other in self.origins:
            differing = [
                f'{key}, then {other.get(key)}, now {origin.get(key)}'
                for key in {**other, **origin}
                if other.get(key) != origin.get(key)
            ]
            if differing:
                raise _other_run('; '.join(differing))

    def check_probe(self, place: Place, probabilities: NDArray[np.float32]) -> None:
        """Check that the window that the parts keep is predicted as it was.

        Raises:
            MapError: If not.
        """
        if place in self.probes:
            change = np.abs(np.nan_to_num(probabilities) - np.nan_to_num(self.probes[place]))
            if change.mean() > _PROBE_CHANGE:
                raise _other_run(f'the predictions, by {change.mean():.3f} on average')

    def remaining(self, windows: Sequence[Any], dataset: Any, least: int) -> list[Any]:
        """Leave out what is done of a sampler's windows; one is kept to compare with.

        Args:
            windows: Slices of x and y, and of t if the sampler gives them.
            dataset: Data set of the sampler, with ``crs`` and ``res``.
            least: Number of windows to keep, so that each rank has one.
        """
        epsg, (xres, yres) = dataset.crs.to_epsg(), dataset.res
        probe, todo, done = list[Any](), list[Any](), list[Any]()
        for window in windows:
            x, y = window[:2]
            height, width = round((y.stop - y.start) / yres), round((x.stop - x.start) / xres)
            corner = Affine(xres, 0, x.start, 0, -yres, y.stop)
            place = self.place(Grid(crs_of(epsg), corner, width, height))
            known = probe if place in self.probes else done
            (known if place in self.places else todo).append(window)
        some = probe + todo
        return some + done[: max(0, least - len(some))]

    def extent(self, epsg: int) -> Place:
        """Smallest window that holds all windows of a CRS."""
        places = np.array([p for p in self.places if p.epsg == epsg])
        row, col = places[:, 1:3].min(0)
        height, width = (places[:, 1:3] + places[:, 3:]).max(0) - (row, col)
        return Place(epsg, int(row), int(col), int(height), int(width))

    def pixels(self, extent: Place, ids: Sequence[int]) -> Pixels:
        """Read a map block by block: class with these numbers, confidence, observations."""
        for key, inside, (rows, cols) in pieces(extent):
            if key in self._files:
                block = reduce(_add, self._blocks(key))[:, *inside]
                with np.errstate(invalid='ignore'):
                    probabilities = torch.from_numpy(block[:-2] / block[-2])
                values = *classify(probabilities, None, ids), block[-1].astype(np.uint16)
                yield Window.from_slices(rows, cols), values

    def _blocks(self, key: Block) -> Iterator[NDArray[np.float32]]:
        for path in self._files[key]:
            with _opened(path) as part:
                yield part['_'.join(map(str, key))]


_PROBE_CHANGE = 0.01  # another batch size or device changes probabilities by less than 0.001


def _other_run(differing: str) -> MapError:
    return MapError(
        f'the parts of the interrupted run were made otherwise; what differs: {differing}. Give '
        'the model, settings and data of that run to continue it, or resume: false to begin anew'
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with np.load(path) as part:
            yield part
    except MapError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise MapError(
            f'{path} cannot be read: {error}. Delete it, and resume: true predicts its windows '
            'again'
        ) from error


def write_mosaic(folder: Path, crs: CRS, zones: Mapping[int, Grid], scheme: ClassScheme) -> None:
    """Warp the maps of all zones to one CRS: ``mosaic.tif`` and its two companions.

    Every pixel is the nearest one of a zone's map; where zones overlap, the more confident.

    Args:
        folder: Folder of the zones' maps.
        crs: CRS of the mosaic.
        zones: Where the map of each zone lies.
        scheme: The classes.

    Raises:
        MapError: If the zones have no place in the CRS.
    """
    grid = mosaic_grid(crs, [*zones.values()])
    write_layers(folder, 'mosaic', map_layers(scheme), grid, _warped(folder, grid, [*zones]))


def mosaic_grid(crs: CRS, zones: Sequence[Grid]) -> Grid:
    """Grid that holds zones in another CRS, its corner on a multiple of the resolution.

    The resolution is that of the first zone; in another unit, the one that keeps the number of
    pixels on the diagonal as it is.

    Args:
        crs: The CRS.
        zones: Where the map of each zone lies.

    Raises:
        MapError: If a zone has no place in the CRS.
    """
    first = zones[0]
    res = first.transform
    if crs.units_factor != first.crs.units_factor:
        size = first.width, first.height
        res = calculate_default_transform(first.crs, crs, *size, *first.bounds)[0]
    bounds = np.array([transform_bounds(zone.crs, crs, *zone.bounds) for zone in zones])
    (xmin, ymin), (xmax, ymax) = bounds[:, :2].min(0), bounds[:, 2:].max(0)
    if not (np.isfinite(bounds).all() and (bounds[:, :2] < bounds[:, 2:]).all()):
        raise MapError(
            f'the scenes have no connected place in {crs}; give mosaic another EPSG code'
        )
    col, row = math.floor(xmin / res.a), math.floor(ymax / res.e)
    width, height = math.ceil(xmax / res.a) - col, math.ceil(ymin / res.e) - row
    corner = Affine(res.a, 0, col * res.a, 0, res.e, row * res.e)
    return Grid(crs, corner, width, height)


def _warped(folder: Path, grid: Grid, zones: Sequence[int]) -> Pixels:
    with ExitStack() as stack:
        paths = [[layer.path(folder, str(zone)) for layer in LAYERS] for zone in zones]
        sources = [[stack.enter_context(rasterio.open(path)) for path in p] for p in paths]
        maps = [[stack.enter_context(WarpedVRT(src, **vars(grid))) for src in s] for s in sources]
        for _, _, (rows, cols) in pieces(Place(0, 0, 0, grid.height, grid.width)):
            window = Window.from_slices(rows, cols)
            values = np.array([[src.read(1, window=window) for src in m] for m in maps])
            best = np.where(values[:, 0] == 0, -1, values[:, 1].astype(int)).argmax(0)
            yield window, np.take_along_axis(values, best[None, None], 0)[0]


class SceneWriter(MapWriter):
    """Blends overlapping windows into a map of the whole scene, one for each CRS.

    The map has the extent of the data, or of the windows if these do not tell it.
    ``EPSG.tif`` holds the class numbers with colours and names, ``EPSG_confidence.tif`` the
    probability in percent and ``EPSG_observations.tif`` the number of valid observations (1 if
    the predictions do not say), all as Cloud-Optimized GeoTIFFs that are read back before all
    of them take their names. Probabilities are weighted with a Hann window, so overlap the
    windows by a quarter or so: a
    :class:`~torchgeo.samplers.GriddedPatchSampler` with a ``stride`` in whole pixels. Each window
    counts once.

    Sums beyond ``buffer_size`` go to files in a hidden folder of the run in ``output_dir``:
    4 * (K + 2) bytes a pixel, and two or three times that if the buffer holds only a few rows of
    blocks. So memory depends neither on the scene nor on the order of the windows. Every rank
    writes its own parts and the first one merges them, so ranks must share the folder; other runs
    in it are left alone. An interrupted run leaves its sums, one that is killed what they were at
    most five minutes before. With ``resume`` the next run continues from them if model, settings,
    windows and data are the same, which digests and one window that is predicted again tell. A
    sampler in ``datamodule.predict_sampler``, or each in a list of them, then gives only what
    remains. On one device the map is that of an uninterrupted run, as far as the model predicts a
    window the same in another batch.
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
            mosaic: EPSG code of an additional map of all scenes.
            resume: Continue an interrupted run; its parts are deleted otherwise.
            buffer_size: Memory of a rank's sums, in MiB; a row of windows should fit.
            classes: Class scheme, or number of classes; that of the data set unless given.

        Raises:
            MapError: If buffer_size is not positive, or mosaic is no EPSG code.
        """
        super().__init__(output_dir, classes)
        if buffer_size <= 0:
            raise MapError(f'buffer_size is {buffer_size}, expected a number of MiB above 0')
        try:
            self.mosaic = None if mosaic is None else CRS.from_epsg(mosaic)
        except ValueError as error:
            raise MapError(f'mosaic is {mosaic}, expected an EPSG code: {error}') from error
        if self.mosaic and not (self.mosaic.is_projected or self.mosaic.is_geographic):
            raise MapError(f'mosaic is {mosaic}, expected an EPSG code of maps or of degrees')
        self.resume = resume
        self.buffer_size = buffer_size
        self._buffer = BlendBuffer()
        self._parts = Parts([])
        self._total, self._save_at = 0, 0.0
        self._dropped: list[Workplace] = []
        self._origin: dict[str, str] = {}
        self._rank = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the parts of an interrupted run."""
        super().setup(trainer, pl_module, stage)
        if stage != 'predict':
            return
        self._rank = trainer.global_rank
        files = self._part_files()
        own = [path for path in files if path.match(f'part-{self._rank:05}-*')]
        self._parts = Parts(files)
        self._buffer = BlendBuffer.load(own[-1]) if own else BlendBuffer()
        self._save()
        self._origin = {'windows': self._plan(trainer)}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the parts are of this model and these data, or delete them.

        Raises:
            MapError: If they are of others.
        """
        super().on_predict_start(trainer, pl_module)
        origin = _origin(trainer, pl_module, self._scheme_of(trainer))
        self._origin = trainer.strategy.broadcast(origin | self._origin)
        self._parts.check_origin(self._origin)
        if self.resume and trainer.is_global_zero:
            done, of = len(self._parts.places), f' of {self._total}' if self._total else ''
            found = f'continues from {done}{of} windows' if done else 'nothing to continue'
            print(f'{self._folder}: {found}')
        self._save_at = time.monotonic() + SAVE_AFTER
        for workplace in self._dropped:
            warn(
                f'{len(workplace.parts)} parts of an interrupted run in {workplace.path} are '
                'deleted; resume: true would have continued it'
            )
            workplace.remove()
        self._dropped = []

    def write(self, window: PredictedWindow, scheme: ClassScheme, dataset: Any) -> None:
        """Add a window to the sums; see :meth:`MapWriter.write`.

        Raises:
            MapError: If the window lies on another pixel grid than the others, or is predicted
                otherwise than in the run that is continued.
        """
        place = self._parts.place(window.grid)
        if place in self._parts.places:
            self._parts.check_probe(place, window.probabilities.float().cpu().numpy())
            return
        self._buffer.add(place, window)
        self._parts.places.add(place)
        if self._is_full or time.monotonic() > self._save_at:
            self._save()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the sums so far to be continued."""
        try:
            self._save()
        except MapError as error:
            lost = len(self._buffer.places) - self._buffer.saved
            warn(f'the last {lost} windows will be predicted again: {error}')
        super().on_exception(trainer, pl_module, exception)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts of all ranks and write the maps."""
        self._save()
        self._buffer = BlendBuffer()  # whose memory is free again
        trainer.strategy.barrier('all parts')
        if trainer.is_global_zero:
            self._merge(trainer)
        trainer.strategy.barrier('scenes')

    def _merge(self, trainer: Trainer) -> None:
        folder, files, scheme = self._folder, self._part_files(), self._scheme_of(trainer)
        parts = Parts(files)
        if not parts.places:
            raise MapError('no window was predicted, so there is no map')
        zones: dict[int, Grid] = {}
        names = [*map(str, parts.lattices), *(['mosaic'] if self.mosaic else [])]
        check_replaceable(layer.path(folder, name) for name in names for layer in LAYERS)
        layers, first = map_layers(scheme), folder / f'{min(parts.lattices)}.tif'
        with named(first), whole(first, self._unfinished) as temporary:
            for epsg, lattice in parts.lattices.items():
                extent = parts.extent(epsg)
                if (bounds := _bounds_of_data(trainer, epsg)) is not None:
                    extent = clip(extent, lattice, bounds)
                zones[epsg] = extent.on(lattice)
                pixels = parts.pixels(extent, scheme.ids)
                write_layers(temporary.parent, str(epsg), layers, zones[epsg], pixels)
            if self.mosaic is not None:
                write_mosaic(temporary.parent, self.mosaic, zones, scheme)
        for file in files:
            file.unlink()
        for name in names:
            print(f'map {name} written to {folder / f"{name}.tif"}')
        older = (path for path in folder.glob('*.tif') if path.stem.split('_')[0] not in names)
        self._warn_of_older(filter(_is_of_a_scene, older))

    def _choose(self, left: list[Workplace]) -> Workplace:
        if not self.resume:
            self._dropped = left
            return Workplace.new(self._folder)
        *others, last = left or [Workplace.new(self._folder)]
        for workplace in others:
            workplace.leave()
        return last

    def _leave(self) -> None:
        super()._leave()
        for workplace in self._dropped:
            workplace.leave()

    def _part_files(self) -> list[Path]:
        return Workplace(self._unfinished).parts if self._unfinished else []

    def _save(self) -> None:
        """Write the sums, if there are others than on disk, and begin anew if they are many."""
        self._buffer.finish()
        if len(self._buffer.places) > self._buffer.saved:
            name = f'part-{self._rank:05}-{self._buffer.number:05}.npz'
            path = (self._unfinished or self._folder) / name
            self._buffer.save(path, self._parts.lattices, self._origin)
            self._save_at = time.monotonic() + SAVE_AFTER
        if self._is_full:
            self._buffer = BlendBuffer(self._buffer.number + 1)

    @property
    def _is_full(self) -> bool:
        return self._buffer.nbytes > self.buffer_size * 2**20

    def _plan(self, trainer: Trainer) -> str:
        """Leave out what is done of the data module's windows; return a digest of them all."""
        datamodule: Any = getattr(trainer, 'datamodule', None)
        sampler = getattr(datamodule, 'predict_sampler', None)
        dataset = getattr(datamodule, 'predict_dataset', None)
        self._total = 0
        if sampler is None or dataset is None:
            return ''
        several = isinstance(dataset, list)
        datasets, samplers = (dataset, sampler) if several else ([dataset], [sampler])
        windows = [list(sampler) for sampler in samplers]
        self._total = sum(map(len, windows))
        if self._parts.places:
            pairs = zip(windows, datasets, strict=True)
            remaining = [self._parts.remaining(w, d, trainer.world_size) for w, d in pairs]
            datamodule.predict_sampler = remaining if several else remaining[0]
        return _digest(windows)


def _is_of_a_scene(path: Path) -> bool:
    """Whether a scene's writer wrote a file, and not the user."""
    name = re.fullmatch(r'(\d{4,6}|mosaic)(_confidence|_observations)?', path.stem)
    return bool(name) and is_map(path)


def _origin(trainer: Trainer, module: LightningModule, scheme: ClassScheme) -> dict[str, str]:
    """What makes the predictions what they are, by name, as far as it can be told."""
    datasets = predict_datasets(trainer)
    datamodule: Any = getattr(trainer, 'datamodule', None)
    statistics = [getattr(datamodule, name, None) for name in ('mean', 'std')]
    settings = {
        name: re.sub(' at 0x[0-9a-f]+', '', repr(getattr(datasets[0], name, None)))
        for name in ('root', 'split', 'bands', 'series')
    }
    for sensor, reading in getattr(datasets[0], 'readings', {}).items():
        said = {k: v for k, v in vars(reading).items() if k not in ('sensor', 'bands')}
        settings[f'what files of {sensor} hold'] = repr(said)
    return settings | {
        'data': _digest(part for dataset in datasets for part in _content(dataset)),
        'statistics': _digest(statistics),
        'weights': _digest(part for pair in module.state_dict().items() for part in pair),
        'classes': _digest([scheme]),
    }


def _digest(values: Iterable[Any]) -> str:
    digest = sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def _content(dataset: Any) -> Iterator[Any]:
    """Type, size, places and times of a data set, and its files where it tells them."""
    yield type(dataset).__name__
    yield len(dataset) if hasattr(dataset, '__len__') else None
    if isinstance(dataset, GeoDataset):
        yield dataset.index.to_wkb().to_csv()
    files = getattr(dataset, 'files', ())
    if isinstance(dataset, SeriesDataset):  # whose root holds more than the images
        rows = map(dataset.files_of, range(len(dataset)))
        files = [file for row in rows for sensor in dataset.sensors for file in row[sensor]]
    for file, stamp in stamps(map(Path, files)):
        yield str(file), *stamp


def _bounds_of_data(trainer: Trainer, epsg: int) -> tuple[float, float, float, float] | None:
    """Bounds of the data sets of a CRS, where they are TorchGeo's."""
    datasets = [dataset for dataset in predict_datasets(trainer) if isinstance(dataset, GeoDataset)]
    indexes = [dataset.index for dataset in datasets if dataset.crs.to_epsg() == epsg]
    return tuple(pd.concat(indexes).total_bounds) if indexes else None
