"""Label rasters from polygons with classes."""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import shapely
import yaml
from numpy.typing import NDArray
from pyogrio.errors import DataLayerError, DataSourceError
from rasterio.features import rasterize
from rasterio.warp import transform_bounds
from tqdm import tqdm

from torchgeo_s1s2.datasets.catalog import (
    GROUND_REFERENCE,
    Catalog,
    list_label_files,
    reference_name,
)
from torchgeo_s1s2.datasets.labels import write_label_files
from torchgeo_s1s2.datasets.rasters import Grid, check_written, first_grid, open_raster
from torchgeo_s1s2.datasets.sensors import SENSORS
from torchgeo_s1s2.errors import DataError, S1S2Warning, UnreadableError, warn
from torchgeo_s1s2.files import whole, write_json

TAG = 'TORCHGEO_S1S2_POLYGONS'
"""Tag of the label rasters that are made here: a checksum of what they are made of."""

Classes = Mapping[Any, int] | str | os.PathLike[str]


def rasterize_labels(
    root: str | os.PathLike[str],
    file: str | os.PathLike[str],
    attribute: str,
    classes: Classes | None = None,
    layer: str | None = None,
    order: Sequence[str | int] | None = None,
    all_touched: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Write the label raster of each patch that has images, from polygons in any CRS.

    A raster has the CRS and pixels of the patch's images, and the id of a polygon where the centre
    of a pixel lies in it. Ground without a polygon has 0, tagged as no data: it has no label. The
    label files are written, or told the labels, too. Rasters that are there of the same polygons
    and arguments stay as they are.

    Args:
        root: Folder with ``s2`` and ``s1``, one of which may be empty.
        file: GeoPackage, GeoParquet, Shapefile or what else GDAL reads. Edges are straight in its
            CRS.
        attribute: Column with the class of each polygon.
        classes: Id of each value of the column, 1..65535, or a YAML file that says so; without it
            the column holds the ids, as numbers or as text such as ``'11'``.
        layer: Layer of the file; the first unless given.
        order: Values of the column from the lowest to the uppermost where polygons overlap; those
            that it lacks lie below. Polygons of one value, and all unless given, lie over those
            before them in the file.
        all_touched: Label each pixel that a polygon touches, not only those with the centre in it.
        overwrite: Replace label rasters that are there and were not made here.
        progress: Show a progress bar.

    Returns:
        Number of label rasters written.

    Raises:
        DataError: If the file has no such attribute, no CRS or no polygon on a patch, an id is out
            of range, or there is a label raster that was not made here.
        FileNotFoundError: If root has no image.
        UnreadableError: If the file cannot be read.
        ValueError: If the order names a value that is neither in the column nor in the classes.
    """
    polygons = _polygons(Path(file), layer, attribute, classes, order)
    write_label_files(root, progress=progress)
    # The data set says the same when it is opened.
    with warnings.catch_warnings(action='ignore', category=S1S2Warning):
        catalog = Catalog(root, progress=progress, cache=False)
    grids = dict(_grids(catalog))
    index = polygons.sindex
    found = {n: index.query(_around(polygons, grid), sort=True) for n, grid in grids.items()}
    if not any(map(len, found.values())):
        here = catalog.patches.total_bounds.round(4).tolist()
        there = polygons.total_bounds.tolist()
        raise DataError(
            f'no polygon of {file} lies on a patch: they lie at {there} in {polygons.crs.name}, '
            f'the patches at {here} in degrees. Check the CRS of the file'
        )
    made_of = _checksum(polygons, all_touched)
    todo = [n for n, g in grids.items() if _is_outdated(catalog, n, g, made_of, overwrite)]
    dtype = 'uint8' if polygons['id'].max() < 256 else 'uint16'
    bare = [n for n in grids.keys() - {*todo} if not catalog.patches['classes'].iat[n]]
    files, _ = list_label_files(catalog.root)
    hidden = not (progress and todo)
    for number in tqdm(todo, 'Rasterizing labels', unit='patch', disable=hidden):
        labels = _rasterized(polygons.iloc[found[number]], grids[number], all_touched, dtype)
        listing = files[catalog.patch(number).name]
        _write(catalog, number, labels, grids[number], made_of, listing)
        if not labels.any():
            bare.append(number)
    if bare:
        rule = '' if all_touched else ' at its centre (all_touched=True: anywhere)'
        warn(
            f'patches without a label: {len(bare)} of {len(grids)}, such as '
            f'{catalog.patch(min(bare)).name}; no polygon of {file} meets a pixel of them{rule}'
        )
    return len(todo)


def read_polygons(
    file: str | os.PathLike[str], attribute: str, layer: str | None = None
) -> tuple[gpd.GeoDataFrame, dict[str, int]]:
    """Polygons with the ``value`` of an attribute as text, and what is to be said of the others."""
    table = read_vectors(Path(file), layer)
    if attribute not in table or attribute == table.geometry.name:
        columns = ', '.join(map(str, table.columns.drop(table.geometry.name)))
        raise DataError(f'{file} has no attribute {attribute!r}; it has {columns or "none"}')
    values = table[attribute].map(_key, na_action='ignore')
    shapes, notes = _valid(table.geometry)
    notes[f'without {attribute}, left out'] = int(values.isna().sum())
    polygons = gpd.GeoDataFrame({'value': values}, geometry=shapes, crs=table.crs)
    return polygons[values.notna() & shapes.notna()], notes


def say(file: str | os.PathLike[str], notes: Mapping[str, int]) -> str:
    """Warn of what is left out of a file; what was said."""
    said = '; '.join(f'{n} {text}' for text, n in notes.items() if n)
    if said:
        warn(f'{file}: of its features {said}')
    return said


def _polygons(
    file: Path,
    layer: str | None,
    attribute: str,
    classes: Classes | None,
    order: Sequence[str | int] | None,
) -> gpd.GeoDataFrame:
    """Polygons with their ``id``, the uppermost last; what is left out is counted."""
    polygons, notes = read_polygons(file, attribute, layer)
    known = _ids(f'{file} in {attribute!r}', polygons['value'], classes)
    ids = polygons['value'].map(known)
    unmapped = Counter(polygons['value'][ids.isna()])
    which = ', '.join(f'{value} ({n})' for value, n in unmapped.most_common(5))
    notes[f'of a value that classes do not name, left out: {which}'] = unmapped.total()
    said = say(file, notes)
    ranks = {_key(value): rank for rank, value in enumerate(order or ())}
    if unknown := sorted(ranks.keys() - {*polygons['value'], *known}):
        raise ValueError(f'order names {", ".join(unknown)}, which no polygon and no class has')
    if order and len(ranks) < len(order):
        raise ValueError(f'order is {[*order]}; name each value once, from the lowest on')
    polygons = polygons.assign(id=ids)[ids.notna()].astype({'id': int})
    if polygons.empty:
        raise DataError(
            f'{file} has no polygon with a class in {attribute!r}; {said or "it is empty"}'
        )
    return polygons.iloc[np.argsort(polygons['value'].map(ranks).fillna(-1), kind='stable')]


def read_vectors(file: Path, layer: str | None = None) -> gpd.GeoDataFrame:
    """Features of a vector file; one that is a table only, or lies nowhere, is refused."""
    try:
        file = file.expanduser()
        parquet = file.suffix.lower() in ('.parquet', '.geoparquet')
        table = gpd.read_parquet(file) if parquet else gpd.read_file(file, layer=layer)
    except (DataSourceError, DataLayerError, OSError, ValueError) as error:
        raise UnreadableError(
            f'{file} cannot be read: {error}; expected a GeoPackage, GeoParquet or Shapefile'
        ) from error
    if not isinstance(table, gpd.GeoDataFrame):
        raise DataError(f'{file} has no geometries, only a table; choose another layer')
    if table.crs is None or not (table.crs.is_geographic or table.crs.is_projected):
        raise DataError(
            f'{file} does not say its CRS ({getattr(table.crs, "name", "none")}); write it with '
            'GeoDataFrame.set_crs'
        )
    return table


def _key(value: Any) -> str:
    """A value as text, the same for 3, 3.0 and '3', and for both ways to write an accent."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return normalize('NFC', str(value).strip())


def _ids(where: str, values: 'pd.Series[Any]', classes: Classes | None) -> dict[str, int]:
    """Id of each value, which is the value itself without classes."""
    given: Any = classes
    if classes is None:
        given = dict(zip(values, values, strict=True))
    elif isinstance(classes, Mapping):
        where = 'classes'
    else:
        where = str(classes)
        try:
            given = yaml.safe_load(Path(classes).expanduser().read_text())
        except yaml.YAMLError as error:
            raise DataError(f'{classes} is no YAML: {error}') from error
        if not isinstance(given, dict):
            raise DataError(f'{classes} holds no mapping; expected lines such as "Forest: 11"')
    ids = pd.to_numeric(pd.Series(given, dtype=object).map(str), errors='coerce')
    odd = ids.index[~(ids.between(1, 2**16 - 1) & (ids % 1 == 0))]
    if len(odd):
        told = ', '.join(f'{n}' if classes is None else f'{n}: {given[n]}' for n in odd[:5])
        raise DataError(
            f'{where} has what is no id (a whole number 1..65535, 0 is none): {told}. '
            f'Give classes, such as {{{odd[0]!r}: 1}}'
        )
    known = {_key(name): int(number) for name, number in ids.items()}
    if twice := [name for name, n in Counter(map(_key, ids.index)).items() if n > 1]:
        raise DataError(f'{where} has several ids of {", ".join(twice)}; give one')
    return known


def _valid(geometry: gpd.GeoSeries) -> tuple[gpd.GeoSeries, dict[str, int]]:
    """Polygons mended, None for what is no polygon; how many of each."""
    polygon = geometry.geom_type.isin(['Polygon', 'MultiPolygon'])
    broken = polygon & ~geometry.is_valid
    shapes = geometry.force_2d().where(polygon)
    shapes[broken] = shapes[broken].make_valid(method='structure', keep_collapsed=False)
    shapes = shapes.where(~shapes.is_empty)
    return shapes, {
        'invalid, mended': int((broken & shapes.notna()).sum()),
        'without area or no polygon, left out': int(shapes.isna().sum()),
    }


def _grids(catalog: Catalog) -> Iterator[tuple[int, Grid]]:
    """Patches that have images, each with the pixels of the first that can be opened."""
    for number in range(len(catalog.patches)):
        images = [(s, i) for s in SENSORS for i in range(len(catalog.times(number, s)))]
        if images:
            yield number, first_grid(catalog.raster(number, *image) for image in images)[1]


def _around(polygons: gpd.GeoDataFrame, grid: Grid) -> shapely.Polygon:
    """A rectangle around a grid in the CRS of the polygons."""
    crs = rasterio.CRS.from_wkt(polygons.crs.to_wkt())
    xmin, ymin, xmax, ymax = transform_bounds(grid.crs, crs, *grid.bounds)
    margin = max(xmax - xmin, ymax - ymin) / 10
    return shapely.box(xmin - margin, ymin - margin, xmax + margin, ymax + margin)


def _checksum(polygons: gpd.GeoDataFrame, all_touched: bool) -> str:
    rule = f'{polygons.crs.to_wkt()} {all_touched} {polygons["id"].tolist()}'
    checksum = hashlib.sha256(rule.encode())
    for shape in polygons.geometry.to_wkb():
        checksum.update(shape)
    return checksum.hexdigest()


def _is_outdated(catalog: Catalog, number: int, grid: Grid, made_of: str, overwrite: bool) -> bool:
    """Whether there is no label raster, or another one of these that are made here."""
    path = catalog.ground_reference(number)
    if path is None:
        return True
    with open_raster(path) as src:
        tag, place = src.tags().get(TAG), (src.transform, src.shape)
    if tag is None and not overwrite:
        raise DataError(
            f'{path} is there and was not made from polygons here; nothing is written. Move it '
            'away, or give overwrite=True'
        )
    return tag != made_of or place != (grid.transform, grid.shape)


def _rasterized(
    polygons: gpd.GeoDataFrame, grid: Grid, all_touched: bool, dtype: str
) -> NDArray[Any]:
    """Ids (H, W) of polygons on a grid, 0 where there is none."""
    # Far corners need not have a place in the grid's CRS.
    near = polygons.clip_by_rect(*_around(polygons, grid).bounds) if len(polygons) else polygons
    shapes = zip(near.geometry.to_crs(grid.crs.to_wkt()), polygons['id'], strict=True)
    own = [(shape, number) for shape, number in shapes if not shape.is_empty]
    labels = np.zeros(grid.shape, dtype)
    if own:
        rasterize(own, out=labels, transform=grid.transform, all_touched=all_touched)
    return labels


def _write(
    catalog: Catalog, number: int, labels: NDArray[Any], grid: Grid, made_of: str, listing: Path
) -> None:
    """Write the labels into the label file, then the raster, which tells that both are there."""
    usual = catalog.root / GROUND_REFERENCE / reference_name(catalog.patch(number).name)
    path = catalog.ground_reference(number) or usual
    profile = {'driver': 'GTiff', 'count': 1, 'dtype': labels.dtype, 'nodata': 0}
    profile |= {'compress': 'deflate', 'tiled': max(labels.shape) > 512, **vars(grid)}
    content = json.loads(listing.read_text())
    content['labels'] = ';'.join(map(str, np.unique(labels[labels > 0])))
    write_json(listing, content)
    with whole(path) as temporary:
        with rasterio.open(temporary, 'w', **profile) as dst:
            dst.write(labels, 1)
            dst.update_tags(**{TAG: made_of})
        check_written(temporary, path)
