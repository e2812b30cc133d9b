"""MultiSenGE and MultiSenNA as TorchGeo data sets of time series."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS
from torchgeo.datasets import DatasetNotFoundError

from torchgeo_s1s2.datasets.catalog import (
    FOLDERS,
    GROUND_REFERENCE,
    LABELS,
    Catalog,
    has_images,
)
from torchgeo_s1s2.datasets.classes import ClassScheme, class_scheme
from torchgeo_s1s2.datasets.download import SeasonDownload
from torchgeo_s1s2.datasets.ground import GroundSplits
from torchgeo_s1s2.datasets.rasters import Grid, read_image, read_labels
from torchgeo_s1s2.datasets.sensors import SENSOR_BANDS, SENSORS, Array, Offset, in_order, readings
from torchgeo_s1s2.datasets.series import Sample, SeriesDataset
from torchgeo_s1s2.datasets.time_series import DateRule, MonthlySeries, check_kind
from torchgeo_s1s2.errors import NoPatchesError, warn

Splits = Mapping[str, Sequence[str]]


class MultiSenGE(SeriesDataset):
    """MultiSenGE: land cover of eastern France from a season of Sentinel-1 and Sentinel-2.

    8,157 patches of 256 x 256 pixels of 10 m in two UTM zones, 72,033 Sentinel-2 and 1,012,227
    Sentinel-1 acquisitions of 2020, and 14 land-cover classes. Any data set in the same layout
    can be read, with patches of any size::

        root/
          labels/            TILE_X_Y.json
          ground_reference/  TILE_GR_X_Y.tif            uint8, labels
          s2/                TILE_YYYYMMDD_S2_X_Y.tif   int16, 10 bands, reflectance x 10,000
          s1/                TILE_YYYYMMDD_S1_X_Y.tif   float32, VV and VH, linear

    A raster says what it is: its type, its no-data tag or mask, its scale and offset, the names of
    its bands, its CRS and its transform count before anything that is assumed here. What is not
    finite is missing. An image on other pixels than its patch is warped to them. What a file cannot
    say is an argument: ``unit``, ``offset``, ``nodata`` and ``file_bands``. See
    :class:`~torchgeo_s1s2.datasets.SeriesDataset` for the samples, which hold Sentinel-2 as
    reflectance and Sentinel-1 in dB.

    If you use the data, cite Wenger et al., https://doi.org/10.5194/isprs-annals-V-3-2022-635-2022
    (the data set, DOI 10.5281/zenodo.6375466) and https://doi.org/10.3390/rs15010151 (the
    protocol and the split).
    """

    all_bands = tuple(band for bands in SENSOR_BANDS.values() for band in bands)

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
        sensors: Sequence[str] = tuple(SENSORS),
        bands: Sequence[str] | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
        crs: CRS | None = None,
        res: float | tuple[float, float] | None = None,
        splits: Splits | GroundSplits | None = None,
        raw: bool = False,
        unit: str | Mapping[str, str] | None = None,
        offset: Offset | None = None,
        nodata: Mapping[str, float] | None = None,
        file_bands: Mapping[str, Sequence[str]] | None = None,
        catalog: Catalog | None = None,
        download: bool = False,
        checksum: bool = False,
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
            res: Width and height of a window's pixels in units of that CRS; those of the patches
                unless given.
            splits: Tiles of each split, in place of the paper's, or
                :class:`~torchgeo_s1s2.datasets.BlockSplits` or
                :class:`~torchgeo_s1s2.datasets.PolygonSplits`.
            raw: Give the values of the files instead of reflectance and dB.
            unit: What the values of the files are, of one sensor or by sensor: for Sentinel-2
                ``'dn'`` (reflectance x 10,000) or ``'reflectance'``, for Sentinel-1 ``'linear'``
                (power), ``'db'`` or ``'amplitude'``; ``'dn'`` and ``'linear'`` unless given.
            offset: What to add to the values of Sentinel-2 files, such as -1000 for processing
                baseline 04.00 and later; or that by the day from which on it holds, such as
                ``{'2022-01-25': -1000}``.
            nodata: By sensor, the value without an observation in files that have no tag and no
                mask; -10000 for Sentinel-2 (0 where the type has no negative numbers) and 0 for
                Sentinel-1 unless given.
            file_bands: By sensor, the bands of files that do not name them, in order.
            catalog: Catalogue of root, if there is one already; nothing is downloaded then.
            download: Download what the series, the split and the sensors need and root lacks; see
                :class:`~torchgeo_s1s2.datasets.SeasonDownload`.
            checksum: Compare the files with the checksums recorded when they were downloaded,
                which reads them all.

        Raises:
            DatasetNotFoundError: If root holds no data set and ``download`` is False.
            DownloadError: If the download cannot go on, or a checksum differs.
            FileNotFoundError: If root lacks a folder.
            NoPatchesError: If no patch of the split has a full series.
            ValueError: If a label file is malformed, or an argument has no such value.
        """
        self.root = self.paths = Path(root)
        self.split = split
        check_kind('series', series, DateRule, 'a date rule, such as MonthlySeries()')
        check_kind('catalog', catalog, Catalog, 'a Catalog(root)')
        example = "tiles by split, as in {'train': ['31UEQ']}, or BlockSplits(...)"
        check_kind('splits', splits, (Mapping, GroundSplits), example)
        own = splits if isinstance(splits, GroundSplits) else dict(splits or type(self).splits)
        self.splits = own  # type: ignore[misc,assignment]
        self.download = download
        series = series or MonthlySeries()
        scheme = class_scheme(classes, self.schemes)
        in_order([series.leader], [*SENSORS], 'sensor to lead the series')
        how = readings(sensors, bands, unit, offset, nodata, file_bands, raw)
        tiles = self._tiles_of_split()
        if catalog is None:
            if not (download or (self.root / LABELS).is_dir() or has_images(self.root)):
                raise DatasetNotFoundError(self)
            season = SeasonDownload(self.root, self.url, tiles, series, tuple(how))
            if download:
                season.run()
            if checksum:
                season.verify()
        self.catalog = catalog or Catalog(self.root)
        if splits and not isinstance(splits, GroundSplits):
            check_splits(splits, self.catalog)
        rows = self._rows_of_split(tiles)
        super().__init__(rows, series, scheme, how, crs, res, transforms)
        if isinstance(self.splits, GroundSplits) and split != 'all':
            patches = self.catalog.patches.dropna(subset='xmin')
            self.restrict(self.splits.areas(patches), split)

    @property
    def title(self) -> str:
        """What messages call the data set."""
        return f'split {self.split!r} in {self.root}'

    def name_of(self, patch: int) -> str:
        """Name of a patch: TILE_X_Y."""
        return self.catalog.patch(patch).name

    def grid_of(self, patch: int) -> Grid:
        """Pixels of a patch in its own zone."""
        return self.catalog.patch(patch).grid

    def times_of(self, patch: int, sensor: str) -> NDArray[np.datetime64]:
        """Sorted acquisition times of a patch, UTC."""
        return self.catalog.times(patch, sensor)

    def read_image(self, patch: int, sensor: str, position: int, grid: Grid) -> Array:
        """Values (C, H, W) of an acquisition on a grid, NaN without one."""
        path, sidecars = self.catalog.raster(patch, sensor, position)
        time, place = self.times_of(patch, sensor)[position], self.grid_of(patch)
        return read_image(path, self.readings[sensor], grid, time, place, sidecars)

    def read_labels(self, patch: int, grid: Grid) -> NDArray[Any] | None:
        """Labels (H, W) as they are on disk, NaN for none; None without a label raster."""
        if not self.catalog.patch(patch).ground_reference:
            return None
        path, sidecars = self.catalog.raster(patch, GROUND_REFERENCE, 0)
        return read_labels(path, grid, self.grid_of(patch), sidecars)

    def files_of(self, index: int, every: bool = False) -> dict[str, list[Path]]:
        """Files that row ``index`` is read from, by sensor, and those of its labels."""
        patch, slots = self._patch(index), self.slots(index)
        chosen: dict[str, Iterable[int]] = {
            sensor: range(len(self.times_of(patch, sensor))) if every else chain(*slots[sensor])
            for sensor in self.sensors
        }
        chosen[GROUND_REFERENCE] = [0] if self.catalog.patch(patch).ground_reference else []
        return {
            folder: [file for p in positions for file in self.catalog.files(patch, folder, p)]
            for folder, positions in chosen.items()
        }

    def _tiles_of_split(self) -> Sequence[str] | None:
        """Tiles of the split, None for all."""
        names = (*self.splits, 'all')
        if self.split not in names:
            raise NoPatchesError(f'no split {self.split!r}; choose one of {", ".join(names)}')
        if 'all' in self.splits:
            raise ValueError("'all' stands for every patch; give the split another name")
        if self.split == 'all' or isinstance(self.splits, GroundSplits):
            return None
        tiles = self.splits[self.split]
        if isinstance(tiles, str):
            raise ValueError(f'split {self.split!r} is {tiles!r}; give a list of tiles: [{tiles}]')
        return tiles

    def _rows_of_split(self, wanted: Sequence[str] | None) -> list[int]:
        patches = self.catalog.patches
        rows = patches['xmin'].notna().to_numpy()
        if wanted is not None:
            rows = rows & patches['tile'].isin(wanted).to_numpy()
        if patches['xmin'].isna().all():
            raise NoPatchesError(
                f'{self.root} has label files, and no raster of their patches in '
                f'{", ".join(FOLDERS)}; fetch these'
            )
        if not rows.any():
            tiles = ', '.join(sorted(set(patches['tile'])))
            raise NoPatchesError(
                f'split {self.split!r} has no patch: its tiles are {wanted}, '
                f'{self.root} has {tiles}. Name the tiles of each split with the argument splits'
            )
        return [int(row) for row in np.flatnonzero(rows)]


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


def check_splits(splits: Splits, catalog: Catalog) -> None:
    """Warn of a tile in two splits, and of one that the data set does not have."""
    owners: dict[str, list[str]] = {}
    for split, tiles in splits.items():
        for tile in dict.fromkeys(tiles):
            owners.setdefault(tile, []).append(split)
    there = set(catalog.patches['tile'])
    notes = [f'tile {t} is in the splits {", ".join(s)}' for t, s in owners.items() if len(s) > 1]
    notes += [
        f'{catalog.root} has no tile {t!r} of split {s[0]!r}'
        for t, s in owners.items()
        if t not in there
    ]
    if notes:
        have = ', '.join(sorted(there))
        warn(f'{"; ".join(notes)} (tiles there: {have})')
