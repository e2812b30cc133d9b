"""Catalogue of the patches and acquisitions of a data set in MultiSenGE's layout."""

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import RasterioError, RasterioIOError
from shapely import box
from tqdm import tqdm

from torchgeo_s1s2.datasets.cache import CONTENTS, TableCache, wait_for_next_tick

SENSORS = ('s2', 's1')
"""Names of the sensors, which are also the names of their folders."""

LABELS, GROUND_REFERENCE = 'labels', 'ground_reference'
CACHE, VERSION = 'catalog.parquet', 1
# Opening one of a thousand files of a folder would list them all.
GDAL_OPTIONS = {'GDAL_DISABLE_READDIR_ON_OPEN': 'EMPTY_DIR'}

KEYS = {'s2': 'corresponding_s2', 's1': 'corresponding_s1'}
_PATCH = re.compile(r'(?P<tile>\w+)_(?P<x>\d+)_(?P<y>\d+)')
_EPSG = re.compile(r'AUTHORITY\["EPSG","(\d+)"\]\]\s*$')


@dataclass
class _Label:
    """What the label file of one patch says; dates are sorted strings YYYYMMDD."""

    tile: str
    x: int
    y: int
    epsg: int
    classes: tuple[int, ...]
    dates: dict[str, list[str]]
    has_reference: bool = True

    @property
    def name(self) -> str:
        return f'{self.tile}_{self.x}_{self.y}'

    def image(self, sensor: str, date: str) -> str:
        return image_name(self.tile, date, sensor, self.x, self.y)

    @property
    def ground_reference(self) -> str:
        return reference_name(self.tile, self.x, self.y)

    def times(self, sensor: str) -> NDArray[np.datetime64]:
        days = np.array([_day(date) for date in self.dates[sensor]], np.int64)
        return days.astype('datetime64[D]').astype('datetime64[ms]')


class Patch(NamedTuple):
    """What reading needs to know of a patch; the fields are columns of ``Catalog.patches``."""

    name: str
    tile: str
    x: int
    y: int
    epsg: int
    ground_reference: bool
    width: int
    height: int
    xmin: float
    xmax: float
    ymax: float


