"""Rasters: where they lie, what they say of themselves, and windows of them."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import CRSError, RasterioError
from rasterio.transform import array_bounds
from rasterio.warp import reproject
from rasterio.warp import transform as warp_points
from rasterio.windows import Window

from torchgeo_s1s2.datasets.sensors import Array, Reading
from torchgeo_s1s2.errors import DataError, ImplausibleValuesError, UnreadableError, warn_once

# Opening one of a thousand files of a folder would list them all.
GDAL_OPTIONS = {'GDAL_DISABLE_READDIR_ON_OPEN': 'EMPTY_DIR'}
_CLOSE = 0.01  # pixels within which two grids are one
Read = Callable[[Window], NDArray[Any]]


@dataclass(frozen=True)
class Grid:
    """Pixels: where they lie and how many, by the names of rasterio's profiles.

    Attributes:
        crs: CRS.
        transform: From columns and rows to the CRS.
        width: Number of columns.
        height: Number of rows.
    """

    crs: CRS
    transform: Affine
    width: int
    height: int

    @classmethod
    @lru_cache(maxsize=1024)
    def of_bounds(
        cls, epsg: int, bounds: tuple[float, float, float, float], width: int, height: int
    ) -> 'Grid':
        """North-up pixels that fill bounds: least x and y, largest x and y."""
        xmin, ymin, xmax, ymax = bounds
        xres, yres = (xmax - xmin) / width, (ymax - ymin) / height
        return cls(crs_of(epsg), Affine(xres, 0, xmin, 0, -yres, ymax), width, height)

    def __str__(self) -> str:
        """Size, CRS and GDAL's geotransform."""
        size = f'{self.width} x {self.height} pixels'
        return f'{size} of {self.crs.to_string():.40} from {self.transform.to_gdal()}'

    @property
    def epsg(self) -> int | None:
        """EPSG code, None if the CRS has none."""
        return epsg_of(self.crs.to_wkt())

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Least x and y, largest x and y of a north-up grid."""
        return array_bounds(self.height, self.width, self.transform)

    @property
    def res(self) -> tuple[float, float]:
        """Width and height of a pixel of a north-up grid."""
        return self.transform.a, -self.transform.e

    @property
    def is_north_up(self) -> bool:
        """Whether columns go east and rows south, within a hundredth of a pixel."""
        t = self.transform
        skew = abs(t.b) * self.height < _CLOSE * abs(t.a), abs(t.d) * self.width < _CLOSE * abs(t.e)
        return t.a > 0 > t.e and all(skew)

    def window(self, col: float, row: float, width: int, height: int) -> 'Grid':
        """Part that begins at a column and row, which may reach beyond."""
        return Grid(self.crs, self.transform @ Affine.translation(col, row), width, height)

    def offset_in(self, other: 'Grid') -> tuple[int, int] | None:
        """Column and row of the first pixel in another grid, None if pixels do not coincide."""
        if self is other:
            return 0, 0
        if not same_crs(self.crs, other.crs):
            return None
        step = ~other.transform @ self.transform
        size = max(self.width, self.height)
        straight = max(abs(step.a - 1), abs(step.b), abs(step.d), abs(step.e - 1)) * size < _CLOSE
        col, row = round(step.c), round(step.f)
        whole = abs(step.c - col) < _CLOSE and abs(step.f - row) < _CLOSE
        return (col, row) if straight and whole else None

    def coincides(self, other: 'Grid') -> bool:
        """Whether the pixels are those of another grid, within a hundredth of one."""
        return self.shape == other.shape and self.offset_in(other) == (0, 0)

    def pixels_of(self, other: 'Grid') -> NDArray[np.float64]:
        """Columns and rows, in this grid, of points along the border of another one: (2, N)."""
        steps = np.linspace(0, 1, 21)
        columns, rows = np.meshgrid(steps * other.width, steps * other.height)
        points: Any = columns.ravel(), rows.ravel()
        x, y = other.transform @ points
        if not same_crs(self.crs, other.crs):
            x, y = np.array(warp_points(other.crs, self.crs, x, y))
        return np.array(~self.transform @ (x, y))


@lru_cache(maxsize=64)
def crs_of(crs: int | str) -> CRS:
    """CRS of an EPSG code or in any spelling."""
    return CRS.from_user_input(crs if isinstance(crs, str) else int(crs))


@lru_cache(maxsize=64)
def epsg_of(crs: str) -> int | None:
    """EPSG code of a CRS in any spelling, None if it has none."""
    return crs_of(crs).to_epsg()


def same_crs(one: CRS, other: CRS) -> bool:
    """Whether two CRS are one, however they are written."""
    return one == other or epsg_of(one.to_wkt()) == epsg_of(other.to_wkt()) is not None


@contextmanager
def open_raster(path: Path, sidecars: bool = False) -> Iterator[rasterio.DatasetReader]:
    """Open a raster, and say which one if it cannot be opened or read.

    Args:
        path: File.
        sidecars: Whether files beside it belong to it: a world file, a mask, GDAL's metadata.

    Raises:
        UnreadableError: If the file is missing, damaged or no raster.
    """
    try:
        with _open(path, sidecars) as src:
            yield src
    except RasterioError as error:
        raise UnreadableError(
            f'{path} cannot be read: {error.__cause__ or error}. Fetch the file again, or delete '
            'it and the catalogue leaves it out'
        ) from error


def check_written(path: Path, target: Path) -> None:
    """Look up the blocks of a GeoTIFF: GDAL does not tell of every disk that fills up.

    Args:
        path: What was written.
        target: Where it shall be.

    Raises:
        OSError: If some are not there.
    """
    size = path.stat().st_size
    try:
        with rasterio.open(path) as src:
            ends = [_block_end(src, b, *p) for b in src.indexes for p, _ in src.block_windows(b)]
    except RasterioError:
        ends = [None]
    if any(end is None or end > size for end in ends):
        raise OSError(f'{target} cannot be written whole. See whether the disk is full')


def _block_end(src: rasterio.DatasetReader, band: int, row: int, col: int) -> int | None:
    """Byte of the file where a block ends, None if it was never written."""
    names = (f'BLOCK_{what}_{col}_{row}' for what in ('OFFSET', 'SIZE'))
    told = [src.get_tag_item(name, 'TIFF', bidx=band) for name in names]
    return None if None in told else sum(map(int, told))


def _open(path: Path, sidecars: bool) -> rasterio.DatasetReader:
    if sidecars:
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN='TRUE'):
            return rasterio.open(path)
    if not _is_classic(path):
        return rasterio.open(path)
    try:
        # GDAL's own reader takes three quarters of the time that libtiff does, of most GeoTIFFs.
        src = rasterio.open(path, driver='LIBERTIFF')
    except RasterioError:
        return rasterio.open(path)
    if src.nodata is None and src.get_tag_item('NODATA_VALUES') is None:
        return src
    other = rasterio.open(path)  # beside a tag, the faster reader overlooks a mask
    masked = MaskFlags.per_dataset in other.mask_flag_enums[0]
    (src if masked else other).close()
    return other if masked else src


def _is_classic(path: Path) -> bool:
    """Whether a file begins as a little-endian TIFF of 32 bits.

    Of others the faster reader overlooks tags of no data and the order of bytes.
    """
    with suppress(OSError), path.open('rb') as file:
        return file.read(4) == b'II*\0'
    return False


def read_grid(path: Path, sidecars: bool = False) -> Grid:
    """Where a raster lies.

    Raises:
        DataError: If the raster does not say.
        UnreadableError: If it cannot be opened.
    """
    with rasterio.Env(**GDAL_OPTIONS), open_raster(path, sidecars) as src:
        return _grid_of(path, src)


def first_grid(rasters: Iterable[tuple[Path, bool]]) -> tuple[Path, Grid]:
    """The first that can be opened of one or more rasters, and where it lies.

    Raises:
        DataError: If that does not say.
        UnreadableError: If none can be opened.
    """
    for path, sidecars in rasters:
        try:
            return path, read_grid(path, sidecars)
        except UnreadableError as error:
            failed = error
    raise failed


def _grid_of(path: Path, src: rasterio.DatasetReader) -> Grid:
    transform = src.transform
    if src.crs is None or transform == Affine.identity():
        mend = 'write its georeference, for instance with gdal_edit -a_srs and -a_ullr'
        if src.gcps[0]:
            mend = 'it has control points only: correct its terrain, or warp it with gdalwarp'
        raise DataError(
            f'{path} does not say where it lies (CRS {src.crs}, transform {transform[:6]}); {mend}'
        )
    return Grid(src.crs, transform, src.width, src.height)


def read_image(
    path: Path,
    reading: Reading,
    grid: Grid,
    time: np.datetime64,
    patch: Grid,
    sidecars: bool = False,
) -> Array:
    """Read bands of an image onto a grid, warped (bilinear) if its own pixels are others.

    Args:
        path: File.
        reading: Which bands, and what the file cannot say of its values.
        grid: Where to.
        time: Time of the acquisition.
        patch: Grid of the patch that the raster is of.
        sidecars: As in :func:`open_raster`.

    Returns:
        Values (C, H, W) in the sensor's physical unit, NaN without an observation.

    Raises:
        DataError: If the raster lacks bands, does not say where it lies or lies elsewhere.
        ImplausibleValuesError: If a power is below 0 nearly everywhere.
        UnreadableError: If it cannot be read.
    """
    with open_raster(path, sidecars) as src:
        if not reading.raw and (reading.unit or reading.offsets):
            reading = _as_tagged(path, src, reading, time)
        indexes, alpha = _indexes(path, src, reading)
        scales = src.scales
        scaled = scales[indexes[0] - 1] != 1
        if any((scales[i - 1] != 1) != scaled for i in indexes):
            raise DataError(f'{path} has a scale for some of its bands only, {scales}; mend them')

        def read(window: Window) -> Array:
            value = _values(path, src, indexes, alpha, window, reading.nodata, np.float32)
            if not reading.raw:
                if offset := reading.offset(time):
                    value += np.float32(offset)
                _rescale(value, src, indexes)
            if reading.unit != 'db' and reading.sensor.positive:
                check_power(path, value, reading.sensor.name)
            return reading.physical(value, scaled)

        own = _own_grid(path, src, patch)
        if own is not patch:
            _tell_of_finer(path.parent, own, patch)
        return onto(own, grid, read, Resampling.bilinear, len(indexes))


def _tell_of_finer(folder: Path, own: Grid, patch: Grid) -> None:
    """Warn of images whose detail is lost."""
    size, least = (abs(grid.transform.determinant) ** 0.5 for grid in (own, patch))
    if size * 1.5 < least and same_crs(own.crs, patch.crs):
        warn_once(
            f'{folder} has images of finer pixels ({size:.3g}) than their patches ({least:.3g}), '
            'which have those of their label rasters, or first images where there is none; they '
            'are averaged. Write these with the pixels that you want'
        )


def _as_tagged(
    path: Path, src: rasterio.DatasetReader, given: Reading, time: np.datetime64
) -> Reading:
    """How a file is read that may say its unit and offset; arguments that it contradicts are told.

    They are ignored, as the file knows better, and as other files of the folder may need them.
    """
    own = given.of_file(src.tags())
    offsets = own.offset(time), given.offset(time)
    for what, (says, told) in {'unit': (own.stored, given.stored), 'offset': offsets}.items():
        if says != told:
            warn_once(
                f'{path.parent} has images that say their {what} ({says}), as was told when they '
                f'were written; the one given ({told}) is ignored for them. Leave it out, unless '
                'other files need it, or write these anew if they are wrong'
            )
    return own


def read_labels(path: Path, grid: Grid, patch: Grid, sidecars: bool = False) -> NDArray[np.float64]:
    """Read a label raster onto a grid, by the nearest pixel.

    Returns:
        Whole numbers (H, W), NaN where the raster has no data or does not reach.

    Raises:
        DataError: If a label is no whole number, or as in :func:`read_image`.
        UnreadableError: If it cannot be read.
    """
    with open_raster(path, sidecars) as src:
        alpha = _alpha(src)
        data = [i for i in src.indexes if i != alpha]
        if len(data) != 1:
            raise DataError(
                f'{path} has {len(data)} bands, a label raster has one; write the class numbers '
                'into one band, not their colours'
            )

        def read(window: Window) -> NDArray[np.float64]:
            value = _values(path, src, data, alpha, window, np.nan, np.float64)
            _rescale(value, src, data)
            return value

        own = _own_grid(path, src, patch)
        labels: NDArray[np.float64] = onto(own, grid, read, Resampling.nearest, 1)[0]
    check_labels(path, labels)
    return labels


def check_labels(path: Path, labels: NDArray[np.float64]) -> None:
    """Raise an error that names a label which is no whole number; NaN is none."""
    odd = labels[((labels != np.round(labels)) | (np.abs(labels) > 2**31)) & ~np.isnan(labels)]
    if odd.size:
        raise DataError(f'{path} holds the label {odd[0]}; labels are whole numbers up to 2**31')


def _alpha(src: rasterio.DatasetReader) -> int | None:
    """Number of the band that is transparency."""
    kinds = dict(zip(src.colorinterp, src.indexes, strict=True))
    return kinds.get(ColorInterp.alpha)


def _indexes(
    path: Path, src: rasterio.DatasetReader, reading: Reading
) -> tuple[list[int], int | None]:
    """Numbers of the bands to read, by name where the file names them, and of transparency.

    A band with a name of the sensor is none of transparency, whatever its colour is.
    """
    sensor, texts, alpha = reading.sensor, _names(src.descriptions), _alpha(src)
    names = dict(enumerate(sensor.named(texts), 1))
    if alpha and (names[alpha] or len(reading.file_bands) == src.count):
        alpha = None
    data = [i for i in names if i != alpha]
    at = {name: i for i, name in names.items() if name}
    if len(at) < sum(map(bool, names.values())):
        raise DataError(f'{path} names a band twice: {src.descriptions}; mend its descriptions')
    expected = reading.file_bands or sensor.bands
    said = dict(zip(expected, data, strict=False)) if len(expected) == len(data) else {}
    others = {texts[i - 1] for i in data} - {None}
    foreign = not reading.file_bands and len(others) == len(data)
    if not at and (foreign or not said):
        raise DataError(
            f'{path} has {len(data)} bands of which no name is known ({src.descriptions}), '
            f'expected {len(expected)}: {", ".join(expected)}. Say which bands they are, in order, '
            f'as in file_bands={{{sensor.name!r}: [...]}}'
        )
    lacking = [band for band in reading.bands if band not in at]
    if lacking and (reading.file_bands or not at) and at.items() <= said.items():
        at = said
        lacking = [band for band in reading.bands if band not in at]
    if lacking:
        odd = [texts[i - 1] for i in data if i not in at.values()]
        raise DataError(
            f'{path} has the bands {", ".join(at)} and lacks {", ".join(lacking)}; choose others '
            f'with bands{f", or name {odd} in file_bands or in the file" if odd else ""}'
        )
    return [at[band] for band in reading.bands], alpha


def _names(texts: Sequence[str | None]) -> list[str | None]:
    """Descriptions without those that count the bands; other numbers are of Sentinel-2's bands."""
    told = {i: re.fullmatch(r'(?:band)?\W*0*(\d+a?)', t, re.I) for i, t in enumerate(texts) if t}
    numbers = {i: match[1] for i, match in told.items() if match}
    if len(numbers) < len(told):
        return [text or None for text in texts]
    counts = any(all(n == str(i + first) for i, n in numbers.items()) for first in (0, 1))
    return [None if counts or i not in numbers else f'B{numbers[i]}' for i in range(len(texts))]


