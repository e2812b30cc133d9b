"""A region from a STAC API, and what each source of Sentinel data must be told."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import ceil, floor
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, get_args

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from shapely import box
from tqdm import tqdm
from urllib3.util import Retry

from torchgeo_s1s2.datasets.rasters import Grid, crs_of
from torchgeo_s1s2.datasets.region import (
    CHUNK,
    Merge,
    Outcome,
    baseline_of,
    clean,
    file_name,
    fuse,
    group,
    images_of,
    kind_of,
    lazily,
    optional,
    patch_name,
    paths_of,
    threads,
    utc,
    write_bands,
    write_patch,
)
from torchgeo_s1s2.datasets.sensors import SENSORS, Sensor, in_order, tags_of
from torchgeo_s1s2.datasets.sources import Source, Wanted
from torchgeo_s1s2.datasets.time_series import DateRule
from torchgeo_s1s2.datasets.vectors import read_vectors
from torchgeo_s1s2.errors import DataError, DownloadError, warn
from torchgeo_s1s2.files import check_room, read_json, write_json

WAITS = (1.0, 2.0, 4.0)
"""Seconds before an image is read again; GDAL forgets what it had of a file after the first."""
_BUSY = (429, 500, 502, 503, 504)  # answers after which a request is repeated
_SILENCE = 60  # seconds without a byte after which a request fails; nothing else would end it
HTTP = {
    'GDAL_DISABLE_READDIR_ON_OPEN': 'EMPTY_DIR',
    'GDAL_HTTP_CONNECTTIMEOUT': _SILENCE,
    'GDAL_HTTP_LOW_SPEED_LIMIT': 1,
    'GDAL_HTTP_LOW_SPEED_TIME': _SILENCE,
    'GDAL_HTTP_MAX_RETRY': 5,
    'GDAL_HTTP_RETRY_DELAY': 1,
    'GDAL_HTTP_RETRY_CODES': ','.join(map(str, _BUSY)),
}
FRESH = {'CPL_VSIL_CURL_NON_CACHED': '/vsicurl/'}  # forgets what GDAL had of a file
Offset = float | Literal['item', 'harmonised']
Orbits = Literal['apart', 'merged', 'ascending', 'descending']
_WIDEST = 100_000  # pixels: 1,000 km, more than a zone with its margins
_PUBLISHED = pd.Timedelta(days=7)  # for images that are published late
_EDGE = 20  # metres: where Sentinel-2's pixels of both 10 and 20 m begin


@dataclass(frozen=True)
class StacCollection:
    """What of a collection its items do not say, or say wrongly.

    Attributes:
        collection: Its id.
        url: Address of its STAC API; that of the region's source unless given.
        bands: Asset of each band, where neither its name nor its common name tells, and of several
            the resolution does not.
        nodata: Value without an observation in files that have no tag.
        offset: What to add to Sentinel-2's values, or ``'item'``: after what the item says, -1000
            from processing baseline 04.00 on, unless it has been added or the asset has another. Or
            ``'harmonised'``: nothing, and items that say otherwise are counted in a warning.
        mask: Asset that classifies pixels, empty for none.
        clouds: Its classes that are clouds or their shadows.
        sign: Whether Planetary Computer is to sign the addresses of files.
        refused: Why the collection cannot be used, empty if it can.
    """

    collection: str
    url: str = ''
    bands: Mapping[str, str] = field(default_factory=dict)
    nodata: float = 0
    offset: Offset = 'item'
    mask: str = ''
    clouds: Sequence[int] = (3, 8, 9, 10)  # of sen2cor's SCL: shadow, medium, high, cirrus
    sign: bool = False
    refused: str = ''

    def __post_init__(self) -> None:
        """Check the offset."""
        if isinstance(self.offset, str) and self.offset not in ('item', 'harmonised'):
            raise ValueError(f"offset is {self.offset!r}; give a number, 'item' or 'harmonised'")


_EARTH_SEARCH = 'https://earth-search.aws.element84.com/v1'
_PLANETARY = 'https://planetarycomputer.microsoft.com/api/stac/v1'
_GRD = StacCollection(
    'sentinel-1-grd',
    _EARTH_SEARCH,
    refused='holds amplitudes in radar geometry, neither calibrated nor corrected for terrain; '
    "take Sentinel-1 from another source, as in collections={'s1': 'planetary-computer'}, or leave "
    "it out with sensors=['s2']",
)
SOURCES: dict[str, dict[str, StacCollection]] = {
    # The COGs have been harmonised: earthsearch:boa_offset_applied and raster:bands of the items
    # often deny it (github.com/Element84/earth-search, issues 9, 66 and 71; rslearn, pull 501), and
    # are right for some of early 2022 (issue 66 there; cirrus-earth-search, issue 26).
    # Files in sentinel-cogs of before 2022 have no tag; GRD after the README there.
    'earth-search': {
        's2': StacCollection('sentinel-2-l2a', _EARTH_SEARCH, offset='harmonised', mask='scl'),
        's1': _GRD,
    },
    # Baseline 05 on, never harmonised; raster:bands are right (the same README, and issue 41).
    'earth-search-c1': {
        's2': StacCollection('sentinel-2-c1-l2a', _EARTH_SEARCH, mask='scl'),
        's1': _GRD,
    },
    # Not harmonised (github.com/microsoft/PlanetaryComputer, issue 134), without raster:bands.
    # Sentinel-1 is gamma nought, linear, terrain corrected; borders hold 0 (issues 307 and 493).
    'planetary-computer': {
        's2': StacCollection('sentinel-2-l2a', _PLANETARY, mask='SCL', sign=True),
        's1': StacCollection(
            'sentinel-1-rtc', _PLANETARY, {'VV': 'vv', 'VH': 'vh'}, -32768, sign=True
        ),
    },
}
"""The collections of each source by sensor, after its documentation and its users' issues."""


