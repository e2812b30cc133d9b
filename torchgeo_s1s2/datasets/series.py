"""Data sets of time series: their index, samples, windows and date rules; no file name."""

import copy
import operator
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Self
from zlib import crc32

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import shapely
import torch
from affine import Affine
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from rasterio.features import geometry_mask
from rasterio.warp import calculate_default_transform
from shapely import Polygon, box, transform
from shapely.affinity import translate
from shapely.geometry.base import BaseGeometry
from torchgeo.datasets import GeoDataset, UnionDataset

from torchgeo_s1s2.datasets.canvas import EVERYWHERE, Canvas, Place
from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.datasets.plot import plot_series
from torchgeo_s1s2.datasets.rasters import GDAL_OPTIONS, Grid, crs_of, mean, reach, same_crs
from torchgeo_s1s2.datasets.sensors import Array, Reading
from torchgeo_s1s2.datasets.time_series import DateRule, Slots, series_report
from torchgeo_s1s2.errors import NoPatchesError, NoSeriesError, UnreadableError, warn

Sample = dict[str, Any]


class _Part(NamedTuple):
    """What a patch gives a sample: pixels to read, which of them it may fill, and their place."""

    patch: int
    period: slice
    slots: Slots
    grid: Grid
    inside: NDArray[np.bool_] | None
    place: Place = EVERYWHERE