class Catalog:
    """Every patch and every acquisition of a data set, known without opening its rasters.

    The label files and one listing of each folder say what there is. Where the patches of a tile
    lie follows from the tile's origin and their x and y. The origins of Sentinel-2's tiles follow
    from their names (the corner of the 100 km square, moved out to a multiple of 60 m), but the
    size of the patches does not, and a tile of other data may have any name. So two rasters a tile
    are opened to learn origin and size, and one a patch only in a tile where these two disagree. A
    raster that turns out to lie elsewhere or to have another size is an error when it is read.

    What was learnt is kept in ``catalog.parquet`` in root, a GeoParquet of the patches, and used
    as long as no file was added to or removed from the folders, and no label file and none of the
    rasters that were opened was written anew; see
    :class:`~torchgeo_s1s2.datasets.cache.TableCache` for what escapes that. A start from it lists
    no images and opens no raster.

    Attributes:
        root: Folder of the data set.
        patches: One row a patch, in the order of the label files' names: ``name``, ``tile``,
            ``x``, ``y`` (pixels in the tile), ``epsg``, ``classes`` (tuple of the labels present),
            ``ground_reference`` (has a label raster), ``width``, ``height`` (pixels), ``xmin``,
            ``ymin``, ``xmax``, ``ymax`` (metres in the patch's own CRS) and ``geometry``
            (footprint, EPSG:4326).
        missing: Number of images by sensor that label files name and the disk lacks.
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
            ValueError: If a label file is malformed.
        """
        self.root = Path(root)
        kept = TableCache(self.root / CACHE, VERSION) if files and cache else None
        table = kept.load() if kept else None
        if table is None:
            table = _Builder(self.root, files, progress).build(kept)
        self.missing: dict[str, int] = table.attrs['missing']
        self._set_times(table)
        table['classes'] = pd.Series(map(tuple, table['classes']), table.index, object)
        self.patches = table.drop(columns=list(SENSORS))
        self.patches.attrs = {}
        fields = (self.patches[field].tolist() for field in Patch._fields)
        self._records = [Patch(*values) for values in zip(*fields, strict=True)]
        self._report_missing()

    @cached_property
    def acquisitions(self) -> pd.DataFrame:
        """One row an image on disk, sorted by patch, sensor and time.

        The columns are ``patch`` (row in ``patches``), ``sensor``, ``time`` (UTC day) and ``path``
        (relative to root). The table is made when first asked for; reading does without it.
        """
        counts = np.diff(self._offsets)
        sensors = np.tile(np.arange(len(SENSORS), dtype=np.int8), len(self.patches))
        patches = np.arange(len(self.patches), dtype=np.int32).repeat(len(SENSORS))
        paths = [
            f'{sensor}/{image_name(patch.tile, date, sensor, patch.x, patch.y)}'
            for number, patch in enumerate(self._records)
            for sensor in SENSORS
            for date in _dates_of(self.times(number, sensor))
        ]
        return pd.DataFrame(
            {
                'patch': patches.repeat(counts),
                'sensor': pd.Categorical.from_codes(sensors.repeat(counts), pd.Index(SENSORS)),
                'time': self._time,
                'path': pd.Series(paths, dtype='str'),
            }
        )

    def times(self, patch: int, sensor: str) -> NDArray[np.datetime64]:
        """Sorted acquisition times of a patch.

        Args:
            patch: Row in ``patches``.
            sensor: ``'s2'`` or ``'s1'``.

        Returns:
            datetime64[s] array, UTC.
        """
        first = len(SENSORS) * patch + SENSORS.index(sensor)
        return self._time[self._offsets[first] : self._offsets[first + 1]]

    def path(self, patch: int, sensor: str, position: int) -> Path:
        """Path of the image at a position of ``times(patch, sensor)``."""
        row = self._records[patch]
        (date,) = _dates_of(self.times(patch, sensor)[[position]])
        return self.root / sensor / image_name(row.tile, date, sensor, row.x, row.y)

    def patch(self, patch: int) -> Patch:
        """What reading needs to know of a patch, faster than a row of the table.

        Args:
            patch: Row in ``patches``.
        """
        return self._records[patch]

    def ground_reference(self, patch: int) -> Path | None:
        """Path of the label raster of a patch, None where there is none."""
        row = self.patch(patch)
        if not row.ground_reference:
            return None
        return self.root / GROUND_REFERENCE / reference_name(row.tile, row.x, row.y)

    def _set_times(self, table: pd.DataFrame) -> None:
        """All times in one array, and where those of each patch and sensor start."""
        times = [t for row in zip(*(table[s] for s in SENSORS), strict=True) for t in row]
        self._time = np.concatenate(times).astype('datetime64[s]')
        self._offsets = np.cumsum([0, *map(len, times)])

    def _report_missing(self) -> None:
        missing = {sensor: n for sensor, n in self.missing.items() if n}
        references = int((~self.patches['ground_reference']).sum())
        if references:
            missing[GROUND_REFERENCE] = references
        if missing:
            what = ', '.join(f'{n} of {name}' for name, n in missing.items())
            warnings.warn(
                f'{self.root}: the labels name files that are not on disk ({what}); '
                'they are left out',
                stacklevel=3,
            )