@dataclass
class SentinelRegion(Source):
    """Downloads a place and a season from a STAC API, as one patch of a data set.

    The images lie on a grid of 10 m in one UTM zone, in whose lattice Sentinel-2's tiles lie too.
    Values are reflectance x 10,000 (int16) and linear power (float32), offsets applied; clouds are
    missing. Of a date rule, only the dates that it may choose are read. What will be read is told
    before. An image is there whole or not at all, and an interrupted run goes on; a finished one
    needs no network as long as its images are there, if its season had been over for a week. A
    missing or broken file is left out with a warning that names it. Images of this tile that the
    arguments do not give are refused.

    Attributes:
        region: West, south, east and north in degrees, or a file of geometries, whose bounds count.
        season: First and last day.
        source: One of ``SOURCES``, or the address of a STAC API.
        collections: By sensor, a description of the collection, or the name of another source.
        tile: Name of the tile; the patch is ``TILE_0_0``.
        epsg: UTM zone; that of the region's centre unless given.
        offset: What to add to Sentinel-2's values, in place of the collection's.
        clouds: Classes of the mask that become missing, in place of the collection's; [] for none.
        max_clouds: Share of the pixels seen from which on a date is left out.
        orbits: Whether images of ascending and descending orbits of Sentinel-1 are kept
            ``'apart'``, ``'merged'`` day by day, or only ``'ascending'`` or ``'descending'`` taken.
        resampling: How pixels of another size or zone are resampled, a name that GDAL has.
        chunk: Height and width in pixels of what is read at once; memory follows it.
        num_workers: Number of threads that read.

    Raises:
        DataError: If a collection is refused or says too little, or images are there of others.
        DownloadError: If the API or its files cannot be reached.
        NoSeriesError: If the dates there make no series.
        UnreadableError: If the file of geometries cannot be read.
        ValueError: If an argument is out of range.
    """

    region: list[float] | str
    season: list[str]
    source: str = 'planetary-computer'
    collections: dict[str, StacCollection | str] | None = None
    tile: str = 'region'
    epsg: int | None = None
    offset: Offset | None = None
    clouds: list[int] | None = None
    max_clouds: float = 0.5
    orbits: Orbits = 'apart'
    resampling: str = 'nearest'
    chunk: int = CHUNK
    num_workers: int = 8

    def __post_init__(self) -> None:
        """Check the arguments."""
        self.season = [str(day)[:10] for day in self.season]
        days = pd.to_datetime(self.season, errors='coerce', format='ISO8601', utc=True)
        if len(days) not in (1, 2) or days.hasnans or days[0] > days[-1]:
            raise ValueError(
                f'season is {self.season}; give its first and last day, such as 2021-06-01'
            )
        if isinstance(self.region, os.PathLike):
            self.region = str(self.region)
        if not isinstance(self.region, str):
            self.region = [*map(float, self.region)]
        if not 0 <= self.max_clouds <= 1:
            raise ValueError(f'max_clouds is {self.max_clouds}; give a share, 0 to 1')
        if self.chunk < 1:
            raise ValueError(f'chunk is {self.chunk}; give a number of pixels, 1 or more')
        in_order([self.orbits], get_args(Orbits), 'orbits')
        in_order([self.resampling], [*Resampling.__members__], 'resampling')
        if self.collections:
            in_order([*self.collections], [*SENSORS], 'sensor in collections')
        patch_name(self.tile)

    def fill(self, root: Path, wanted: Wanted) -> None:
        """Download what the date rule may choose."""
        self.write(root, wanted.series.reads(wanted.sensors), wanted.series)

    def write(
        self,
        root: str | Path,
        sensors: Sequence[str] = tuple(SENSORS),
        series: DateRule | None = None,
        progress: bool = True,
    ) -> Path:
        """Download what is not there.

        Args:
            root: Folder of the data set; made if it is not there.
            sensors: ``('s2', 's1')`` or one of them.
            series: Date rule that chooses dates; all unless given.
            progress: Print the plan and show progress bars.

        Returns:
            The root.
        """
        root, sensors = Path(root), in_order(sensors, [*SENSORS], 'sensor')
        root.mkdir(parents=True, exist_ok=True)
        known = {sensor: self.collection(sensor) for sensor in sensors}
        pixels = {sensor: self._pixels(sensor, c) for sensor, c in known.items()}
        state = _State(root / f'{self.tile}.region.json', self._settings(sensors, series), pixels)
        there = [path for path in images_of(root, self.tile) if path.parent.name in sensors]
        for path in there:
            if changed := state.changed[path.parent.name]:
                raise DataError(
                    f'the images of {self.tile} in {root} were made with other {changed}; choose '
                    'another tile or root, or delete them'
                )
        if state.finished and all(root.joinpath(image).exists() for image in state.images):
            return root
        if untold := [path for path in there if path.parent.name in state.untold]:
            warn(
                f'{state.path} does not say how images that are there were made ({len(untold)}, '
                f'such as {untold[0].name}); they are taken to be of the source, offset, clouds, '
                'orbits and resampling now given. Delete them if they are not'
            )
        late = pd.Period(self.season[-1]).end_time + _PUBLISHED
        is_over = pd.Timestamp.now('UTC').tz_localize(None) > late
        grid = self.grid()
        images = {sensor: self._images(sensor, c, grid) for sensor, c in known.items()}
        given = {name for own in images.values() for name in own}
        self._refuse_others(root, there, given)  # before the state of another run is replaced
        with optional('dask').config.set(num_workers=self.num_workers):
            self._leave_clouds_out(images.get('s2', {}), state, progress)
            state.save()
            self._refuse_others(root, there, given - {*state.left_out})
            while True:
                chosen = self._choose(images, state.left_out, series)
                if not any(chosen.values()):
                    why = Counter(state.left_out.values())
                    told = '; '.join(f'{n} {reason}' for reason, n in why.items())
                    raise DataError(f'no date of {self.tile} is left: {told}. Choose others')
                self._tell(root, grid, images, chosen, progress)
                failed = write_patch(root, self.tile, grid, chosen, progress)
                state.left_out |= failed
                paths = paths_of(Path(), chosen)
                state.images = [str(path) for path in paths if path.name not in failed]
                finished = not failed or series is None
                state.save(finished=finished and is_over)
                if finished:
                    return root

    def _refuse_others(self, root: Path, there: Sequence[Path], given: Set[str]) -> None:
        """Raise an error where images are there that these arguments do not give."""
        if others := [path for path in there if path.name not in given]:
            raise DataError(
                f'{root} has {len(others)} images of {self.tile}, such as {others[0].name}, that '
                'the region, season, source or max_clouds now asked for do not give; delete them, '
                'or choose another tile or root'
            )

    def collection(self, sensor: str) -> StacCollection:
        """Description of the collection of a sensor."""
        own = (self.collections or {}).get(sensor, self.source)
        if isinstance(own, StacCollection):
            known = replace(own, url=own.url or self.source)
        elif isinstance(own, str) and own in SOURCES:
            known = SOURCES[own][sensor]
        else:
            raise DataError(
                f'nothing is known of {own!r} as a source of {sensor}; choose one of '
                f'{", ".join(SOURCES)}, or describe its collection, as in collections={{{sensor!r}:'
                " StacCollection('sentinel-2-l2a', mask='SCL')}"
            )
        if known.refused:
            raise DataError(f'{known.collection} at {known.url} {known.refused}')
        if sensor == 's2' and self.clouds and not known.mask:
            raise DataError(
                f'clouds are {self.clouds}, and no mask of {known.collection} is known; describe '
                'it, as in StacCollection(mask=...)'
            )
        offset = self.offset if sensor == 's2' else None
        given: dict[str, Any] = {'clouds': self.clouds, 'offset': offset}
        known = replace(known, **{k: v for k, v in given.items() if v is not None})
        return known if known.clouds and known.mask else replace(known, mask='', clouds=())

    @cached_property
    def geometry(self) -> gpd.GeoSeries:
        """Geometries in degrees, whose bounds count."""
        bounds, shapes = self.region, None
        if isinstance(bounds, str):
            shapes = read_vectors(Path(bounds)).geometry.to_crs(4326)
            bounds = shapes.total_bounds.tolist()
            if np.isnan(bounds).any():
                raise DataError(f'{self.region} has no geometry')
        west, south, east, north = bounds if len(bounds) == 4 else [np.nan] * 4
        if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
            raise DataError(
                f'region {self.region} has the bounds {bounds}; expected west, south, east, north '
                'in degrees, and two regions where one crosses 180'
            )
        return gpd.GeoSeries([box(*bounds)], crs=4326) if shapes is None else shapes

    def grid(self) -> Grid:
        """Pixels of the region."""
        place = self.geometry.segmentize(0.01)
        try:
            epsg = self.epsg or place.estimate_utm_crs().to_epsg()
        except RuntimeError:
            raise DataError(
                f'no UTM zone is known for {self.region}; give epsg, that of a CRS in metres'
            ) from None
        unit, _ = crs_of(epsg).units_factor
        if unit != 'metre':
            raise DataError(f'epsg is {epsg}, whose unit is the {unit}; give that of a UTM zone')
        west, south, east, north = place.to_crs(epsg).total_bounds / _EDGE
        left, bottom = _EDGE * floor(west), _EDGE * floor(south)
        right, top = _EDGE * ceil(east), _EDGE * ceil(north)
        width, height = (right - left) // 10, (top - bottom) // 10
        if max(width, height) > _WIDEST:
            raise DataError(
                f'the region is {width} x {height} pixels of EPSG:{epsg}, too wide for one zone; '
                'give parts of it, and two where it crosses 180 degrees'
            )
        return Grid(crs_of(epsg), Affine(10, 0, left, 0, -10, top), width, height)

    def _settings(self, sensors: Sequence[str], series: DateRule | None) -> dict[str, Any]:
        """What decides which images there are, and what they hold."""
        settings = asdict(replace(self, chunk=1, num_workers=1))
        rule = {'series': repr(series), 'sensors': sensors}
        return settings | rule | {'bounds': self.geometry.total_bounds.tolist()}

    def _pixels(self, sensor: str, collection: StacCollection) -> dict[str, Any]:
        """What decides what the images of a sensor hold, wherever they come from."""
        elsewhere = ('url', 'sign', 'refused')
        pixels = {k: v for k, v in asdict(collection).items() if k not in elsewhere}
        pixels |= {'clouds': sorted(collection.clouds), 'nodata': str(float(collection.nodata))}
        pixels |= {'orbits': self.orbits} if sensor == 's1' else {}
        return pixels | {'resampling': self.resampling}

    def _images(
        self, sensor: str, collection: StacCollection, grid: Grid
    ) -> dict[str, 'StacImage']:
        """Images of the region in the order of time, each of the items of a pass."""
        items, notes = {}, []
        for content in self._search(collection):
            try:
                item = _item(content)
                orbit = str(item.properties.get('sat:orbit_state')).lower()
                if sensor == 's2' or self.orbits in ('apart', 'merged', orbit):
                    items[item.id] = item, _assets(item, sensor, collection)
            except DataError as error:
                notes.append(str(error))
        if not items and not notes:
            raise DataError(f'no item of {collection.collection} is of an {self.orbits} orbit')
        told = f'items left out ({len(notes)}): {"; ".join(notes[:5])}'
        if not items:
            raise DataError(f'no item of {collection.collection} can be used. {told}')
        if notes:
            warn(told)
        if sensor == 's2' and collection.offset == 'harmonised':
            _warn_of_offsets([item for item, _ in items.values()])
        found = sorted(items.values(), key=lambda own: (-_baseline(own[0]), own[0].id))
        times = utc(_time(item) for item, _ in found)
        kinds = [kind_of(sensor, item.properties.get('sat:orbit_state')) for item, _ in found]
        merge: Merge = 'day' if sensor == 's1' and self.orbits == 'merged' else 'pass'
        how = (sensor, collection, grid, self.resampling, self.chunk)
        return {
            file_name(self.tile, *key): StacImage(key[0], [found[i] for i in numbers], *how)
            for key, numbers in sorted(group(times, kinds, merge).items())
        }

    def _search(self, collection: StacCollection) -> list[dict[str, Any]]:
        """Items of the region and the season, as the API gives them."""
        client = optional('pystac_client')
        retry = Retry(5, backoff_factor=WAITS[0] / 2, status_forcelist=_BUSY, allowed_methods=None)
        where = f'{collection.collection} at {collection.url}'
        try:
            api = client.Client.open(
                collection.url,
                stac_io=client.stac_api_io.StacApiIO(max_retries=retry),
                timeout=_SILENCE,
            )
            search = api.search(
                collections=[collection.collection],
                bbox=self.geometry.total_bounds.tolist(),
                datetime='/'.join(self.season),
            )
            items = [*search.items_as_dicts()]
        except Exception as error:  # an address that is no STAC API brings any, a silent one too
            why = (str(error) or repr(error)).splitlines()[0][:200]
            raise DownloadError(
                f'{where} cannot be searched ({why}). Check the network and the address; the next '
                'start goes on with what is there'
            ) from None
        if not items:
            raise DownloadError(
                f'{where} has nothing of {self.region} from {self.season[0]} to {self.season[-1]}; '
                'choose another season, region or source'
            )
        return items

    def _leave_clouds_out(
        self, images: Mapping[str, 'StacImage'], state: '_State', progress: bool
    ) -> None:
        """Look up the share of clouds of each date."""
        if self.max_clouds >= 1:
            return
        todo = {n: i for n, i in images.items() if i.collection.mask and n not in state.clouds}
        bar = tqdm(todo.items(), 'Looking for clouds', disable=not (progress and todo), unit='date')
        for name, image in bar:
            state.clouds[name] = image.cloud_share()
        cloudy = {n for n, share in state.clouds.items() if share > self.max_clouds}
        state.left_out |= dict.fromkeys(cloudy, f'with more than {self.max_clouds:.0%} of clouds')

    def _choose(
        self, images: '_Images', left_out: Mapping[str, str], series: DateRule | None
    ) -> '_Images':
        """Images that a date rule may choose."""
        names = {s: [name for name in own if name not in left_out] for s, own in images.items()}
        if series is not None:
            times = {
                s: np.array([images[s][name].time for name in own], 'datetime64[s]')
                for s, own in names.items()
            }
            chosen = series.candidates(times)
            names = {s: [own[i] for i in sorted(chosen[s])] for s, own in names.items()}
        return {s: {name: images[s][name] for name in own} for s, own in names.items()}

    def _tell(
        self, root: Path, grid: Grid, images: '_Images', chosen: '_Images', progress: bool
    ) -> None:
        """Print what will be read, and compare it with the disk."""
        total = 0
        lines = [f'{self.tile}: {grid.width} x {grid.height} pixels of 10 m, EPSG:{grid.epsg}']
        for sensor, own in chosen.items():
            absent = sum(not (root / sensor / name).exists() for name in own)
            size = (2 if sensor == 's2' else 4) * len(SENSORS[sensor].bands)
            size *= grid.width * grid.height * absent
            total += size
            items = sum(len(image.items) for image in own.values())
            lines.append(
                f'{sensor}: {len(own)} of {len(images[sensor])} dates, {items} images of '
                f'{self.collection(sensor).collection}, at most {size / 1e9:.3f} GB to write'
            )
        if progress:
            print('\n'.join(lines))
        check_room(root, total, 'choose fewer dates or a smaller region')


