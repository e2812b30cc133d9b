"""A small synthetic data set in MultiSenGE's file layout.

Landscapes, dates and values are made up. Reflectances are mixtures of seven spectra, backscatter a
mean for each cover; these and the seasons are set by hand, of the order that is usual for such
covers in temperate Europe, and fitted to no measurement. Speckle follows a gamma distribution, as
multi-look intensity does (Oliver and Quegan, Understanding Synthetic Aperture Radar Images, 2004).

The difficulty is meant, and of the kinds that real images have:

- The season tells crops apart: maize looks like grass until it is harvested, a stubble field like
  bare ground. Sowing dates differ between parcels, so no single date serves them all.
- Sentinel-1 tells what the spectra leave open: buildings from bare ground, woody plants from herbs.
- The neighbourhood tells built-up classes and woody ones apart: a pixel of a town is a roof or a
  garden, and only how many of each lie around it makes the town dense or sparse.
- Soils and plants vary between parcels and from date to date, borders are mixed, radar speckles
  and some images are hazy.
- The mix of classes differs between patches, and the most frequent class has a fifth of the pixels.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import rasterio
import torch
from kornia.filters import gaussian_blur2d
from numpy.typing import NDArray
from rasterio.transform import from_origin
from tqdm import tqdm

from torchgeo_s1s2.datasets.catalog import (
    GROUND_REFERENCE,
    LABELS,
    image_name,
    list_label_files,
    reference_name,
)
from torchgeo_s1s2.datasets.labels import label_content
from torchgeo_s1s2.datasets.rasters import Grid, crs_of
from torchgeo_s1s2.datasets.sensors import SENSORS, tags_of
from torchgeo_s1s2.datasets.time_series import check_at_least
from torchgeo_s1s2.files import read_json, write_json

Array = NDArray[np.float64]

TILES = {
    '31UFQ': (32631, 600000, 5500020),
    '32ULU': (32632, 300000, 5400000),
    '31UFP': (32631, 600000, 5400000),
    '31UEQ': (32631, 499980, 5500020),
}
"""EPSG code and upper left corner in metres of the tiles that can be written."""

PATCHES = {'31UFQ': 24, '32ULU': 24, '31UFP': 16, '31UEQ': 16}
"""Patches of each tile unless told otherwise: training in both zones, validation, test."""

ENL = 8.0
"""Equivalent number of looks of the speckle."""

MARKER = 'synthetic.json'

# Reflectance of B02 B03 B04 B05 B06 B07 B08 B8A B11 B12.
_SPECTRA = np.array(
    [
        [0.03, 0.06, 0.03, 0.09, 0.28, 0.36, 0.40, 0.42, 0.20, 0.10],  # green vegetation
        [0.02, 0.04, 0.02, 0.06, 0.20, 0.26, 0.29, 0.30, 0.13, 0.06],  # forest
        [0.08, 0.11, 0.14, 0.18, 0.22, 0.25, 0.28, 0.30, 0.34, 0.24],  # dry vegetation
        [0.09, 0.12, 0.15, 0.17, 0.19, 0.21, 0.23, 0.25, 0.32, 0.28],  # soil
        [0.15, 0.17, 0.19, 0.20, 0.22, 0.23, 0.25, 0.26, 0.30, 0.27],  # roofs
        [0.08, 0.09, 0.10, 0.10, 0.11, 0.12, 0.12, 0.12, 0.14, 0.13],  # asphalt
        [0.05, 0.05, 0.03, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01],  # water
    ]
)
_GREEN, _FOREST, _DRY, _SOIL, _ROOF, _ASPHALT, _WATER = range(7)


@dataclass(frozen=True)
class _Cover:
    """One kind of ground: what grows when, on what, and how it scatters.

    ``frequency`` is its share of the parcels outside towns. The plants cover ``low`` of the ground
    outside the season and ``high`` within it; the season is from day ``start`` to day ``end`` of
    the year, and ``mottle`` is the standard deviation of their share between neighbouring pixels.
    ``ground`` gives the shares of the other spectra. Backscatter is in dB without plants, and
    ``gain`` is added at full cover.
    """

    label: int
    frequency: float
    mottle: float
    ground: Mapping[int, float]
    low: float = 0.0
    high: float = 0.0
    start: float = 100
    end: float = 300
    vv: float = -11.0
    vh: float = -19.0
    gain: tuple[float, float] = (0.0, 0.0)
    plant: int = _GREEN


_COVERS = (
    _Cover(1, 0, 0.2, {_ROOF: 0.7, _ASPHALT: 0.3}, 0.1, 0.2, 90, 310, -4, -12, (-7, -6)),
    _Cover(2, 0, 0.35, {_ROOF: 0.7, _ASPHALT: 0.3}, 0.3, 0.5, 90, 310, -5, -13, (-6, -4)),
    _Cover(3, 0, 0.1, {_ROOF: 0.7, _ASPHALT: 0.3}, 0.05, 0.1, vv=-5.5, vh=-15, gain=(-6, -4)),
    _Cover(4, 0, 0.25, {_SOIL: 0.6, _ROOF: 0.4}, 0.5, 0.8, 80, 320, -9, -15, (-2, -1)),
    _Cover(5, 0, 0.15, {_ASPHALT: 0.7, _SOIL: 0.3}, 0.1, 0.2, 100, 290, -13, -21),
    # Arable land: winter cereals, with and without a catch crop, maize, beet.
    _Cover(6, 0.17, 0.05, {_DRY: 0.5, _SOIL: 0.5}, 0.02, 0.9, 80, 180, -10, -19, (-2.5, 1)),
    _Cover(6, 0.1, 0.05, {_DRY: 0.2, _SOIL: 0.8}, 0.05, 0.6, 235, 330, -10, -19, (-1, 2)),
    _Cover(6, 0.15, 0.05, {_DRY: 0.3, _SOIL: 0.7}, 0.02, 0.9, 160, 262, -11, -20, (2, 3)),
    _Cover(6, 0.08, 0.05, {_SOIL: 1}, 0.02, 0.9, 150, 300, -11, -20, (2, 3)),
    _Cover(7, 0.05, 0.1, {_SOIL: 0.9, _DRY: 0.1}, 0.1, 0.5, 135, 285, -9, -17, (1, 1)),
    _Cover(8, 0.04, 0.25, {_DRY: 0.5, _SOIL: 0.5}, 0.35, 0.75, 105, 300, -10, -17, (1, 1.5)),
    _Cover(9, 0.16, 0.05, {_DRY: 0.8, _SOIL: 0.2}, 0.5, 0.85, 60, 320, -12, -19, (0.5, 1)),
    # Groves, deciduous and coniferous forest.
    _Cover(
        10, 0.03, 0.2, {_DRY: 0.5, _SOIL: 0.5}, 0.3, 0.85, 105, 300, -10, -16.5, (1, 1), _FOREST
    ),
    _Cover(11, 0.11, 0.1, {_DRY: 0.6, _SOIL: 0.4}, 0.25, 0.95, 110, 300, -10, -16, plant=_FOREST),
    _Cover(11, 0.05, 0.1, {_SOIL: 1}, 0.85, 0.95, 60, 340, -10, -15.5, plant=_FOREST),
    _Cover(12, 0.015, 0.1, {_SOIL: 0.6, _ROOF: 0.4}, 0.02, 0.08, vv=-12, vh=-21),
    _Cover(13, 0.03, 0.2, {_WATER: 0.5, _DRY: 0.5}, 0.3, 0.8, 130, 290, -10, -19, (1, 2)),
    _Cover(14, 0.015, 0, {_WATER: 1}, vv=-19, vh=-26),
)
_BY_LABEL = {label: i for i, label in reversed(list(enumerate(c.label for c in _COVERS)))}
_ALIKE = {3: _BY_LABEL[1], 4: _BY_LABEL[8]}
"""Covers that labels look like where classes need their surroundings."""


@dataclass(frozen=True)
class _Scene:
    """What of a patch is the same on all dates, each (H, W).

    Attributes:
        label: Label of its class.
        cover: Index in ``_COVERS``, which tells what it looks like.
        parcel: Number of the parcel.
        delay: Days that the season is late.
        vigour: Factor on the share of plants.
        mottle: What is added to the share of plants.
        brightness: Factor on the reflectance of the ground.
        roughness: What is added to the backscatter, in dB.
    """

    label: NDArray[np.intp]
    cover: NDArray[np.intp]
    parcel: NDArray[np.intp]
    delay: Array
    vigour: Array
    mottle: Array
    brightness: Array
    roughness: Array

    def field(self, name: str) -> Array:
        """An attribute of the cover of each pixel."""
        return np.array([getattr(c, name) for c in _COVERS])[self.cover]

    def plants(self, day: int) -> Array:
        """Share of each pixel that plants cover on a day of the year."""
        low, high, start, end = map(self.field, ('low', 'high', 'start', 'end'))
        season = phenology(day, start + self.delay, end + self.delay)
        share = (low + (high - low) * season) * self.vigour + self.mottle
        return share.clip(0, 1)


def write_synthetic(
    root: str | os.PathLike[str],
    size: int = 64,
    patches: Mapping[str, int] | None = None,
    year: int = 2020,
    incomplete: float = 0.1,
    haze: float = 0.2,
    seed: int = 0,
    progress: bool = True,
    delay: float = 0,
    context: bool = False,
) -> Path:
    """Write a synthetic data set, or what is missing of it.

    Args:
        root: Folder to write to; made if it is not there.
        size: Width and height of the patches in pixels.
        patches: Number of patches of each tile of ``TILES``; ``PATCHES`` unless given.
        year: Year of the acquisitions.
        incomplete: Share of patches without an image in November.
        haze: Share of Sentinel-2 images with a bank of haze.
        seed: Seed; a patch depends on the seed and its name only.
        progress: Show a progress bar.
        delay: Days by which all seasons come later, or earlier if below 0. Landscapes, dates and
            noise stay the same.
        context: Whether classes need their surroundings more: dense and specialised built-up areas
            look alike at each pixel, as do parks and orchards, and seasons, plants and soils vary
            half as much again, so that a pixel's own series says less.

    Returns:
        Root.

    Raises:
        ValueError: If root holds other files, or a tile is not in ``TILES``.
    """
    root, patches = Path(root), dict(patches or PATCHES)
    settings = {'size': size, 'patches': patches, 'year': year, 'incomplete': incomplete}
    settings |= {'haze': haze, 'seed': seed, 'delay': delay, 'context': context}
    if unknown := set(patches) - set(TILES):
        raise ValueError(f'no origin is known of tiles {sorted(unknown)}; choose from {[*TILES]}')
    for what, count in {'size': size, **patches}.items():
        check_at_least(what, count, 2 if what == 'size' else 1)
    _claim(root, settings)
    places = _places(patches, size)
    files, _ = list_label_files(root)
    todo = [name for name in places if name not in files]
    hidden = not (progress and todo)
    for name in tqdm(todo, 'Writing synthetic patches', unit='patch', disable=hidden):
        _write_patch(root, name, *places[name], settings)
    return root


def phenology(day: Array | float, start: Array | float, end: Array | float) -> Array:
    """Share of the season's growth that stands on a day: a double logistic of 0..1.

    Args:
        day: Day of the year.
        start: Day on which half of it has grown.
        end: Day on which half of it has gone.
    """
    rise = 1 / (1 + np.exp((start - np.asarray(day)) / 8))
    return rise - 1 / (1 + np.exp((end - np.asarray(day)) / 8))


def speckle(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Multi-look speckle: gamma with mean 1 and variance 1/ENL."""
    return rng.gamma(ENL, 1 / ENL, shape)


