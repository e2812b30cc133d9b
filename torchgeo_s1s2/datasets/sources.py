"""What fills the root of a data set before a run; a configuration names it as ``source``."""

import os
import shutil
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import rasterio.shutil
from tqdm import tqdm

from torchgeo_s1s2.datasets.catalog import FOLDERS, GROUND_REFERENCE, LABELS, list_rasters
from torchgeo_s1s2.datasets.download import SeasonDownload
from torchgeo_s1s2.datasets.labels import label_content
from torchgeo_s1s2.datasets.multisenge import MultiSenGE
from torchgeo_s1s2.datasets.rasters import check_written, crs_of, open_raster
from torchgeo_s1s2.datasets.sensors import SENSORS
from torchgeo_s1s2.datasets.synthetic import write_synthetic
from torchgeo_s1s2.datasets.time_series import DateRule
from torchgeo_s1s2.datasets.vectors import rasterize_labels
from torchgeo_s1s2.errors import UnreadableError, warn
from torchgeo_s1s2.files import check_room, read_json, whole, write_json


class Wanted(NamedTuple):
    """What a run reads.

    Attributes:
        url: Where the archives of the data set are.
        tiles: Tiles of all splits, None for all.
        series: Date rule.
        sensors: Sensors.
        splits: Opens the data sets of the run's splits below a root.
    """

    url: str
    tiles: Sequence[str] | None
    series: DateRule
    sensors: Sequence[str]
    splits: Callable[[Path], Iterator[MultiSenGE]]


class Source(ABC):
    """Fills the root of a data set. Only the first process of a run is asked to."""

    @abstractmethod
    def fill(self, root: Path, wanted: Wanted) -> None:
        """Get what is wanted and missing."""

    def place(self, root: Path) -> Path:
        """Where the data are read from afterwards."""
        return root


class Synthetic(Source):
    """Writes a small synthetic data set, unless it is there.

    Its arguments are those of :func:`~torchgeo_s1s2.datasets.synthetic.write_synthetic`.
    """

    def __init__(self, **kwargs: Any) -> None:
        """Keep them."""
        self.kwargs = kwargs

    def fill(self, root: Path, wanted: Wanted) -> None:
        """Write it."""
        write_synthetic(root, **self.kwargs)


@dataclass
class Download(Source):
    """Downloads what the series and the sensors need in the tiles of all splits.

    See :class:`~torchgeo_s1s2.datasets.SeasonDownload`.

    Attributes:
        checksum: Compare the files with the checksums recorded when they were downloaded, which
            reads them all.
        hosts: Hosts other than that of the data set's archives to which it may redirect.
    """

    checksum: bool = False
    hosts: Sequence[str] = ()

    def fill(self, root: Path, wanted: Wanted) -> None:
        """Download, and verify if that is wanted."""
        season = SeasonDownload(
            root, wanted.url, wanted.tiles, wanted.series, wanted.sensors, hosts=self.hosts
        )
        season.run()
        if self.checksum:
            season.verify()


@dataclass
class Copy(Source):
    """Keeps an uncompressed copy of what the run reads; see :func:`copy_series`.

    Attributes:
        folder: Folder of the copy, on a fast disk if there is one.
        num_workers: Number of threads that copy.
    """

    folder: str
    num_workers: int = 4

    def fill(self, root: Path, wanted: Wanted) -> None:
        """Copy what is missing or has changed."""
        for dataset in wanted.splits(root):
            copy_series(dataset, self.place(root), self.num_workers)

    def place(self, root: Path) -> Path:
        """The copy."""
        return Path(self.folder).expanduser()


class VectorLabels(Source):
    """Writes the label rasters of a data set from polygons.

    Its arguments are those of :func:`~torchgeo_s1s2.datasets.rasterize_labels`.
    """

    def __init__(self, **kwargs: Any) -> None:
        """Keep them."""
        self.kwargs = kwargs

    def fill(self, root: Path, wanted: Wanted) -> None:
        """Write what is missing or has changed."""
        rasterize_labels(root, **self.kwargs)


