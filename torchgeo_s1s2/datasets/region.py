"""A place and a season in MultiSenGE's layout, from xarray, whatever made it."""

import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from operator import eq
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.windows import Window
from tqdm import tqdm

from torchgeo_s1s2.datasets.catalog import (
    FOLDERS,
    GROUND_REFERENCE,
    LABELS,
    image_name,
    reference_name,
)
from torchgeo_s1s2.datasets.labels import write_label_files
from torchgeo_s1s2.datasets.rasters import Grid, check_power, check_written, read_grid
from torchgeo_s1s2.datasets.sensors import SENSORS, Sensor, readings, tags_of, words_of
from torchgeo_s1s2.errors import DataError, ImplausibleValuesError, warn
from torchgeo_s1s2.files import whole

Merge = Literal['pass', 'day'] | None
Key = tuple[pd.Timestamp, str]
"""Time of an image and what names its sensor, such as ``S1_ASC``."""

CHUNK = 2048
"""Height and width in pixels of the chunks of what has none; a multiple of the files' blocks."""

_SAME: dict[Merge, Callable[[pd.Timestamp, pd.Timestamp], bool]] = {
    'pass': lambda before, time: time - before <= pd.Timedelta(minutes=30),  # an orbit takes 98
    'day': lambda before, time: before.date() == time.date(),
    None: eq,
}
"""Whether two acquisitions that follow each other make one image."""

# openEO says t and bands, xarray's to_array says variable, older Earth Engine backends X and Y.
_DIMENSIONS = {'t': 'time', 'X': 'x', 'Y': 'y', 'bands': 'band', 'variable': 'band'}
ORBITS = {'asc': 'ASC', 'ascending': 'ASC', 'desc': 'DESC', 'descending': 'DESC'}
_WARP = (
    'in degrees; warp them to metres, for instance with '
    'data.rio.reproject(data.rio.estimate_utm_crs(), resolution=10), or ask for a UTM zone'
)
_PROFILE = {
    'driver': 'GTiff',
    'tiled': True,
    'blockxsize': 256,
    'blockysize': 256,
    'interleave': 'band',
    'compress': 'zstd',
    'zstd_level': 1,
    'num_threads': 'all_cpus',
    'bigtiff': 'if_safer',
}


class Outcome(NamedTuple):
    """Why an image was not written, empty if it was, and what was left out of it."""

    left_out: str = ''
    notes: tuple[str, ...] = ()


Job = Callable[[Path], Outcome]
"""Writes the image of a path; goes to worker processes."""
Images = Mapping[str, Mapping[str, Job]]
"""Jobs by sensor and file name."""