class _State:
    """What a run has learnt, in a file, so that the next one need not."""

    def __init__(
        self, path: Path, settings: dict[str, Any], pixels: dict[str, dict[str, Any]]
    ) -> None:
        self.path, self.settings = path, settings
        kept = read_json(path) if path.exists() else {}
        before = kept.get('pixels', {})
        self.untold = pixels.keys() - before.keys()
        # Images that are there stay, so what their pixels depend on must.
        self.changed = {
            sensor: ', '.join(k for k in own if before.get(sensor, own).get(k, own[k]) != own[k])
            for sensor, own in pixels.items()
        }
        self.pixels = before | pixels
        same = json.dumps(kept.get('settings')) == json.dumps(settings)
        self.finished: bool = same and kept['finished']
        self.left_out: dict[str, str] = kept['left_out'] if same else {}
        self.clouds: dict[str, float] = kept['clouds'] if same else {}
        self.images: list[str] = kept.get('images', [])

    def save(self, finished: bool = False) -> None:
        self.finished = finished
        names = ('settings', 'pixels', 'finished', 'left_out', 'clouds', 'images')
        write_json(self.path, {n: getattr(self, n) for n in names}, indent=1)


@dataclass(frozen=True)
class StacImage:
    """Writes an image of the items of a pass, each with its assets by band.

    Attributes:
        time: When it was acquired.
        items: STAC items, newest processing first.
        sensor: ``'s2'`` or ``'s1'``.
        collection: What is to be known of them.
        grid: Where to.
        resampling: How.
        chunk: Height and width of what is read at once.
    """

    time: pd.Timestamp
    items: Sequence[tuple[Any, Mapping[str, str]]]
    sensor: str
    collection: StacCollection
    grid: Grid
    resampling: str
    chunk: int

    @property
    def tag(self) -> float:
        """Value without an observation in the file."""
        return SENSORS['s2'].nodata if self.sensor == 's2' else np.nan

    def __call__(self, path: Path) -> Outcome:
        """Write it, without items of which a file cannot be read."""
        outcome, notes = self._patiently(
            lambda items: write_bands(
                path, self.grid, [self._bands(items)], self.tag, tags_of(self.sensor)
            )
        )
        why = 'that cannot be read' if outcome is None else outcome.left_out
        return Outcome(why, tuple(notes))

    def cloud_share(self) -> float:
        """Share of the pixels seen that are clouds, 0 if none is seen."""

        def count(items: Sequence[Any]) -> float:
            mask, cloudy = self._mask(items)
            with threads() as how:
                seen, clouds = optional('dask').compute((mask != 0).sum(), cloudy.sum(), **how)
            return float(clouds / max(seen, 1))

        return self._patiently(count)[0] or 0

    def _mask(self, items: Sequence[Any]) -> tuple[Any, Any]:
        """Classes of the first item that has a pixel, and where they are clouds."""
        layers = [{'mask': self._load(item, [self.collection.mask])[0][0]} for item, _ in items]
        mask, classes = fuse(layers, 0)['mask'], [*self.collection.clouds]
        return mask, lazily(np.isin, mask, dtype=bool, test_elements=classes)

    def _bands(self, items: Sequence[Any]) -> dict[str, Any]:
        """Bands of the first item that has a pixel, clouds missing."""
        bands = fuse([self._layer(*own) for own in items], self.tag)
        if not self.collection.mask:
            return bands
        _, cloudy = self._mask(items)
        where = optional('dask.array').where
        return {name: where(cloudy, a.dtype.type(self.tag), a) for name, a in bands.items()}

    def _layer(self, item: Any, assets: Mapping[str, str]) -> dict[str, Any]:
        """Bands of an item in the unit of the layout."""
        loaded = self._load(item, [*assets.values()])
        kind = 'int16' if self.sensor == 's2' else 'float32'
        how = {'dtype': kind, 'kind': kind, 'tag': self.tag, 'positive': self.sensor == 's1'}
        return {
            band: lazily(
                clean,
                value,
                missing=nodata,
                offset=_offset(item, asset, self.collection) if self.sensor == 's2' else 0,
                **how,
            )
            for (band, asset), (value, nodata) in zip(assets.items(), loaded, strict=True)
        }

    def _load(self, item: Any, assets: Sequence[str]) -> list[tuple[Any, float]]:
        """Assets of an item on the grid, and their values without an observation."""
        grid = self.grid
        place = optional('odc.geo.geobox').GeoBox(grid.shape, grid.transform, grid.crs)
        # A footprint that crosses 180 degrees as one polygon, or is coarse, would leave chunks out.
        item.geometry = place.footprint('epsg:4326', buffer=1, wrapdateline=True).json
        nodata = self.collection.nodata
        kinds = {
            '*': {'data_type': 'float32', 'nodata': nodata},  # holds what files of any type do
            self.collection.mask: {'data_type': 'uint8', 'nodata': 0},
        }
        with rasterio.Env(**HTTP):
            data = optional('odc.stac').load(
                [item],
                bands=assets,
                geobox=place,
                chunks={'x': self.chunk, 'y': self.chunk},
                resampling={'*': self.resampling, self.collection.mask or 'mask': 'nearest'},
                stac_cfg={item.collection_id: {'assets': kinds}, '*': {'warnings': 'ignore'}},
                patch_url=_signed if self.collection.sign else None,
            )
        arrays = [data[name].isel(time=0) for name in assets]
        return [(array.data, float(array.attrs.get('nodata', nodata))) for array in arrays]

    def _patiently[T](self, work: Callable[[Sequence[Any]], T]) -> tuple[T | None, list[str]]:
        """Do work with the items; again after a while, and then without what is broken."""
        items, notes = [*self.items], list[str]()
        while items:
            for wait in (0, *WAITS):
                time.sleep(wait)
                try:
                    with rasterio.Env(**(FRESH if wait else {})):
                        return work(items), notes
                except RasterioError as error:
                    failure = error
            broken = [self._broken(*own) for own in items]
            if not any(broken):
                raise DownloadError(f'{items[0][0].id} cannot be read: {failure}') from failure
            notes += filter(None, broken)
            items = [own for own, why in zip(items, broken, strict=True) if not why]
        return None, notes

    def _broken(self, item: Any, assets: Mapping[str, str]) -> str:
        """Which file of an item cannot be read, empty if all can; an error if the server fails."""
        for asset in filter(None, (*assets.values(), self.collection.mask)):
            with rasterio.Env(**FRESH):
                ((value, _),) = self._load(item, [asset])
            try:
                with threads() as how:
                    value.map_blocks(lambda block: block[:1, :1]).compute(**how)
            except RasterioError as error:
                href = item.assets[asset].href
                if re.search(r'CURL error|response code: (401|403|408|429|5\d\d)', str(error)):
                    raise DownloadError(
                        f'{href} cannot be reached ({error}); start again later, and the run goes '
                        'on, or see whether you have access'
                    ) from None
                return f'{asset} of {item.id} ({href}) is left out: {error}'
        return ''


