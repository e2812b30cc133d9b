"""Raster layers of a map: class, confidence and number of observations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
import torch
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.io import DatasetWriter, MemoryFile
from torch import Tensor

from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.files import whole

NO_CLASS = 0
"""Value of a class layer without an observation."""

NO_CONFIDENCE = 255
"""Value of a confidence layer without an observation."""


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
    def create(
        self, path: str | Path, shape: tuple[int, int], epsg: int, transform: Affine, **options: Any
    ) -> Iterator[DatasetWriter]:
        """Open a new tiled GeoTIFF with the layer's description, colours and names.

        Args:
            path: File to write, or GDAL's name of one.
            shape: Height and width.
            epsg: EPSG code of the CRS.
            transform: Affine transform from pixels to the CRS.
            **options: GDAL creation options.

        Yields:
            A rasterio dataset to write band 1 of.
        """
        profile: dict[str, Any] = {
            'driver': 'GTiff',
            'count': 1,
            'height': shape[0],
            'width': shape[1],
            'dtype': self.dtype,
            'nodata': self.nodata,
            'crs': CRS.from_epsg(epsg),
            'transform': transform,
            'tiled': True,
            'blockxsize': 256,
            'blockysize': 256,
        }
        with rasterio.open(path, 'w', **(profile | options)) as dst:
            dst.set_band_description(1, self.description)
            if self.units:
                dst.set_band_unit(1, self.units)
            if self.scheme:
                colors = zip(self.scheme.ids, self.scheme.colors, strict=True)
                dst.write_colormap(1, {NO_CLASS: (0, 0, 0, 0)} | {i: (*c, 255) for i, c in colors})
                names = zip(self.scheme.ids, self.scheme.names, strict=True)
                dst.update_tags(1, **{f'CLASS_{i}': name for i, name in names})
            yield dst

    def write(self, path: Path, value: NDArray[Any], epsg: int, transform: Affine) -> None:
        """Write a compressed, tiled GeoTIFF, whole or not at all.

        Args:
            path: File to write; one that is there is replaced.
            value: Pixels (H, W).
            epsg: EPSG code of the CRS.
            transform: Affine transform from pixels to the CRS.

        Raises:
            OSError: If the file cannot be written.
        """
        # GDAL does not report a disk that fills up while a file is closed; Python does.
        with whole(path) as temporary, MemoryFile(ext='.tif') as memory:
            shape = value.shape[0], value.shape[1]
            with self.create(memory.name, shape, epsg, transform, compress='deflate') as dst:
                dst.write(value, 1)
            temporary.write_bytes(memory.getbuffer())
            self.write_category_names(temporary)

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


CONFIDENCE = Layer('_confidence', 'uint8', NO_CONFIDENCE, 'confidence', 'average', units='%')
OBSERVATIONS = Layer('_observations', 'uint16', None, 'number of valid observations', 'nearest')


def class_layer(scheme: ClassScheme) -> Layer:
    """Layer of class numbers with the colours and names of a scheme."""
    return Layer('', 'uint8', NO_CLASS, 'land cover', 'mode', scheme=scheme)


def classify(
    probabilities: Tensor, observations: Tensor | None, ids: Sequence[int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Most probable class and its probability.

    Args:
        probabilities: (K, H, W), 0..1; NaN where unknown.
        observations: (H, W), 0 where nothing was observed; None if all was.
        ids: Number of each class in the map, 1..254.

    Returns:
        Class numbers (H, W), 0 where unknown, and percent (H, W), 0..100, 255 where unknown.
    """
    confidence, index = probabilities.float().max(0)
    known = confidence.isfinite()
    if observations is not None:
        known &= observations.to(known.device) > 0
    numbers = torch.tensor(ids, dtype=torch.uint8, device=index.device)[index]
    percent = (100 * confidence).round().clamp(0, 100).nan_to_num().to(torch.uint8)
    return (
        numbers.masked_fill(~known, NO_CLASS).cpu().numpy(),
        percent.masked_fill(~known, NO_CONFIDENCE).cpu().numpy(),
    )
