"""Label files for a user's own images."""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import rasterio
from tqdm import tqdm

from torchgeo_s1s2.datasets.catalog import (
    FOLDERS,
    GROUND_REFERENCE,
    KEYS,
    LABELS,
    Image,
    list_label_files,
    list_rasters,
)
from torchgeo_s1s2.datasets.rasters import crs_of, first_grid, read_grid, read_labels
from torchgeo_s1s2.datasets.sensors import SENSORS
from torchgeo_s1s2.errors import DataError, warn
from torchgeo_s1s2.files import write_json


def write_label_files(
    root: str | os.PathLike[str],
    overwrite: bool = False,
    progress: bool = True,
    names: Sequence[str] | None = None,
) -> int:
    """Write the label file of each patch that has images, from the rasters that are there.

    Those that are there already, at any depth below ``labels``, stay where they are.

    The tile of a patch is any name of letters, digits and ``_``; x and y say where the patch lies
    in it, in pixels: ``mytile_0_0`` is the whole of a scene. One image a patch is opened for its
    CRS, and its label raster, if there is one, is read for the labels present.

    Args:
        root: Folder with ``s2`` and ``s1``, one of which may be empty, and ``ground_reference``
            unless nothing has labels.
        overwrite: Write label files that are there anew; they stay as they are otherwise.
        progress: Show a progress bar.
        names: Names of the patches, such as ``mytile_0_0``; all unless given.

    Returns:
        Number of label files written.

    Raises:
        DataError: If an image has no EPSG code, or a label raster holds what is no label.
        FileNotFoundError: If root has no folder of a sensor, or neither has an image.
    """
    root = Path(root)
    rasters = {folder: _rasters(root, folder) for folder in FOLDERS}
    there = {name for sensor in SENSORS for name in rasters[sensor]}
    if not there:
        raise FileNotFoundError(
            f'{root} has no image; expected s2/TILE_YYYYMMDD_S2_X_Y.tif or s1/TILE_YYYYMMDD_S1_X_Y'
            '.tif, TILE being letters, digits and _'
        )
    for folder in (LABELS, GROUND_REFERENCE):
        (root / folder).mkdir(exist_ok=True)
    chosen = there if names is None else there & {*names}
    files, _ = list_label_files(root)
    todo = sorted(chosen if overwrite else chosen - {*files})
    hidden = not (progress and todo)
    for name in tqdm(todo, 'Writing labels', unit='patch', disable=hidden):
        own = {folder: rasters[folder].get(name, []) for folder in FOLDERS}
        path = files.get(name, root / LABELS / f'{name}.json')
        write_json(path, _content(root, name, own))
    return len(todo)


def _rasters(root: Path, folder: str) -> Mapping[str, list[Image]]:
    if not (root / folder).is_dir() and folder != GROUND_REFERENCE:
        raise FileNotFoundError(
            f'there is no folder {root / folder}; make it, empty if there is nothing'
        )
    found, notes = list_rasters(root, folder)
    if notes:
        warn(f'{root}: {"; ".join(notes)}')
    return found


def label_content(
    images: Mapping[str, Iterable[str]], crs: rasterio.CRS, labels: Iterable[int]
) -> dict[str, str]:
    """What the label file of a patch says: its images by sensor, CRS, and labels on its ground."""
    return {
        **{KEYS[sensor]: ';'.join(images[sensor]) for sensor in SENSORS},
        'projection': crs.to_wkt(version='WKT1_GDAL'),
        'labels': ';'.join(map(str, labels)),
    }


def _content(root: Path, name: str, rasters: Mapping[str, Sequence[Image]]) -> dict[str, str]:
    paths = {folder: [i.raster(root, name) for i in images] for folder, images in rasters.items()}
    path, grid = first_grid(chain(*(paths[sensor] for sensor in SENSORS)))
    if grid.epsg is None:
        raise DataError(f'{path} has no CRS with an EPSG code ({grid.crs}); warp it to one')
    names = {sensor: [path.name for path, _ in paths[sensor]] for sensor in SENSORS}
    present = next((_labels(*raster) for raster in paths[GROUND_REFERENCE]), [])
    return label_content(names, crs_of(grid.epsg), present)


def _labels(path: Path, sidecars: bool) -> list[int]:
    """Labels in a raster but 0, which stands for none."""
    grid, present = read_grid(path, sidecars), set[int]()
    for top in range(0, grid.height, 512):
        rows = grid.window(0, top, grid.width, min(512, grid.height - top))
        labels = read_labels(path, rows, grid, sidecars)
        present |= {int(label) for label in np.unique(labels[~np.isnan(labels)])}
    return sorted(present - {0})
