"""Synthetic data in the layout of PASTIS-R: five folds, 19 classes and void, both orbits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
from shapely import box

from torchgeo_s1s2.datasets.pastis import METADATA, PASTIS_CLASSES, VOID
from torchgeo_s1s2.datasets.synthetic import phenology, speckle
from torchgeo_s1s2.files import whole

MARKER = 'synthetic_pastis.json'
START = np.datetime64('2018-09-17')
SOIL = np.array([0.08, 0.11, 0.15, 0.18, 0.21, 0.23, 0.25, 0.27, 0.33, 0.28])
GREEN = np.array([0.03, 0.06, 0.03, 0.10, 0.28, 0.36, 0.40, 0.42, 0.20, 0.10])
CROPS = np.random.default_rng(0)
BEGIN = CROPS.uniform(40, 240, len(PASTIS_CLASSES))
"""Day of the season on which each class is half grown; the background stays as it is."""
END = BEGIN + CROPS.uniform(50, 160, len(PASTIS_CLASSES))
BRIGHT = CROPS.uniform(0.8, 1.2, len(PASTIS_CLASSES))
GAIN = CROPS.uniform(-4, 4, len(PASTIS_CLASSES))
"""Backscatter that the plants of each class add at full cover, in dB."""


def write(root: Path, patches: int = 60, size: int = 32) -> None:
    """Write patches, those of each fold as often as those of the others; the metadata come last."""
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).write_text(json.dumps({'patches': patches, 'size': size}))
    rows = [dict(_patch(root, number, size)) for number in range(patches)]
    corners = [(600000 + 10 * size * row['ID_PATCH'], 5500000) for row in rows]
    squares = [box(x, y, x + 10 * size, y + 10 * size) for x, y in corners]
    geometry = gpd.GeoSeries(squares, crs=32630).to_crs(2154)
    with whole(root / METADATA) as path:
        gpd.GeoDataFrame(rows, geometry=geometry).to_file(path, driver='GeoJSON')


def _patch(root: Path, number: int, size: int) -> Iterator[tuple[str, Any]]:
    """Arrays of a patch, and its row of the metadata."""
    rng = np.random.default_rng([7, number])
    centres = rng.uniform(0, size, (size * size // 50, 2))
    pixels = np.indices((size, size)).reshape(2, -1).T[:, None]
    parcel = ((pixels - centres) ** 2).sum(2).argmin(1).reshape(size, size)
    crops = np.where(rng.random(len(centres)) < 0.3, 0, rng.integers(1, VOID, len(centres)))
    late, crop = rng.normal(0, 20, len(centres))[parcel], crops[parcel]
    target = np.zeros((3, size, size), np.uint8)
    target[0] = np.where(np.isin(parcel, parcel[0]) & (crop > 0), VOID, crop)  # cut by the border
    save(root / 'ANNOTATIONS' / f'TARGET_{number}.npy', target)
    yield from {'ID_PATCH': number, 'Fold': number % 5 + 1, 'TILE': 't30uxv'}.items()
    clear = np.flatnonzero(rng.random(42) < 0.6) * 10
    for sensor, days in {'S2': clear, 'S1A': np.arange(2, 420, 12), 'S1D': clear + 3}.items():
        images = []
        for day in days:
            share = np.where(crop, phenology(float(day), BEGIN[crop] + late, END[crop] + late), 0.3)
            if sensor == 'S2':
                image = BRIGHT[crop] * (
                    SOIL[:, None, None] * (1 - share) + GREEN[:, None, None] * share
                )
                images.append(1e4 * (image + rng.normal(0, 0.015, image.shape)).clip(0.001))
            else:
                level = np.array([-10, -17])[:, None, None] + GAIN[crop] * share
                db = level + 10 * np.log10(speckle(rng, level.shape))
                images.append(np.concatenate([db, db[:1] - db[1:]]))
        kind = np.int16 if sensor == 'S2' else np.float16
        save(root / f'DATA_{sensor}' / f'{sensor}_{number}.npy', np.array(images).astype(kind))
        dates = (int(str(START + int(day)).replace('-', '')) for day in days)
        yield f'dates-{sensor}', json.dumps({str(i): date for i, date in enumerate(dates)})


def save(path: Path, array: Any) -> None:
    """Write an array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        np.save(temporary, array)
