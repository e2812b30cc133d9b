"""Rasters of patches, read onto grids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from torchgeo_s1s2.datasets.catalog import Catalog, open_raster
from torchgeo_s1s2.datasets.classes import NO_LABEL

SENSOR_BANDS: dict[str, tuple[str, ...]] = {
    's2': ('B02', 'B03', 'B04', 'B05', 'B06', 'B07', 'B08', 'B8A', 'B11', 'B12'),
    's1': ('VV', 'VH'),
}
"""Bands of each sensor in the order of its files."""

NODATA = {'s2': -10000, 's1': 0}
"""Value of a pixel without an observation in each sensor's files."""


@dataclass(frozen=True)
class Grid:
    """Pixels to be filled: where they lie and how many."""

    epsg: int | None
    crs: rasterio.CRS
    transform: Affine
    width: int
    height: int

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Least x and y, largest x and y."""
        xmin, ymax = self.transform.c, self.transform.f
        return (
            xmin,
            ymax + self.height * self.transform.e,
            xmin + self.width * self.transform.a,
            ymax,
        )

    def offset_in(self, src: 'rasterio.DatasetReader | Grid') -> tuple[int, int] | None:
        """Column and row of the first pixel in a raster, None if the two are not on one grid."""
        here, there = self.transform, src.transform
        if src.crs != self.crs or abs(there.a - here.a) + abs(there.e - here.e) > 1e-6:
            return None
        col, row = (here.c - there.c) / there.a, (here.f - there.f) / there.e
        aligned = abs(col - round(col)) < 1e-3 and abs(row - round(row)) < 1e-3
        return (round(col), round(row)) if aligned else None


class Rasters:
    """Reads the rasters of patches, which a catalogue knows by row."""

    def __init__(self, catalog: Catalog, bands: Mapping[str, Sequence[str]], raw: bool) -> None:
        """Keep the settings.

        Args:
            catalog: Catalogue of the data set.
            bands: Bands to read of each sensor.
            raw: Give the values of the files instead of reflectance and dB.
        """
        self.catalog = catalog
        self.bands = bands
        self.raw = raw

    def grid(self, row: int) -> Grid:
        """Grid of a patch in its own zone."""
        patch = self.catalog.patch(row)
        res = (patch.xmax - patch.xmin) / patch.width
        origin = Affine(res, 0, patch.xmin, 0, -res, patch.ymax)
        crs = rasterio.CRS.from_epsg(patch.epsg)
        return Grid(patch.epsg, crs, origin, patch.width, patch.height)

    def slot(
        self, row: int, sensor: str, positions: Sequence[int], grid: Grid
    ) -> NDArray[np.float32]:
        """Mean of the acquisitions of a slot in the units of a sample.

        Args:
            row: Row of the patch in the catalogue.
            sensor: ``'s2'`` or ``'s1'``.
            positions: Positions of the acquisitions in the sensor's times.
            grid: Where to.

        Returns:
            Values (C, H, W), NaN without an observation.

        Raises:
            OSError: If a raster cannot be read; the message names it.
            ValueError: If a raster has another size or number of bands than the others.
        """
        return self.mean(self.acquisitions(row, sensor, positions, grid), sensor)

    def acquisitions(
        self, row: int, sensor: str, positions: Sequence[int], grid: Grid
    ) -> list[NDArray[Any]]:
        """Bands of acquisitions as they are in their rasters, each (C, H, W); else as slot."""
        names = SENSOR_BANDS[sensor]
        indexes = [names.index(band) + 1 for band in self.bands[sensor]]
        paths = (self.catalog.path(row, sensor, position) for position in positions)
        return [self._read(p, row, indexes, len(names), grid, NODATA[sensor]) for p in paths]

    def mean(self, images: Sequence[NDArray[Any]], sensor: str) -> NDArray[np.float32]:
        """Mean of acquisitions (C, H, W) of a sensor, in the units of a sample."""
        values = [_without_nodata(image, sensor) for image in images]
        value = values[0] if len(values) == 1 else _nanmean(np.stack(values))
        return value if self.raw else _to_physical(value, sensor)

    def labels(self, row: int, grid: Grid) -> NDArray[Any] | None:
        """Labels (H, W) as they are in the raster, None where there is none; else as slot."""
        path = self.catalog.ground_reference(row)
        if path is None:
            return None
        labels: NDArray[Any] = self._read(path, row, [1], 1, grid, NO_LABEL)[0]
        return labels

    def _read(
        self, path: Path, row: int, indexes: list[int], count: int, grid: Grid, nodata: int
    ) -> NDArray[Any]:
        """Read bands of a raster onto a grid: (len(indexes), H, W) in the raster's type."""
        with open_raster(path) as src:
            self._check(path, src, row, count)
            offset = grid.offset_in(src)
            try:
                if offset is not None:
                    return _crop(src, indexes, grid, *offset, nodata)
                return _warp(src, grid, nodata).read(indexes)
            except rasterio.errors.RasterioError as error:
                raise OSError(
                    f'{path} cannot be read: {error}. Fetch the file again, or delete it and the '
                    'catalogue leaves it out'
                ) from error

    def _check(self, path: Path, src: rasterio.DatasetReader, row: int, count: int) -> None:
        patch = self.catalog.patch(row)
        got = src.count, src.width, src.height
        expected = count, patch.width, patch.height
        if got != expected:
            raise ValueError(
                f'{path} has (bands, width, height) {got}, expected {expected} as the other '
                f'rasters of patch {patch.name}; fetch or write the file again'
            )
        t = src.transform
        if abs(t.c - patch.xmin) + abs(t.f - patch.ymax) > 1e-3:
            raise ValueError(
                f'{path} has its upper left corner at {t.c}, {t.f}; the other rasters place patch '
                f'{patch.name} at {patch.xmin}, {patch.ymax}'
            )


