"""MultiSenGE and MultiSenNA as TorchGeo data sets of time series."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from zlib import crc32

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import torch
from affine import Affine
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pyproj import CRS
from shapely import box, transform
from torchgeo.datasets import DatasetNotFoundError, GeoDataset

from torchgeo_s1s2.datasets.catalog import (
    GDAL_OPTIONS,
    LABELS,
    SENSORS,
    Catalog,
    native_footprints,
)
from torchgeo_s1s2.datasets.classes import NO_LABEL, ClassScheme, class_scheme
from torchgeo_s1s2.datasets.download import SeasonDownload
from torchgeo_s1s2.datasets.packed import PackedCopy
from torchgeo_s1s2.datasets.plot import plot_series
from torchgeo_s1s2.datasets.rasters import SENSOR_BANDS, Grid, Rasters
from torchgeo_s1s2.datasets.time_series import DateRule, MonthlySeries, Slots
from torchgeo_s1s2.errors import NoPatchesError, NoSeriesError

Sample = dict[str, Any]
Splits = Mapping[str, Sequence[str]]


class MultiSenGE(GeoDataset):
    """MultiSenGE: land cover of eastern France from a season of Sentinel-1 and Sentinel-2.

    8,157 patches of 256 x 256 pixels of 10 m in two UTM zones, 72,033 Sentinel-2 and 1,012,227
    Sentinel-1 acquisitions of 2020, and 14 land-cover classes. Any data set in the same layout
    can be read, with patches of any size::

        root/
          labels/            TILE_X_Y.json
          ground_reference/  TILE_GR_X_Y.tif            uint8, labels
          s2/                TILE_YYYYMMDD_S2_X_Y.tif   int16, 10 bands, reflectance x 10,000
          s1/                TILE_YYYYMMDD_S1_X_Y.tif   float32, VV and VH, linear

    ``dataset[i]`` is patch i on its own grid in its own UTM zone, without resampling.
    ``dataset[xmin:xmax, ymin:ymax, tmin:tmax]`` is any window in the data set's CRS: plain reads
    where it lies on the grid of the patches, and otherwise warped (bilinear, labels nearest), and
    mosaicked slot by slot; ``tmin:tmax`` limits the acquisitions that the date rule may use.

    A sample holds:

    ===================== ============ ======= ==================================================
    key                   shape        dtype   meaning
    ===================== ============ ======= ==================================================
    ``image``             (T, C, H, W) float32 S2 reflectance, then S1 in dB; NaN without a value
    ``mask``              (H, W)       int64   class 0..K-1, 255 without a label
    ``valid``             (T, S)       bool    the sensor saw the slot
    ``acquisition_times`` (T, S)       int64   seconds since 1970 UTC, -1 where not valid
    ``bounds``            (9,)         float64 x, y and t as TorchGeo gives them
    ``transform``         (9,)         float64 affine transform, row by row
    ``crs``               ()           int64   EPSG code
    ``index``             ()           int64   patch i; only of ``dataset[i]``
    ===================== ============ ======= ==================================================

    If you use the data, cite Wenger et al., https://doi.org/10.5194/isprs-annals-V-3-2022-635-2022
    (the data set, DOI 10.5281/zenodo.6375466) and https://doi.org/10.3390/rs15010151 (the
    protocol and the split).
    """

    all_bands = SENSOR_BANDS['s2'] + SENSOR_BANDS['s1']
    rgb_bands = ('B04', 'B03', 'B02')

    #: Where the archives ``{labels,ground_reference,s2,s1}.tgz`` are; a mirror may replace it.
    url: ClassVar[str] = 'https://s3.unistra.fr/a2s_datasets/MultiSenGE'
    #: Tiles of each split, after Wenger et al. 2023.
    splits: ClassVar[Splits] = {
        'train': ('32UMV', '32ULU', '32ULV', '32TLT', '31UGQ', '31TFN', '31UFQ', '31UFR'),
        'val': ('31UFP', '31UGP'),
        'test': ('31UEQ',),
    }
    #: Numbers of classes for which there is a scheme.
    schemes: ClassVar[tuple[int, ...]] = (6, 10, 14)

    def __init__(
        self,
        root: str | os.PathLike[str] = 'data',
        split: str = 'train',
        series: DateRule | None = None,
        classes: int | ClassScheme = 14,
        sensors: Sequence[str] = SENSORS,
        bands: Sequence[str] | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
        crs: CRS | None = None,
        splits: Splits | None = None,
        raw: bool = False,
        catalog: Catalog | None = None,
        download: bool = False,
        checksum: bool = False,
        packed: str | os.PathLike[str] | None = None,
    ) -> None:
        """Catalogue the data set and choose the patches of a split that have a full series.

        Args:
            root: Folder of the data set.
            split: Name of a split, or ``'all'`` for every patch.
            series: Date rule; the paper's ``MonthlySeries()`` unless given.
            classes: Number of classes, or a class scheme of your own.
            sensors: ``('s2', 's1')`` or one of them.
            bands: Bands to read, in any order; they come in the sensors' order. All unless given.
            transforms: Function applied to each sample.
            crs: CRS of the index and of GeoSlice windows; that of most patches unless given.
            splits: Tiles of each split, in place of the paper's.
            raw: Give the values of the files instead of reflectance and dB.
            catalog: Catalogue of root, if there is one already; nothing is downloaded then.
            download: Download what the series, the split and the sensors need and root lacks; see
                :class:`~torchgeo_s1s2.datasets.SeasonDownload`.
            checksum: Compare the files with the checksums recorded when they were downloaded,
                which reads them all.
            packed: Folder of a copy that :func:`~torchgeo_s1s2.datasets.pack` wrote, to read
                instead of the rasters. Samples are the same. What the copy does not hold, such as
                warped windows or the dates of another period, is read from the rasters.

        Raises:
            DatasetNotFoundError: If root holds no data set and ``download`` is False.
            DownloadError: If the download cannot go on, or a checksum differs.
            FileNotFoundError: If root lacks a folder, or there is no packed copy.
            NoPatchesError: If no patch of the split has a full series.
            ValueError: If a label file is malformed, an argument has no such value, or the packed
                copy was made of other patches, dates, bands or files.
        """
        self.root = self.paths = Path(root)
        self.split = split
        self.series = series or MonthlySeries()
        self.classes = class_scheme(classes, self.schemes)
        self.sensors = _in_order(sensors, SENSORS, 'sensor')
        self.bands = _bands(bands, self.sensors)
        self.transforms = transforms
        self.raw = raw
        self.splits = dict(splits or type(self).splits)  # type: ignore[misc]
        self.download = download
        if catalog is None:
            self._obtain(checksum)
        self.catalog = catalog or Catalog(self.root)
        self.rasters = Rasters(self.catalog, self.bands, raw)
        self._names = self.catalog.patches['name'].tolist()
        # Workers that outlive an epoch see a change in shared memory only.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._patches = self._choose_patches()
        self.index = self._index(crs)
        self._lookup = torch.from_numpy(self.classes.lookup.astype(np.int64))
        if packed is not None:
            self.rasters = PackedCopy(packed, self)

    def __getitem__(self, index: Any) -> Sample:
        """Read a patch or a window.

        Args:
            index: Number of a patch, or [xmin:xmax:xres, ymin:ymax:yres, tmin:tmax:tres].

        Returns:
            The sample; see the class.

        Raises:
            IndexError: If there is no such patch, or nothing in the window.
            OSError: If a raster cannot be read; the message names it.
            ValueError: If a raster has another size or number of bands than the others.
        """
        if isinstance(index, slice | tuple):
            sample = self._window(index)
        else:
            sample = self._patch(int(index))
        return self.transforms(sample) if self.transforms else sample

    @property
    def zones(self) -> dict[int, list[str]]:
        """Tiles of the patches by the EPSG code of their CRS."""
        patches = self.catalog.patches.iloc[self._patches]
        return {
            int(group['epsg'].iat[0]): sorted(set(group['tile']))
            for _, group in patches.groupby('epsg')
        }

    def name(self, index: int) -> str:
        """Name of patch ``index``: TILE_X_Y."""
        return str(self._names[self._patches[index]])

    @property
    def epoch(self) -> int:
        """Number of the epoch, from which date rules draw that draw; worker processes see it."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

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

    def slots(self, index: int) -> Slots:
        """Time slots of patch ``index`` as the date rule chooses them."""
        return self._select(int(self._patches[index]))[0]

    def _obtain(self, checksum: bool) -> None:
        """Download and verify as far as that is wanted."""
        if not self.download and not (self.root / LABELS).is_dir():
            raise DatasetNotFoundError(self)
        tiles = self._tiles_of_split()
        season = SeasonDownload(self.root, self.url, tiles, self.series, self.sensors)
        if self.download:
            season.run()
        if checksum:
            season.verify()

    def _tiles_of_split(self) -> Sequence[str] | None:
        """Tiles of the split, None for all."""
        names = (*self.splits, 'all')
        if self.split not in names:
            raise NoPatchesError(f'no split {self.split!r}; choose one of {", ".join(names)}')
        return None if self.split == 'all' else self.splits[self.split]

    def _choose_patches(self) -> NDArray[np.intp]:
        """Rows of the catalogue in the split that have a footprint and a full series."""
        chosen, failed = [], Counter[str]()
        rows = self._rows_of_split()
        sensors = self.series.reads(self.sensors)
        reasons: dict[tuple[bytes, ...], str] = {}  # many patches have the same times
        for row in rows:
            key = tuple(self.catalog.times(row, sensor).tobytes() for sensor in sensors)
            if key not in reasons:
                reasons[key] = self._why_not(row)
            if reasons[key]:
                failed[reasons[key]] += 1
            else:
                chosen.append(row)
        if not chosen:
            why = '; '.join(f'{n} patches have {reason}' for reason, n in failed.most_common(3))
            raise NoPatchesError(
                f'none of the {len(rows)} patches of split {self.split!r} in {self.root} has the '
                f'series {self.series}: {why}. Choose another series, or missing="keep"'
            )
        return np.array(chosen, np.intp)

    def _why_not(self, row: int) -> str:
        """Why a patch has no series, empty if it has one."""
        try:
            slots, _ = self._select(row)
        except NoSeriesError as error:
            return str(error)
        seen = any(any(slots[sensor]) for sensor in self.sensors)
        return '' if seen else 'no acquisition at all'

    def _rows_of_split(self) -> NDArray[np.intp]:
        patches, wanted = self.catalog.patches, self._tiles_of_split()
        rows = patches['xmin'].notna().to_numpy()
        if wanted is not None:
            rows = rows & patches['tile'].isin(wanted).to_numpy()
        if not rows.any():
            tiles = ', '.join(sorted(set(patches['tile'])))
            raise NoPatchesError(
                f'split {self.split!r} has no patch: its tiles are {wanted}, '
                f'{self.root} has {tiles}. Name the tiles of each split with the argument splits'
            )
        return np.flatnonzero(rows)

    def _index(self, crs: CRS | None) -> gpd.GeoDataFrame:
        """One row a patch, as TorchGeo's samplers expect it."""
        patches = self.catalog.patches.iloc[self._patches]
        target = CRS.from_user_input(crs or int(patches['epsg'].mode()[0]))
        res = self.rasters.grid(int(self._patches[0])).transform.a
        self._res = res, res
        parts = [self._footprints(group, target) for _, group in patches.groupby('epsg')]
        geometry = pd.concat(parts).loc[patches.index]
        first, last = np.array([self._span(row) for row in self._patches]).T
        times = pd.IntervalIndex.from_arrays(
            pd.DatetimeIndex(first), pd.DatetimeIndex(last), closed='both', name='datetime'
        )
        return gpd.GeoDataFrame(
            {'name': patches['name'].to_numpy()}, index=times, geometry=geometry.array, crs=target
        )

    def _footprints(self, patches: pd.DataFrame, crs: CRS) -> gpd.GeoSeries:
        """Footprints in a CRS, on whole pixels so that samplers stay on the grid of the others."""
        native = native_footprints(patches)
        if native.crs == crs:
            return native
        if not crs.is_projected:
            return native.to_crs(crs)
        res = np.array(self._res)
        warped = native.to_crs(crs)
        snapped = transform(warped.to_numpy(), lambda xy: np.round(xy / res) * res)
        return gpd.GeoSeries(snapped, index=warped.index, crs=crs)

    def _span(self, row: int) -> tuple[np.datetime64, np.datetime64]:
        times = [t for s in self.sensors if len(t := self.catalog.times(row, s))]
        return min(t[0] for t in times), max(t[-1] for t in times)

    def _select(self, row: int, period: slice | None = None) -> tuple[Slots, dict[str, int]]:
        """Slots of a patch in a period, and where the positions of each sensor start."""
        times, first = {}, {}
        for sensor in self.series.reads(self.sensors):
            t = self.catalog.times(row, sensor)
            start, stop = _within(t, period) if period else (0, len(t))
            times[sensor], first[sensor] = t[start:stop], start
        draw = crc32(f'{self._names[row]} {self.epoch}'.encode())
        return self.series.select(times, draw), first

    def check(self, index: int = 0) -> None:
        """Read one pixel of each raster of a patch, which costs little whatever its size.

        Args:
            index: Number of a patch.

        Raises:
            OSError: If a raster cannot be read; the message names it.
            ValueError: If a raster has another size or number of bands than the others.
        """
        row = int(self._patches[index])
        grid = replace(self.rasters.grid(row), width=1, height=1)
        self._sample(grid, self._period(index), [(row, *self._select(row))])

    def _patch(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f'index: {index} not found in dataset with {len(self)} patches')
        index %= len(self)
        row = int(self._patches[index])
        series = [(row, *self._select(row))]
        sample = self._sample(self.rasters.grid(row), self._period(index), series)
        return sample | {'index': torch.tensor(index)}

    def _period(self, index: int) -> slice:
        times = self.index.index[index]
        return slice(times.left, times.right, 1)

    def _window(self, index: Any) -> Sample:
        x, y, t = self._disambiguate_slice(index)
        width, height = round((x.stop - x.start) / x.step), round((y.stop - y.start) / y.step)
        origin = Affine(x.step, 0, x.start, 0, -y.step, y.stop)
        crs = rasterio.CRS.from_wkt(self.crs.to_wkt())
        grid = Grid(self.crs.to_epsg(), crs, origin, width, height)
        found = self.index.sindex.query(box(*grid.bounds), 'intersects', sort=True)
        chosen, failed = [], Counter[str]()
        for row in self._patches[found]:
            try:
                chosen.append((int(row), *self._select(int(row), t)))
            except NoSeriesError as error:
                failed[str(error)] += 1
        if not chosen or width < 1 or height < 1:
            why = f' ({len(found)} patches, none with a full series: {dict(failed)})' * bool(failed)
            raise IndexError(f'index: {index} not found in dataset with bounds: {self.bounds}{why}')
        return self._sample(grid, t, chosen)

    def _sample(
        self, grid: Grid, period: slice, series: Iterable[tuple[int, Slots, dict[str, int]]]
    ) -> Sample:
        """Read the slots of one or more patches onto a grid; the first patch with a value wins."""
        shape = self.series.length, len(self.sensors)
        image = np.full(
            (shape[0], sum(map(len, self.bands.values())), grid.height, grid.width),
            np.nan,
            np.float32,
        )
        labels = np.full(image.shape[2:], NO_LABEL, np.uint8)
        times = np.full(shape, -1, np.int64)
        with rasterio.Env(**GDAL_OPTIONS):
            for row, slots, first in series:
                self._fill_image(image, times, grid, row, slots, first)
                self._fill_labels(labels, grid, row)
        return {
            'image': torch.from_numpy(image),
            'mask': self._lookup[torch.from_numpy(labels).int()],
            'valid': torch.from_numpy(times >= 0),
            'acquisition_times': torch.from_numpy(times),
            **_georeference(grid, period),
        }

    def _fill_image(
        self,
        image: NDArray[np.float32],
        times: NDArray[np.int64],
        grid: Grid,
        row: int,
        slots: Slots,
        first: Mapping[str, int],
    ) -> None:
        """Fill what is NaN in ``image`` (T, C, H, W) and -1 in ``times`` (T, S) from one patch."""
        channel = 0
        for s, (sensor, bands) in enumerate(self.bands.items()):
            for t, positions in enumerate(slots[sensor]):
                target = image[t, channel : channel + len(bands)]
                empty = times[t, s] < 0
                if not positions or not (empty or np.isnan(target).any()):
                    continue
                at = [first[sensor] + p for p in positions]
                value = self.rasters.slot(row, sensor, at, grid)
                if np.isnan(value.flat[0]) and np.isnan(value).all():
                    continue
                np.copyto(target, value, where=empty or np.isnan(target))
                if empty:
                    times[t, s] = self.catalog.times(row, sensor)[at[0]].astype(np.int64)
            channel += len(bands)

    def _fill_labels(self, labels: NDArray[np.uint8], grid: Grid, row: int) -> None:
        value = self.rasters.labels(row, grid)
        if value is not None:
            np.copyto(labels, value, where=labels == NO_LABEL)