class SeriesDataset(GeoDataset):
    """Patches of ground, each with time series of sensors and perhaps labels.

    Everything that a data set gives follows from its ``index``, a GeoDataFrame with a row a patch
    or a part of one: ``patch`` and ``name`` say which, ``geometry`` which pixels of it (those whose
    centre lies within), and the interval of the row which acquisitions. So whatever cuts, filters
    or copies the index gives a data set that holds that and no more, TorchGeo's splitters included.

    ``dataset[i]`` is row i on the patch's own grid in its own zone, without resampling.
    ``dataset[xmin:xmax, ymin:ymax, tmin:tmax]`` is any window in the data set's CRS: plain reads
    where it lies on the grid of the patches, and otherwise warped (bilinear, labels nearest), and
    mosaicked slot by slot; ``tmin:tmax`` limits the acquisitions that the date rule may use. Times
    are of any kind that pandas knows; without a zone they are UTC.

    A sample holds:

    ===================== ============ ======= ==================================================
    key                   shape        dtype   meaning
    ===================== ============ ======= ==================================================
    ``image``             (T, C, H, W) float32 bands of the sensors in order; NaN without a value
    ``mask``              (H, W)       int64   class 0..K-1, 255 without a label
    ``valid``             (T, S)       bool    the sensor saw a pixel in the slot
    ``acquisition_times`` (T, S)       int64   seconds since 1970 UTC, -1 where not valid
    ``bounds``            (9,)         float64 x, y and t as TorchGeo gives them
    ``transform``         (9,)         float64 affine transform, row by row
    ``crs``               ()           int64   EPSG code
    ``index``             ()           int64   row i; only of ``dataset[i]``
    ===================== ============ ======= ==================================================

    Where a window lies on several patches, ``acquisition_times`` tell of each slot the time that
    most of its pixels have, the earlier of two.

    An image that cannot be read is left out with a warning that names it where the date rule finds
    another one, and an error otherwise.

    Attributes:
        report: What the date rule makes of the patches; ``print`` shows it.
    """

    root: Path

    def __init__(
        self,
        patches: Sequence[int],
        series: DateRule,
        classes: ClassScheme,
        readings: Mapping[str, Reading],
        crs: CRS | None = None,
        res: float | tuple[float, float] | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        """Choose the patches that have a full series, and index them.

        Args:
            patches: Numbers of the patches.
            series: Date rule.
            classes: Class scheme of the masks.
            readings: How the files of each sensor are read.
            crs: CRS of the index and of windows; that of most patches unless given.
            res: Width and height of a pixel of a window in units of that CRS; those of the patches
                unless given.
            transforms: Function applied to each sample.

        Raises:
            NoPatchesError: If no patch has a full series.
        """
        self.series = series
        self.classes = classes
        self.readings = dict(readings)
        self.sensors = tuple(readings)
        self.bands = {name: reading.bands for name, reading in readings.items()}
        self.transforms = transforms
        self._unreadable: set[tuple[int, str, int]] = set()
        # Workers that outlive an epoch see a change in shared memory only.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        chosen = self._choose(patches)
        epsg = pd.Series([self.grid_of(patch).epsg for patch in chosen]).mode()[0]
        target = CRS.from_user_input(crs or int(epsg))
        own = self._res_in(target, chosen[0])
        self._res = own if res is None else _pair(res, own)
        self._index, self._checked = self._index_of(chosen, target), True
        self._slivers = self._index.geometry[:0]

    @abstractmethod
    def name_of(self, patch: int) -> str:
        """Name of a patch."""

    @abstractmethod
    def grid_of(self, patch: int) -> Grid:
        """Pixels of a patch in its own zone, known without opening a raster."""

    @abstractmethod
    def times_of(self, patch: int, sensor: str) -> NDArray[np.datetime64]:
        """Sorted acquisition times of a patch, datetime64[s], UTC."""

    @abstractmethod
    def read_image(self, patch: int, sensor: str, position: int, grid: Grid) -> Array:
        """Values (C, H, W) of an acquisition on a grid in the sensor's physical unit, or NaN."""

    @abstractmethod
    def read_labels(self, patch: int, grid: Grid) -> NDArray[Any] | None:
        """Labels (H, W) on a grid as the files have them, NaN for none; None without a file."""

    @abstractmethod
    def files_of(self, index: int, every: bool = False) -> dict[str, list[Path]]:
        """Files that row ``index`` is read from, by sensor, and those of its labels.

        Args:
            index: Number of a row.
            every: Also those of the images that the date rule does not choose.
        """

    @property
    def index(self) -> gpd.GeoDataFrame:
        """One row a patch or a part of one, as TorchGeo's samplers expect it."""
        return self._index

    @index.setter
    def index(self, index: gpd.GeoDataFrame) -> None:
        index = _restored(index, list(self._index.columns), self.crs)
        self._check_names(index)
        if len(index) and index.crs != self.crs:
            self._res = self._res_in(index.crs, int(index['patch'].iat[0]))
        self._index, self._checked = index, False
        self._slivers = index.geometry[:0]
        len(self)  # says what is left out

    def _check_names(self, index: gpd.GeoDataFrame) -> None:
        """Refuse rows of another data set, or of this one before patches were added to it."""
        for patch, name in zip(index['patch'], index['name'], strict=True):
            with suppress(IndexError):
                if f'{name}_'.startswith(f'{self.name_of(int(patch))}_'):  # or a piece of it
                    continue
            raise ValueError(
                f'patch {patch} of the index is {name!r}, which is another one here; give rows of '
                'the index of this data set as it is now'
            )

    @property
    def _rows(self) -> gpd.GeoDataFrame:
        """The index without rows that hold no pixel, such as those at the border of a region."""
        if not self._checked:
            self._checked = True
            held = np.array([self._holds(row) for row in range(len(self._index))], bool)
            if not held.all():
                self._slivers = self._index.geometry[~held]
                self._index = self._index[held]
                left_out = f'{(~held).sum()} of {len(held)}'
                warn(f'rows of the index that hold no pixel, left out: {left_out}')
        return self._index

    def __len__(self) -> int:
        """Number of rows of the index that hold a pixel."""
        return len(self._rows)

    def _holds(self, index: int) -> bool:
        """Whether a row holds the centre of a pixel."""
        grid, shape = self._part(index)
        return min(grid.shape) > 0 and (shape is None or bool(_inside(shape, grid).any()))

    @property
    def crs(self) -> CRS:
        """CRS of the index and of windows."""
        return self._index.crs

    @crs.setter
    def crs(self, new_crs: CRS) -> None:
        new_crs = CRS.from_user_input(new_crs)
        if new_crs == self.crs:
            return
        if len(self):
            self._res = self._res_in(new_crs, int(self._rows['patch'].iat[0]))
        self._index, self._slivers = self._rows.to_crs(new_crs), self._slivers.to_crs(new_crs)

    @property
    def epoch(self) -> int:
        """Number of the epoch, from which date rules draw that draw; worker processes see it."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        with torch.inference_mode():  # in which Lightning may have opened the data set
            self._epoch.fill_(epoch)

    def __getstate__(self) -> dict[str, Any]:
        """Look at the index of a copy again, for random_bbox_splitting changes that in place."""
        return {**self.__dict__, '_index': self._rows.copy(), '_checked': False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share the number of the epoch with worker processes after a copy, too."""
        self.__dict__.update(state)
        self._epoch.share_memory_()

    def __getitem__(self, index: Any) -> Sample:
        """Read a row of the index or a window.

        Args:
            index: Number of a row, or [xmin:xmax:xres, ymin:ymax:yres, tmin:tmax:tres].

        Returns:
            The sample; see the class.

        Raises:
            DataError: If a raster is not what it must be.
            IndexError: If there is no such row, or nothing in the window.
            UnreadableError: If a raster cannot be read and no other date takes its place.
        """
        window = isinstance(index, slice | tuple)
        sample = self._window(index) if window else self._row(operator.index(index))
        return self.transforms(sample) if self.transforms else sample

    def __and__(self, other: GeoDataset) -> Any:
        """Refuse: a series has a dimension that images of other data sets lack.

        With the series on the right, ``other & series``, it is TorchGeo that fails, when reading.

        Raises:
            TypeError: Always; the message says what to do instead.
        """
        raise TypeError(
            f'a series (T, C, H, W) cannot be joined with the samples of {type(other).__name__}; '
            'read both with the windows of one sampler: for w in sampler: dataset[w], other[w]'
        )

    def __or__(self, other: GeoDataset) -> 'SeriesUnion':
        """Join with another data set of series; see :class:`SeriesUnion`."""
        return SeriesUnion(self, other)

    def name(self, index: int) -> str:
        """Name of the patch of row ``index``."""
        return str(self._rows['name'].iat[index])

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of ``dataset[index]``."""
        return self._part(index)[0].shape

    def crop(self, index: int, top: int, left: int, height: int, width: int) -> Sample:
        """Read a window of row ``index`` on its own grid.

        Args:
            index: Number of a row.
            top: First row of pixels.
            left: First column of pixels.
            height: Number of rows of pixels.
            width: Number of columns; what lies beyond the row's own pixels is missing.

        Returns:
            The sample, as of ``dataset[index]``.
        """
        sample = self._row(index, (left, top, width, height))
        return self.transforms(sample) if self.transforms else sample

    def labels(self, index: int, top: int, left: int, height: int, width: int) -> NDArray[Any]:
        """Labels of a window of row ``index`` as they are on disk.

        Args:
            index: Number of a row.
            top: First row of pixels.
            left: First column of pixels.
            height: Number of rows of pixels.
            width: Number of columns of pixels.

        Returns:
            float64 (H, W), NaN without a label.
        """
        grid, inside = self._target(index, (left, top, width, height))
        with rasterio.Env(**GDAL_OPTIONS):
            labels = self.read_labels(self._patch(index), grid)
        if labels is None:
            return np.full((height, width), np.nan)
        return labels if inside is None else np.where(inside, labels, np.nan)

    def slots(self, index: int) -> Slots:
        """Time slots of row ``index`` as the date rule chooses them."""
        return self._select(self._patch(index), self._period(index))

    def replaced(self, index: int) -> bool:
        """Whether row ``index`` was read around an image that cannot be read."""
        return any(patch == self._patch(index) for patch, _, _ in self._unreadable)

    def zones(self) -> list[Self]:
        """This data set cut by the CRS of the patches, each part with its own as the index's."""
        codes = [self.grid_of(patch).epsg for patch in self._rows['patch']]
        parts = []
        for code in dict.fromkeys(codes):
            part = copy.copy(self)
            rows = [i for i, c in enumerate(codes) if c == code]
            cuts = [self._cut(i) for i in rows]
            geometry = [
                box(*self._grid(i).bounds) if cut is None else cut
                for i, cut in zip(rows, cuts, strict=True)
            ]
            part.index = self._rows.iloc[rows].set_geometry(
                gpd.GeoSeries(geometry, self._rows.index[rows], crs=code)
            )
            part._res = self._grid(rows[0]).res
            parts.append(part)
        return parts

    def restrict(self, areas: gpd.GeoDataFrame, split: str) -> None:
        """Keep the pixels in the areas of a split, with a row for each piece of a patch.

        TorchGeo's ``roi_split`` has a row a patch instead, around all its pieces.

        Args:
            areas: Polygons that do not overlap, with their ``split``.
            split: Name of the split.

        Raises:
            NoPatchesError: If no patch lies in them.
        """
        areas, index = areas.to_crs(self.crs), self._rows
        grounds = index.geometry.to_numpy()
        rows, of_areas = areas.sindex.query(grounds, 'intersects')
        own = areas['split'].to_numpy()[of_areas] == split
        rows, of_areas = rows[own], of_areas[own]
        shapes = shapely.intersection(grounds[rows], areas.geometry.to_numpy()[of_areas])
        pieces = index.iloc[rows].set_geometry(gpd.GeoSeries(shapes, index.index[rows], index.crs))
        pieces = pieces.explode()
        self._index = pieces[pieces.geom_type == 'Polygon']
        self._index = self._index[[self._holds(i) for i in range(len(self))]]
        if self._index.empty:
            raise NoPatchesError(f'{self.title} has no patch: none lies in its areas')
        number = self._index.groupby('patch').cumcount() + 1
        several = self._index['patch'].duplicated(keep=False).to_numpy()
        names = self._index['name'] + ('_' + number.astype(str)).where(several, '')
        self._index = self._index.assign(name=names.to_numpy())

    def check(self, index: int = 0) -> None:
        """Read one pixel of each raster of a row, which costs little whatever its size.

        Args:
            index: Number of a row.

        Raises:
            DataError: If a raster is not what it must be.
            UnreadableError: If a raster cannot be read and no other date takes its place.
        """
        self._row(index, (0, 0, 1, 1))

    def plot(self, sample: Sample, show_titles: bool = True, suptitle: str | None = None) -> Figure:
        """Plot the series, the mask and, if there is one, the prediction.

        Args:
            sample: A sample, with a ``prediction`` (H, W) or without.
            show_titles: Whether to title each panel.
            suptitle: Title of the figure.

        Returns:
            A figure with a row for each sensor, one for the classes, and their legend.
        """
        return plot_series(sample, self.bands, self.classes, show_titles, suptitle)

    def _choose(self, patches: Sequence[int]) -> list[int]:
        """Patches that have a full series; the others are counted in a warning."""
        sensors = self.series.reads(self.sensors)
        times = ({s: self.times_of(patch, s) for s in sensors} for patch in patches)
        self.report = series_report(self.series, times, self.sensors)
        chosen = [p for p, why in zip(patches, self.report.reasons, strict=True) if not why]
        failed = Counter(filter(None, self.report.reasons))
        if failed:
            why = '; '.join(f'{reason} ({n})' for reason, n in failed.most_common(3))
            if not chosen:
                leader, others = self.series.leader, [s for s in sensors if s != self.series.leader]
                led = any(len(self.times_of(patch, leader)) for patch in patches)
                mend = 'missing="keep"' if led or not others else f'leader={others[0]!r}'
                raise NoPatchesError(
                    f'none of the patches of {self.title} ({len(patches)}) has the series '
                    f'{self.series}: {why}. Choose another series, or {mend}'
                )
            left_out = f'{failed.total()} of {len(patches)}'
            warn(f'patches of {self.title} left out: {left_out}: {why}')
        return chosen

    @property
    def title(self) -> str:
        """What messages call the data set."""
        return type(self).__name__

    def _index_of(self, patches: Sequence[int], crs: CRS) -> gpd.GeoDataFrame:
        """One row a patch."""
        spans = np.array([self._span(patch) for patch in patches]).T
        first, last = (pd.DatetimeIndex(times) for times in spans)
        # To the end of the day, or time_series_split would cut off the last date.
        last = last.floor('D') + pd.Timedelta(days=1)
        times = pd.IntervalIndex.from_arrays(first, last, closed='both', name='datetime')
        columns = {'name': [self.name_of(patch) for patch in patches], 'patch': [*patches]}
        grids = [self.grid_of(patch) for patch in patches]
        bounds, codes = np.array([grid.bounds for grid in grids]), np.array([g.epsg for g in grids])
        geometry = np.empty(len(grids), object)
        for code in np.unique(codes):
            rows = codes == code
            geometry[rows] = self._footprints(bounds[rows], CRS.from_epsg(int(code)), crs)
        return gpd.GeoDataFrame(columns, index=times, geometry=geometry, crs=crs)

    def _footprints(self, bounds: NDArray[np.float64], own: CRS, crs: CRS) -> NDArray[np.object_]:
        """Footprints in a CRS, of whole pixels so that samplers stay on the grid of the others."""
        native = gpd.GeoSeries(box(*bounds.T), crs=own)
        if own == crs:
            return native.to_numpy()
        corners = (
            shapely.get_coordinates(native.to_crs(crs).to_numpy()).reshape(-1, 5, 2) / self.res
        )
        low = corners < corners[:, :4].mean(1, keepdims=True)
        snapped = np.where(low, np.floor(corners + 0.01), np.ceil(corners - 0.01))
        footprints: NDArray[np.object_] = shapely.polygons(snapped * self.res)
        return footprints

    def _res_in(self, crs: CRS, patch: int) -> tuple[float, float]:
        """Size of a patch's pixels in a CRS: the same where its unit is."""
        grid = self.grid_of(patch)
        own = CRS.from_user_input(grid.crs.to_wkt())
        if [a.unit_name for a in own.axis_info] == [a.unit_name for a in crs.axis_info]:
            return grid.res
        affine, _, _ = calculate_default_transform(
            grid.crs, crs_of(crs.srs), grid.width, grid.height, *grid.bounds
        )
        return affine.a, -affine.e

    def _span(self, patch: int) -> tuple[np.datetime64, np.datetime64]:
        sensors = self.series.reads(self.sensors)
        times = [t for s in sensors if len(t := self.times_of(patch, s))]
        return min(t[0] for t in times), max(t[-1] for t in times)

    def _select(self, patch: int, period: slice) -> Slots:
        """Slots of a patch from what was acquired in a period and can be read."""
        first, last = (np.datetime64(time, 'ns') for time in (period.start, period.stop))
        at, times = {}, {}
        for sensor in self.series.reads(self.sensors):
            t = self.times_of(patch, sensor)
            usable = (t >= first) & (t <= last)
            usable[[p for n, s, p in self._unreadable if (n, s) == (patch, sensor)]] = False
            at[sensor], times[sensor] = np.flatnonzero(usable).tolist(), t[usable]
        draw = crc32(f'{self.name_of(patch)} {self.epoch}'.encode())
        slots = self.series.select(times, draw)
        return {s: tuple(tuple(at[s][p] for p in slot) for slot in slots[s]) for s in slots}

    def _period(self, index: int) -> slice:
        """Times of a row, its ends included: those of time_series_split do not overlap so."""
        interval = self._rows.index[index]
        return slice(_utc(interval.left), _utc(interval.right), 1)

    def _patch(self, index: int) -> int:
        return int(self._rows['patch'].iat[index])

    def _grid(self, index: int) -> Grid:
        return self.grid_of(self._patch(index))

    def _ground(self, index: int) -> BaseGeometry:
        """Geometry of a row, without the borders that a cut may leave of what lies beside it."""
        geometry = self._rows.geometry.iat[index]
        parts = shapely.get_parts(geometry)  # none of None
        areas = shapely.get_dimensions(parts) == 2
        return geometry if len(parts) and areas.all() else shapely.union_all(parts[areas])

    def _cut(self, index: int) -> BaseGeometry | None:
        """Geometry of a row in the CRS of its patch, None if it is the whole patch."""
        grid, geometry = self._grid(index), self._ground(index)
        inset = 0.01
        if not same_crs(grid.crs, crs_of(self.crs.srs)):
            inset = 0.5  # footprints are of other pixels, so centres count
            there = _transformer(self.crs.srs, grid.crs.to_wkt())
            geometry = transform(geometry, there.transform, interleaved=False)
            # Of two pieces one shall have the centres on their border, however that is rounded.
            geometry = translate(geometry, *np.multiply(1e-3, grid.res))
        return None if geometry.covers(_inset(grid, inset)) else geometry

    def _part(self, index: int) -> tuple[Grid, BaseGeometry | None]:
        """Pixels of a row, and what of them to leave out if that is no rectangle."""
        grid, geometry = self._grid(index), self._cut(index)
        if geometry is None:
            return grid, None
        if geometry.is_empty:
            return grid.window(0, 0, 0, 0), None
        xmin, ymin, xmax, ymax = geometry.bounds
        (left, top), (right, bottom) = (
            ~grid.transform @ (xmin, ymax),
            ~grid.transform @ (xmax, ymin),
        )
        # Pixels whose centre lies within.
        col, row = max(round(left), 0), max(round(top), 0)
        last = min(round(right), grid.width), min(round(bottom), grid.height)
        rectangle = geometry.equals(box(*geometry.bounds))
        part = grid.window(col, row, last[0] - col, last[1] - row)
        return part, None if rectangle else geometry

    def _row(self, index: int, crop: tuple[int, int, int, int] | None = None) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f'index: {index} not found in dataset of length {len(self)}')
        index %= len(self)
        grid, inside = self._target(index, crop)
        period = self._period(index)
        sample = self._sample(grid, period, [_Part(self._patch(index), period, {}, grid, inside)])
        return sample | {'index': torch.tensor(index)}

    def _target(
        self, index: int, crop: tuple[int, int, int, int] | None
    ) -> tuple[Grid, NDArray[np.bool_] | None]:
        """Pixels to read of a row, and which of them are its own if not all of the patch's are."""
        part, geometry = self._part(index)
        grid = part.window(*crop) if crop else part
        if min(grid.shape) < 1:
            raise IndexError(f'index: {index} ({self.name(index)}) holds no pixel')
        inside = None if geometry is None else _inside(geometry, grid)
        if crop and part != self._grid(index):
            own = _inside(box(*part.bounds), grid)
            inside = own if inside is None else inside & own
        return grid, inside

    def _window(self, index: Any) -> Sample:
        x, y, t = self._disambiguate_slice(index)
        period = slice(_utc(t.start), _utc(t.stop), t.step)
        if not (
            x.step > 0 and y.step > 0 and np.isfinite([x.start, x.stop, y.start, y.stop]).all()
        ):
            raise IndexError(f'index: {index}, expected finite bounds and resolutions above 0')
        width, height = round((x.stop - x.start) / x.step), round((y.stop - y.start) / y.step)
        if width < 1 or height < 1:
            raise IndexError(f'index: {index} holds no pixel of {x.step} x {y.step}')
        affine = Affine(x.step, 0, x.start, 0, -y.step, y.stop)
        grid = Grid(crs_of(self.crs.srs), affine, width, height)
        parts = [self._part_of_window(row, grid, period) for row in self._rows_in(grid)]
        if not parts and self._slivers.intersects(box(*grid.bounds)).any():
            canvas = Canvas(self.series.length, self.bands, grid.shape, several=False)
            return canvas.sample() | _georeference(grid, period)
        try:
            return self._sample(grid, period, parts)
        except NoSeriesError as error:
            raise IndexError(
                f'index: {index} not found in dataset with bounds: {self.bounds} ({error})'
            ) from error

    def _rows_in(self, grid: Grid) -> NDArray[np.intp]:
        """Rows that a window shows, or if there are none, those that it touches."""
        find = partial(self._rows.sindex.query, predicate='intersects', sort=True)
        rows: NDArray[np.intp] = find(_inset(grid, 0.49))  # where centres of pixels are
        return rows if len(rows) else find(box(*grid.bounds))

    def _part_of_window(self, row: int, grid: Grid, period: slice) -> _Part:
        """What of a window a row can fill."""
        own, cut = self._period(row), self._cut(row)
        first, end = np.reshape(reach(grid, self._grid(row)), (2, 2))
        size = grid.width, grid.height
        left, top = np.clip(first, 0, np.subtract(size, 1)).tolist()
        right, bottom = np.clip(end, (left + 1, top + 1), size).tolist()
        part = grid.window(left, top, right - left, bottom - top)
        return _Part(
            self._patch(row),
            slice(max(period.start, own.start), min(period.stop, own.stop)),
            {},
            part,
            None if cut is None else _inside(self._ground(row), part),
            (slice(top, bottom), slice(left, right)),
        )

    def _sample(self, grid: Grid, period: slice, parts: Iterable[_Part]) -> Sample:
        """Read the slots of one or more patches onto a grid; the first patch with a value wins."""
        chosen, failed = list[_Part](), Counter[str]()
        for part in parts:
            try:
                chosen.append(part._replace(slots=self._select(part.patch, part.period)))
            except NoSeriesError as error:
                failed[f'{self.name_of(part.patch)}: {error}'] += 1
        if not chosen:
            raise NoSeriesError(
                f'none of the patches there ({len(failed)}) has the series {self.series} from '
                f'{period.start} to {period.stop}: {"; ".join(list(failed)[:3])}'
            )
        with rasterio.Env(**GDAL_OPTIONS):
            canvas = self._filled(grid.shape, chosen)
        return canvas.sample() | _georeference(grid, period)

    def _filled(self, shape: tuple[int, int], chosen: list[_Part]) -> Canvas:
        """Pixels of patches, around images that cannot be read."""
        canvas = Canvas(self.series.length, self.bands, shape, several=len(chosen) > 1)
        for i, part in enumerate(chosen):
            try:
                self._fill(canvas, part)
            except UnreadableError as error:
                chosen[i] = self._without(part, error)
                return self._filled(shape, chosen)  # anew, for some dates may have changed
            labels = self.read_labels(part.patch, part.grid)
            if labels is not None:
                canvas.add_mask(self.classes.remap(labels), part.inside, part.place)
        return canvas

    def _fill(self, canvas: Canvas, part: _Part) -> None:
        """Fill what a canvas lacks from one patch."""
        for sensor in self.sensors:
            times = self.times_of(part.patch, sensor)
            for t, positions in enumerate(part.slots[sensor]):
                if positions and canvas.lacks(sensor, t, part.place):
                    value = self._slot(part.patch, sensor, positions, part.grid)
                    time = int(times[positions[0]].astype(np.int64))
                    canvas.add(sensor, t, time, value, part.inside, part.place)

    def _slot(self, patch: int, sensor: str, positions: Sequence[int], grid: Grid) -> Array:
        """Mean of the acquisitions of a slot in the unit of a sample."""
        images = []
        for position in positions:
            try:
                images.append(self.read_image(patch, sensor, position, grid))
            except UnreadableError:
                self._unreadable.add((patch, sensor, position))
                raise
        return self.readings[sensor].finish(mean(images))

    def _without(self, part: _Part, error: UnreadableError) -> _Part:
        """Another choice of dates, without the image that could not be read.

        Raises:
            UnreadableError: If the date rule has no other.
        """
        try:
            slots = self._select(part.patch, part.period)
        except NoSeriesError:
            self._unreadable -= {bad for bad in self._unreadable if bad[0] == part.patch}
            raise error from None
        before, after = (sum(map(bool, chain(*s.values()))) for s in (part.slots, slots))
        warn(f'{error} {"Another" if after >= before else "No other"} date takes its place')
        return part._replace(slots=slots)