def _crop(
    src: rasterio.DatasetReader, indexes: list[int], grid: Grid, col: int, row: int, nodata: int
) -> NDArray[Any]:
    """Read a window that may reach beyond the raster; ``nodata`` there."""
    left, top = max(col, 0), max(row, 0)
    width = min(col + grid.width, src.width) - left
    height = min(row + grid.height, src.height) - top
    window = Window(left, top, width, height)
    if (width, height) == (grid.width, grid.height):
        return src.read(indexes, window=window)
    out = np.full((len(indexes), grid.height, grid.width), nodata, src.dtypes[0])
    if width > 0 and height > 0:
        inside = np.s_[:, top - row : top - row + height, left - col : left - col + width]
        out[inside] = src.read(indexes, window=window)
    return out


def _warp(src: rasterio.DatasetReader, grid: Grid, nodata: int) -> WarpedVRT:
    is_label = nodata == NO_LABEL
    return WarpedVRT(
        src,
        crs=grid.crs,
        transform=grid.transform,
        width=grid.width,
        height=grid.height,
        resampling=Resampling.nearest if is_label else Resampling.bilinear,
        src_nodata=None if is_label else nodata,
        nodata=nodata,
        dtype=src.dtypes[0],
    )


def _without_nodata(image: NDArray[Any], sensor: str) -> NDArray[np.float32]:
    """NaN where a sensor has no value; S1 power must be above 0."""
    value = image.astype(np.float32)
    missing = image == NODATA['s2'] if sensor == 's2' else ~(image > 0)
    if missing.any():
        value[missing] = np.nan
    return value


def _nanmean(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over the first axis of what is not NaN; NaN where everything is."""
    seen = ~np.isnan(images)
    total: NDArray[np.float32] = images.sum(0, where=seen)
    count: NDArray[np.float32] = seen.sum(0, dtype=np.float32)
    with np.errstate(invalid='ignore'):
        return total / count


def _to_physical(value: NDArray[np.float32], sensor: str) -> NDArray[np.float32]:
    """S2 to reflectance, S1 to dB, in place."""
    if sensor == 's1':
        np.log10(value, out=value)
    value *= np.float32(1e-4 if sensor == 's2' else 10)
    return value
