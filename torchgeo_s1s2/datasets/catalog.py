"""Catalogue of the patches and acquisitions of a data set in MultiSenGE's layout."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import geopandas as gpd
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from shapely import box
from tqdm import tqdm

from torchgeo_s1s2.datasets.cache import CONTENTS, TableCache, wait_for_next_tick
from torchgeo_s1s2.datasets.rasters import Grid, epsg_of, first_grid
from torchgeo_s1s2.datasets.sensors import SENSORS
from torchgeo_s1s2.errors import DataError, UnreadableError, warn

LABELS, GROUND_REFERENCE = 'labels', 'ground_reference'
FOLDERS = (*SENSORS, GROUND_REFERENCE)
"""Folders of rasters."""

CACHE, VERSION = 'catalog.parquet', 2
KEYS = {'s2': 'corresponding_s2', 's1': 'corresponding_s1'}
_PATCH = re.compile(r'(?P<tile>\w+)_(?P<x>\d+)_(?P<y>\d+)')
_BESIDE = 'aux.xml', 'msk', 'tfw', 'tifw', 'tiffw', 'wld', 'hdr'
_SIDECAR = re.compile(
    rf'(?P<stem>.+?)(\.tiff?)?\.({"|".join(map(re.escape, _BESIDE))})', re.IGNORECASE
)
# TILE_20200706_S2_X_Y.tif. What follows S2 or S1 may tell two images of one day apart, and so may
# the time of day.
_IMAGE = re.compile(
    r'(?P<tile>\w+?)_(?P<time>\d{8}(T\d{6})?)_(?P<kind>S[12][A-Za-z0-9]*(_[A-Za-z]+)?)'
    r'_(?P<place>\d+_\d+)(?P<ending>\.tiff?)',
    re.IGNORECASE,
)
_REFERENCE = re.compile(
    r'(?P<tile>\w+)_(?P<kind>GR)_(?P<place>\d+_\d+)(?P<ending>\.tiff?)', re.IGNORECASE
)


class Layout(NamedTuple):
    """What the paths of many rasters share.

    Attributes:
        folder: Folder, relative to the root, that ends with ``/``.
        time: How the time is written, as ``strftime`` has it.
        kind: What names the sensor.
        ending: ``.tif`` or another spelling.
        sidecars: Whether files beside the raster belong to it.
    """

    folder: str
    time: str
    kind: str
    ending: str
    sidecars: bool = False

    def path(self, patch: str, time: int) -> str:
        """Path, relative to the root, of a raster of a patch; seconds since 1970."""
        tile, place = split_name(patch)
        middle = datetime.fromtimestamp(time, UTC).strftime(self.time) if self.time else ''
        return f'{self.folder}{tile}_{middle}{self.kind}_{place}{self.ending}'


_layout = lru_cache(maxsize=1000)(Layout)
"""A million images share a few of them."""


class Image(NamedTuple):
    """An acquisition on disk: when (seconds since 1970), and how its path is made."""

    time: int
    layout: Layout

    def raster(self, root: Path, patch: str) -> tuple[Path, bool]:
        """Path below root for a patch, and whether files beside it belong to it."""
        return root / self.layout.path(patch, self.time), self.layout.sidecars


class Patch(NamedTuple):
    """What reading needs to know of a patch; the fields are columns of ``Catalog.patches``."""

    name: str
    epsg: int
    ground_reference: bool
    width: int
    height: int
    xmin: float
    ymin: float
    xmax: float
    ymax: float

    @property
    def grid(self) -> Grid:
        """Its pixels, in its own zone."""
        bounds = self.xmin, self.ymin, self.xmax, self.ymax
        return Grid.of_bounds(self.epsg, bounds, self.width, self.height)


@dataclass
class _Label:
    """What the label file of a patch says, and what is known of its rasters by folder."""

    name: str
    epsg: int
    classes: tuple[int, ...]
    images: dict[str, list[Image]]
    twice: int
    grid: Grid | None = None


class Catalog:
    """Every patch and every acquisition of a data set, known without reading its rasters.

    A label file makes a patch. Its images are those on disk, at any depth below the folder of their
    sensor: what the label file names and the disk lacks is left out, what is there besides is read
    too, and both are counted in a warning. One raster a patch is opened, the label raster if there
    is one, to learn where the patch lies and its size.

    Images are named ``TILE_YYYYMMDD_S2_X_Y.tif``, or ``.tiff``, in upper or lower case. The time
    of day (``YYYYMMDDTHHMMSS``) or letters after the sensor (``S1A``, ``S1_ASC``) tell images of
    one day apart; images of one time are all kept.

    What was learnt is kept in ``catalog.parquet`` in root, a GeoParquet of the patches, and used
    as long as no file was added to or removed from the folders, and no label file and none of the
    rasters that were opened, nor a file beside them, was written anew; see
    :class:`~torchgeo_s1s2.datasets.cache.TableCache` for what escapes that. A start from it lists
    no images and opens no raster.

    Attributes:
        root: Folder of the data set.
        patches: One row a patch, in the order of the label files' names: ``name``, ``tile``,
            ``x``, ``y`` (as in the name), ``epsg``, ``classes`` (tuple of the labels present),
            ``ground_reference`` (has a label raster), ``width``, ``height`` (pixels), ``xmin``,
            ``ymin``, ``xmax``, ``ymax`` (in the patch's own CRS) and ``geometry`` (footprint,
            EPSG:4326).
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        files: bool = True,
        progress: bool = True,
        cache: bool = True,
    ) -> None:
        """Read the cached catalogue, or else the label files and the folders.

        Args:
            root: Folder with ``labels``, ``ground_reference``, ``s2`` and ``s1``.
            files: Whether the rasters are there. False catalogues what the label files name, to
                count and to plan before a download; the patches then have no footprint, and
                nothing is cached.
            progress: Show a progress bar while many label files are read.
            cache: Use and keep ``catalog.parquet``.

        Raises:
            FileNotFoundError: If root lacks a folder, or ``labels`` holds no label file.
            DataError: If a label file is malformed.
            UnreadableError: If no raster of a patch can be opened.
        """
        self.root = Path(root)
        kept = TableCache(self.root / CACHE, VERSION) if files and cache else None
        table = kept.load() if kept else None
        if table is None:
            table = _Builder(self.root, files, progress).build(kept)
        attrs, table.attrs = table.attrs, {}  # which pandas would copy at each step
        self._layouts = [Layout(*layout) for layout in attrs['layouts']]
        self._set_images(table)
        table['classes'] = pd.Series(map(tuple, table['classes']), table.index, object)
        self.patches = table.drop(columns=[f'{f}_{n}' for f in FOLDERS for n in ('time', 'layout')])
        fields = (self.patches[name].tolist() for name in Patch._fields)
        self._records = [Patch(*values) for values in zip(*fields, strict=True)]
        if attrs['notes']:
            notes = '; '.join(attrs['notes'])
            warn(f'{self.root}: {notes}')

    @cached_property
    def acquisitions(self) -> pd.DataFrame:
        """One row an image on disk, sorted by patch, sensor and time.

        The columns are ``patch`` (row in ``patches``), ``sensor``, ``time`` (UTC) and ``path``
        (relative to root). The table is made when first asked for; reading does without it.
        """
        rows = [
            (number, sensor, time, str(self.path(number, sensor, position).relative_to(self.root)))
            for number in range(len(self._records))
            for sensor in SENSORS
            for position, time in enumerate(self.times(number, sensor))
        ]
        table = pd.DataFrame(rows, columns=['patch', 'sensor', 'time', 'path'])
        return table.astype({'sensor': pd.CategoricalDtype([*SENSORS]), 'path': 'str'})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: a catalogue does not change, and parts of a data set share it."""
        return self

    def times(self, patch: int, sensor: str) -> NDArray[np.datetime64]:
        """Sorted acquisition times of a patch.

        Args:
            patch: Row in ``patches``.
            sensor: ``'s2'`` or ``'s1'``.

        Returns:
            datetime64[s] array, UTC.
        """
        return self._time[self._span(patch, sensor)]

    def path(self, patch: int, sensor: str, position: int) -> Path:
        """Path of the image at a position of ``times(patch, sensor)``."""
        return self.raster(patch, sensor, position)[0]

    def raster(self, patch: int, folder: str, position: int) -> tuple[Path, bool]:
        """Path of a raster, and whether files beside it belong to it."""
        at = self._span(patch, folder).start + position
        image = Image(int(self._time[at].astype(np.int64)), self._layouts[self._layout[at]])
        return image.raster(self.root, self._records[patch].name)

    def files(self, patch: int, folder: str, position: int) -> list[Path]:
        """A raster, and the files beside it that belong to it."""
        return _files_of(*self.raster(patch, folder, position))

    def patch(self, patch: int) -> Patch:
        """What reading needs to know of a patch, faster than a row of the table.

        Args:
            patch: Row in ``patches``.
        """
        return self._records[patch]

    def ground_reference(self, patch: int) -> Path | None:
        """Path of the label raster of a patch, None where there is none."""
        return self.path(patch, GROUND_REFERENCE, 0) if self.patch(patch).ground_reference else None

    def _span(self, patch: int, folder: str) -> slice:
        first = len(FOLDERS) * patch + FOLDERS.index(folder)
        return slice(self._offsets[first], self._offsets[first + 1])

    def _set_images(self, table: pd.DataFrame) -> None:
        """Times and layouts of all rasters in two arrays, and where those of each patch start."""
        times, layouts = (
            [*chain(*zip(*(table[f'{f}_{what}'] for f in FOLDERS), strict=True))]
            for what in ('time', 'layout')
        )
        self._time = np.concatenate(times).astype('datetime64[s]')
        self._layout = np.concatenate(layouts).astype(np.int16)
        self._offsets = np.cumsum([0, *map(len, times)])


class _Builder:
    """Makes the table of a catalogue from the label files, the folders and a raster a patch.

    The table has a row a patch, with sorted times and layouts of its rasters by folder.
    """

    def __init__(self, root: Path, files: bool, progress: bool) -> None:
        self.root = root
        self.files = files
        self.progress = progress
        self.notes: list[str] = []

    def build(self, cache: TableCache | None) -> gpd.GeoDataFrame:
        """The table, kept in the cache if there is one."""
        folders = FOLDERS if self.files else ()
        self._check_folders(LABELS, *folders)
        labelled = [where for where, _ in walk(self.root, LABELS)]
        contents = (where + CONTENTS for where in labelled)
        everything = [where for f in folders for where, _ in walk(self.root, f)]
        state = cache.state(*labelled, *contents, *everything) if cache else {}
        if state:
            wait_for_next_tick(state)
        labels = self._read_labels()
        opened = []
        if self.files:
            self._find_images(labels)
            opened = self._find_grids(labels)
        table = _table(labels)
        table.attrs['notes'] = self.notes
        if cache:
            cache.save(table, state | cache.state(*opened))
        return table

    def _check_folders(self, *folders: str) -> None:
        for folder in folders:
            if not (self.root / folder).is_dir():
                raise FileNotFoundError(
                    f'{self.root} has no folder {folder!r}; a data set has the folders '
                    f'{LABELS}, {GROUND_REFERENCE}, {", ".join(SENSORS)}: {self._mend(folder)}'
                )

    def _mend(self, folder: str) -> str:
        """What to do where a folder is missing or empty."""
        if not has_images(self.root):
            return 'give the folder that holds them as root'
        if folder in SENSORS:
            return 'make it, empty if there is nothing, or give the folder that holds them as root'
        return f'write_label_files({str(self.root)!r}) writes label files for the images there'

    def _read_labels(self) -> list[_Label]:
        files, again = list_label_files(self.root)
        if not files:
            raise FileNotFoundError(
                f'{self.root / LABELS} holds no label file, expected TILE_X_Y.json: '
                f'{self._mend(LABELS)}'
            )
        if again:
            self.notes.append(f'label files with the name of another, which is read: {again}')
        hidden = not self.progress or len(files) < 1000
        bar = tqdm(files.values(), 'Reading labels', disable=hidden, unit='patch')
        labels = [_read_label(path) for path in bar]
        if twice := sum(label.twice for label in labels):
            self.notes.append(f'images that a label file names twice, each counted once: {twice}')
        return labels

    def _find_images(self, labels: Sequence[_Label]) -> None:
        """Put what is on disk in the place of what the label files name, and count what differs."""
        missing, unlisted = Counter[str](), 0
        for folder in FOLDERS:
            found, notes = list_rasters(self.root, folder)
            self.notes += notes
            for label in labels:
                there = sorted(found.pop(label.name, ()))
                if folder == GROUND_REFERENCE:
                    missing[folder] += not there
                elif (days := _days(there)) != (listed := _days(label.images[folder])):
                    missing[folder] += (Counter(listed) - Counter(days)).total()
                    unlisted += (Counter(days) - Counter(listed)).total()
                label.images[folder] = there
            if folder == GROUND_REFERENCE and missing[folder] == len(labels):
                missing[folder] = sum(bool(label.classes) for label in labels)
            if found:
                n, example = sum(map(len, found.values())), min(found)
                self.notes.append(
                    f'rasters in {folder} of places without a label file, such as {example}, left '
                    f'out: {n}; write_label_files adds them'
                )
        if unlisted:
            self.notes.append(f'images that no label file names, read too: {unlisted}')
        if lacking := +missing:
            what = ', '.join(f'{n} of {folder}' for folder, n in lacking.items())
            self.notes.insert(
                0, f'the labels name files that are not on disk ({what}); they are left out'
            )

    def _find_grids(self, labels: Sequence[_Label]) -> list[str]:
        """Open a raster a patch to learn where it lies; the paths of what was read."""
        hidden = not self.progress or len(labels) < 1000
        with ThreadPoolExecutor(8) as pool:
            paths = pool.map(partial(_find_grid, self.root), labels)
            bar = tqdm(paths, 'Locating patches', len(labels), disable=hidden, unit='patch')
            return [*chain(*bar)]


def walk(root: Path, folder: str) -> Iterator[tuple[str, list[str]]]:
    """A folder and all below it but hidden ones, relative to root, each with its file names."""
    for where, folders, names in os.walk(root / folder, followlinks=True):
        real = Path(where).resolve()
        beyond = (n for n in folders if not real.is_relative_to((real / n).resolve()))  # no circle
        folders[:] = sorted(name for name in beyond if not name.startswith('.'))
        yield Path(where).relative_to(root).as_posix(), names


def list_label_files(root: Path) -> tuple[dict[str, Path], int]:
    """Label files by patch, in the order of their names, and how many have the name of another."""
    there = ((name, where) for where, names in walk(root, LABELS) for name in names)
    places = sorted(own for own in there if own[0].endswith('.json') and own[0][0] != '.')
    files = dict[str, Path]()
    for name, where in places:
        files.setdefault(name.removesuffix('.json'), root / where / name)
    return files, len(places) - len(files)


def has_images(root: Path) -> bool:
    """Whether a folder of a sensor holds anything."""
    return any(names for sensor in SENSORS for _, names in walk(root, sensor))


def list_rasters(root: Path, folder: str) -> tuple[dict[str, list[Image]], list[str]]:
    """Rasters in one of FOLDERS and below it by patch, and what is to be said of the others."""
    found: dict[str, list[Image]] = defaultdict(list)
    odd, doubles = list[str](), 0
    pattern = _REFERENCE if folder == GROUND_REFERENCE else _IMAGE
    kind = 'gr' if folder == GROUND_REFERENCE else folder
    for where, every in walk(root, folder):
        rasters = sorted(name for name in every if name.lower().endswith(('.tif', '.tiff')))
        others = {name: _SIDECAR.fullmatch(name) for name in {*every} - {*rasters}}
        beside = {match['stem'] for match in others.values() if match}
        stems = set[str]()
        for name in rasters:
            match = pattern.fullmatch(name)
            if match is None or not match['kind'].lower().startswith(kind):
                odd.append(name)
                continue
            stem = name[: match.start('ending')]
            try:
                image = _image(match, f'{where}/', stem in beside)
            except ValueError:  # no date
                odd.append(name)
                continue
            doubles += stem in stems
            if stem not in stems:
                stems.add(stem)
                found[f'{match["tile"]}_{match["place"]}'].append(image)
        for name in (name for name, match in others.items() if not match):
            stem, _, ending = name.partition('.')  # an image of another format
            known = pattern.fullmatch(f'{stem}.tif') or ending.lower() == 'jp2'
            if stem not in stems and known:
                odd.append(name)
    return found, _notes(folder, odd, doubles, found.values())


def _notes(
    folder: str, odd: Sequence[str], doubles: int, found: Iterable[Sequence[Image]]
) -> list[str]:
    same = sum(len(images) - len({image.time for image in images}) for images in found)
    read = 'the first of each is' if folder == GROUND_REFERENCE else 'all are'
    example = min(odd, default='')
    texts = {
        f'of other names than its rasters, such as {example}, left out': len(odd),
        'like another one but for the ending; one of each is read': doubles,
        f'of the place and time of another one; {read} read': same,
    }
    return [f'files in {folder} {text}: {n}' for text, n in texts.items() if n]


def _image(match: re.Match[str], folder: str, sidecars: bool) -> Image:
    """Acquisition that a file name tells of; that of a label raster has the time 0."""
    seconds, style = 0, ''
    if match.re is _IMAGE:
        text = match['time']
        seconds = _seconds(text)
        style = '%Y%m%d_' if len(text) == 8 else f'%Y%m%d{text[8]}%H%M%S_'
    return Image(seconds, _layout(folder, style, match['kind'], match['ending'], sidecars))


@lru_cache(maxsize=100_000)
def _seconds(text: str) -> int:
    """Seconds since 1970 of YYYYMMDD or YYYYMMDDTHHMMSS."""
    style = '%Y%m%d' if len(text) == 8 else '%Y%m%dT%H%M%S'
    time = datetime.strptime(text.upper(), style).replace(tzinfo=UTC)
    if not 1700 <= time.year <= 2200:  # beyond what pandas can hold
        raise ValueError(f'no date of a satellite: {text}')
    return int(time.timestamp())


def _days(images: Iterable[Image]) -> list[int]:
    return [image.time // 86400 for image in images]


def split_name(patch: str) -> tuple[str, str]:
    """Tile and place (``X_Y``) in the name of a patch."""
    tile, x, y = patch.rsplit('_', 2)
    return tile, f'{x}_{y}'


def image_name(patch: str, date: str, sensor: str) -> str:
    """File name of an image of a patch; the date is YYYYMMDD."""
    tile, place = split_name(patch)
    return f'{tile}_{date}_{sensor.upper()}_{place}.tif'


def reference_name(patch: str) -> str:
    """File name of the label raster of a patch."""
    tile, place = split_name(patch)
    return f'{tile}_GR_{place}.tif'


def _read_label(path: Path) -> _Label:
    if _PATCH.fullmatch(path.stem) is None:
        raise DataError(
            f'{path} is not named TILE_X_Y.json, for example 31UEQ_257_514.json; move it elsewhere'
        )
    try:
        content = json.loads(path.read_bytes())
        epsg = epsg_of(content['projection'])
        if epsg is None:
            raise ValueError(f'projection without EPSG code: {content["projection"][:60]}')
        classes = tuple(int(c) for c in content['labels'].split(';') if c)
        listed = {sensor: content[key].split(';') for sensor, key in KEYS.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        keys = ', '.join([*KEYS.values(), 'projection', 'labels'])
        raise DataError(
            f'{path} is malformed ({type(error).__name__}: {error}); expected a JSON object with '
            f'the strings {keys}. Fetch the file again or delete it'
        ) from error
    except OSError as error:
        raise UnreadableError(
            f'{path} cannot be read: {error}. Fetch the file again or delete it'
        ) from error
    every = {sensor: [*_listed(path, sensor, names)] for sensor, names in listed.items()}
    images = {sensor: sorted({*named}) for sensor, named in every.items()}
    twice = sum(len(named) - len(images[sensor]) for sensor, named in every.items())
    return _Label(path.stem, epsg, classes, images, twice)


def _listed(path: Path, sensor: str, names: Iterable[str]) -> Iterator[Image]:
    """Images that a label file names; each must be of its patch."""
    tile, place = split_name(path.stem)
    head, tail, end = f'{tile}_', f'_{sensor.upper()}_{place}.tif', len(tile) + 9
    usual = _layout(f'{sensor}/', '%Y%m%d_', sensor.upper(), '.tif', False)
    for name in filter(None, names):
        try:
            if name.startswith(head) and name[end:] == tail:
                yield Image(_seconds(name[len(head) : end]), usual)
            else:
                match = _IMAGE.fullmatch(name)
                if not match or f'{match["tile"]}_{match["place"]}' != path.stem:
                    raise ValueError(name)
                yield _image(match, f'{sensor}/', sidecars=False)
        except ValueError as error:
            raise DataError(
                f'{path} names {name!r} as an image of {sensor}; expected {head}YYYYMMDD{tail}'
            ) from error


def _files_of(raster: Path, sidecars: bool) -> list[Path]:
    """A raster, and the files beside it if any belong to it."""
    endings = [*_BESIDE, *map(str.upper, _BESIDE)] if sidecars else []
    names = (f'{name}.{ending}' for name in (raster.name, raster.stem) for ending in endings)
    return [raster, *filter(Path.exists, map(raster.with_name, names))]


def _find_grid(root: Path, label: _Label) -> list[str]:
    """Find the grid of a patch: of its label raster, or the first image that can be opened."""
    images = label.images[GROUND_REFERENCE][:1] or [*chain(*(label.images[s] for s in SENSORS))]
    if not images:
        return []
    rasters = dict(image.raster(root, label.name) for image in images)
    path, grid = first_grid(rasters.items())
    if grid.epsg != label.epsg:
        raise DataError(
            f'{path} is in {grid.crs}, its label file says EPSG:{label.epsg}; mend one of them'
        )
    if not grid.is_north_up:
        raise DataError(f'{path} is not north-up ({grid.transform[:6]}); warp it to be')
    label.grid = grid
    return [file.relative_to(root).as_posix() for file in _files_of(path, rasters[path])]


def _table(labels: Sequence[_Label]) -> gpd.GeoDataFrame:
    names = [_PATCH.fullmatch(label.name) for label in labels]
    frame = pd.DataFrame(
        {
            'name': [label.name for label in labels],
            'tile': pd.Categorical([m['tile'] for m in names if m]),
            'x': [int(m['x']) for m in names if m],
            'y': [int(m['y']) for m in names if m],
            'epsg': [label.epsg for label in labels],
            'classes': [label.classes for label in labels],
            'ground_reference': [bool(label.images.get(GROUND_REFERENCE)) for label in labels],
        }
    )
    layouts: dict[Layout, int] = {}
    for folder in FOLDERS:
        images = [label.images.get(folder, []) for label in labels]
        numbers = [[layouts.setdefault(i.layout, len(layouts)) for i in row] for row in images]
        frame[f'{folder}_time'] = _arrays([i.time for i in row] for row in images)
        frame[f'{folder}_layout'] = _arrays(numbers)
    grids = [label.grid for label in labels]
    places = [(g.width, g.height, *g.bounds) if g else (0, 0, *4 * [np.nan]) for g in grids]
    frame[['width', 'height', 'xmin', 'ymin', 'xmax', 'ymax']] = np.array(places)
    frame = frame.astype({'width': int, 'height': int})
    table = gpd.GeoDataFrame(frame, geometry=_footprints(frame), crs='EPSG:4326')
    table.attrs = {'layouts': [tuple(layout) for layout in layouts]}
    return table


def _arrays(rows: Iterable[Sequence[int]]) -> 'pd.Series[Any]':
    """A column of an array a row."""
    return pd.Series([np.array(row, np.int64) for row in rows], dtype=object)


def _footprints(frame: pd.DataFrame) -> gpd.GeoSeries:
    """Footprints in EPSG:4326; None where the bounds are not known."""
    footprints = gpd.GeoSeries([None] * len(frame), index=frame.index, crs='EPSG:4326')
    for _, group in frame.dropna(subset='xmin').groupby('epsg'):
        footprints[group.index] = native_footprints(group).to_crs('EPSG:4326')
    return footprints


def native_footprints(patches: pd.DataFrame) -> gpd.GeoSeries:
    """Rectangles, in their CRS, of rows of ``Catalog.patches`` that share their ``epsg``."""
    bounds = patches[['xmin', 'ymin', 'xmax', 'ymax']].to_numpy(float)
    return gpd.GeoSeries(box(*bounds.T), index=patches.index, crs=patches['epsg'].iat[0])