class _Builder:
    """Makes the table of a catalogue from the label files, the folders and a few rasters.

    The table has a row a patch, with its sorted times of each sensor.
    """

    def __init__(self, root: Path, files: bool, progress: bool) -> None:
        self.root = root
        self.files = files
        self.progress = progress
        self.opened: dict[str, None] = {}

    def build(self, cache: TableCache | None) -> gpd.GeoDataFrame:
        """The table, kept in the cache if there is one."""
        if self.files:
            self._check_folders()
        folders = LABELS, LABELS + CONTENTS, GROUND_REFERENCE, *SENSORS
        state = cache.state(*folders) if cache else {}
        if state:
            wait_for_next_tick(state)
        labels = list(self._read_labels())
        missing = dict.fromkeys(SENSORS, 0)
        if self.files:
            missing = {sensor: self._leave_out_missing(labels, sensor) for sensor in SENSORS}
            self._find_references(labels)
        table = self._table(labels)
        table.attrs = {'missing': missing}
        if cache:
            cache.save(table, state | cache.state(*self.opened))
        return table

    def _check_folders(self) -> None:
        for folder in (*SENSORS, GROUND_REFERENCE, LABELS):
            self._folder(folder)

    def _folder(self, folder: str) -> Path:
        path = self.root / folder
        if not path.is_dir():
            raise FileNotFoundError(
                f'{self.root} has no folder {folder!r}; a data set has the folders '
                f'{LABELS}, {GROUND_REFERENCE}, {", ".join(SENSORS)}. Give the folder that holds '
                'them as root'
            )
        return path

    def _list(self, folder: str) -> set[str]:
        return {entry.name for entry in os.scandir(self._folder(folder))}

    def _read_labels(self) -> Iterator[_Label]:
        names = sorted(name for name in self._list(LABELS) if name.endswith('.json'))
        if not names:
            raise FileNotFoundError(
                f'{self.root / LABELS} holds no label file; expected TILE_X_Y.json'
            )
        hidden = not self.progress or len(names) < 1000
        for name in tqdm(names, 'Reading labels', disable=hidden, unit='patch'):
            yield _read_label(self.root / LABELS / name)

    def _leave_out_missing(self, labels: list[_Label], sensor: str) -> int:
        """Take dates without an image on disk out of the labels; the number of these dates."""
        names, missing = self._list(sensor), 0
        for label in labels:
            dates = label.dates[sensor]
            label.dates[sensor] = [d for d in dates if label.image(sensor, d) in names]
            missing += len(dates) - len(label.dates[sensor])
        return missing

    def _find_references(self, labels: list[_Label]) -> None:
        names = self._list(GROUND_REFERENCE)
        for label in labels:
            label.has_reference = label.ground_reference in names

    def _table(self, labels: list[_Label]) -> gpd.GeoDataFrame:
        frame = pd.DataFrame(
            {
                'name': [label.name for label in labels],
                'tile': pd.Categorical([label.tile for label in labels]),
                'x': [label.x for label in labels],
                'y': [label.y for label in labels],
                'epsg': [label.epsg for label in labels],
                'classes': [label.classes for label in labels],
                'ground_reference': [label.has_reference for label in labels],
            }
        )
        for sensor in SENSORS:
            frame[sensor] = pd.Series([label.times(sensor) for label in labels], dtype=object)
        place = np.full((len(frame), 5), np.nan)
        if self.files:
            for rows in frame.groupby('tile', observed=True).indices.values():
                place[rows] = self._probe_tile([labels[row] for row in rows])
        width, height, left, top, res = place.T
        xmin, ymax = left + frame['x'] * res, top - frame['y'] * res
        frame['width'], frame['height'] = np.nan_to_num(place[:, :2]).astype(int).T
        frame['xmin'], frame['ymin'] = xmin, ymax - height * res
        frame['xmax'], frame['ymax'] = xmin + width * res, ymax
        return gpd.GeoDataFrame(frame, geometry=_footprints(frame), crs='EPSG:4326')

    def _probe_tile(self, labels: list[_Label]) -> NDArray[np.float64]:
        """What ``_probe`` tells of each patch of a tile, or of all of them where they agree."""
        probes = [self._probe(labels[i]) for i in (0, -1)]
        if probes[0] != probes[1]:
            probes = [self._probe(label) for label in labels]
        return np.array(probes if len(set(probes)) > 1 else probes[:1])

    def _probe(self, label: _Label) -> tuple[float, ...]:
        """Width, height, tile origin and resolution that one raster of a patch tells."""
        images = [f'{s}/{label.image(s, date)}' for s in SENSORS for date in label.dates[s]]
        if label.has_reference:
            images = [f'{GROUND_REFERENCE}/{label.ground_reference}']
        if not images:
            return (np.nan,) * 5
        path = self.root / images[0]
        self.opened[images[0]] = None
        with open_raster(path) as src:
            t = src.transform
            _check_georeference(path, src, label.epsg)
            origin = t.c - label.x * t.a, t.f - label.y * t.e
            return src.width, src.height, round(origin[0], 6), round(origin[1], 6), t.a


def image_name(tile: str, date: str, sensor: str, x: int, y: int) -> str:
    """File name of an image of a patch; the date is YYYYMMDD."""
    return f'{tile}_{date}_{sensor.upper()}_{x}_{y}.tif'


def reference_name(tile: str, x: int, y: int) -> str:
    """File name of the label raster of a patch."""
    return f'{tile}_GR_{x}_{y}.tif'