class SeriesUnion(UnionDataset):
    """Data sets of series side by side: a window gets the values that any of them has.

    Where several have a value, that of the first counts. ``acquisition_times`` tell of each slot
    the time that most pixels have, as in a :class:`SeriesDataset`.
    """

    def __init__(
        self,
        dataset1: GeoDataset,
        dataset2: GeoDataset,
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        """Join two data sets.

        Args:
            dataset1: A data set of series, or a union.
            dataset2: Another one, of the same bands, classes, number of slots and units.
            transforms: Function applied to each sample.

        Raises:
            TypeError: If one is no data set of series.
            ValueError: If their samples differ.
        """
        described = [_description(dataset) for dataset in (dataset1, dataset2)]
        if described[0] != described[1]:
            raise ValueError(
                f'samples of the two data sets differ: {described[0]} and {described[1]}; give '
                'both the same bands, classes, number of slots and raw'
            )
        self._bands: Mapping[str, Sequence[str]] = described[0][0]
        # Copies, for the CRS and resolution of the second become those of the first.
        super().__init__(copy.copy(dataset1), copy.copy(dataset2), self._merge, transforms)
        self._member = '_'.join(['member', *(c for c in self.index if c.startswith('member'))])
        own = [d.index.assign(**{self._member: i}) for i, d in enumerate(self.datasets)]
        self._index, self._handed_on = pd.concat(own), True

    @property
    def index(self) -> gpd.GeoDataFrame:
        """The rows of both; those that are left of them make a part."""
        return self._index

    @index.setter
    def index(self, index: gpd.GeoDataFrame) -> None:
        before = getattr(self, '_index', index)
        self._index = _restored(index, list(before.columns), before.crs)
        self._handed_on = False

    def __getstate__(self) -> dict[str, Any]:
        """Look at the index of a copy again, for random_bbox_splitting changes that in place."""
        own = {'datasets': [*map(copy.copy, self.datasets)], '_index': self._index.copy()}
        return {**self.__dict__, **own, '_handed_on': False}

    def __getitem__(self, index: Any) -> Sample:
        """Read a window; each data set gives what it has of the union's rows.

        Raises:
            IndexError: If there is nothing in the window.
            TypeError: If the index is a number, which has another meaning in each data set.
        """
        if not isinstance(index, slice | tuple):
            raise TypeError(
                f'{index!r} is no window; a union of data sets is read by these, as in '
                'union[xmin:xmax, ymin:ymax] or with a sampler of TorchGeo. A patch has a number '
                'in its own data set only: union.datasets[0][0] is the first of the first'
            )
        if not (samples := [*self._samples(index)]):
            raise IndexError(f'index: {index} not found in dataset with bounds: {self.bounds}')
        sample: Sample = self.collate_fn(samples)
        return self.transforms(sample) if self.transforms else sample

    def _samples(self, index: Any) -> Iterator[Sample]:
        """What each data set has, those of a union in a union included."""
        if not self._handed_on:
            self._handed_on = True
            for i, dataset in enumerate(self.datasets):
                dataset.index = self._index[self._index[self._member] == i]
        for dataset in self.datasets:
            with suppress(IndexError):
                if isinstance(dataset, SeriesUnion) and dataset.transforms is None:
                    yield from dataset._samples(index)
                else:
                    yield dataset[index]

    def _merge(self, samples: Sequence[Sample]) -> Sample:
        """Each pixel and label of samples of one window from the first that has it."""
        first = samples[0]
        canvas = Canvas(len(first['image']), self._bands, first['mask'].shape, several=True)
        for sample in samples:
            for s, (sensor, channels) in enumerate(canvas.channels.items()):
                for t, time in enumerate(sample['acquisition_times'][:, s].tolist()):
                    if time >= 0:
                        canvas.add(sensor, t, time, sample['image'][t, channels].numpy())
            canvas.add_mask(sample['mask'].numpy())
        return first | canvas.sample()

    def __or__(self, other: GeoDataset) -> 'SeriesUnion':
        """Join with another data set of series."""
        return SeriesUnion(self, other)

    __and__ = SeriesDataset.__and__


def _restored(index: gpd.GeoDataFrame, columns: Sequence[str], crs: CRS) -> gpd.GeoDataFrame:
    """With what random_grid_cell_assignment drops: names of columns, and the CRS in 0.10.0."""
    numbers = {i: name for i, name in enumerate(columns) if name != 'geometry'}
    whole = isinstance(index, gpd.GeoDataFrame) and isinstance(index.index, pd.IntervalIndex)
    if not whole or not ({'patch', 'name'} <= {*index} or {*numbers} & {*index}):
        raise ValueError(
            'rows of an index must keep their columns "patch" and "name" and their intervals of '
            'time; select rows of dataset.index or change their geometry, without reset_index, '
            'dissolve, overlay or other columns of these names'
        )
    if index.crs is None:
        index = index.set_crs(crs)
    if 'patch' in index:
        return index
    return index.rename(columns=numbers)[[*numbers.values(), 'geometry']]


def _description(dataset: GeoDataset) -> tuple[Any, ...]:
    if isinstance(dataset, SeriesUnion):
        return _description(dataset.datasets[0])
    if not isinstance(dataset, SeriesDataset):
        raise TypeError(f'{type(dataset).__name__} is no data set of series; it cannot be joined')
    raw = {name for name, reading in dataset.readings.items() if reading.raw}
    return dataset.bands, dataset.classes.names, dataset.series.length, raw


def _pair(res: float | Sequence[float], own: tuple[float, float]) -> tuple[float, float]:
    pair = tuple(res) if isinstance(res, Sequence) else (res, res)
    if len(pair) != 2 or not all(isinstance(r, Real) and 0 < r < np.inf for r in pair):
        raise ValueError(f'res is {res!r}; give width and height of a pixel, numbers above 0')
    if not all(1e-3 < a / b < 1e3 for a, b in zip(pair, own, strict=True)):
        raise ValueError(
            f'res is {res!r}, and a pixel of the patches is {own} in the CRS; give it in its unit'
        )
    return pair


def _utc(time: Any) -> pd.Timestamp:
    """A time of any kind, without its zone; without one it is UTC."""
    if isinstance(time, Real):
        raise TypeError(f'{time!r} is no time; give a date, such as pd.Timestamp("2020-07-01")')
    stamp = pd.Timestamp(time)
    return stamp.tz_convert('UTC').tz_localize(None) if stamp.tz else stamp


def _inset(grid: Grid, share: float) -> Polygon:
    """Bounds of a grid without a share of its outermost pixels."""
    return box(*np.add(grid.bounds, np.multiply(share, [*grid.res, *np.negative(grid.res)])))


def _inside(geometry: BaseGeometry, grid: Grid) -> NDArray[np.bool_]:
    """Pixels of a grid whose centre lies within a geometry."""
    if geometry.is_empty:
        return np.zeros(grid.shape, bool)
    return geometry_mask([geometry], grid.shape, grid.transform, invert=True)


@lru_cache(maxsize=64)
def _transformer(source: str, target: str) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


def _georeference(grid: Grid, period: slice) -> Sample:
    xmin, ymin, xmax, ymax = grid.bounds
    xres, yres = grid.res
    seconds = [np.nan if t is pd.NaT else t.timestamp() for t in (period.start, period.stop)]
    bounds = [xmin, xmax, xres, ymin, ymax, yres, *seconds, period.step]
    return {
        'bounds': torch.tensor(bounds, dtype=torch.float64),
        'transform': torch.tensor(grid.transform, dtype=torch.float64),
        'crs': torch.tensor(grid.epsg or -1),
    }