def write_series(
    root: str | os.PathLike[str],
    s2: Any = None,
    s1: Any = None,
    tile: str = 'region',
    labels: Any = None,
    merge: Merge = 'pass',
    unit: str | Mapping[str, str] | None = None,
    offset: Any = None,
    nodata: Mapping[str, float] | None = None,
    corners: bool | None = None,
    progress: bool = True,
) -> Path:
    """Write series of images from xarray as a patch of a data set in MultiSenGE's layout.

    Takes what odc-stac, xee, openEO, cubo, stackstac and sentle give as it is: a Dataset with a
    variable a band, or a DataArray with a dimension ``band``; with x, y and time in any order and
    direction, and a CRS in metres where rioxarray, odc-geo or CF conventions have it. Bands are
    known by name (``B02``, ``B2``) or common name (``blue``); names such as ``vv_asc``, or a
    coordinate ``sat:orbit_state``, tell the orbits of Sentinel-1 apart.

    Each acquisition becomes a GeoTIFF that names its bands and tags its no-data value. dask
    computes it chunk by chunk, with a few chunks in memory; where there is a ``dask.distributed``
    client, on its workers, which must see ``root``. A file is there whole or not at all, and those
    that are there are not written again.

    Args:
        root: Folder of the data set; made if it is not there.
        s2: Sentinel-2, Dataset or DataArray; None for none.
        s1: Sentinel-1, on the same pixels; may be the same array.
        tile: Name of the tile, of letters, digits and ``_``; the patch is ``TILE_0_0``.
        labels: DataArray (y, x) of labels on the same pixels, below 255.
        merge: What makes one image: acquisitions of one orbit less than half an hour apart
            (``'pass'``), those of a day (``'day'``) or of one time (None). The first that saw a
            pixel gives it.
        unit: What the values are if not reflectance x 10,000 and linear power, as in
            :class:`~torchgeo_s1s2.datasets.MultiSenGE`. Files hold reflectance x 10,000 and linear
            power.
        offset: What to add to Sentinel-2's values, as there, or a DataArray of it along time; 0 if
            they are as they should be. Files say the unit and the offset that are given here, so
            that neither is applied again.
        nodata: By sensor, the value without an observation, in place of what the arrays say.
            Where they do not: NaN, 0 of unsigned types, -10000 (Sentinel-2) or 0 of others.
        corners: Whether x and y are those of the pixels' upper left corners and not of their
            centres; what cubo and sentle tell of that unless given.
        progress: Show a progress bar.

    Returns:
        The root.

    Raises:
        DataError: If an array does not say where it lies or what it is, or another patch of that
            name is there.
        ImportError: If the extra ``stac`` is not installed.
    """
    if merge not in _SAME:
        raise ValueError(f"merge is {merge!r}; expected 'pass', 'day' or None")
    known = readings([*SENSORS], unit=unit, nodata=nodata)
    cubes = {
        name: _Cube(data, SENSORS[name], known[name].unit, (nodata or {}).get(name), corners, add)
        for name, data, add in (('s2', s2, offset), ('s1', s1, 0))
        if data is not None
    }
    if not cubes:
        raise DataError('there is nothing to write; give s2, s1 or both')
    grid, *others = (cube.grid for cube in cubes.values())
    reference = None
    if labels is not None:
        if not hasattr(labels, 'to_dataset'):
            raise DataError(f'labels are a {type(labels).__name__}; expected a DataArray (y, x)')
        dataset = _dataset(labels.to_dataset(name='labels'), {'y', 'x'})
        others.append(_grid(dataset, corners))
        labels = _only(dataset['labels'], 'y', 'x')
        missing = _tag_of(labels, np.nan)
        reference = lazily(_labels, dask_of(labels), dtype='uint8', missing=missing)
    if not all(other.coincides(grid) for other in others):
        found = '; '.join(map(str, [grid, *others]))
        raise DataError(f's2, s1 and labels lie on different pixels, {found}; warp them')
    images = {name: cube.jobs(tile, merge) for name, cube in cubes.items()}
    paths = paths_of(Path(root), images)
    if there := sum(path.exists() for path in paths):
        warn(
            f'images of {tile} that are there already, not written again: {there} of {len(paths)}; '
            'delete what shall be'
        )
    write_patch(root, tile, grid, images, progress, reference)
    return Path(root)


def write_patch(
    root: str | os.PathLike[str],
    tile: str,
    grid: Grid,
    images: Images,
    progress: bool = True,
    labels: Any = None,
) -> dict[str, str]:
    """Write the images of a patch that are not there, its labels (H, W) and its label file.

    Returns:
        Why images were left out, by file name.
    """
    root = Path(root)
    paths = paths_of(root, images)
    for folder in (LABELS, *FOLDERS):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for path in images_of(root, tile)[:1]:
        if not (there := read_grid(path)).coincides(grid):
            raise DataError(f'{path} lies at {there}, not at {grid}; choose another tile or root')
    outcomes = dict(_run({p: job for p, job in paths.items() if not p.exists()}, progress))
    _warn(outcomes, len(paths))
    if not images_of(root, tile):
        raise DataError(
            f'none of the images of {tile} ({len(paths)}) has a pixel: nothing to write'
        )
    if labels is not None:
        path = root / GROUND_REFERENCE / reference_name(patch_name(tile))
        write_bands(path, grid, [{'label': labels}], 255)
    write_label_files(root, overwrite=True, progress=False, names=[patch_name(tile)])
    return {path.name: outcome.left_out for path, outcome in outcomes.items() if outcome.left_out}


def patch_name(tile: str) -> str:
    """Name of the patch that is the whole of a tile."""
    if re.fullmatch(r'\w+', tile) is None:
        raise DataError(f'tile is {tile!r}; expected letters, digits and _')
    return f'{tile}_0_0'