class MultiSenNA(MultiSenGE):
    """MultiSenNA: the same for Nouvelle-Aquitaine, 12,258 patches and a class 15 (beaches, sand).

    There is no published split by tiles, so name the tiles of each split with ``splits``, or take
    ``split='all'``. Everything else is as in MultiSenGE.
    """

    url: ClassVar[str] = 'https://s3.unistra.fr/a2s_datasets/MultiSenNA'
    splits: ClassVar[Splits] = {}
    schemes: ClassVar[tuple[int, ...]] = (15,)

    def __init__(
        self,
        root: str | os.PathLike[str] = 'data',
        split: str = 'all',
        *args: Any,
        classes: int | ClassScheme = 15,
        **kwargs: Any,
    ) -> None:
        """See MultiSenGE.

        Args:
            root: Folder of the data set.
            split: Name of a split of ``splits``, or ``'all'`` for every patch.
            *args: As in MultiSenGE.
            classes: 15, or a class scheme of your own.
            **kwargs: As in MultiSenGE.
        """
        kwargs['classes'] = classes
        super().__init__(root, split, *args, **kwargs)


def _in_order(chosen: Sequence[str], allowed: Sequence[str], what: str) -> tuple[str, ...]:
    """The chosen names in the order of the allowed ones."""
    unknown = chosen if isinstance(chosen, str) else [n for n in chosen if n not in allowed]
    if unknown or not chosen:
        raise ValueError(f'no such {what}: {unknown or chosen!r}; choose from {", ".join(allowed)}')
    return tuple(name for name in allowed if name in chosen)


