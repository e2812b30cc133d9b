"""A packed copy of chosen series, which reads many times as fast as their rasters.

One safetensors file a patch holds the acquisitions that the date rule chooses, uncompressed, and
in its header what it was made of.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import rasterio
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from torchgeo_s1s2.datasets.catalog import GDAL_OPTIONS
from torchgeo_s1s2.datasets.classes import NO_LABEL
from torchgeo_s1s2.datasets.rasters import NODATA, Grid, Rasters

if TYPE_CHECKING:
    from torchgeo_s1s2.datasets.multisenge import MultiSenGE

LABELS = 'labels'
SUFFIX = '.safetensors'
_VERSION = 1

Kept = dict[str, list[tuple[int, ...]]]
"""Positions of the slots of a patch that are not empty, each once, by sensor."""


def pack(
    dataset: 'MultiSenGE',
    folder: str | os.PathLike[str],
    num_workers: int = 0,
    progress: bool = True,
) -> Path:
    """Write the packed copy of a data set, or what is missing or out of date of it.

    Give the folder to :class:`~torchgeo_s1s2.datasets.MultiSenGE` as ``packed``. A file is there
    whole or not at all, so an interrupted run goes on where it was. Splits may share a folder.

    Args:
        dataset: The data set, reading its rasters.
        folder: Folder to write to; made if it is not there.
        num_workers: Number of processes that read and write.
        progress: Show a progress bar.

    Returns:
        The folder.

    Raises:
        OSError: If the disk lacks the room, or a raster cannot be read.
        ValueError: If the folder holds the copy of another series, sensors or bands, or the date
            rule draws.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    job = _Packing(dataset, folder)
    if not len(job):
        return folder
    _check_room(folder, job.size)
    loader = DataLoader(job, batch_size=None, num_workers=num_workers)
    title = f'Packing {job.size / 1e9:.1f} GB'
    for _ in tqdm(loader, title, disable=not progress, unit='patch'):
        pass
    return folder