def paths_of(root: Path, images: Images) -> dict[Path, Job]:
    """Jobs by the paths of their images."""
    return {root / s / name: job for s, own in images.items() for name, job in own.items()}


def images_of(root: Path, tile: str) -> list[Path]:
    """Images of a tile on disk, none of one whose name begins alike."""
    name = re.compile(rf'{tile}_\d{{8}}(T\d{{6}})?_S[12]\w*_0_0\.tif')
    return sorted(path for path in root.glob(f's[12]/{tile}_*.tif') if name.fullmatch(path.name))


def group(
    times: Sequence[pd.Timestamp], kinds: Sequence[str], merge: Merge
) -> dict[Key, list[int]]:
    """Numbers of the acquisitions that make one image, in the order of time."""
    if merge == 'day':
        kinds = [kind.split('_')[0] for kind in kinds]
    groups: dict[Key, list[int]] = {}
    last: Key = pd.Timestamp(0), ''
    for i in sorted(range(len(times)), key=lambda i: (kinds[i], times[i])):
        same = kinds[i] == last[1] and _SAME[merge](times[groups[last][-1]], times[i])
        last = last if same else (times[i], kinds[i])
        groups.setdefault(last, []).append(i)
    return groups


def file_name(tile: str, time: pd.Timestamp, kind: str) -> str:
    """File name of an image, without the time of day where it is midnight and so not known."""
    style = '%Y%m%d' if time == time.normalize() else '%Y%m%dT%H%M%S'
    return image_name(patch_name(tile), time.strftime(style), kind)


def kind_of(name: str, orbit: str | None) -> str:
    """What names a sensor, such as ``S1_ASC``, if Sentinel-1's orbit is known."""
    known = ORBITS.get(str(orbit).lower()) if name.upper() == 'S1' else None
    return f'S1_{known}' if known else name.upper()


def baseline_of(text: Any) -> float:
    """Processing baseline that is told as 04.00, 4.0 or N0400; 0 if none is."""
    found = re.fullmatch(r'N?0?(\d)\.?(\d*)', str(text).strip())
    return float(f'{found[1]}.{found[2]}') if found else 0


def utc(times: Iterable[Any]) -> list[pd.Timestamp]:
    """Times in UTC without a zone, in whole seconds."""
    return [*pd.to_datetime([*times], utc=True).tz_localize(None).floor('s')]


def _run(jobs: Mapping[Path, Job], progress: bool) -> Iterable[tuple[Path, Outcome]]:
    """Do the jobs: on the workers of a distributed client if there is one, else one by one."""
    client: Any = None
    with suppress(ImportError, ValueError):
        client = import_module('distributed').get_client()
    done = ((path, job(path)) for path, job in jobs.items())
    if client is not None:
        futures = {client.submit(job, path, pure=False): path for path, job in jobs.items()}
        ready = import_module('distributed').as_completed(futures)
        done = ((futures[future], future.result()) for future in ready)
    hidden = not (progress and jobs)
    return tqdm(done, 'Writing images', len(jobs), unit='image', disable=hidden)


def _warn(outcomes: Mapping[Path, Outcome], count: int) -> None:
    reasons = Counter(filter(None, (outcome.left_out for outcome in outcomes.values())))
    notes = [note for outcome in outcomes.values() for note in outcome.notes]
    if reasons:
        why = '; '.join(f'{n} {reason}' for reason, n in reasons.items())
        notes.insert(0, f'images left out: {reasons.total()} of {count} ({why})')
    if notes:
        warn('; '.join(notes))