def open_raster(path: Path) -> rasterio.DatasetReader:
    """Open a raster, or say which one cannot be opened.

    Raises:
        OSError: If the file is missing or not a raster.
    """
    try:
        # GDAL's own reader takes three quarters of the time that libtiff does, of most GeoTIFFs.
        return rasterio.open(path, driver='LIBERTIFF')
    except RasterioError:
        pass
    try:
        return rasterio.open(path)
    except RasterioIOError as error:
        raise OSError(
            f'{path} cannot be opened: {error}. Fetch the file again, or delete it and the '
            'catalogue leaves it out'
        ) from error


def _read_label(path: Path) -> _Label:
    match = _PATCH.fullmatch(path.stem)
    if match is None:
        raise ValueError(f'{path} is not named TILE_X_Y.json, for example 31UEQ_257_514.json')
    tile, x, y = match['tile'], int(match['x']), int(match['y'])
    try:
        content = json.loads(path.read_bytes())
        epsg = _epsg(content['projection'])
        classes = tuple(int(c) for c in content['labels'].split(';') if c)
        listed = {sensor: content[key].split(';') for sensor, key in KEYS.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        keys = ', '.join([*KEYS.values(), 'projection', 'labels'])
        raise ValueError(
            f'{path} is malformed ({type(error).__name__}: {error}); expected a JSON object with '
            f'the strings {keys}. Fetch the file again or delete it'
        ) from error
    dates = {s: sorted(_dates(path, names, s, f'{x}_{y}', tile)) for s, names in listed.items()}
    return _Label(tile, x, y, epsg, classes, dates)


def _dates(path: Path, names: Iterable[str], sensor: str, xy: str, tile: str) -> Iterator[str]:
    """Dates of image names; each must name this patch."""
    head, tail, end = f'{tile}_', f'_{sensor.upper()}_{xy}.tif', len(tile) + 9
    for name in names:
        if not name:
            continue
        date = name[len(head) : end]
        if not (name.startswith(head) and name[end:] == tail and _day(date) is not None):
            raise ValueError(
                f'{path} names {name!r} as an image of {sensor}; expected {head}YYYYMMDD{tail}'
            )
        yield sys.intern(date)  # a million names hold a few hundred dates


@lru_cache(maxsize=10_000)
def _day(text: str) -> int | None:
    """Days since 1970 of a date YYYYMMDD, None if it is not one."""
    try:
        day = datetime.strptime(text, '%Y%m%d').date()
    except ValueError:
        return None
    return (day - date(1970, 1, 1)).days if text.isdigit() else None


def _dates_of(times: NDArray[np.datetime64]) -> list[str]:
    """Dates YYYYMMDD."""
    return [day.replace('-', '') for day in times.astype('datetime64[D]').astype(str).tolist()]


@lru_cache(maxsize=64)
def _epsg(wkt: str) -> int:
    """EPSG code of a WKT1 string."""
    if match := _EPSG.search(wkt):
        return int(match[1])
    code = CRS.from_wkt(wkt).to_epsg()
    if code is None:
        raise ValueError(f'projection without EPSG code: {wkt[:60]}')
    return code


def _check_georeference(path: Path, src: rasterio.DatasetReader, epsg: int) -> None:
    t = src.transform
    if src.crs is None or src.crs.to_epsg() != epsg:
        raise ValueError(
            f'{path} is in {src.crs}, its label file says EPSG:{epsg}; mend one of them'
        )
    if t.b or t.d or t.a <= 0 or t.e != -t.a:
        raise ValueError(f'{path} is not north-up with square pixels ({t[:6]}); warp it to be')


def _footprints(frame: pd.DataFrame) -> gpd.GeoSeries:
    """Footprints in EPSG:4326; None where the bounds are not known."""
    parts = [gpd.GeoSeries([None] * len(frame), index=frame.index, crs='EPSG:4326')]
    for _, group in frame.dropna(subset='xmin').groupby('epsg'):
        parts.append(native_footprints(group).to_crs('EPSG:4326'))
    return pd.concat(parts)[lambda s: ~s.index.duplicated(keep='last')].reindex(frame.index)


def native_footprints(patches: pd.DataFrame) -> gpd.GeoSeries:
    """Rectangles of patches of one CRS.

    Args:
        patches: Rows of ``Catalog.patches`` that share their ``epsg``.

    Returns:
        Polygons in that CRS with the index of ``patches``.
    """
    bounds = patches[['xmin', 'ymin', 'xmax', 'ymax']].to_numpy(float)
    return gpd.GeoSeries(box(*bounds.T), index=patches.index, crs=patches['epsg'].iat[0])