def _values(
    path: Path,
    src: rasterio.DatasetReader,
    indexes: Sequence[int],
    alpha: int | None,
    window: Window,
    nodata: float,
    dtype: type[np.floating[Any]],
) -> NDArray[Any]:
    """Values of bands, NaN where the raster has none: after its tag or its mask, or *nodata*."""
    kinds = {np.dtype(src.dtypes[i - 1]).kind for i in indexes}
    if 'c' in kinds:
        raise DataError(f'{path} holds complex numbers ({src.dtypes[0]}); give power or dB')
    # Whole numbers become floats faster in NumPy than in GDAL.
    whole = kinds <= {*'iu'}
    own = np.result_type(*(src.dtypes[i - 1] for i in indexes)) if whole else dtype
    stored: NDArray[Any] = src.read(indexes, window=window, out_dtype=own)
    value: NDArray[Any] = stored.astype(dtype, copy=False)
    short = whole and stored.dtype.itemsize <= 2 and stored.size
    flags, tags = src.mask_flag_enums, src.nodatavals
    # GDAL takes transparency for a mask, but not beside a tag.
    kinds_of_mask = {flag for i in indexes for flag in flags[i - 1]}
    masked = MaskFlags.per_dataset in kinds_of_mask and MaskFlags.alpha not in kinds_of_mask
    masked |= any(not flags[i - 1] for i in indexes)  # each band has a mask of its own
    if 'u' in kinds and nodata < 0:
        nodata = 0  # as in ESA's products, whose type has no other
    for tag in {tags[i - 1] for i in indexes} - ({None} if masked or alpha else set()):
        none = nodata if tag is None else tag
        if short and not stored.min() <= none <= stored.max():
            continue  # found in a fraction of the time of a comparison of each pixel
        missing = _equal(value, none)
        if missing.any():
            missing[[tags[i - 1] != tag for i in indexes]] = False
            value[missing] = np.nan
    if masked:
        value[src.read_masks(indexes, window=window) == 0] = np.nan
    elif alpha:
        value[:, src.read(alpha, window=window) == 0] = np.nan
    if 'f' in kinds:
        value[~np.isfinite(value)] = np.nan
    return value