def _bands(bands: Sequence[str] | None, sensors: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Bands of each sensor in use."""
    allowed = [band for sensor in sensors for band in SENSOR_BANDS[sensor]]
    chosen = _in_order(allowed if bands is None else bands, allowed, 'band')
    by_sensor = {s: tuple(b for b in SENSOR_BANDS[s] if b in chosen) for s in sensors}
    for sensor, names in by_sensor.items():
        if not names:
            raise ValueError(f'no band of {sensor} in {bands}; add one or leave {sensor} out')
    return by_sensor


def _within(times: NDArray[np.datetime64], period: slice) -> tuple[int, int]:
    """First and last + 1 position of sorted times within a closed period."""
    start, stop = (np.datetime64(pd.Timestamp(t), 'ns') for t in (period.start, period.stop))
    return int(np.searchsorted(times, start)), int(np.searchsorted(times, stop, 'right'))


def _georeference(grid: Grid, period: slice) -> Sample:
    xmin, ymin, xmax, ymax = grid.bounds
    t = grid.transform
    tres = period.step if period.step is not None else 1
    seconds = period.start.timestamp(), period.stop.timestamp(), tres
    bounds = [xmin, xmax, t.a, ymin, ymax, -t.e, *seconds]
    return {
        'bounds': torch.tensor(bounds, dtype=torch.float64),
        'transform': torch.tensor(t, dtype=torch.float64),
        'crs': torch.tensor(grid.epsg or -1),
    }