def _claim(root: Path, settings: Mapping[str, object]) -> None:
    """Make the folders and record the settings, unless root holds something else."""
    marker = root / MARKER
    if marker.exists():
        older = {'delay': 0, 'context': False}  # than these arguments
        if older | read_json(marker) != settings:
            raise ValueError(
                f'{marker} says that the synthetic data there were written with other settings '
                f'than {settings}; delete {root} or give another root'
            )
        return
    if there := next((path for path in root.rglob('*') if path.is_file()), None):
        raise ValueError(
            f'{root} holds files that are not synthetic, as {there}; give another root'
        )
    for folder in (LABELS, GROUND_REFERENCE, *SENSORS):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_json(marker, settings, indent=1)


def _places(patches: Mapping[str, int], size: int) -> dict[str, tuple[str, int, int]]:
    """Tile and upper left pixel within it of each patch by name, with gaps of a pixel."""
    sides = {tile: int(np.ceil(np.sqrt(count))) for tile, count in patches.items()}
    places = [
        (tile, n % sides[tile] * (size + 1), n // sides[tile] * (size + 1))
        for tile, count in patches.items()
        for n in range(count)
    ]
    return {'{}_{}_{}'.format(*place): place for place in places}


def _write_patch(
    root: Path, name: str, tile: str, x: int, y: int, settings: Mapping[str, Any]
) -> None:
    """Write the rasters of a patch and then its label file, which makes it part of the set."""
    rng = np.random.default_rng([settings['seed'], crc32(name.encode())])
    scene = _draw_scene(rng, settings['size'], settings['delay'], settings['context'])
    # Sentinel-1's orbit comes back every 12 days.
    days = {'s2': _s2_days(rng, settings['incomplete'])}
    days['s1'] = np.arange(rng.integers(100, 112), 366, 12)
    epsg, left, top = TILES[tile]
    place = from_origin(left + 10 * x, top - 10 * y, 10, 10)
    grid = Grid(crs_of(epsg), place, settings['size'], settings['size'])
    names: dict[str, list[str]] = {sensor: [] for sensor in SENSORS}
    for sensor in SENSORS:
        for day in rng.permutation(days[sensor]).tolist():
            when = date(settings['year'], 1, 1) + timedelta(day)
            names[sensor].append(image_name(name, f'{when:%Y%m%d}', sensor))
            if sensor == 's2':
                image: NDArray[Any] = _reflectance(rng, scene, day, settings['haze'])
            else:
                image = _backscatter(rng, scene, day)
            _write_raster(root / sensor / names[sensor][-1], image, grid, tags_of(sensor))
    labels = scene.label.astype(np.uint8)
    _write_raster(root / GROUND_REFERENCE / reference_name(name), labels[None], grid, {})
    content = label_content(names, grid.crs, np.unique(labels))
    write_json(root / LABELS / f'{name}.json', content)


def _draw_scene(rng: np.random.Generator, size: int, delay: float, context: bool) -> _Scene:
    cover, parcel = _landscape(rng, size)
    label = np.array([c.label for c in _COVERS])[cover]
    more = 1.5 if context else 1
    if context:
        cover = np.array([_ALIKE.get(c.label, i) for i, c in enumerate(_COVERS)])[cover]
    spread = np.array([c.mottle for c in _COVERS])[cover]
    return _Scene(
        label,
        cover,
        parcel,
        delay=_by_parcel(rng, parcel, 12 * more) + delay,
        vigour=np.exp(_by_parcel(rng, parcel, 0.15 * more)),
        mottle=more * spread * rng.normal(size=cover.shape),
        brightness=np.exp(_by_parcel(rng, parcel, 0.15 * more)),
        roughness=_by_parcel(rng, parcel, 0.7 * more),
    )


def _by_parcel(rng: np.random.Generator, parcel: NDArray[np.intp], spread: float) -> Array:
    """A normal number of mean 0 for each parcel, at its pixels."""
    return rng.normal(0, spread, parcel.max() + 1)[parcel]


def _landscape(rng: np.random.Generator, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Cover (index in _COVERS) and parcel number of each pixel, both (size, size)."""
    yx = np.indices((size, size)).reshape(2, -1).T.astype(float)
    centres = rng.uniform(0, size, (max(size * size // 130, 4), 2))
    wavy = yx + 1.5 * np.sin(yx[:, ::-1] / 5 + rng.uniform(0, 6, 2))
    squares = (centres**2).sum(1) - 2 * wavy @ centres.T  # of the distances, but for one term
    parcel = squares.argmin(1).reshape(size, size)
    cover = _parcel_covers(rng, centres, size)[parcel]
    if rng.random() < 0.35:
        _draw_river(rng, cover)
    for _ in range(rng.integers(1, 3)):
        _draw_road(rng, cover)
    return cover, parcel


def _blur(image: Array, sigma: float) -> Array:
    """Gaussian blur of an image (C, H, W)."""
    width = min(2 * int(np.ceil(3 * sigma)) + 1, 2 * (image.shape[-1] // 2) - 1)
    single = torch.from_numpy(image)[None].float()  # convolves several times as fast as double
    return gaussian_blur2d(single, (width, width), (sigma, sigma))[0].double().numpy()


def _parcel_covers(rng: np.random.Generator, centres: Array, size: int) -> NDArray[np.intp]:
    """Rural covers, with a town that is dense in the middle and sparse around it."""
    frequency = np.array([c.frequency for c in _COVERS]) * rng.gamma(1, 1, len(_COVERS))
    covers = rng.choice(len(_COVERS), len(centres), p=frequency / frequency.sum())
    distance = np.linalg.norm(centres - rng.uniform(0.1, 0.9, 2) * size, axis=1)
    radius = rng.uniform(0.15, 0.45) * min(size, 128)
    ring = rng.choice([2, 2, 2, 2, 3, 3, 4, 4, 9], len(centres))
    suburb = np.array([_BY_LABEL[label] for label in ring])
    covers = np.where(distance < radius, suburb, covers)
    return np.where(distance < 0.35 * radius, _BY_LABEL[1], covers)


def _draw_river(rng: np.random.Generator, cover: NDArray[np.intp]) -> None:
    size = len(cover)
    row, column = np.mgrid[:size, :size]
    course = rng.uniform(0, size) + rng.uniform(3, 8) * np.sin(column / rng.uniform(6, 15))
    distance = np.abs(row - course)
    cover[distance < rng.uniform(4, 8)] = _BY_LABEL[13]
    cover[distance < rng.uniform(1.5, 3.5)] = _BY_LABEL[14]
    if rng.random() < 0.5:
        cover[:] = cover.T.copy()


def _draw_road(rng: np.random.Generator, cover: NDArray[np.intp]) -> None:
    row, column = np.indices(cover.shape)
    angle = rng.uniform(0, np.pi)
    through = rng.uniform(0.2, 0.8, 2) * len(cover)
    offset = (row - through[0]) * np.cos(angle) + (column - through[1]) * np.sin(angle)
    cover[np.abs(offset) < rng.uniform(0.8, 1.6)] = _BY_LABEL[5]


def _s2_days(rng: np.random.Generator, incomplete: float) -> NDArray[np.int64]:
    """Days of the year with a clear image: one in each month of the season, and some others."""
    season = np.array([185, 216, 247, 309]) + rng.integers(0, 8) + rng.integers(0, 4, 4)
    others = rng.choice(np.arange(70, 300), rng.integers(3, 7), replace=False)
    if rng.random() < incomplete:
        season = season[:3]
    return np.unique(np.concatenate([season, others]))


def _reflectance(
    rng: np.random.Generator, scene: _Scene, day: int, haze: float
) -> NDArray[np.int16]:
    """Sentinel-2 image, (10, H, W), reflectance x 10,000."""
    plants = scene.plants(day)[..., None]
    ground = np.array([sum(n * _SPECTRA[i] for i, n in c.ground.items()) for c in _COVERS])
    wet = np.exp(_by_parcel(rng, scene.parcel, 0.1) + rng.normal(0, 0.08))
    bare = ground[scene.cover] * (scene.brightness * wet)[..., None]
    image = plants * _SPECTRA[scene.field('plant')] + (1 - plants) * bare
    image = _blur(np.moveaxis(image, -1, 0), 0.6)  # the sensor's point spread
    image = image * rng.normal(1, 0.03, (10, 1, 1)) + rng.normal(0, 0.004, (10, 1, 1))
    image += rng.normal(0, 0.015, image.shape) * (0.3 + image)
    if rng.random() < haze:
        # The share of the light that comes from a bank of haze.
        bank = _blur(rng.normal(size=(1, *scene.cover.shape)), len(scene.cover) / 8)
        veil = ((bank - bank.mean()) / bank.std()).clip(0, 2) * 0.15
        image = image * (1 - veil) + 0.45 * veil
    return (image.clip(0.0001, 1.5) * 1e4).astype(np.int16)


def _backscatter(rng: np.random.Generator, scene: _Scene, day: int) -> NDArray[np.float32]:
    """Sentinel-1 image, (2, H, W), linear power of VV and VH."""
    plants = scene.plants(day)
    moisture = rng.normal(0, 1) + _by_parcel(rng, scene.parcel, 0.7)
    level = scene.roughness + moisture * (1 - plants)  # moist soil scatters more
    gain = np.moveaxis(scene.field('gain'), -1, 0)
    bare = np.stack([scene.field('vv'), scene.field('vh')])
    power = 10 ** ((bare + gain * plants + level + rng.normal(0, 0.3, (2, 1, 1))) / 10)
    mixed = _blur(power, 0.7)
    return (mixed * speckle(rng, mixed.shape)).astype(np.float32)


def _write_raster(
    path: Path, image: NDArray[np.generic], grid: Grid, tags: Mapping[str, str]
) -> None:
    profile = {'driver': 'GTiff', 'compress': 'lzw', 'count': len(image), 'dtype': image.dtype.name}
    with rasterio.open(path, 'w', **profile, **vars(grid)) as dst:
        dst.update_tags(**tags)
        dst.write(image)