class _Cube:
    """A sensor's part of an xarray: its bands (time, y, x), north up, and how to clean them."""

    def __init__(
        self,
        data: Any,
        sensor: Sensor,
        unit: str | None,
        nodata: float | None,
        corners: bool | None,
        offset: Any,
    ) -> None:
        dataset = _dataset(data, {'time', 'y', 'x'})
        self.sensor, self.nodata = sensor, nodata
        self.unit = None if unit == next(iter(sensor.units)) else unit
        self.tags = tags_of(sensor.name, unit is not None, offset is not None)
        self.grid = _grid(dataset, corners)
        self.times = _times(dataset['time'])
        self.bands = _bands(dataset, sensor)
        self.baselines, self.orbits = (
            np.broadcast_to(dataset.coords.get(name, ''), len(self.times))
            for name in ('s2:processing_baseline', 'sat:orbit_state')
        )
        self.offsets = self._offsets(offset)
        variables = [v for own in self.bands.values() for v in own.values()]
        self.type, self.tag = self._type(variables), self._missing(variables[0])
        if self.type == 'float32':
            self.tag = np.nan
        elif any(self.offsets):
            self.type, self.tag = 'int16', sensor.nodata

    def _offsets(self, offset: Any) -> list[float]:
        """What is to be added at each time."""
        late = sum(baseline_of(baseline) >= 4 for baseline in self.baselines)
        if offset is None and late:
            warn(
                f's2 has acquisitions of processing baseline 04.00 and later ({late}), whose '
                'values are 1,000 too high unless their source has harmonised them; give '
                'offset=-1000, or 0 if it has'
            )
        if hasattr(offset, 'dims'):
            return self._offsets_along_time(offset)
        reading = readings(['s2'], offset=offset)['s2']
        return [reading.offset(np.datetime64(time)) for time in self.times]

    def _offsets_along_time(self, offset: Any) -> list[float]:
        """Offsets of an array at each time, in whatever order it has them."""
        values = offset.values
        if offset.dims and 'time' in offset.coords:
            own = _times(offset['time'])
            if own != self.times:
                known = dict(zip(own, values, strict=True))
                values = np.array([known.get(time, np.nan) for time in self.times])
        if values.size not in (1, len(self.times)) or not np.isfinite(values.astype(float)).all():
            raise DataError(
                f'offset holds {offset.values} along {", ".join(offset.dims)}; expected a number '
                'at each time of s2'
            )
        return [*map(float, np.broadcast_to(values, len(self.times)))]

    def jobs(self, tile: str, merge: Merge) -> dict[str, Job]:
        """What writes each image, by its file name."""
        where = [(kind, t) for kind in self.bands for t in range(len(self.times))]
        kinds = [kind_of(kind, self.orbits[t]) for kind, t in where]
        groups = group([self.times[t] for _, t in where], kinds, merge)
        return {
            file_name(tile, *key): partial(
                write_bands,
                grid=self.grid,
                layers=[self._layer(*where[i]) for i in numbers],
                nodata=self.tag,
                tags=self.tags,
            )
            for key, numbers in groups.items()
        }

    def _layer(self, kind: str, time: int) -> dict[str, Any]:
        """Bands at a time in the unit of the layout."""
        how = {
            'dtype': self.type,
            'kind': self.type,
            'tag': self.tag,
            'offset': self.offsets[time],
            'positive': self.sensor.positive and self.unit != 'db',
            'convert': partial(_to_layout, self.sensor, self.unit) if self.unit else None,
        }
        return {
            name: lazily(clean, dask_of(v.isel(time=time)), missing=self._missing(v), **how)
            for name, v in self.bands[kind].items()
        }

    def _type(self, variables: Sequence[Any]) -> str:
        """Type of the files: that of the arrays where GeoTIFF has it and values stay."""
        for v in variables:
            if v.attrs.get('scale_factor', 1) != 1 or v.attrs.get('add_offset', 0) != 0:
                raise DataError(f'{v.name} is packed; unpack it with xarray.decode_cf, give unit')
            if v.dtype.kind not in 'uif':
                raise DataError(f'{v.name} has the type {v.dtype}; expected real numbers')
        kinds = {v.dtype.name for v in variables}
        same = len(kinds) == 1 and kinds <= {'uint8', 'uint16', 'int16', 'int32'} and not self.unit
        return kinds.pop() if same else 'float32'

    def _missing(self, variable: Any) -> float:
        """Value without an observation."""
        usual = {'f': np.nan, 'u': 0.0, 'i': self.sensor.nodata}[variable.dtype.kind]
        return _tag_of(variable, usual, self.nodata)


