"""PASTIS-R: its arrays, its dates and where its patches lie."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from pyogrio.errors import DataSourceError
from pyproj import CRS
from rasterio.enums import Resampling
from rasterio.windows import Window
from torchgeo.datasets import PASTIS

from torchgeo_s1s2.datasets.catalog import GROUND_REFERENCE
from torchgeo_s1s2.datasets.classes import ClassScheme, LandCoverClass
from torchgeo_s1s2.datasets.rasters import Grid, check_labels, crs_of, onto
from torchgeo_s1s2.datasets.sensors import PASTIS_SENSORS, Array, in_order, readings
from torchgeo_s1s2.datasets.series import Sample, SeriesDataset
from torchgeo_s1s2.datasets.time_series import AllDates, DateRule, check_kind
from torchgeo_s1s2.errors import DataError, NoPatchesError, UnreadableError, warn

FOLDS = (1, 2, 3, 4, 5)
METADATA = 'metadata.geojson'
VOID = 19
_LAMBERT_93 = 2154
_LAUNCH = np.datetime64('2014-04-03')
_COLORS = np.rint(255 * np.asarray(PASTIS.cmap.colors)).astype(int).tolist()
PASTIS_CLASSES = ClassScheme(
    tuple(
        LandCoverClass(name.replace('_', ' ').capitalize(), tuple(color[:3]), (label,))
        for label, (name, color) in enumerate(zip(PASTIS.classes, _COLORS, strict=True))
        if label != VOID
    )
)
"""The 20 classes of PASTIS but the void one: background and 18 crops, at the index of their label.