def _equal(value: NDArray[Any], tag: float) -> NDArray[np.bool_]:
    """Where values are a tag, which may be written with six digits if it is large."""
    with np.errstate(over='ignore'):  # a tag of a wider type
        own = value.dtype.type(tag)
    return np.isclose(value, own, rtol=1e-4) if abs(own) > 2**24 else value == own


def _rescale(value: NDArray[Any], src: rasterio.DatasetReader, indexes: Sequence[int]) -> None:
    """Apply the file's own scale and offset, in place."""
    scales, offsets = src.scales, src.offsets
    for band, i in enumerate(indexes):
        if (scales[i - 1], offsets[i - 1]) != (1, 0):
            value[band] = value[band] * scales[i - 1] + offsets[i - 1]


def check_power(where: object, value: NDArray[Any], name: str = 's1') -> None:
    """Raise an error where values that shall be power are mostly well below 0."""
    if not (value < 0).any():
        return
    known = value[value > -100]  # below, it is no dB either
    if known.size and (middle := float(np.median(known))) < -1:
        raise ImplausibleValuesError(
            f'{where} holds mostly negative values (median {middle:.4g}), which are no power. If '
            f"they are dB, give unit={{{name!r}: 'db'}}; if that value stands for none, give "
            f'nodata={{{name!r}: {middle:.4g}}}, or tag it in the file'
        )


