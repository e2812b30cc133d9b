"""Raster layers of a map: class, confidence and number of observations."""

import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
import rasterio.shutil
import torch
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.windows import Window
from torch import Tensor

from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.datasets.rasters import Grid
from torchgeo_s1s2.errors import MapError
from torchgeo_s1s2.files import whole

NO_CLASS = 0
"""Value of a class layer without an observation."""

NO_CONFIDENCE = 255
"""Value of a confidence layer without an observation."""

Pixels = Iterable[tuple[Window, Sequence[NDArray[Any]]]]

_GDAL_OPTIONS = {'GDAL_CACHEMAX': 128}  # MB; otherwise a share of the machine's memory
_COG_OPTIONS = {'driver': 'COG', 'compress': 'deflate', 'blocksize': 512, 'bigtiff': 'if_safer'}


@dataclass(frozen=True)
class Layer:
    """What distinguishes one raster of a map from another.

    Attributes:
        suffix: What follows the map's name in the file name.
        dtype: Type of the pixels.
        nodata: Value without an observation, or None.
        description: Description of the band.
        resampling: GDAL's resampling of the overviews.
        units: Unit of the band.
        scheme: Classes whose colours and names the raster carries.
    """

    suffix: str
    dtype: str
    nodata: int | None
    description: str
    resampling: str
    units: str | None = None
    scheme: ClassScheme | None = None

    def path(self, folder: Path, name: str) -> Path:
        """File of this layer of the map ``name``."""
        return folder / f'{name}{self.suffix}.tif'

    @contextmanager
    def create(self, path: Path, grid: Grid) -> Iterator[rasterio.io.DatasetWriter]:
        """Open a new tiled GeoTIFF with the layer's description, colours and names.

        Args:
            path: File to write.
            grid: Where its pixels lie.

        Yields:
            A rasterio dataset to write band 1 of.
        """
        profile = {'count': 1, 'dtype': self.dtype, 'nodata': self.nodata} | vars(grid)
        with rasterio.open(path, 'w', 'GTiff', tiled=True, bigtiff='if_safer', **profile) as dst:
            dst.set_band_description(1, self.description)
            if self.units:
                dst.set_band_unit(1, self.units)
            if self.scheme:
                colors = zip(self.scheme.ids, self.scheme.colors, strict=True)
                dst.write_colormap(1, {NO_CLASS: (0, 0, 0, 0)} | {i: (*c, 255) for i, c in colors})
                names = zip(self.scheme.ids, self.scheme.names, strict=True)
                dst.update_tags(1, **{f'CLASS_{i}': name for i, name in names})
            yield dst

    def write_category_names(self, path: Path) -> None:
        """Write GDAL's sidecar with the class names, which GIS programs show in the legend.

        Args:
            path: File of the raster.
        """
        if self.scheme is None:
            return
        names = {NO_CLASS: 'No data'} | dict(zip(self.scheme.ids, self.scheme.names, strict=True))
        root = ElementTree.Element('PAMDataset')
        band = ElementTree.SubElement(root, 'PAMRasterBand', band='1')
        categories = ElementTree.SubElement(band, 'CategoryNames')
        for number in range(max(names) + 1):
            ElementTree.SubElement(categories, 'Category').text = names.get(number, '')
        ElementTree.ElementTree(root).write(path.with_name(f'{path.name}.aux.xml'), 'utf-8')


LAND_COVER = Layer('', 'uint8', NO_CLASS, 'land cover', 'mode')
CONFIDENCE = Layer('_confidence', 'uint8', NO_CONFIDENCE, 'confidence', 'average', units='%')
OBSERVATIONS = Layer('_observations', 'uint16', None, 'number of valid observations', 'nearest')
LAYERS = LAND_COVER, CONFIDENCE, OBSERVATIONS


def map_layers(scheme: ClassScheme) -> tuple[Layer, ...]:
    """Class numbers with the colours and names of a scheme, confidence and observations."""
    return replace(LAND_COVER, scheme=scheme), *LAYERS[1:]