A map, in which 0 stands for no observation, has the number of the label + 1.
"""


class _Patch(NamedTuple):
    """A patch: where it lies, and of each sensor sorted times and their places in the array."""

    name: str
    grid: Grid
    times: Mapping[str, NDArray[np.datetime64]]
    order: Mapping[str, NDArray[np.intp]]


class PASTISSeries(SeriesDataset):
    """PASTIS-R: crops of France from a season of Sentinel-2 and both orbits of Sentinel-1.

    2,433 patches of 128 x 128 pixels of 10 m, each with 38 to 61 acquisitions of Sentinel-2 (L2A of
    Theia) and about 70 of each orbit of Sentinel-1, from September 2018 to November 2019, and with
    the crop of each pixel. ``torchgeo.datasets.PASTIS(root, download=True)`` brings the archive
    (54 GB). Anything in the same layout can be read, PASTIS without Sentinel-1 too::

        root/ or root/PASTIS-R/
          metadata.geojson            ID_PATCH, Fold, TILE, footprint, dates-S2, dates-S1A, ...
          DATA_S2/S2_ID.npy           (T, 10, H, W) int16, reflectance x 10,000, -10000 for none
          DATA_S1A/S1A_ID.npy         (T, 3, H, W) float16, VV, VH and VV - VH, dB (ascending)
          DATA_S1D/S1D_ID.npy         the same (descending)
          ANNOTATIONS/TARGET_ID.npy   (3, H, W) uint8, of which the first channel is the class

    The arrays are mapped into memory, and only the dates are read that the date rule chooses. See
    :class:`~torchgeo_s1s2.datasets.SeriesDataset` for the samples, which hold Sentinel-2 as
    reflectance and Sentinel-1 in dB (averaged and warped as power). Pixels of the void class (19)
    have no label, as in the published evaluation, which counts the background (0).

    The footprints are published in Lambert 93, the pixels are those of tiles in UTM: the grid of a
    patch is in that of the two in which its footprint is a rectangle.

    If you use the data, cite Garnot and Landrieu, https://doi.org/10.1109/ICCV48922.2021.00483, and
    for Sentinel-1 Garnot et al., https://doi.org/10.1016/j.isprsjprs.2022.03.012.
    """

    all_bands = tuple(band for sensor in PASTIS_SENSORS.values() for band in sensor.bands)

    def __init__(
        self,
        root: str | os.PathLike[str] = 'data',
        folds: Sequence[int] = FOLDS,
        series: DateRule | None = None,
        classes: ClassScheme | None = None,
        sensors: Sequence[str] = tuple(PASTIS_SENSORS),
        bands: Sequence[str] | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
        crs: CRS | None = None,
        res: float | tuple[float, float] | None = None,
        raw: bool = False,
        unit: str | Mapping[str, str] | None = None,
        nodata: Mapping[str, float] | None = None,
    ) -> None:
        """Read the metadata and the headers of the arrays, and choose the patches of some folds.

        Args:
            root: Folder of the data set, or the one above it.
            folds: Official folds, each 1..5.
            series: Date rule; ``AllDates(max_length=61)``, all of Sentinel-2, unless given.
            classes: Class scheme over the labels 0..18; :data:`PASTIS_CLASSES` unless given.
            sensors: Some of ``('s2', 's1a', 's1d')``.
            bands: Bands to read, in any order; all unless given.
            transforms: Function applied to each sample.
            crs: CRS of the index and of GeoSlice windows; that of most patches unless given.
            res: Width and height of a window's pixels in units of that CRS; those of the patches
                unless given.
            raw: Give the values of the files instead of reflectance.
            unit: What the values of the files are, as in
                :class:`~torchgeo_s1s2.datasets.MultiSenGE`; ``'dn'`` and ``'db'`` unless given.
            nodata: By sensor, the value without an observation; -10000 for Sentinel-2 unless given.
                What is not finite is missing too.

        Raises:
            DataError: If the metadata are malformed, or an array is missing, damaged or has another
                shape than they say.
            FileNotFoundError: If there is no ``metadata.geojson``.
            NoPatchesError: If no patch of the folds has a full series.
            ValueError: If an argument has no such value.
        """
        within = Path(root) / PASTIS.directory
        self.root = self.paths = within if within.is_dir() else Path(root)
        chosen = {*folds} if isinstance(folds, Iterable) else set()
        if not chosen or not chosen <= {*FOLDS}:
            raise ValueError(f'folds is {folds!r}; expected a list of some of {FOLDS}')
        self.folds = tuple(map(int, folds))
        check_kind('series', series, DateRule, 'a date rule, such as AllDates(max_length=61)')
        series = series or AllDates(max_length=61)
        in_order([series.leader], [*PASTIS_SENSORS], 'sensor to lead the series')
        # Theia's products of these years have no offset, so nobody need look for one.
        how = readings(sensors, bands, unit, 0, nodata, raw=raw, table=PASTIS_SENSORS)
        self._patches = self._read_patches(series.reads(tuple(how)))
        rows = range(len(self._patches))
        super().__init__(rows, series, classes or PASTIS_CLASSES, how, crs, res, transforms)

    @property
    def title(self) -> str:
        """What messages call the data set."""
        return f'folds {", ".join(map(str, self.folds))} in {self.root}'

    def name_of(self, patch: int) -> str:
        """Name of a patch: its ID_PATCH."""
        return self._patches[patch].name

    def grid_of(self, patch: int) -> Grid:
        """Pixels of a patch."""
        return self._patches[patch].grid

    def times_of(self, patch: int, sensor: str) -> NDArray[np.datetime64]:
        """Sorted days of acquisition of a patch."""
        return self._patches[patch].times[sensor]

    def read_image(self, patch: int, sensor: str, position: int, grid: Grid) -> Array:
        """Values (C, H, W) of an acquisition on a grid, NaN without one."""
        reading, own = self.readings[sensor], self._patches[patch]
        images = _open(self._array(sensor, own.name))
        image = images[own.order[sensor][position]]
        channels = [reading.sensor.bands.index(band) for band in reading.bands]

        def read(window: Window) -> Array:
            value = image[:, *window.toslices()][channels].astype(np.float32)
            value[~np.isfinite(value) | (value == reading.nodata)] = np.nan
            return reading.physical(value, scaled=False)

        return onto(own.grid, grid, read, Resampling.bilinear, len(channels))

    def read_labels(self, patch: int, grid: Grid) -> NDArray[Any]:
        """Labels (H, W) as they are on disk, NaN for void; what is no label is refused."""
        own = self._patches[patch]
        path = self._array(GROUND_REFERENCE, own.name)
        target = _open(path)

        def read(window: Window) -> NDArray[np.float64]:
            labels = target[:1, *window.toslices()].astype(np.float64)
            labels[labels == VOID] = np.nan
            return labels

        labels: NDArray[np.float64] = onto(own.grid, grid, read, Resampling.nearest, 1)[0]
        check_labels(path, labels)
        return labels

    def files_of(self, index: int, every: bool = False) -> dict[str, list[Path]]:
        """Files that row ``index`` is read from, by sensor, and that of its labels."""
        name, metadata = self.name(index), self.root / METADATA
        files = {sensor: [metadata, self._array(sensor, name)] for sensor in self.sensors}
        return files | {GROUND_REFERENCE: [self._array(GROUND_REFERENCE, name)]}

    def _array(self, kind: str, name: str) -> Path:
        """File of a sensor or of the labels of a patch."""
        prefix = PASTIS.prefix['semantic' if kind == GROUND_REFERENCE else kind]
        return self.root / f'{prefix}{name}.npy'

    def _read_patches(self, sensors: Sequence[str]) -> list[_Patch]:
        """Patches of the folds, in the order of their numbers."""
        table = _read_metadata(self.root / METADATA, sensors)
        table = table[table['Fold'].isin(self.folds)]
        if table.empty:
            raise NoPatchesError(f'{self.title}: {METADATA} has no patch of these folds')
        table = table.sort_values('ID_PATCH')
        times, order, shapes = [], [], []
        for row in table.to_dict('records'):
            listed = {s: self._listed(s, row) for s in sensors}
            shapes.append(self._check_arrays(str(row['ID_PATCH']), listed))
            order.append({s: np.argsort(t, kind='stable') for s, t in listed.items()})
            times.append({s: t[order[-1][s]] for s, t in listed.items()})
        grids = _grids(table, shapes, self.title)
        return list(map(_Patch, table['ID_PATCH'].astype(str), grids, times, order))

    def _listed(self, sensor: str, row: Mapping[str, Any]) -> NDArray[np.datetime64]:
        """Times of a sensor in the order of the array."""
        key = _dates_of(sensor)
        try:
            dates = json.loads(row[key]) if isinstance(row[key], str) else row[key]
            digits = [str(dates[number]) for number in sorted(dates, key=int)]
            days = [f'{day[:4]}-{day[4:6]}-{day[6:]}' for day in digits]
            times = np.array(days, 'datetime64[s]')
            if (times < _LAUNCH).any():
                raise ValueError('no Sentinel flew yet')
            return times
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise DataError(
                f'{self.root / METADATA}: {key} of patch {row["ID_PATCH"]} is {row[key]!r:.80}; '
                'expected dates by number, such as {"0": 20180924, "1": 20181004}'
            ) from error

    def _check_arrays(
        self, name: str, listed: Mapping[str, NDArray[np.datetime64]]
    ) -> tuple[int, int]:
        """Compare the shapes of a patch's arrays with the metadata; its height and width."""
        path = self._array(GROUND_REFERENCE, name)
        shape = _open(path).shape
        if len(shape) != 3 or not all(shape):
            raise _misshapen(path, shape, '(3, H, W)')
        for sensor, times in listed.items():
            path = self._array(sensor, name)
            expected = len(times), len(PASTIS_SENSORS[sensor].bands), *shape[1:]
            if (found := _open(path).shape) != expected:
                raise _misshapen(path, found, f'{expected} after the dates, bands and labels')
        return shape[1], shape[2]