def _own_grid(path: Path, src: rasterio.DatasetReader, patch: Grid) -> Grid:
    """Pixels of a raster, some of which are those of its patch."""
    own = _grid_of(path, src)
    if own == patch:
        return patch
    try:
        columns, rows = own.pixels_of(patch)
    except (CRSError, CPLE_BaseError):  # no way from one CRS to the other
        columns = rows = np.array([np.nan])
    across = columns.max() > 0 and columns.min() < own.width
    if not (across and rows.max() > 0 and rows.min() < own.height):
        raise DataError(
            f'{path} lies at {own.bounds} in {own.crs}, beside its patch at {patch.bounds} in '
            f'{patch.crs}; mend its georeference or its name'
        )
    return own


def onto(own: Grid, grid: Grid, read: Read, how: Resampling, count: int) -> NDArray[Any]:
    """Read a window onto a grid: as it is where the pixels coincide, and else warped.

    Args:
        own: Pixels of the file.
        grid: Where to.
        read: Reads a window of the file, (C, H, W), NaN without a value.
        how: How to warp.
        count: Number of bands C.
    """
    offset = grid.offset_in(own)
    if offset is None:
        col, row, stop, end = reach(own, grid)
    else:
        col, row = offset
        stop, end = col + grid.width, row + grid.height
    left, top, right, bottom = max(col, 0), max(row, 0), min(stop, own.width), min(end, own.height)
    if right <= left or bottom <= top:
        return np.full((count, *grid.shape), np.nan, np.float32)
    part = own.window(left, top, right - left, bottom - top)
    source = read(Window(left, top, part.width, part.height))
    if offset is not None:
        if part.shape == grid.shape:
            return source
        beyond = (0, 0), (top - row, end - bottom), (left - col, stop - right)
        return np.pad(source, beyond, constant_values=np.nan)
    out = np.full((count, *grid.shape), np.nan, source.dtype)
    reproject(
        source,
        out,
        src_transform=part.transform,
        src_crs=part.crs,
        src_nodata=np.nan,
        dst_transform=grid.transform,
        dst_crs=grid.crs,
        dst_nodata=np.nan,
        resampling=how,
        tolerance=0,
        UNIFIED_SRC_NODATA='NO',
        **_scales(own, grid),
    )
    return out