class PackedCopy(Rasters):
    """Reads the packed copy of a data set, and the rasters for what that does not hold.

    Attributes:
        folder: Folder of the copy.
    """

    def __init__(self, folder: str | os.PathLike[str], dataset: 'MultiSenGE') -> None:
        """Check that the copy holds the series of every patch of a data set as they are now.

        Args:
            folder: Folder that :func:`pack` wrote.
            dataset: The data set.

        Raises:
            FileNotFoundError: If there is no such folder.
            OSError: If a file of it cannot be read.
            ValueError: If the copy was made of other patches, dates, bands or files.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f'there is no packed copy in {folder}; write it with pack()')
        super().__init__(dataset.catalog, dataset.bands, dataset.raw)
        self._kept: dict[int, Kept] = {}
        missing, changed = [], []
        for patch in _patches(dataset):
            found = _made_of(self.folder, patch.name)
            if found is None:
                missing.append(patch.name)
            elif _differs(self.folder, patch.name, found, patch.made_of):
                changed.append(patch.name)
            self._kept[patch.row] = patch.kept
        for names, what in ((missing, 'lacks'), (changed, 'was made of other files for')):
            if names:
                raise ValueError(
                    f'the packed copy {self.folder} {what} {len(names)} of the {len(dataset)} '
                    f'patches of split {dataset.split!r} in {dataset.root}, for example {names[0]}'
                    '. Bring it up to date with pack(), or read without it'
                )

    def slot(
        self, row: int, sensor: str, positions: Sequence[int], grid: Grid
    ) -> NDArray[np.float32]:
        """As of the rasters."""
        kept, wanted = self._kept.get(row, {}).get(sensor, []), tuple(positions)
        value = None
        if wanted in kept:
            key = f'{sensor}_{kept.index(wanted)}'
            value = self._held(row, key, grid, NODATA[sensor])
        if value is None:
            return super().slot(row, sensor, positions, grid)
        return value if value.dtype.kind == 'f' else self.mean([value], sensor)

    def labels(self, row: int, grid: Grid) -> NDArray[Any] | None:
        """As of the rasters."""
        if self.catalog.ground_reference(row) is None:
            return None
        labels = self._held(row, LABELS, grid, NO_LABEL)
        return super().labels(row, grid) if labels is None else labels

    def _held(self, row: int, key: str, grid: Grid, nodata: float) -> NDArray[Any] | None:
        """What the copy holds on a grid, None on the grid of another zone or between pixels.

        Returns:
            Whole numbers as they are in the raster, or floats in the units of a sample; *nodata* or
            NaN beyond the patch.
        """
        native = self.grid(row)
        offset = grid.offset_in(native)
        if offset is None:
            return None
        path = _path(self.folder, self.catalog.patch(row).name)
        try:
            with safe_open(path, 'np') as file:
                if grid == native:
                    return file.get_tensor(key)
                return _crop(file.get_slice(key), (grid.height, grid.width), *offset, nodata)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error


class _Patch(NamedTuple):
    """A patch to pack: its row in the catalogue, the slots kept, and what its file is made of."""

    row: int
    name: str
    kept: Kept
    made_of: dict[str, str]


class _Packing(Dataset[int]):
    """Items are patches that are not up to date; to read one is to write its file."""

    def __init__(self, dataset: 'MultiSenGE', folder: Path) -> None:
        self.rasters, self.folder = Rasters(dataset.catalog, dataset.bands, dataset.raw), folder
        self.todo = []
        for patch in _patches(dataset):
            found = _made_of(folder, patch.name)
            if found is None or _differs(folder, patch.name, found, patch.made_of):
                self.todo.append(patch)

    def __len__(self) -> int:
        return len(self.todo)

    @property
    def size(self) -> int:
        """Number of bytes that the files will take."""
        total = 0
        for patch in self.todo:
            where = self.rasters.catalog.patch(patch.row)
            bytes_of = {'s2': 2, 's1': 4}
            planes = sum(
                len(patch.kept[sensor]) * len(bands) * bytes_of[sensor]
                for sensor, bands in self.rasters.bands.items()
            )
            total += where.width * where.height * (planes + 1)
        return total

    def __getitem__(self, number: int) -> int:
        patch = self.todo[number]
        path = _path(self.folder, patch.name)
        part = path.with_name(f'{path.name}.{os.getpid()}.part')
        try:
            save_file(dict(self._arrays(patch)), part, patch.made_of)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return number

    def _arrays(self, patch: _Patch) -> Iterator[tuple[str, NDArray[Any]]]:
        grid = self.rasters.grid(patch.row)
        with rasterio.Env(**GDAL_OPTIONS):
            for sensor, slots in patch.kept.items():
                for number, positions in enumerate(slots):
                    yield f'{sensor}_{number}', self._slot(patch.row, sensor, positions, grid)
            labels = self.rasters.labels(patch.row, grid)
        if labels is not None:
            yield LABELS, labels

    def _slot(self, row: int, sensor: str, positions: Sequence[int], grid: Grid) -> NDArray[Any]:
        """Whole numbers as they are, which take half the room, anything else as in a sample."""
        images = self.rasters.acquisitions(row, sensor, positions, grid)
        as_they_are = len(images) == 1 and images[0].dtype.kind in 'iu'
        return images[0] if as_they_are else self.rasters.mean(images, sensor)


def _kept(dataset: 'MultiSenGE', index: int) -> Kept:
    slots = dataset.slots(index)
    return {sensor: list(dict.fromkeys(filter(None, slots[sensor]))) for sensor in dataset.sensors}


def _patches(dataset: 'MultiSenGE') -> Iterator[_Patch]:
    """Patches of a data set as they are now."""
    if dataset.series.draws:
        raise ValueError(
            f'{dataset.series} draws other dates every epoch, so there is no packed copy of it; '
            'choose a rule that does not draw, or read without a copy'
        )
    settings = json.dumps(
        {
            'version': _VERSION,
            'series': repr(dataset.series),
            'bands': dataset.bands,
            'raw': dataset.raw,
        }
    )
    for index, row in enumerate(map(int, dataset._patches)):
        kept = _kept(dataset, index)
        files = json.dumps(_sources(dataset, row, kept))
        made_of = {'settings': settings, 'split': dataset.split, 'files': files}
        yield _Patch(row, dataset.name(index), kept, made_of)


def _sources(dataset: 'MultiSenGE', row: int, kept: Kept) -> list[list[Any]]:
    """Name, size and time of change of the rasters of a patch, slot by slot."""
    catalog = dataset.catalog
    paths = [
        catalog.path(row, sensor, position)
        for sensor in dataset.sensors
        for positions in kept[sensor]
        for position in positions
    ]
    reference = catalog.ground_reference(row)
    sources = []
    for path in [*paths, reference] if reference else paths:
        status = path.stat()
        sources.append([path.name, status.st_size, status.st_mtime_ns])
    return sources


def _path(folder: Path, name: str) -> Path:
    return folder / f'{name}{SUFFIX}'


def _made_of(folder: Path, name: str) -> dict[str, str] | None:
    """What the file of a patch is made of, None if there is no file."""
    path = _path(folder, name)
    try:
        with safe_open(path, 'np') as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _differs(
    folder: Path, name: str, found: Mapping[str, str], expected: Mapping[str, str]
) -> bool:
    """Whether the rasters have changed since.

    Raises:
        ValueError: If the copy is of another series, sensors or bands.
    """
    if found.get('settings') != expected['settings']:
        raise ValueError(
            f'the packed copy {folder} is of other settings: {_path(folder, name).name} was made '
            f'for split {found.get("split")!r} with {found.get("settings")}, expected '
            f'{expected["settings"]}. Give a folder of its own to each series and choice of bands'
        )
    return found.get('files') != expected['files']


def _unreadable(path: Path, error: Exception) -> OSError:
    return OSError(f'{path} cannot be read: {error}. Delete it and pack again')


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f'the packed copy takes {size / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB '
            'free; make room, or choose fewer dates, bands or patches'
        )


def _crop(source: Any, shape: tuple[int, int], col: int, row: int, nodata: float) -> NDArray[Any]:
    """Part of an array (..., H, W) that may reach beyond it; without a value there."""
    *count, height, width = source.get_shape()
    top, left = max(row, 0), max(col, 0)
    bottom, right = min(row + shape[0], height), min(col + shape[1], width)
    if bottom - top == shape[0] and right - left == shape[1]:
        part: NDArray[Any] = source[..., top:bottom, left:right]
        return part
    whole = source[:]
    value = np.nan if whole.dtype.kind == 'f' else nodata
    out = np.full((*count, *shape), value, whole.dtype)
    if bottom > top and right > left:
        inside = np.s_[..., top - row : bottom - row, left - col : right - col]
        out[inside] = whole[..., top:bottom, left:right]
    return out