def copy_series(
    dataset: MultiSenGE,
    folder: str | os.PathLike[str],
    num_workers: int = 4,
    progress: bool = True,
) -> Path:
    """Copy what the date rule of a data set may choose, uncompressed, in the same layout.

    The copy is a data set of its own, which serves every date rule and class scheme over its dates;
    several data sets may share it. Rasters keep their type, no-data value, scale and names of
    bands. A file is there whole or not at all, an interrupted copy goes on, and a raster that has
    changed is copied again. Rasters that cannot be read, or that the data set has no longer, are
    warned of.

    Args:
        dataset: The data set.
        folder: Folder to write to; made if it is not there.
        num_workers: Number of threads.
        progress: Show a progress bar.

    Returns:
        The folder.

    Raises:
        NoRoomError: If the disk lacks the room.
    """
    folder = Path(folder)
    for name in (LABELS, *FOLDERS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    patches = dataset.index['patch'].unique().tolist()
    rasters = [raster for patch in patches for raster in _rasters(dataset, patch, folder)]
    jobs = [raster for raster in rasters if raster.is_outdated]
    check_room(folder, _size(jobs), 'choose fewer dates or patches')
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        title, hidden = f'Copying to {folder}', not (progress and jobs)
        bar = tqdm(pool.map(_copy, jobs), title, len(jobs), disable=hidden, unit='raster')
        failed = [text for text in bar if text]
    if failed:
        told = '; '.join(failed[:3])
        warn(f'rasters that cannot be read and are not copied ({len(failed)}): {told}')
    held = _held(folder, {dataset.name_of(patch) for patch in patches})
    for patch in patches:
        _write_label_file(dataset, patch, folder, held)
    if stale := [p for p in chain(*held.values()) if not (dataset.root / p).exists()]:
        warn(
            f'{folder} holds rasters that {dataset.root} has no longer, still read ({len(stale)}): '
            f'{", ".join(stale[:3])}. Delete them, or give another folder'
        )
    return folder


class _Raster(NamedTuple):
    """A raster: where it is, whether files beside it belong to it, and its copy."""

    source: Path
    sidecars: bool
    target: Path

    @property
    def is_outdated(self) -> bool:
        """Whether there is no copy, or one of what the raster was before."""
        if not self.target.exists():
            return True
        time = self.target.stat().st_mtime_ns
        # Some file systems, and archives on the way to them, keep whole seconds, or even ones.
        least = 1 if time % 1_000_000_000 else 2_000_000_000
        return abs(self.source.stat().st_mtime_ns - time) >= least


def _rasters(dataset: MultiSenGE, patch: int, folder: Path) -> Iterator[_Raster]:
    """Rasters that a patch may be read from."""
    catalog = dataset.catalog
    times = {s: catalog.times(patch, s) for s in dataset.series.reads(dataset.sensors)}
    positions: dict[str, Any] = dict(dataset.series.candidates(times))
    if catalog.patch(patch).ground_reference:
        positions[GROUND_REFERENCE] = [0]
    for kind, chosen in positions.items():
        for p in sorted(chosen):
            path, sidecars = catalog.raster(patch, kind, p)
            yield _Raster(path, sidecars, folder / path.relative_to(dataset.root))


def _copy(raster: _Raster) -> str:
    """Copy a raster with its time of change; why not, if it cannot be read."""
    source, sidecars, target = raster
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as temporary, open_raster(source, sidecars) as src:
            options = {'tiled': True} if max(src.shape) > 512 else {}
            with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
                rasterio.shutil.copy(
                    src, temporary, driver='GTiff', compress='none', bigtiff='if_safer', **options
                )
            check_written(temporary, target)
            shutil.copystat(source, temporary)
    except UnreadableError as error:
        return str(error)
    return ''


def _size(rasters: Iterable[_Raster]) -> int:
    """Bytes of the pixels of rasters, those of a folder being as large as its first."""
    alike = defaultdict(list)
    for raster in rasters:
        alike[raster.target.parent].append(raster)
    return sum(len(own) * next(filter(None, map(_bytes, own)), 0) for own in alike.values())


def _bytes(raster: _Raster) -> int:
    """Bytes of the pixels of a raster, 0 if it cannot be read."""
    try:
        with open_raster(raster.source, raster.sidecars) as src:
            return src.width * src.height * sum(np.dtype(dtype).itemsize for dtype in src.dtypes)
    except UnreadableError:
        return 0


def _held(folder: Path, names: Collection[str]) -> dict[tuple[str, str], list[str]]:
    """Paths of the rasters of patches in a copy, relative to it, by folder and patch."""
    return {
        (kind, name): [image.layout.path(name, image.time) for image in images]
        for kind in FOLDERS
        for name, images in list_rasters(folder, kind)[0].items()
        if name in names
    }


def _write_label_file(
    dataset: MultiSenGE, patch: int, folder: Path, held: Mapping[tuple[str, str], Sequence[str]]
) -> None:
    """Name what the copy holds of a patch."""
    row = dataset.catalog.patches.iloc[patch]
    name = row['name']
    images = {s: sorted(Path(p).name for p in held.get((s, name), ())) for s in SENSORS}
    content = label_content(images, crs_of(row['epsg']), row['classes'])
    path = folder / LABELS / f'{name}.json'
    if not path.exists() or read_json(path) != content:
        write_json(path, content)
