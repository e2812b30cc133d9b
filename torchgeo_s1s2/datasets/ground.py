"""Splits by the ground, so that neighbouring pixels are not in two of them."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import geopandas as gpd
import numpy as np
import shapely
from pyproj import CRS

from torchgeo_s1s2.datasets.catalog import native_footprints
from torchgeo_s1s2.datasets.vectors import read_polygons, say
from torchgeo_s1s2.errors import DataError


class GroundSplits(ABC):
    """Divides the ground of a data set; its ``splits`` may be one of these instead of tiles.

    A patch that lies in several parts is cut at the pixels whose centre lies in them, and each
    piece is a row of its own. Training on pieces larger than a batch can hold takes ``patch_size``.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """Names of the splits."""

    @abstractmethod
    def areas(self, patches: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
        """Polygons that do not overlap, with the ``split`` that each belongs to.

        Args:
            patches: Rows of ``Catalog.patches``.
        """


@dataclass
class BlockSplits(GroundSplits):
    """Square blocks of ground, drawn for the splits.

    The blocks lie on a lattice from the origin of the zone that most patches are in. They are those
    that the patches reach, whatever the date rule makes of these, so that data sets of other rules
    have the same parts. Close patches and zones, as far as they overlap, are cut alike.

    Patches that are added move a few of the blocks that were there to other splits, since the
    shares stay exact, and all of them if most patches are then in another zone. Ground on which a
    model was trained may so come to test it; take ``PolygonSplits`` for splits that must not move.

    Attributes:
        size: Side of a block in metres, or in degrees where most patches are; a multiple of a pixel
            keeps blocks rectangular.
        shares: Share of the blocks of each split; their sum is 1.
        seed: Seed of the draw.
        buffer: How far blocks lie apart, as in *size*; the ground between them is in no split.

    Raises:
        ValueError: If a number is out of range.
    """

    size: float
    shares: dict[str, float]
    seed: int = 0
    buffer: float = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.size < math.inf:
            raise ValueError(f'size is {self.size}; give the side of a block in metres, above 0')
        if not 0 <= self.buffer < self.size:
            raise ValueError(f'buffer is {self.buffer}; give 0 or more, and less than {self.size}')
        if self.seed < 0:
            raise ValueError(f'seed is {self.seed}; give a whole number from 0')
        shares = [*self.shares.values()] if isinstance(self.shares, dict) else []
        if not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1):
            raise ValueError(
                f'shares are {self.shares}; give each split one above 0, 1 together, such as '
                "{'train': 0.6, 'val': 0.2, 'test': 0.2}"
            )

    def __iter__(self) -> Iterator[str]:
        """Names of the splits."""
        return iter(self.shares)

    def areas(self, patches: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
        """The blocks."""
        crs = int(patches['epsg'].mode()[0])
        pixel = ((patches['xmax'] - patches['xmin']) / patches['width']).max()
        unit = CRS.from_epsg(crs).axis_info[0].unit_name
        if self.size < pixel:
            raise DataError(
                f'size is {self.size}, less than a pixel, {pixel:g} {unit}; make it larger'
            )
        places = np.unique(np.concatenate([*self._reached(patches, crs)]), axis=0)
        places = np.array(sorted(places.tolist(), key=self._draw))
        corners = places * self.size
        low, high = corners + self.buffer / 2, corners + self.size - self.buffer / 2
        blocks = shapely.box(*low.T, *high.T)
        if patches['epsg'].nunique() > 1:  # where blocks meet, they stay alike when projected
            blocks = shapely.segmentize(blocks, self.size / 8)
        borders = np.round(np.cumsum([*self.shares.values()]) * len(blocks)).astype(int)
        counts = np.diff(borders, prepend=0)
        if not counts.all():
            raise DataError(
                f'{len(blocks)} blocks of {self.size} {unit} are too few for the shares '
                f'{self.shares}; give a smaller size'
            )
        return gpd.GeoDataFrame({'split': np.repeat([*self], counts)}, geometry=blocks, crs=crs)

    def _draw(self, place: list[int]) -> bytes:
        """What a block has drawn by its column and row, whatever others there are."""
        return hashlib.sha256(f'{self.seed} {place}'.encode()).digest()

    def _reached(self, patches: gpd.GeoDataFrame, crs: int) -> Iterator[np.ndarray]:
        """Columns and rows of the blocks that patches reach."""
        for _, group in patches.groupby('epsg'):
            bounds = native_footprints(group).to_crs(crs).bounds.to_numpy() / self.size
            bounds = bounds + np.multiply(1e-6, [1, 1, -1, -1])  # more than coordinates are rounded
            for left, bottom, right, top in np.unique(bounds, axis=0):
                xs = np.arange(math.floor(left), math.ceil(right))
                ys = np.arange(math.floor(bottom), math.ceil(top))
                yield np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)


@dataclass
class PolygonSplits(GroundSplits):
    """Polygons of a vector file, each with the name of its split; other ground is in none.

    Attributes:
        file: GeoPackage, GeoParquet or Shapefile, in any CRS.
        attribute: Column with the names.
        layer: Layer of the file; the first unless given.
    """

    file: str
    attribute: str
    layer: str | None = None

    def __iter__(self) -> Iterator[str]:
        """Names of the splits."""
        return iter(sorted({*self._polygons['value']}))

    def areas(self, patches: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
        """The polygons, those of a split that touch as one.

        Raises:
            DataError: If polygons of two splits overlap.
        """
        crs = int(patches['epsg'].mode()[0])
        table = self._polygons.dissolve('value')
        for name, shape in table.geometry.items():
            others = table.geometry.drop(name)
            overlap = others[others.intersection(shape).to_crs(crs).area > 1]
            if len(overlap):
                raise DataError(
                    f'polygons of {self.file} overlap that are of the splits {name} and '
                    f'{overlap.index[0]}; ground is in one split'
                )
        # About 100 m, over which edges that meet stay within a millimetre when projected.
        table.geometry = table.segmentize(0.001 if table.crs.is_geographic else 100)
        parts = table.to_crs(crs).explode().reset_index(names='split')
        return parts[['split', 'geometry']]

    @cached_property
    def _polygons(self) -> gpd.GeoDataFrame:
        polygons, notes = read_polygons(self.file, self.attribute, self.layer)
        say(self.file, notes)
        return polygons