def write_layers(
    folder: Path,
    name: str,
    layers: Sequence[Layer],
    grid: Grid,
    pixels: Pixels,
    within: Path | None = None,
) -> None:
    """Write the layers of a map as Cloud-Optimized GeoTIFFs, all of them whole or none.

    GDAL does not report every disk that fills up, so what it wrote is read back and compared.

    Args:
        folder: Folder of the map.
        name: Name of the map.
        layers: Its layers.
        grid: Where its pixels lie.
        pixels: Windows of the grid and the values of the layers there.
        within: Folder of the same file system to write in; ``folder`` unless given.

    Raises:
        MapError: If a file cannot be written, or reads otherwise.
    """
    with (
        named(folder / name),
        rasterio.Env(**_GDAL_OPTIONS),
        whole(layers[0].path(folder, name), within) as first,
        tempfile.TemporaryDirectory(prefix='.plain.', dir=first.parent) as plain,
    ):
        sources = [layer.path(Path(plain), name) for layer in layers]
        given = _write_plain(sources, layers, grid, pixels)
        for layer, source, sums in zip(layers, sources, given, strict=True):
            target = layer.path(first.parent, name)
            options = _COG_OPTIONS | {'overview_resampling': layer.resampling}
            rasterio.shutil.copy(source, target, **options)
            layer.write_category_names(target)
            _check(target, sums)
    for layer in layers:
        if layer.scheme is None:  # statistics that another program kept of the raster before
            path = layer.path(folder, name)
            path.with_name(f'{path.name}.aux.xml').unlink(missing_ok=True)


def is_map(path: Path) -> bool:
    """Whether a file is a layer of a map that this package wrote."""
    with suppress(RasterioError), rasterio.open(path) as src:
        return src.descriptions[0] in {layer.description for layer in LAYERS}
    return False


def check_replaceable(paths: Iterable[Path]) -> None:
    """Refuse to replace what this package did not write.

    Raises:
        MapError: If one of the files is no layer of a map.
    """
    for path in paths:
        if path.exists() and not is_map(path):
            raise MapError(
                f'{path} is not a map that this package wrote, and would be replaced; move it away '
                'or give another output_dir'
            )


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Say which map cannot be written."""
    try:
        yield
    except (OSError, RasterioError, CPLE_BaseError) as error:
        raise MapError(
            f'the map {path} cannot be written whole: {error.__cause__ or error}. See whether the '
            'disk is full'
        ) from error


def _write_plain(
    paths: Sequence[Path], layers: Sequence[Layer], grid: Grid, pixels: Pixels
) -> list[list[tuple[Window, int]]]:
    """Write uncompressed rasters; return checksums of each one's windows."""
    given: list[list[tuple[Window, int]]] = [[] for _ in layers]
    with ExitStack() as stack:
        files = [
            stack.enter_context(layer.create(path, grid))
            for layer, path in zip(layers, paths, strict=True)
        ]
        for window, values in pixels:
            for dst, value, sums in zip(files, values, given, strict=True):
                value = value.astype(dst.dtypes[0], copy=False)
                dst.write(value, 1, window=window)
                sums.append((window, _checksum(value)))
    return given


def _check(path: Path, sums: Sequence[tuple[Window, int]]) -> None:
    """Read every block of a raster and of its overviews, and compare checksums of windows."""
    with rasterio.open(path) as src:
        levels = [{'overview_level': level} for level in range(len(src.overviews(1)))]
        if any(_checksum(src.read(1, window=window)) != checksum for window, checksum in sums):
            raise OSError(f'{path.name} has other values than were written')
    for options in ({}, *levels):
        with rasterio.open(path, **options) as src:
            for _, window in src.block_windows(1):
                src.read(1, window=window)


def _checksum(value: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(value))


def classify(
    probabilities: Tensor, observations: Tensor | None, ids: Sequence[int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Most probable class and its probability.

    Args:
        probabilities: (K, H, W), 0..1; not finite where unknown.
        observations: (H, W), 0 where nothing was observed; None if all was.
        ids: Number of each class in the map, 1..254.

    Returns:
        Class numbers (H, W), 0 where unknown, and percent (H, W), 0..100, 255 where unknown.
    """
    confidence, index = probabilities.float().max(0)
    known = probabilities.isfinite().all(0)
    if observations is not None:
        known &= observations.to(known.device) > 0
    numbers = torch.tensor(ids, dtype=torch.uint8, device=index.device)[index]
    percent = (100 * confidence).nan_to_num().round().clamp(0, 100).to(torch.uint8)
    return (
        numbers.masked_fill(~known, NO_CLASS).cpu().numpy(),
        percent.masked_fill(~known, NO_CONFIDENCE).cpu().numpy(),
    )