def optional(module: str) -> Any:
    """Import a module of the extra ``stac``, or say how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module} cannot be imported ({error}); install what it takes to read regions with '
            'pip install "torchgeo-s1s2[stac]"'
        ) from error


@contextmanager
def threads() -> Iterator[dict[str, Any]]:
    """How dask shall compute: in threads that have all ended afterwards, even after an error."""
    count = optional('dask').config.get('num_workers', None) or os.cpu_count()
    # rasterio ignores warnings in its threads, which may leave all of them ignored.
    with warnings.catch_warnings(), ThreadPoolExecutor(count) as pool:
        yield {'scheduler': 'threads', 'pool': pool}


def lazily(function: Callable[..., NDArray[Any]], *arrays: Any, **kwargs: Any) -> Any:
    """The dask array of a function of the blocks of arrays (H, W), however these are cut."""
    pairs = [part for array in arrays for part in (array, 'yx')]
    return optional('dask.array').blockwise(function, 'yx', *pairs, **kwargs)


def clean(
    value: NDArray[Any],
    *,
    kind: str,
    tag: float,
    missing: float,
    offset: float = 0,
    positive: bool = False,
    convert: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
) -> NDArray[Any]:
    """Values as files have them: a tag for what is missing, not finite, or not positive."""
    empty = _is(value, missing)
    if value.dtype.kind == 'f':
        empty |= ~np.isfinite(value)
    if positive:
        check_power('s1', value[~empty])
        empty |= ~(value > 0)
    elif kind != 'float32' and value.dtype.kind == 'f':
        _check_dn(value[~empty])
    if offset:
        value = value.astype(np.float32 if value.dtype.kind == 'f' else np.int32) + offset
    if convert:
        value = convert(value)
    if kind != 'float32' and value.dtype != kind:
        value = value.round().clip(np.iinfo(kind).min, np.iinfo(kind).max)
    value = value.astype(kind)
    value[empty] = tag
    return value


def _check_dn(value: NDArray[Any]) -> None:
    """Raise an error where values that shall be whole numbers are mostly reflectance."""
    if ((value > 0) & (value < 1)).sum() > value.size / 2:
        raise ImplausibleValuesError(
            f's2 holds reflectance itself (median {np.median(value):.3g}), expected 10,000 times '
            "that; take another source, or give write_series(unit='reflectance') the arrays"
        )


def _labels(value: NDArray[Any], missing: float) -> NDArray[np.uint8]:
    """Labels as files have them, 255 for none."""
    empty = _is(value, missing) | (value == 255) | ~np.isfinite(value)
    odd = value[~(empty | np.isin(value, range(255)))]
    if odd.size:
        raise DataError(f'labels hold {odd[0]}; expected whole numbers from 0 to 254, or give NaN')
    return np.where(empty, 255, value).astype(np.uint8)


def fuse(layers: Sequence[Mapping[str, Any]], nodata: float) -> dict[str, Any]:
    """One dask array a band, each pixel from the first layer that has it."""
    return {
        name: lazily(_first_seen, *(layer[name] for layer in layers), dtype=a.dtype, nodata=nodata)
        for name, a in layers[0].items()
    }


def _first_seen(first: NDArray[Any], *others: NDArray[Any], nodata: float) -> NDArray[Any]:
    out = first.copy() if others else first
    for other in others:
        np.copyto(out, other, where=_is(out, nodata))
    return out


def _is(value: NDArray[Any], nodata: float) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.isnan(value) if np.isnan(nodata) else value == nodata
    return found


def write_bands(
    path: Path,
    grid: Grid,
    layers: Sequence[Mapping[str, Any]],
    nodata: float,
    tags: Mapping[str, str] | None = None,
) -> Outcome:
    """Write layers of dask arrays (H, W), one a band, as a GeoTIFF, block by block."""
    bands = fuse(layers, nodata)
    dtype = next(iter(bands.values())).dtype
    profile = _PROFILE | vars(grid) | {'nodata': nodata, 'dtype': dtype, 'count': len(bands)}
    profile['predictor'] = 3 if dtype.kind == 'f' else 2
    with whole(path) as temporary:
        with rasterio.open(temporary, 'w', **profile) as dst:
            dst.descriptions = tuple(bands)
            dst.update_tags(**(tags or {}))
            targets = [_Band(path, dst, number, nodata) for number in range(1, len(bands) + 1)]
            with threads() as how:  # only threads share an open file
                lock = threading.Lock()
                optional('dask.array').store([*bands.values()], targets, lock=lock, **how)
        check_written(temporary, path)
    if any(target.seen for target in targets):
        return Outcome()
    path.unlink()
    return Outcome('without a pixel')


@dataclass
class _Band:
    """A band of an open file, to which dask assigns blocks, and whether one had a value."""

    path: Path
    dst: Any
    number: int
    nodata: float
    seen: bool = False

    def __setitem__(self, where: tuple[slice, slice], value: NDArray[Any]) -> None:
        (top, bottom), (left, right) = ((part.start, part.stop) for part in where)
        self.seen = self.seen or not _is(value, self.nodata).all()
        window = Window(left, top, right - left, bottom - top)
        try:
            self.dst.write(value, self.number, window=window)
        except RasterioError as error:  # unlike one of reading, it is no reason to try again
            raise OSError(
                f'{self.path} cannot be written: {error.__cause__ or error}. See whether the disk '
                'is full'
            ) from error


def _dataset(data: Any, dimensions: set[str]) -> Any:
    """A Dataset with a variable a band, whose columns go east and rows south."""
    if not hasattr(data, 'rename') or not hasattr(data, 'dims'):
        raise DataError(f'{type(data).__name__} is no Dataset or DataArray of xarray; give one')
    data = data.rename({old: new for old, new in _DIMENSIONS.items() if old in data.dims})
    if degrees := {'lat', 'lon', 'latitude', 'longitude'} & {*map(str, data.dims)}:
        raise DataError(f'the pixels lie along {", ".join(sorted(degrees))}, {_WARP}')
    if not hasattr(data, 'data_vars'):
        single = {} if 'band' in data.dims else {'name': data.name or 'band'}
        data = data.to_dataset('band' if 'band' in data.dims else None, **single).assign_attrs(
            data.attrs
        )
    if 'time' in (dimensions & {*data.coords}) - {*data.dims}:
        data = data.expand_dims('time')
    if lacking := dimensions - {*map(str, data.dims)}:
        raise DataError(
            f'the dimensions are {", ".join(map(str, data.dims))} and lack '
            f'{", ".join(sorted(lacking))}; rename them with data.rename'
        )
    for name, step in (('x', 1), ('y', -1)):
        if name not in data.coords or not data.sizes[name]:
            raise DataError(
                f'the array has no coordinates of the pixels along {name}; give them in metres, '
                f'as in data.assign_coords({name}=...)'
            )
        if (data[name].values[-1] - data[name].values[0]) * step < 0:
            data = data.isel({name: slice(None, None, -1)})
    return data


def _bands(dataset: Any, sensor: Sensor) -> dict[str, dict[str, Any]]:
    """Variables by kind (``S1``, ``S1_ASC``) and band."""
    bands: dict[str, dict[str, Any]] = {}
    words = [words_of(str(name)) for name in dataset.data_vars]
    orbits = [next((word for word in own if word in ORBITS), '') for own in words]
    names = sensor.named(['_'.join(word for word in own if word not in ORBITS) for own in words])
    for variable, orbit, band in zip(dataset.data_vars.values(), orbits, names, strict=True):
        if band and {'time', 'y', 'x'} <= {*variable.dims}:
            own = bands.setdefault(kind_of(sensor.name, orbit), {})
            if band in own:
                twice = f'{own[band].name} and {variable.name}'
                raise DataError(f'{band} is there twice, as {twice}; drop one')
            own[band] = _only(variable, 'time', 'y', 'x')
    if not bands:
        raise DataError(
            f'no band of {sensor.name} is among {", ".join(map(str, dataset.data_vars))}; rename '
            f'them to {", ".join(sensor.bands)}'
        )
    for kind, own in bands.items():
        if lacking := [band for band in sensor.bands if band not in own]:
            warn(
                f'{kind} has no {", ".join(lacking)} along time, y and x; its files hold '
                f'{", ".join(own)}. If others of {", ".join(map(str, dataset.data_vars))} are '
                'among them, rename these'
            )
    return {kind: {b: own[b] for b in sensor.bands if b in own} for kind, own in bands.items()}


def _only(variable: Any, *dimensions: str) -> Any:
    """A variable along these dimensions, in this order."""
    if more := ', '.join(map(str, {*variable.dims} - {*dimensions})):
        raise DataError(f'{variable.name} has the dimension {more} too; choose with data.isel')
    return variable.transpose(*dimensions)


def _times(coordinate: Any) -> list[pd.Timestamp]:
    """Times of a coordinate."""
    if coordinate.dtype.kind in 'iuf' or pd.isna(times := utc(coordinate.values)).any():
        raise DataError(f'time holds {coordinate.values[:3]} ..., not all of which are times')
    return times


def _tag_of(variable: Any, usual: float, given: float | None = None) -> float:
    """Value that a variable is given, or says, to have where it has none."""
    told = [variable.attrs.get(name) for name in ('_FillValue', 'nodata', 'missing_value')]
    tags = [float(tag) for tag in (given, *told) if tag is not None]
    whole_numbers = variable.dtype.kind in 'iu'  # among which there is no NaN
    return next((tag for tag in tags if not (whole_numbers and np.isnan(tag))), usual)


def _to_layout(sensor: Sensor, unit: str, value: NDArray[Any]) -> NDArray[Any]:
    """Bring values to the unit of the layout's files."""
    one = next(iter(sensor.units.values()))(np.ones(1, np.float32))
    return sensor.units[unit](value.astype(np.float32)) / one