_Images = dict[str, dict[str, StacImage]]


def _signed(href: str) -> str:
    """Address of a file as Planetary Computer signs it."""
    sign = optional('planetary_computer').sign
    try:
        with ThreadPool(1) as pool:  # of threads that nobody waits for
            return str(pool.apply_async(sign, (href,)).get(_SILENCE))
    except (OSError, ValueError, TimeoutError) as error:
        raise DownloadError(
            f'{href} cannot be signed by Planetary Computer ({str(error) or "no answer"}); start '
            'again later, and the run goes on, or see whether PC_SDK_SUBSCRIPTION_KEY is right'
        ) from None


def _item(content: Mapping[str, Any]) -> Any:
    """STAC item of what an API gives; an error if it is none."""
    try:
        return optional('pystac').Item.from_dict(content)
    except Exception as error:  # what lacks a time or a field brings any
        raise DataError(f'{content.get("id")} is no STAC item: {error!r}') from error


def _assets(item: Any, sensor: str, collection: StacCollection) -> dict[str, str]:
    """Asset of each band; an error if the item lacks one, or its values are others."""
    bands = SENSORS[sensor].bands
    assets = {b: collection.bands.get(b) or _named(item, b, SENSORS[sensor]) for b in bands}
    wanted = {**assets, 'mask': collection.mask} if collection.mask else assets
    lacking = [f'{b} ({a or "no such name"})' for b, a in wanted.items() if a not in item.assets]
    if lacking:
        raise DataError(f'{item.id} lacks {", ".join(lacking)}')
    for asset in assets.values() if sensor == 's2' else ():
        _offset(item, asset, collection)
        told = _told(item, asset)
        scale, kind = told.get('scale'), str(told.get('data_type', ''))
        if kind.startswith('float') or str(told.get('nodata')).lower() == 'nan':
            raise DataError(f'{asset} of {item.id} holds floats; expected reflectance x 10,000')
        if scale is not None and not any(np.isclose(scale, known) for known in (1, 1e-4)):
            raise DataError(f'{asset} of {item.id} has the scale {scale}; expected 0.0001')
    return assets


