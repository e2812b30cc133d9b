"""Catalogue of the patches and acquisitions of a data set in MultiSenGE's layout."""

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import RasterioIOError
from shapely.geometry import box
from tqdm import tqdm

SENSORS = ('s2', 's1')
"""Names of the sensors, which are also the names of their folders."""

LABELS, GROUND_REFERENCE = 'labels', 'ground_reference'
KEYS = {'s2': 'corresponding_s2', 's1': 'corresponding_s1'}
_PATCH = re.compile(r'(?P<tile>\w+)_(?P<x>\d+)_(?P<y>\d+)')
_EPSG = re.compile(r'AUTHORITY\["EPSG","(\d+)"\]\]\s*$')


@dataclass(frozen=True)
class _Label:
    """What the label file of one patch says; dates are strings YYYYMMDD."""

    tile: str
    x: int
    y: int
    epsg: int
    classes: tuple[int, ...]
    dates: dict[str, list[str]]

    @property
    def name(self) -> str:
        return f'{self.tile}_{self.x}_{self.y}'

    def image(self, sensor: str, date: str) -> str:
        return f'{self.tile}_{date}_{sensor.upper()}_{self.x}_{self.y}.tif'

    @property
    def ground_reference(self) -> str:
        return reference_name(self.tile, self.x, self.y)


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
    ymax: float