def _grid(dataset: Any, corners: bool | None) -> Grid:
    """Where the pixels lie."""
    crs = _crs(dataset)
    if not crs.is_projected:
        raise DataError(f'the pixels are in {crs}, {_WARP}')
    (left, width), (top, height) = (_axis(dataset[name]) for name in ('x', 'y'))
    half = 0 if (_at_corners(dataset) if corners is None else corners) else 0.5
    transform = Affine(width, 0, left - half * width, 0, height, top - half * height)
    return Grid(crs, transform, dataset.sizes['x'], dataset.sizes['y'])


def _axis(coordinate: Any) -> tuple[float, float]:
    """First value and step of a coordinate."""
    values = coordinate.values.astype(float)
    steps = np.diff(values)
    if not steps.size or np.ptp(steps) > abs(steps.mean()) / 10:
        raise DataError(
            f'{coordinate.name} holds {values[:3]} ..., which are not the even steps of a grid; '
            'resample the pixels'
        )
    return values[0], steps.mean()


def _at_corners(dataset: Any) -> bool:
    """Whether coordinates are those of upper left corners, as far as sentle and stackstac tell.

    sentle says so in an attribute of x and y. stackstac, also below cubo, gives corners unless
    asked, on a grid whose corners are multiples of the resolution. Its coordinate ``epsg`` stays
    where its attributes are lost.
    """
    x, attrs = dataset['x'], dataset.attrs
    if 'coord_save_mode' in x.attrs:
        return bool(x.attrs['coord_save_mode'] == 'top-left')
    if not {'spec', 'central_x'} & {*attrs} or 'resolution' not in attrs:
        if 'epsg' in dataset.coords:
            raise DataError(
                'x and y may be those of the centres of pixels or, as stackstac gives them unless '
                'asked, of their upper left corners, and the attributes that tell are lost; give '
                'corners=False or corners=True'
            )
        return False
    return bool(abs(float(x[0]) / float(attrs['resolution']) % 1 - 0.5) > 0.25)


def _crs(dataset: Any) -> CRS:
    """CRS of a grid mapping (rioxarray, odc-geo, openEO, sentle), or attributes (xee, cubo)."""
    names = ('spatial_ref', 'crs_wkt', 'crs', 'proj:code', 'epsg', 'proj:epsg')
    places = [v.attrs for v in (*dataset.variables.values(), dataset)]
    places.append({n: v.item() for n, v in dataset.coords.items() if n in names and not v.dims})
    for name in names:
        for value in (place[name] for place in places if place.get(name)):
            code = str(value).removesuffix('.0')  # as text, or of a type of NumPy
            with suppress(CRSError, ValueError):
                return CRS.from_user_input(int(code) if code.isdigit() else value)
    raise DataError('the array does not say its CRS; give it, as in data.rio.write_crs(32632)')


def dask_of(array: Any) -> Any:
    """The dask array of a DataArray, which is cut to chunks unless it has some."""
    return (array if array.chunks else array.chunk({'y': CHUNK, 'x': CHUNK})).data