def _named(item: Any, band: str, sensor: Sensor) -> str:
    """Asset of a band by name, else by common name, of several the finest; empty for none."""
    keys = [*item.assets]
    for texts in (keys, [_told(item, key).get('common_name') for key in keys]):
        if names := [key for key, n in zip(keys, sensor.named(texts), strict=True) if n == band]:
            break
    told = [_told(item, name) for name in names]
    sizes: list[Any] = [own.get('gsd') or own.get('spatial_resolution') for own in told]
    finest = [
        name for name, size in zip(names, sizes, strict=True) if None in sizes or size == min(sizes)
    ]
    if len(finest) > 1:
        raise DataError(
            f'{item.id} has {band} as {" and ".join(finest)}; say which is meant, as in '
            f'StacCollection(bands={{{band!r}: {finest[0]!r}}})'
        )
    return finest[0] if finest else ''


def _time(item: Any) -> Any:
    """When an item was acquired, or began to be."""
    return item.datetime or item.common_metadata.start_datetime


def _told(item: Any, asset: str) -> dict[str, Any]:
    """What an item says of an asset and its band if it has one, after STAC 1.0 or 1.1."""
    told = item.assets[asset].to_dict()
    for key in ('bands', 'eo:bands', 'raster:bands'):
        bands: Any = told.get(key) or []
        told |= bands[0] if len(bands) == 1 else {}
    return {name.removeprefix('raster:').removeprefix('eo:'): told[name] for name in told}


