"""A small synthetic data set in MultiSenGE's file layout.

Everything in it is made up: landscapes, dates and values. Reflectances are mixtures of seven
spectra (green vegetation, forest, dry vegetation, soil, roofs, asphalt, water) and backscatter a
mean for each cover plus speckle. The spectra, backscatter levels and seasons are set by hand, of
the order that is usual for such covers at Sentinel-2's and Sentinel-1's wavelengths; they are
fitted to no measurement. Crops grow and are harvested in the months of temperate Europe. Speckle
follows a gamma distribution, as multi-look intensity does (Oliver and Quegan, Understanding
Synthetic Aperture Radar Images, 2004).

The difficulty is meant: harvested fields look like roofs or bare ground until SAR sees the
buildings, summer crops look like grass until they are harvested, sowing dates differ between
parcels, borders are mixed, some images are hazy, and no class can be told from its frequency.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import rasterio
import torch
from kornia.filters import gaussian_blur2d
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import from_origin
from tqdm import tqdm

from torchgeo_s1s2.datasets.catalog import GROUND_REFERENCE, LABELS, SENSORS

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

ENL = 12.0
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

    The plants cover ``low`` of the ground outside the season and ``high`` within it; the season is
    from day ``start`` to day ``end`` of the year. ``ground`` gives the shares of the other spectra.
    Backscatter is in dB without plants, and ``gain`` is added at full cover.
    """

    label: int
    ground: Mapping[int, float]
    low: float = 0.0
    high: float = 0.0
    start: float = 100
    end: float = 300
    vv: float = -11.0
    vh: float = -19.0
    gain: tuple[float, float] = (0.0, 0.0)
    plant: int = _GREEN
    frequency: float = 0.0


_COVERS = (
    _Cover(1, {_ROOF: 0.7, _ASPHALT: 0.3}, 0.05, 0.1, vv=-4, vh=-12),
    _Cover(2, {_ROOF: 0.6, _SOIL: 0.4}, 0.25, 0.45, 90, 310, -8, -15),
    _Cover(3, {_ROOF: 0.8, _ASPHALT: 0.2}, 0.02, 0.05, vv=-6, vh=-17),
    _Cover(4, {_SOIL: 0.7, _ROOF: 0.3}, 0.55, 0.8, 80, 320, -10.5, -16.5),
    _Cover(5, {_ASPHALT: 0.7, _SOIL: 0.3}, 0.1, 0.2, 100, 290, -13, -21),
    # Arable land: winter cereals, with and without a catch crop, rape, maize, beet.
    _Cover(6, {_DRY: 0.5, _SOIL: 0.5}, 0.02, 0.9, 80, 180, -10, -19, (-2.5, 1), frequency=0.17),
    _Cover(6, {_DRY: 0.2, _SOIL: 0.8}, 0.05, 0.6, 235, 330, -10, -19, (-1, 2), frequency=0.1),
    _Cover(6, {_DRY: 0.3, _SOIL: 0.7}, 0.02, 0.9, 160, 262, -11, -20, (3, 5), frequency=0.15),
    _Cover(6, {_SOIL: 1}, 0.02, 0.9, 150, 300, -11, -20, (2, 4), frequency=0.08),
    _Cover(7, {_SOIL: 0.9, _DRY: 0.1}, 0.1, 0.5, 135, 285, -8.5, -16.5, (1, 1), frequency=0.05),
    _Cover(8, {_DRY: 0.5, _SOIL: 0.5}, 0.35, 0.75, 105, 300, -9.5, -16, (1, 1.5), frequency=0.04),
    _Cover(9, {_DRY: 0.8, _SOIL: 0.2}, 0.5, 0.85, 60, 320, -12, -19, (0.5, 1), frequency=0.16),
    _Cover(10, {_DRY: 0.5, _SOIL: 0.5}, 0.3, 0.85, 105, 300, -9.5, -15.5, (1, 1), _FOREST, 0.03),
    _Cover(11, {_DRY: 0.6, _SOIL: 0.4}, 0.25, 0.95, 110, 300, -9, -14.5, (0.5, 0.5), _FOREST, 0.11),
    _Cover(11, {_SOIL: 1}, 0.85, 0.95, 60, 340, -9.5, -14.5, (0, 0), _FOREST, 0.05),
    _Cover(12, {_SOIL: 0.6, _ROOF: 0.4}, 0.02, 0.08, vv=-12, vh=-21, frequency=0.015),
    _Cover(13, {_WATER: 0.5, _DRY: 0.5}, 0.3, 0.8, 130, 290, -9, -19, (2, 2), frequency=0.03),
    _Cover(14, {_WATER: 1}, vv=-20, vh=-27, frequency=0.015),
)
_BY_LABEL = {label: i for i, label in reversed(list(enumerate(c.label for c in _COVERS)))}