class Catalog:
    """Every patch and every acquisition of a data set, known without opening its rasters.

    The label files and one listing of each folder say what there is. Where the patches of a tile
    lie follows from the tile's origin and their x and y; two rasters a tile are opened to learn
    origin and patch size, and one a patch only in a tile where these two disagree. A raster that
    turns out to lie elsewhere or to have another size is an error when it is read.

    Nothing is cached on disk: the 8,157 label files and the listing of a million images of
    MultiSenGE take about 5 s on a fast disk, and a cache could not tell that a file has gone.

    Attributes:
        root: Folder of the data set.
        patches: One row a patch, in the order of the label files' names: ``name``, ``tile``,
            ``x``, ``y`` (pixels in the tile), ``epsg``, ``classes`` (tuple of the labels present),
            ``ground_reference`` (has a label raster), ``width``, ``height`` (pixels), ``xmin``,
            ``ymin``, ``xmax``, ``ymax`` (metres in the patch's own CRS) and ``geometry``
            (footprint, EPSG:4326).
        acquisitions: One row an image on disk, sorted by patch, sensor and time: ``patch`` (row in
            ``patches``), ``sensor``, ``time`` (UTC day) and ``path`` (relative to root).
        missing: Number of images by sensor that label files name and the disk lacks.
    """

    def __init__(
        self, root: str | os.PathLike[str], files: bool = True, progress: bool = True
    ) -> None:
        """Read the label files and list the folders.

        Args:
            root: Folder with ``labels``, ``ground_reference``, ``s2`` and ``s1``.
            files: Whether the rasters are there. False catalogues what the label files name, to
                count and to plan before a download; the patches then have no footprint.
            progress: Show a progress bar while many label files are read.

        Raises:
            FileNotFoundError: If root lacks a folder, or ``labels`` holds no label file.
            ValueError: If a label file is malformed.
        """
        self.root = Path(root)
        listing = {folder: self._list(folder) for folder in SENSORS} if files else None
        references = self._list(GROUND_REFERENCE) if files else None
        labels = list(self._read_labels(progress))
        self.missing = dict.fromkeys(SENSORS, 0)
        self.acquisitions = self._acquisitions(labels, listing)
        self.patches = self._patches(labels, references)
        fields = (self.patches[field].tolist() for field in Patch._fields)
        self._records = [Patch(*values) for values in zip(*fields, strict=True)]
        self._paths = self.acquisitions['path']
        self._offsets = self._row_offsets()
        self._report_missing()

    def times(self, patch: int, sensor: str) -> NDArray[np.datetime64]:
        """Sorted acquisition times of a patch.

        Args:
            patch: Row in ``patches``.
            sensor: ``'s2'`` or ``'s1'``.

        Returns:
            datetime64[s] array, UTC.
        """
        return self._time[self._rows(patch, sensor)]

    def path(self, patch: int, sensor: str, position: int) -> Path:
        """Path of the image at a position of ``times(patch, sensor)``."""
        row = self._rows(patch, sensor).start + position
        return self.root / str(self._paths.iat[row])

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

    def _rows(self, patch: int, sensor: str) -> slice:
        first = len(SENSORS) * patch + SENSORS.index(sensor)
        return slice(int(self._offsets[first]), int(self._offsets[first + 1]))

    def _list(self, folder: str) -> set[str]:
        path = self.root / folder
        if not path.is_dir():
            raise FileNotFoundError(
                f'{self.root} has no folder {folder!r}; a data set has the folders '
                f'{LABELS}, {GROUND_REFERENCE}, {", ".join(SENSORS)}. Give the folder that holds '
                'them as root'
            )
        return {entry.name for entry in os.scandir(path)}

    def _read_labels(self, progress: bool) -> Iterator[_Label]:
        names = sorted(name for name in self._list(LABELS) if name.endswith('.json'))
        if not names:
            raise FileNotFoundError(
                f'{self.root / LABELS} holds no label file; expected TILE_X_Y.json'
            )
        hidden = not progress or len(names) < 1000
        for name in tqdm(names, 'Reading labels', disable=hidden, unit='patch'):
            yield _read_label(self.root / LABELS / name)

    def _acquisitions(
        self, labels: list[_Label], listing: Mapping[str, set[str]] | None
    ) -> pd.DataFrame:
        patches: list[int] = []
        sensors: list[int] = []
        dates: list[str] = []
        paths: list[str] = []
        for patch, label in enumerate(labels):
            for code, sensor in enumerate(SENSORS):
                for date in sorted(label.dates[sensor]):
                    name = label.image(sensor, date)
                    if listing is not None and name not in listing[sensor]:
                        self.missing[sensor] += 1
                        continue
                    patches.append(patch)
                    sensors.append(code)
                    dates.append(date)
                    paths.append(f'{sensor}/{name}')
        return pd.DataFrame(
            {
                'patch': np.array(patches, np.int32),
                'sensor': pd.Categorical.from_codes(np.array(sensors, np.int8), pd.Index(SENSORS)),
                'time': pd.to_datetime(pd.Series(dates, dtype='str'), format='%Y%m%d').astype(
                    'datetime64[s]'
                ),
                'path': pd.Series(paths, dtype='str'),
            }
        )

    def _patches(self, labels: list[_Label], references: set[str] | None) -> gpd.GeoDataFrame:
        frame = pd.DataFrame(
            {
                'name': [label.name for label in labels],
                'tile': pd.Categorical([label.tile for label in labels]),
                'x': [label.x for label in labels],
                'y': [label.y for label in labels],
                'epsg': [label.epsg for label in labels],
                'classes': [label.classes for label in labels],
                'ground_reference': [
                    references is None or label.ground_reference in references for label in labels
                ],
            }
        )
        place = np.full((len(frame), 5), np.nan)
        if references is not None:
            for rows in frame.groupby('tile', observed=True).indices.values():
                place[rows] = self._probe_tile(frame, np.asarray(rows))
        width, height, left, top, res = place.T
        xmin, ymax = left + frame['x'] * res, top - frame['y'] * res
        frame['width'], frame['height'] = np.nan_to_num(place[:, :2]).astype(int).T
        frame['xmin'], frame['ymin'] = xmin, ymax - height * res
        frame['xmax'], frame['ymax'] = xmin + width * res, ymax
        return gpd.GeoDataFrame(frame, geometry=_footprints(frame), crs='EPSG:4326')

    def _probe_tile(self, frame: pd.DataFrame, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """What ``_probe`` tells of each patch of a tile, or of all of them where they agree."""
        probes = [self._probe(frame, row) for row in rows[[0, -1]]]
        if probes[0] != probes[1]:
            probes = [self._probe(frame, row) for row in rows]
        return np.array(probes[: len(rows)] if len(set(probes)) > 1 else probes[:1])

    def _probe(self, frame: pd.DataFrame, row: int) -> tuple[float, ...]:
        """Width, height, tile origin and resolution that one raster of a patch tells."""
        patch: Any = next(frame.iloc[[row]].itertuples())
        if patch.ground_reference:
            path = self.root / GROUND_REFERENCE / reference_name(patch.tile, patch.x, patch.y)
        else:
            first = int(np.searchsorted(self.acquisitions['patch'], row))
            if first == len(self.acquisitions) or self.acquisitions.at[first, 'patch'] != row:
                return (np.nan,) * 5
            path = self.root / str(self.acquisitions.at[first, 'path'])
        with open_raster(path) as src:
            t = src.transform
            _check_georeference(path, src, patch.epsg)
            origin = t.c - patch.x * t.a, t.f - patch.y * t.e
            return src.width, src.height, round(origin[0], 6), round(origin[1], 6), t.a

    def _row_offsets(self) -> NDArray[np.int64]:
        table = self.acquisitions
        key = (
            table['patch'].to_numpy(np.int64) * len(SENSORS) + table['sensor'].cat.codes.to_numpy()
        )
        self._time = table['time'].to_numpy()
        return np.searchsorted(key, np.arange(len(SENSORS) * len(self.patches) + 1))

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


def reference_name(tile: str, x: int, y: int) -> str:
    """File name of the label raster of a patch."""
    return f'{tile}_GR_{x}_{y}.tif'


def open_raster(path: Path) -> rasterio.DatasetReader:
    """Open a raster, or say which one cannot be opened.

    Raises:
        OSError: If the file is missing or not a raster.
    """
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
    dates = {s: list(_dates(path, names, s, f'{x}_{y}', tile)) for s, names in listed.items()}
    return _Label(tile, x, y, epsg, classes, dates)


def _dates(path: Path, names: Iterable[str], sensor: str, xy: str, tile: str) -> Iterator[str]:
    """Dates of image names; each must name this patch."""
    head, tail, end = f'{tile}_', f'_{sensor.upper()}_{xy}.tif', len(tile) + 9
    for name in names:
        if not name:
            continue
        date = name[len(head) : end]
        if not (name.startswith(head) and name[end:] == tail and _is_date(date)):
            raise ValueError(
                f'{path} names {name!r} as an image of {sensor}; expected {head}YYYYMMDD{tail}'
            )
        yield date


@lru_cache(maxsize=10_000)
def _is_date(text: str) -> bool:
    try:
        return bool(datetime.strptime(text, '%Y%m%d'))
    except ValueError:
        return False


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
    return gpd.GeoSeries([box(*b) for b in bounds], index=patches.index, crs=patches['epsg'].iat[0])