def _baseline(item: Any) -> float:
    """Processing baseline of an item, 0 if it does not say."""
    names = ('s2:processing_baseline', 'processing:version')
    return next(filter(None, (baseline_of(item.properties.get(name)) for name in names)), 0)


def _offset(item: Any, asset: str, collection: StacCollection) -> float:
    """What to add to the values of an asset, after what its item says and never its date."""
    if collection.offset != 'item':
        return 0 if collection.offset == 'harmonised' else collection.offset
    baseline, applied = _baseline(item), item.properties.get('earthsearch:boa_offset_applied')
    if applied or 0 < baseline < 4:
        return 0
    told = _told(item, asset)
    if (offset := told.get('offset')) is not None:
        return float(round(offset / (told.get('scale') or (1e-4 if abs(offset) < 1 else 1))))
    if not baseline:
        raise DataError(f'{item.id} says no processing baseline; give offset, 0 or -1000')
    return -1000


def _warn_of_offsets(items: Sequence[Any]) -> None:
    """Count items of a harmonised collection that say otherwise, or nothing."""
    denying = [
        item.id
        for item in items
        if not item.properties.get('earthsearch:boa_offset_applied') and not 0 < _baseline(item) < 4
    ]
    if denying:
        warn(
            f'{len(denying)} of {len(items)} items, such as {denying[0]}, are of processing '
            'baseline 04.00 or later, or say none, and do not say that their offset is applied '
            '(earthsearch:boa_offset_applied). It is taken to be, as in most of these files; where '
            "values are 1,000 too high, as in some of early 2022, give offset='item' to believe "
            'the items, and 0 if none is'
        )