def _dates_of(sensor: str) -> str:
    return f'dates-{sensor.upper()}'


def _misshapen(path: Path, found: Sequence[int], expected: str) -> DataError:
    return DataError(
        f'{path} has the shape {tuple(found)}, expected {expected}. Unpack the archive again'
    )


def _open(path: Path) -> NDArray[Any]:
    """Map an array into memory, and say which one if that cannot be or it holds no numbers."""
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode='r')
    except (OSError, ValueError) as error:
        raise DataError(
            f'{path} is no array that can be read: {error}. Unpack the archive again'
        ) from error
    if array.dtype.kind not in 'iuf':
        raise DataError(f'{path} holds {array.dtype}, expected numbers. Unpack the archive again')
    return array


def _read_metadata(path: Path, sensors: Iterable[str]) -> gpd.GeoDataFrame:
    if not path.exists():
        raise FileNotFoundError(
            f'there is no {path}; give the folder of PASTIS-R as root. '
            f'torchgeo.datasets.PASTIS({str(path.parent)!r}, download=True) brings it'
        )
    try:
        table = gpd.read_file(path)
    except DataSourceError as error:
        raise UnreadableError(f'{path} cannot be read: {error}. Unpack the archive again') from None
    if lacking := {'ID_PATCH', 'Fold', *map(_dates_of, sensors)} - {*table}:
        raise DataError(
            f'{path} lacks {", ".join(sorted(lacking))}; it has {", ".join(table)}. Choose other '
            'sensors, or unpack the archive again'
        )
    numbers = {key: pd.to_numeric(table[key], errors='coerce') for key in ('ID_PATCH', 'Fold')}
    wrong = {
        'an ID_PATCH that is no whole number': numbers['ID_PATCH'] % 1 != 0,
        'the ID_PATCH of another': numbers['ID_PATCH'].duplicated(),
        f'a Fold other than {FOLDS}': ~numbers['Fold'].isin(FOLDS),
        'no footprint': table.geometry.isna() | table.geometry.is_empty,
    }
    for what, rows in wrong.items():
        if rows.any():
            first = table.loc[rows, ['ID_PATCH', 'Fold']].iloc[0].to_dict()
            raise DataError(
                f'{rows.sum()} of {len(table)} patches of {path} have {what}, the first is '
                f'{first}. Unpack the archive again'
            )
    table = table.assign(**{key: number.astype(int) for key, number in numbers.items()})
    if np.abs(table.total_bounds).max() > 360 and table.crs.is_geographic:
        # GeoJSON without a CRS is in degrees, which these are not.
        table = table.set_crs(_LAMBERT_93, allow_override=True)
    return table