def _scales(own: Grid, grid: Grid) -> dict[str, float]:
    """How many pixels of a grid lie along one of a file, with two digits, at the file's middle.

    GDAL would compare what it reads with what it fills, so that values depend on the window.
    """
    col, row = grid.pixels_of(own).reshape(2, 21, 21)[:, 10, 10]
    points = own.pixels_of(grid.window(col, row, 20, 20)).reshape(2, 21, 21)
    scales = 20 / np.hypot(points[:, 0, 20] - points[:, 0, 0], points[:, 20, 0] - points[:, 0, 0])
    named = zip(('XSCALE', 'YSCALE'), scales, strict=True)
    return {name: float(f'{scale:.2g}') for name, scale in named if np.isfinite(scale)}


def reach(own: Grid, grid: Grid) -> list[int]:
    """First column and row of the pixels that a warp to a grid needs, and those after the last."""
    points = own.pixels_of(grid)
    if not np.isfinite(points).all():
        return [0] * 4
    low, high = points.min(1), points.max(1)
    # Where pixels are made larger, each needs as many as it is larger.
    margin = 2 + np.ceil((high - low) / (grid.width, grid.height))
    return [int(v) for v in (*np.floor(low - margin), *np.ceil(high + margin))]


def mean(images: Sequence[Array]) -> Array:
    """Mean of images of what is not NaN; NaN where everything is."""
    if len(images) == 1:
        return images[0]
    stack = np.stack(images)
    seen = ~np.isnan(stack)
    with np.errstate(invalid='ignore'):
        average: Array = np.add.reduce(stack, 0, where=seen) / seen.sum(0, dtype=np.float32)
    return average