def write_synthetic(
    root: str | os.PathLike[str],
    size: int = 64,
    patches: Mapping[str, int] | None = None,
    year: int = 2020,
    incomplete: float = 0.1,
    haze: float = 0.2,
    seed: int = 0,
    progress: bool = True,
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

    Returns:
        Root.

    Raises:
        ValueError: If root holds another data set, or a tile is not in ``TILES``.
    """
    root, patches = Path(root), dict(patches or PATCHES)
    settings = {
        'size': size,
        'patches': patches,
        'year': year,
        'incomplete': incomplete,
        'haze': haze,
        'seed': seed,
    }
    unknown = set(patches) - set(TILES)
    if unknown:
        raise ValueError(f'no origin is known of tiles {sorted(unknown)}; choose from {[*TILES]}')
    _claim(root, settings)
    todo = [name for name in _names(patches, size) if not _label_path(root, name).exists()]
    bar = tqdm(todo, 'Writing synthetic patches', unit='patch', disable=not (progress and todo))
    for tile, x, y in bar:
        _write_patch(root, tile, x, y, size, year, incomplete, haze, seed)
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
        if json.loads(marker.read_text()) != settings:
            raise ValueError(
                f'{marker} says that the synthetic data there were written with other settings '
                f'than {settings}; delete {root} or give another root'
            )
        return
    if (root / LABELS).is_dir() and any((root / LABELS).iterdir()):
        raise ValueError(f'{root} holds a data set that is not synthetic; give another root')
    for folder in (LABELS, GROUND_REFERENCE, *SENSORS):
        (root / folder).mkdir(parents=True, exist_ok=True)
    _write_text(marker, json.dumps(settings, indent=1))


def _names(patches: Mapping[str, int], size: int) -> Iterator[tuple[str, int, int]]:
    for tile, count in patches.items():
        side = int(np.ceil(np.sqrt(count)))
        for number in range(count):
            yield tile, number % side * (size + 1), number // side * (size + 1)


def _label_path(root: Path, name: tuple[str, int, int]) -> Path:
    return root / LABELS / '{}_{}_{}.json'.format(*name)


def _write_patch(
    root: Path,
    tile: str,
    x: int,
    y: int,
    size: int,
    year: int,
    incomplete: float,
    haze: float,
    seed: int,
) -> None:
    """Write the rasters of a patch and then its label file, which makes it part of the set."""
    rng = np.random.default_rng([seed, crc32(f'{tile}_{x}_{y}'.encode())])
    cover, parcel = _landscape(rng, size)
    labels = np.array([c.label for c in _COVERS], np.uint8)[cover]
    names: dict[str, list[str]] = {}
    profile = _profile(tile, x, y, size)
    shift = rng.normal(0, 9, parcel.max() + 1)[parcel]
    vigour = rng.normal(1, 0.12, parcel.max() + 1)[parcel].clip(0.6, 1.15)
    for sensor, days in (('s2', _s2_days(rng, incomplete)), ('s1', _s1_days(rng))):
        draw = _reflectance if sensor == 's2' else _backscatter
        names[sensor] = []
        for day in rng.permutation(days):
            date = np.datetime64(f'{year}-01-01') + int(day)
            name = f'{tile}_{str(date).replace("-", "")}_{sensor.upper()}_{x}_{y}.tif'
            image = draw(rng, cover, int(day), shift, vigour, haze)
            _write_raster(root / sensor / name, image, profile)
            names[sensor].append(name)
    _write_raster(root / GROUND_REFERENCE / f'{tile}_GR_{x}_{y}.tif', labels[None], profile)
    content = {
        'corresponding_s2': ';'.join(names['s2']),
        'corresponding_s1': ';'.join(names['s1']),
        'projection': profile['crs'].to_wkt(version='WKT1_GDAL'),
        'labels': ';'.join(map(str, np.unique(labels))),
    }
    _write_text(_label_path(root, (tile, x, y)), json.dumps(content))


def _landscape(rng: np.random.Generator, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Cover (index in _COVERS) and parcel number of each pixel, both (size, size)."""
    yx = np.indices((size, size)).reshape(2, -1).T.astype(float)
    centres = rng.uniform(0, size, (max(size * size // 130, 4), 2))
    wavy = yx + 1.5 * np.sin(yx[:, ::-1] / 5 + rng.uniform(0, 6, 2))
    parcel = _nearest(centres, wavy).reshape(size, size)
    cover = _parcel_covers(rng, centres, size)[parcel]
    if rng.random() < 0.35:
        _draw_river(rng, cover)
    for _ in range(rng.integers(1, 3)):
        _draw_road(rng, cover)
    return cover, parcel


def _nearest(centres: Array, points: Array) -> NDArray[np.intp]:
    """Number of the centre that is nearest to each point."""
    squares = (centres**2).sum(1) - 2 * points @ centres.T
    return squares.argmin(1)


def _blur(image: Array, sigma: float) -> Array:
    """Gaussian blur of an image (C, H, W)."""
    width = min(2 * int(np.ceil(3 * sigma)) + 1, 2 * (image.shape[-1] // 2) - 1)
    blurred = gaussian_blur2d(torch.from_numpy(image)[None], (width, width), (sigma, sigma))
    return blurred[0].numpy()


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


def _s1_days(rng: np.random.Generator) -> NDArray[np.int64]:
    """Days of the year of an orbit that comes back every 12 days."""
    return np.arange(rng.integers(100, 112), 366, 12)


def _growth(cover: NDArray[np.intp], day: int, shift: Array, vigour: Array) -> Array:
    """Share of each pixel that plants cover."""
    low, high, start, end = (
        np.array([getattr(c, field) for c in _COVERS])[cover]
        for field in ('low', 'high', 'start', 'end')
    )
    season = phenology(day, start + shift, end + shift)
    return ((low + (high - low) * season) * vigour).clip(0, 1)


def _reflectance(
    rng: np.random.Generator,
    cover: NDArray[np.intp],
    day: int,
    shift: Array,
    vigour: Array,
    haze: float,
) -> NDArray[np.int16]:
    """Sentinel-2 image, (10, H, W), reflectance x 10,000."""
    plants = _growth(cover, day, shift, vigour)
    ground = np.zeros((len(_COVERS), len(_SPECTRA)))
    for i, c in enumerate(_COVERS):
        ground[i, list(c.ground)] = list(c.ground.values())
    spectra = (ground @ _SPECTRA)[cover] * rng.normal(1, 0.08) * (2 - vigour)[..., None]
    green = _SPECTRA[np.array([c.plant for c in _COVERS])[cover]]
    image = plants[..., None] * green + (1 - plants[..., None]) * spectra
    image = _blur(np.moveaxis(image, -1, 0), 0.6)  # the sensor's point spread
    image = image * rng.normal(1, 0.03, (10, 1, 1)) + rng.normal(0, 0.004, (10, 1, 1))
    image += rng.normal(0, 0.012, image.shape) * (0.3 + image)
    if rng.random() < haze:
        bank = _blur(rng.normal(size=(1, *cover.shape)), len(cover) / 8)
        veil = ((bank - bank.mean()) / bank.std()).clip(0, 2) * 0.15
        image = image * (1 - veil) + 0.45 * veil
    return (image.clip(0.0001, 1.5) * 1e4).astype(np.int16)


def _backscatter(
    rng: np.random.Generator,
    cover: NDArray[np.intp],
    day: int,
    shift: Array,
    vigour: Array,
    haze: float,
) -> NDArray[np.float32]:
    """Sentinel-1 image, (2, H, W), linear power of VV and VH."""
    plants = _growth(cover, day, shift, vigour)
    wet = rng.normal(0, 1) * (1 - plants)  # moist soil scatters more
    bands = []
    for band, field in enumerate(('vv', 'vh')):
        mean = np.array([getattr(c, field) for c in _COVERS])[cover]
        gain = np.array([c.gain[band] for c in _COVERS])[cover]
        power = 10 ** ((mean + gain * plants + wet + rng.normal(0, 0.3)) / 10)
        bands.append(power)
    mixed = _blur(np.stack(bands), 0.7)
    return (mixed * speckle(rng, mixed.shape)).astype(np.float32)


def _profile(tile: str, x: int, y: int, size: int) -> dict[str, Any]:
    epsg, left, top = TILES[tile]
    return {
        'driver': 'GTiff',
        'compress': 'lzw',
        'width': size,
        'height': size,
        'crs': CRS.from_epsg(epsg),
        'transform': from_origin(left + 10 * x, top - 10 * y, 10, 10),
    }


def _write_raster(path: Path, image: NDArray[np.generic], profile: Mapping[str, object]) -> None:
    with rasterio.open(path, 'w', count=len(image), dtype=image.dtype.name, **profile) as dst:
        dst.write(image)


def _write_text(path: Path, text: str) -> None:
    part = path.with_suffix('.part')
    part.write_text(text)
    part.replace(path)
