"""Label files for a user's own images."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import rasterio
from tqdm import tqdm

from torchgeo_s1s2.datasets.catalog import (
    GROUND_REFERENCE,
    KEYS,
    LABELS,
    SENSORS,
    open_raster,
    reference_name,
)
from torchgeo_s1s2.files import whole

_IMAGE = r'(?P<tile>\w+)_\d{{8}}_{sensor}_(?P<x>\d+)_(?P<y>\d+)\.tif'
_Place = tuple[str, int, int]


def write_label_files(
    root: str | os.PathLike[str], overwrite: bool = False, progress: bool = True
) -> int:
    """Write the label file of each patch that has images, from the rasters that are there.

    The tile of a patch is any name of letters, digits and ``_``; x and y say where the patch lies
    in it, in pixels: ``mytile_0_0`` is the whole of a scene. One image a patch is opened for its
    CRS, and its label raster, if there is one, is read for the labels present.

    Args:
        root: Folder with ``s2`` and ``s1``, one of which may be empty, and ``ground_reference``
            unless nothing has labels.
        overwrite: Write label files that are there anew; they stay as they are otherwise.
        progress: Show a progress bar.

    Returns:
        Number of label files written.

    Raises:
        FileNotFoundError: If root has no folder of a sensor, or neither has an image.
        ValueError: If a file in them has no name of an image, or an image has no EPSG code.
    """
    root = Path(root)
    images = _images(root)
    if not images:
        raise FileNotFoundError(
            f'{root} has no image; expected s2/TILE_YYYYMMDD_S2_X_Y.tif or s1/TILE_YYYYMMDD_S1_X_Y'
            '.tif'
        )
    for folder in (LABELS, GROUND_REFERENCE):
        (root / folder).mkdir(exist_ok=True)
    paths = {place: root / LABELS / '{}_{}_{}.json'.format(*place) for place in sorted(images)}
    todo = {place: path for place, path in paths.items() if overwrite or not path.exists()}
    for place, path in tqdm(todo.items(), 'Writing labels', unit='patch', disable=not progress):
        with whole(path) as temporary:
            temporary.write_text(json.dumps(_content(root, place, images[place])))
    return len(todo)


def _images(root: Path) -> dict[_Place, dict[str, list[str]]]:
    """File names of each patch by sensor, sorted."""
    images: dict[_Place, dict[str, list[str]]] = defaultdict(lambda: {s: [] for s in SENSORS})
    for sensor in SENSORS:
        for name, place in _places(root / sensor, sensor.upper()):
            images[place][sensor].append(name)
    return images


def _places(folder: Path, sensor: str) -> Iterator[tuple[str, _Place]]:
    if not folder.is_dir():
        raise FileNotFoundError(f'there is no folder {folder}; make it, empty if there is nothing')
    pattern = re.compile(_IMAGE.format(sensor=sensor))
    for path in sorted(folder.glob('*.tif')):
        match = pattern.fullmatch(path.name)
        if match is None:
            raise ValueError(
                f'{path} is not named TILE_YYYYMMDD_{sensor}_X_Y.tif; rename or remove it'
            )
        yield path.name, (match['tile'], int(match['x']), int(match['y']))


def label_content(
    images: Mapping[str, Iterable[str]], crs: rasterio.CRS, labels: Iterable[int]
) -> dict[str, str]:
    """What the label file of a patch says.

    Args:
        images: File names of each sensor.
        crs: CRS of the patch.
        labels: Labels that its label raster holds.
    """
    return {
        **{KEYS[sensor]: ';'.join(images[sensor]) for sensor in SENSORS},
        'projection': crs.to_wkt(version='WKT1_GDAL'),
        'labels': ';'.join(map(str, labels)),
    }


def _content(root: Path, place: _Place, images: Mapping[str, list[str]]) -> dict[str, str]:
    sensor = next(s for s in SENSORS if images[s])
    path = root / sensor / images[sensor][0]
    with open_raster(path) as src:
        crs = src.crs
    if crs is None or crs.to_epsg() is None:
        raise ValueError(f'{path} has no CRS with an EPSG code ({crs}); warp it to one')
    return label_content(images, crs, _labels(root / GROUND_REFERENCE / reference_name(*place)))


def _labels(path: Path) -> list[int]:
    """Labels in a raster but 0, which stands for none."""
    if not path.exists():
        return []
    with open_raster(path) as src:
        present = [np.unique(src.read(1, window=window)) for _, window in src.block_windows(1)]
    return sorted({int(label) for labels in present for label in labels} - {0})