def _grids(table: gpd.GeoDataFrame, shapes: Sequence[tuple[int, int]], title: str) -> list[Grid]:
    """Pixels of each patch in the CRS in which its footprint is a rectangle."""
    codes = [table.crs.to_epsg(), *map(_zone, dict.fromkeys(table.get('TILE', ())))]
    projected = {code: table.geometry.to_crs(code).tolist() for code in codes if code}
    grids, skewed = [], 0
    for row, (height, width) in enumerate(shapes):
        placed = [_place(code, g[row], height, width) for code, g in projected.items()]
        grid, skew = min(placed, key=lambda pair: pair[1])
        skewed += skew > 0.5
        grids.append(grid)
    if skewed:
        warn(
            f'the footprints of {skewed} of {len(grids)} patches of {title} are no rectangles in '
            f'{", ".join(f"EPSG:{code}" for code in projected)}; their maps cover the bounds'
        )
    return grids


def _zone(tile: object) -> int | None:
    """EPSG code of the UTM zone of a tile such as t30uxv, all of which are north."""
    digits = str(tile).upper().removeprefix('T')[:2]
    return 32600 + int(digits) if digits.isdecimal() and 1 <= int(digits) <= 60 else None


def _place(code: int, footprint: Any, height: int, width: int) -> tuple[Grid, float]:
    """Grid that fills a footprint, and how many pixels its corners are off."""
    vertices, bounds = shapely.get_coordinates(footprint), np.array(footprint.bounds)
    corners = bounds[[[0, 1], [0, 3], [2, 1], [2, 3]]]
    res = (bounds[2:] - bounds[:2]) / (width, height)
    apart = np.abs(corners[:, None] - vertices) / res
    # Coordinates are written with so many digits that a pixel of 10 m has 10 m again.
    digits = 3 if crs_of(code).is_projected else 12
    grid = Grid.of_bounds(code, tuple(bounds.round(digits).tolist()), width, height)
    return grid, float(apart.max(2).min(1).max())
