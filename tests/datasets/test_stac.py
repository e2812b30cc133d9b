"""Regions from a STAC API on loopback, with what Earth Search and Planetary Computer do."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import create_server
from threading import Event
from typing import Any, NamedTuple

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
from conftest import COMMON as NAMES
from conftest import read_raster
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds
from shapely import Polygon, box

from benchmarks.server import Files, item, serve_files, serve_items, write_cog
from torchgeo_s1s2.datasets import SENSOR_BANDS, SentinelRegion, StacCollection, stac
from torchgeo_s1s2.datasets.rasters import Grid, crs_of
from torchgeo_s1s2.datasets.sensors import OFFSET, UNIT
from torchgeo_s1s2.datasets.time_series import EvenlySpaced, MonthlySeries
from torchgeo_s1s2.errors import (
    DataError,
    DownloadError,
    ImplausibleValuesError,
    NoSeriesError,
    S1S2Warning,
    UnreadableError,
)

for module in ('odc.stac', 'pystac_client', 'rustac'):
    pytest.importorskip(module, reason='the extra stac is not installed')
pystac = pytest.importorskip('pystac')

LEFT, TOP, SIZE = 399960, 5400000, 96  # metres, and pixels of 10 m
INNER = (LEFT + 200, TOP - 700, LEFT + 800, TOP - 100)
BANDS = SENSOR_BANDS['s2']
COMMON = dict(zip(BANDS, NAMES, strict=True))
COARSE = {'B05', 'B06', 'B07', 'B8A', 'B11', 'B12'}
OWN = StacCollection('c')
GRID = Grid(crs_of(32632), from_origin(LEFT, TOP, 10, 10), 8, 8)
RNG = np.random.default_rng(0)


class World(NamedTuple):
    """What is served."""

    api: str
    files: Files
    root: Path


def scene(
    world: Path,
    url: str,
    name: str,
    day: str,
    collection: str,
    earth: bool = False,
    low: int = 1,
    cloudy: float = 0.1,
    raster: float | None = None,
    **told: Any,
) -> dict[str, Any]:
    """An item of Sentinel-2 with its files: 0 without data, in the third row, and no tag."""
    assets: dict[str, dict[str, Any]] = {}
    for band in BANDS:
        res = 20 if band in COARSE else 10
        value = RNG.integers(low, 6000, (SIZE * 10 // res,) * 2).astype('uint16')
        value[2] = 0
        key = COMMON[band] if earth else band
        write_cog(world / name / f'{key}.tif', value, LEFT, TOP, res)
        assets[key] = {'href': f'{url}/{name}/{key}.tif'}
        if raster is not None:
            assets[key]['raster:bands'] = [{'nodata': 0, 'scale': 0.0001, 'offset': raster}]
    scl = np.where(RNG.random((SIZE // 2, SIZE // 2)) < cloudy, 9, 4).astype('uint8')
    key = 'scl' if earth else 'SCL'
    write_cog(world / name / f'{key}.tif', scl, LEFT, TOP, 20)
    assets[key] = {'href': f'{url}/moved/{name}/{key}.tif'}
    first = next(iter(world.joinpath(name).iterdir()))
    return item(name, collection, day, assets, first, **told)


def radar(world: Path, url: str, name: str, day: str, half: slice, orbit: str) -> dict[str, Any]:
    """A slice of Sentinel-1: power in some columns, -32768 or a border of 0 elsewhere."""
    assets = {}
    for key in ('vv', 'vh'):
        value = np.full((SIZE, SIZE), -32768, np.float32)
        value[:, half] = RNG.gamma(4, 0.02, value[:, half].shape)
        value[5] = 0
        write_cog(world / name / f'{key}.tif', value, LEFT, TOP, nodata=-32768)
        assets[key] = {'href': f'{url}/{name}/{key}.tif'}
    properties = {'sat:orbit_state': orbit}
    return item(name, 'sentinel-1-rtc', day, assets, world / name / 'vv.tif', **properties)


@pytest.fixture(scope='module')
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp('world')
    with serve_files(root) as files:
        s2: Any = partial(scene, root, files.url)
        s1: Any = partial(radar, root, files.url)
        early, late, autumn = (f'{d}T10:30:21Z' for d in ('2021-07-03', '2022-08-05', '2021-10-01'))
        old, new = ({'s2:processing_baseline': number} for number in ('03.01', '05.10'))
        flag: dict[str, Any] = {'raster': -0.1, 'earthsearch:boa_offset_applied': False, **new}
        items = [
            s2('es_old', early, 'earth-l2a', True, **old),
            s2('es_new', late, 'earth-l2a', True, **flag),
            s2('c1', early, 'c1-l2a', True, **flag),
            s2('pc_old', late, 'pc-l2a', **old),
            s2('pc_reprocessed', early, 'pc-l2a', low=1000, **new),
            s2('pc_clouds', autumn, 'pc-l2a', cloudy=0.9, **new),
            s2('twice_new', early, 'twice', cloudy=0.4, **new),
            s2('twice_old', early, 'twice', cloudy=0, **old),
            s2('silent', early, 'silent'),
            s1('s1_a', '2021-07-04T05:40:10Z', slice(0, 60), 'descending'),
            s1('s1_b', '2021-07-04T05:40:35Z', slice(50, 96), 'descending'),
            s1('s1_c', '2021-07-04T17:10:00Z', slice(0, 96), 'ascending'),
            s2('lacking', early, 'lacking', **new),
            s2('entire', late, 'lacking', **new),
            s2('broken', early, 'broken', **new),
            s2('gone', late, 'broken', **new),
            s2('good', autumn, 'broken', **new),
            *(s2(f'fragile_{n}', f'2022-01-0{n}T10:30:21Z', 'fragile', **new) for n in range(4, 9)),
        ]
        del next(own for own in items if own['id'] == 'lacking')['assets']['B11']
        (root / 'broken' / 'B04.tif').write_bytes(b'<html>Not a raster</html>')
        (root / 'gone' / 'B12.tif').unlink()
        with serve_items(items, root) as api:
            yield World(api, files, root)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stac, 'WAITS', (0.01, 0.01))
    monkeypatch.setitem(stac.HTTP, 'GDAL_HTTP_RETRY_DELAY', 0.01)


def region(world: World, kind: str, **options: Any) -> SentinelRegion:
    """A region of one collection of the world, as a source describes it."""
    sources = stac.SOURCES
    known = {
        'earth-l2a': sources['earth-search']['s2'],
        'c1-l2a': sources['earth-search-c1']['s2'],
        'sentinel-1-rtc': sources['planetary-computer']['s1'],
    }
    description = known.get(kind, sources['planetary-computer']['s2'])
    sensor = 's1' if kind == 'sentinel-1-rtc' else 's2'
    own = {sensor: replace(description, collection=kind, url=world.api)}
    bounds = transform_bounds('EPSG:32632', 'EPSG:4326', *INNER, densify_pts=21)
    usual = {'region': [*bounds], 'season': ['2021-01-01', '2022-12-31'], 'collections': own}
    return SentinelRegion(**(usual | options))


def direct(world: World, name: str, path: Path, offset: int, earth: bool) -> Any:
    """The same pixels read with rasterio alone: rows and columns of a file on the tile's grid."""
    with rasterio.open(path) as src:
        col, row = round((src.transform.c - LEFT) / 10), round((TOP - src.transform.f) / 10)
        rows, columns = slice(row, row + src.height), slice(col, col + src.width)
    bands = []
    for key in [*(COMMON[b] if earth else b for b in BANDS), 'scl' if earth else 'SCL']:
        value = read_raster(world.root / name / f'{key}.tif')[0].astype(int)
        repeat = SIZE // len(value)
        bands.append(value.repeat(repeat, 0).repeat(repeat, 1)[rows, columns])
    *bands, scl = bands
    return np.array([np.where((b == 0) | (scl == 9), -10000, b + offset) for b in bands])


def item_of(assets: dict[str, Any], path: Path, **properties: Any) -> Any:
    """An item of processing baseline 05.00, unless told, that lies where a raster lies."""
    told = {'s2:processing_baseline': '05.00'} | properties
    return pystac.Item.from_dict(item('a', 'c', '2022-07-01T10:30:21Z', assets, path, **told))


def image_of(item: Any, sensor: str, grid: Grid) -> stac.StacImage:
    pair = item, stac._assets(item, sensor, OWN)
    return stac.StacImage(pd.Timestamp(0), [pair], sensor, OWN, grid, 'nearest', 16)


@pytest.fixture
def somewhere(tmp_path: Path) -> Path:
    write_cog(tmp_path / 'a.tif', np.ones((4, 4), 'uint16'), LEFT, TOP)
    return tmp_path / 'a.tif'


@pytest.mark.parametrize(
    ('kind', 'offsets'),
    [
        ('earth-l2a', {'es_old': 0, 'es_new': 0}),
        ('c1-l2a', {'c1': -1000}),
        ('pc-l2a', {'pc_reprocessed': -1000, 'pc_old': 0}),
    ],
)
def test_pixels_and_offsets(
    kind: str, offsets: dict[str, int], world: World, tmp_path: Path, capsys: Any
) -> None:
    region(world, kind).write(tmp_path, ['s2'])
    paths = sorted((tmp_path / 's2').iterdir())
    assert len(paths) == len(offsets)
    for path, (name, offset) in zip(paths, offsets.items(), strict=True):
        expected = direct(world, name, path, offset, kind != 'pc-l2a')
        np.testing.assert_array_equal(read_raster(path), expected)
        with rasterio.open(path) as src:
            assert src.descriptions == BANDS
            assert (src.tags()[UNIT], src.tags()[OFFSET]) == ('dn', '0')
            assert src.nodata == -10000
            assert all(v % 20 == 0 for v in src.bounds)
            assert src.bounds.left <= INNER[0]
            assert src.bounds.top >= INNER[3]
    seen = 3 if kind == 'pc-l2a' else len(offsets)
    said = f's2: {len(paths)} of {seen} dates, {len(paths)} images of {kind}'
    assert said in capsys.readouterr().out


def test_of_two_processings_the_newest_tells_clouds(world: World, tmp_path: Path) -> None:
    region(world, 'twice').write(tmp_path, ['s2'], progress=False)
    (path,) = (tmp_path / 's2').iterdir()
    expected = direct(world, 'twice_new', path, -1000, False)
    np.testing.assert_array_equal(read_raster(path), expected)


def test_items_that_deny_being_harmonised_are_said(world: World, tmp_path: Path) -> None:
    """es_new says baseline 05.10, not applied, and an offset of -0.1; es_old is of 03.01."""
    with pytest.warns(S1S2Warning, match="1 of 2 items, such as es_new, .* give offset='item'"):
        region(world, 'earth-l2a').write(tmp_path / 'a', ['s2'], progress=False)
    for offset, added in (('item', -1000), (0, 0), (-500, -500)):
        with warnings.catch_warnings(action='error', category=S1S2Warning):
            source = region(world, 'earth-l2a', offset=offset)
            source.write(tmp_path / str(offset), ['s2'], progress=False)
        old, new = sorted((tmp_path / str(offset) / 's2').iterdir())
        np.testing.assert_array_equal(read_raster(new), direct(world, 'es_new', new, added, True))
        assert offset == -500 or (read_raster(old) == direct(world, 'es_old', old, 0, True)).all()


@pytest.mark.parametrize(
    ('orbits', 'names'),
    [
        ('apart', ['20210704T054010_S1_DESC', '20210704T171000_S1_ASC']),
        ('merged', ['20210704T054010_S1']),
        ('ascending', ['20210704T171000_S1_ASC']),
    ],
)
def test_sentinel_1(orbits: Any, names: list[str], world: World, tmp_path: Path) -> None:
    region(world, 'sentinel-1-rtc', orbits=orbits).write(tmp_path, ['s1'], progress=False)
    paths = sorted((tmp_path / 's1').iterdir())
    assert [p.name for p in paths] == [f'region_{name}_0_0.tif' for name in names]
    with rasterio.open(paths[0]) as src:
        value, left, top = src.read(1), *(round(v / 10) for v in (src.bounds.left, src.bounds.top))
        at = np.s_[TOP // 10 - top :, left - LEFT // 10 :]
        first, last = (read_raster(world.root / s / 'vv.tif')[0] for s in ('s1_a', 's1_b'))
        assert src.descriptions == ('VV', 'VH')
        assert src.tags()[UNIT] == 'linear'
        assert np.isnan(src.nodata)
    if orbits != 'ascending':
        expected = np.where(first > 0, first, np.where(last > 0, last, np.nan))
        np.testing.assert_array_equal(value, expected[at][:64, :64])
    with pytest.raises(DataError, match='made with other orbits; choose another tile or root'):
        region(world, 'sentinel-1-rtc', orbits='descending').write(tmp_path, ['s1'])


def test_a_date_rule_reads_what_it_chooses(world: World, tmp_path: Path) -> None:
    source = region(world, 'pc-l2a', max_clouds=1.0)
    source.write(tmp_path, ['s2'], EvenlySpaced(n=1), progress=False)
    assert len([*(tmp_path / 's2').iterdir()]) == 1
    with pytest.raises(NoSeriesError, match='no S2 date'):
        source.write(tmp_path / 'b', ['s2'], MonthlySeries(months=[1]), progress=False)


def test_goes_on_without_asking_twice(world: World, tmp_path: Path) -> None:
    source = region(world, 'pc-l2a')
    source.write(tmp_path, ['s2'], progress=False)
    path, other = sorted((tmp_path / 's2').iterdir())
    written = path.stat().st_mtime_ns
    before = len(world.files.asked)
    replace(source, chunk=256).write(tmp_path, ['s2'], progress=False)
    assert len(world.files.asked) == before
    other.unlink()
    source.write(tmp_path, ['s2'], progress=False)
    assert other.exists()
    assert path.stat().st_mtime_ns == written
    with pytest.raises(DataError, match='choose another tile or root'):
        replace(source, epsg=32631).write(tmp_path, ['s2'], progress=False)


def test_images_that_are_there_are_those_asked_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched, search = list[StacCollection](), SentinelRegion._search

    def count(self: SentinelRegion, collection: StacCollection) -> Any:
        searched.append(collection)
        return search(self, collection)

    monkeypatch.setattr(SentinelRegion, '_search', count)
    place = str(tmp_path / 'place.gpkg')
    left, low, right, high = INNER
    bow = Polygon([(left, low), (right, high), (right, low), (left, high)])  # is invalid
    gpd.GeoSeries([box(*INNER), bow, None], crs=32632).to_file(place)
    source = region(world, 'pc-l2a', region=place, season=['2021-06-01', '2021-12-31'])
    own = source.collection('s2')

    def write(root: str = 'a', **changes: Any) -> int:
        replace(source, **changes).write(tmp_path / root, ['s2'], progress=False)
        return len([*(tmp_path / root / 's2').iterdir()])

    assert write() == 1
    others: dict[str, dict[str, Any]] = {
        'mask, clouds': {'clouds': []},
        'offset': {'collections': {'s2': replace(own, offset=-900)}},
        'nodata': {'collections': {'s2': replace(own, nodata=1)}},
        'resampling': {'resampling': 'cubic'},
    }
    for what, changes in others.items():
        with pytest.raises(DataError, match=f'made with other {what}; choose another tile or root'):
            write(**changes)
    assert write(offset='item', clouds=[10, 9, 8, 3], orbits='merged') == 1
    assert write(season=['2021-06-01', '2022-12-31'], max_clouds=1.0) == 3
    fewer: list[dict[str, Any]] = [{'season': ['2022-01-01', '2022-12-31']}, {'max_clouds': 0.5}]
    for changes in fewer:
        with pytest.raises(DataError, match=r'has [12] images of region, such as .* do not give;'):
            write(**changes)
    searched.clear()
    for season, times in (('2021-12-31', 1), ('2100-01-01', 2)):
        for _ in range(2):
            write(season, season=['2021-06-01', season])
        assert len(searched) == times
        searched.clear()
    # As an earlier release left it, which knew nothing of pixels.
    state = tmp_path / '2021-12-31' / 'region.region.json'
    kept = json.loads(state.read_text())
    state.write_text(json.dumps({k: v for k, v in kept.items() if k != 'pixels'}))
    gpd.GeoSeries([box(*INNER).buffer(-100)], crs=32632).to_file(place)
    with (
        pytest.raises(DataError, match=r'lies at .*; choose another tile or root'),
        pytest.warns(S1S2Warning, match=r'region\.json does not say how .* made \(1, such as'),
    ):
        write('2021-12-31')


@pytest.mark.parametrize(
    ('number', 'faults'),
    enumerate([[429, 429], [503], ['drop'], ['drop', 429, 'drop']], 4),
)
def test_refused_and_dropped_requests(
    number: int, faults: list[Any], world: World, tmp_path: Path
) -> None:
    path = f'fragile_{number}/B08.tif'
    world.files.faults[path] = [*faults]
    source = region(world, 'fragile', season=[f'2022-01-0{number}'] * 2)
    source.write(tmp_path, ['s2'], progress=False)
    (written,) = (tmp_path / 's2').iterdir()
    assert not world.files.faults[path]
    expected = direct(world, f'fragile_{number}', written, -1000, False)
    np.testing.assert_array_equal(read_raster(written), expected)


def test_what_is_missing_or_broken_is_named(world: World, tmp_path: Path) -> None:
    with pytest.warns(S1S2Warning, match=r'items left out \(1\): lacking lacks B11 \(no such'):
        region(world, 'lacking').write(tmp_path / 'a', ['s2'], progress=False)
    with pytest.warns(S1S2Warning) as told:
        region(world, 'broken').write(tmp_path / 'b', ['s2'], progress=False)
    (message,) = (str(w.message) for w in told if w.category is S1S2Warning)
    assert 'images left out: 2 of 3 (2 that cannot be read)' in message
    assert f'B04 of broken ({world.files.url}/broken/B04.tif) is left out' in message
    assert 'B12 of gone' in message
    assert '404' in message
    assert len([*(tmp_path / 'b' / 's2').iterdir()]) == 1


def test_what_is_no_item_is_left_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = SentinelRegion._search

    def more(self: SentinelRegion, collection: StacCollection) -> list[dict[str, Any]]:
        first, *others = search(self, collection)
        return [first | {'id': 'timeless', 'properties': {'datetime': None}}, first, *others]

    monkeypatch.setattr(SentinelRegion, '_search', more)
    with pytest.warns(S1S2Warning, match=r'left out \(1\): timeless is no STAC item: .*datetime'):
        region(world, 'c1-l2a').write(tmp_path, ['s2'], progress=False)
    assert len([*(tmp_path / 's2').iterdir()]) == 1


@pytest.mark.parametrize('status', [401, 403, 408, 429])
def test_a_server_that_wants_no_more_is_an_error(status: int, world: World, tmp_path: Path) -> None:
    world.files.faults['fragile_8/B02.tif'] = [status] * 1000
    source = region(world, 'fragile', season=['2022-01-08', '2022-01-08'])
    with pytest.raises(DownloadError, match=rf'cannot be reached .*{status}.*start again later'):
        source.write(tmp_path, ['s2'], progress=False)


def refuse(href: str) -> None:
    raise OSError('403 Client Error')  # as those of requests are


@pytest.mark.parametrize(
    ('sign', 'why'), [(refuse, '403 Client Error'), (lambda _: Event().wait(), 'no answer')]
)
def test_a_service_that_does_not_sign_is_an_error(
    sign: Any, why: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip('planetary_computer'), 'sign', sign)
    monkeypatch.setattr(stac, '_SILENCE', 0.1)
    own = replace(region(world, 'pc-l2a').collection('s2'), sign=True)
    source = region(world, 'pc-l2a', collections={'s2': own})
    with pytest.raises(DownloadError, match=rf'cannot be signed .*\({why}\); start again later'):
        source.write(tmp_path, ['s2'], progress=False)


def test_a_server_that_falls_silent_is_an_error(
    world: World, tmp_path: Path, somewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stac, '_SILENCE', 0.1)
    monkeypatch.setattr(stac, 'WAITS', (0.01,))
    monkeypatch.setitem(stac.HTTP, 'GDAL_HTTP_LOW_SPEED_TIME', 1)
    monkeypatch.setitem(stac.HTTP, 'GDAL_HTTP_MAX_RETRY', 0)
    with create_server(('127.0.0.1', 0)) as silent:
        url = f'http://127.0.0.1:{silent.getsockname()[1]}'
        own = {'s2': StacCollection('c', url)}
        with pytest.raises(DownloadError, match=r'cannot be searched \(.*timed out'):
            region(world, 'pc-l2a', collections=own).write(tmp_path, ['s2'])
        assets = {band: {'href': f'{url}/{band}.tif'} for band in ('vv', 'vh')}
        image = image_of(item_of(assets, somewhere), 's1', GRID)
        with pytest.raises(DownloadError, match=f'{url}/vv.tif cannot be reached'):
            image(tmp_path / 'out.tif')


def test_refuses(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match='amplitudes in radar geometry, neither calibrated'):
        SentinelRegion([7, 48, 8, 49], ['2021-01-01', '2021-02-01'], 'earth-search').write(tmp_path)
    with pytest.raises(DataError, match=r"nothing is known of 'https://a\.b' as a source of s2"):
        SentinelRegion([7, 48, 8, 49], ['2021-01-01', '2021-02-01'], 'https://a.b').write(tmp_path)
    with pytest.raises(DataError, match='silent says no processing baseline; give offset'):
        region(world, 'silent').write(tmp_path, ['s2'])
    with pytest.raises(DownloadError, match=r'has nothing of .* choose another season'):
        region(world, 'pc-l2a', season=['2001-01-01', '2001-02-01']).write(tmp_path, ['s2'])
    own = StacCollection('sentinel-2-l2a')
    with pytest.raises(ValueError, match=r"no such sensor: \['S2'\]; choose from s2, s1"):
        region(world, 'pc-l2a').write(tmp_path, ['S2'])
    with pytest.raises(ValueError, match="offset is 'boa'; give a number, 'item' or 'harmonised'"):
        region(world, 'pc-l2a', offset='boa').write(tmp_path, ['s2'])
    with pytest.raises(DataError, match=r'clouds are \[3\], and no mask of .* is known; describe'):
        region(world, 'pc-l2a', clouds=[3], collections={'s2': own}).write(tmp_path, ['s2'])
    world.files.contents |= {'page': b'<html>', 'other.json': b'[]'}
    no_api = (f'{world.files.url}/{name}' for name in ('', 'page', 'other.json'))
    for url in ('http://127.0.0.1:9', *no_api):
        at = {'s2': replace(own, url=url)}
        with pytest.raises(DownloadError, match=r'cannot be searched \(.+\)\. Check the network'):
            region(world, 'pc-l2a', collections=at).write(tmp_path, ['s2'])


def test_a_file_of_geometries_and_a_zone(tmp_path: Path) -> None:
    path, season = str(tmp_path / 'field.gpkg'), ['2021-01-01', '2021-02-01']
    field = gpd.GeoSeries([box(*INNER)], crs=32632)
    field.to_file(path)
    grid = SentinelRegion(path, season).grid()
    assert grid.epsg == 32632
    # The outline comes back from degrees with a rounding error, and is never cut short.
    assert grid.bounds[0] in (INNER[0], INNER[0] - 20)
    assert SentinelRegion(path, season, epsg=32631).grid().epsg == 32631
    bounds = field.to_crs(4326).total_bounds
    assert SentinelRegion(bounds, season).region == bounds.tolist()
    gpd.GeoSeries([box(177, -19, 181, -16)], crs=4326).to_file(path)
    message = r'has the bounds \[177.0, .* two regions where one crosses'
    with pytest.raises(DataError, match=message):
        SentinelRegion(path, season).grid()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'season': ['2021-02-01', '2021-01-01']}, 'season is .* give its first and last day'),
        ({'season': ['July', 'August']}, 'season is .* give its first and last day'),
        ({'season': []}, 'season is .* give its first and last day'),
        ({'max_clouds': 50}, 'max_clouds is 50; give a share, 0 to 1'),
        ({'orbits': 'asc'}, r"no such orbits: \['asc'\]; choose from apart, merged, ascending"),
        ({'resampling': 'cubicc'}, r"no such resampling: \['cubicc'\]; choose from nearest, bi"),
        ({'chunk': 0}, 'chunk is 0; give a number of pixels'),
        ({'tile': 'my-town'}, "tile is 'my-town'; expected letters, digits and _"),
        ({'collections': {'S1': 'planetary-computer'}}, r"no such sensor in collections: \['S1'"),
        ({'region': [7, 48, 8]}, 'expected west, south, east, north in degrees'),
        ({'region': [8, 48, 7, 49]}, 'expected west, south, east, north in degrees'),
        ({'region': [179.9, -17, -179.9, -16]}, 'two regions where one crosses 180'),
        ({'region': [-180, -80, 180, 80]}, 'pixels of EPSG:32630, too wide for one zone'),
        ({'epsg': 4326}, 'epsg is 4326, whose unit is the degree; give that of a UTM zone'),
        ({'epsg': 2263}, 'epsg is 2263, whose unit is the US survey foot; give that of a UTM'),
        ({'region': [10, 84.5, 11, 84.6]}, r'no UTM zone is known for \[10.*; give epsg, that of'),
        ({'region': Path('none.gpkg')}, 'none.gpkg cannot be read'),
    ],
)
def test_what_makes_no_region_is_named(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {'region': [7, 48, 7.1, 48.1], 'season': ['2021-01-01', '2021-02-01']}
    given |= options
    with pytest.raises((ValueError, UnreadableError), match=message):
        SentinelRegion(**given).grid()


@pytest.mark.parametrize(
    ('told', 'says', 'message'),
    [
        ({'scale': 0.00005}, {}, 'B02 of a has the scale 5e-05; expected 0.0001'),
        ({'scale': 0, 'offset': -0.1}, {}, 'B02 of a has the scale 0; expected 0.0001'),
        ({'data_type': 'float32'}, {}, 'B02 of a holds floats; expected reflectance x 10,000'),
        ({'nodata': 'nan'}, {}, 'B02 of a holds floats; expected reflectance x 10,000'),
        ({'offset': -0.1}, {}, ''),
        ({'offset': 0}, {}, ''),
        ({'scale': None, 'offset': None}, {'s2:processing_baseline': 'N0500'}, ''),
    ],
)
@pytest.mark.parametrize('place', ['raster:bands', 'bands', 'asset'])
def test_items_that_say_something_else(
    place: str, told: dict[str, Any], says: dict[str, Any], message: str, somewhere: Path
) -> None:
    if place != 'raster:bands':  # STAC 1.1
        told = {f'raster:{k}' if k in ('scale', 'offset') else k: v for k, v in told.items()}
    said = told if place == 'asset' else {place: [told]}
    assets = {band: {'href': f'{band}.tif', **said} for band in BANDS}
    own = item_of(assets, somewhere, **says)
    if message:
        with pytest.raises(DataError, match=message):
            stac._assets(own, 's2', OWN)
    else:
        assert stac._assets(own, 's2', OWN)['B12'] == 'B12'
        added = 0 if 0 in told.values() else -1000
        assert stac._offset(own, 'B02', OWN) == added


@pytest.mark.parametrize('outline', ['split', 'one polygon', 'elsewhere'])
def test_every_pixel_is_read_whatever_the_footprint_says(outline: str, tmp_path: Path) -> None:
    """An image across 180 degrees: there, x of zone 60 is 819,452 m at 17 degrees south."""
    left, top = 819_000, 8_118_000
    value = RNG.integers(1, 100, (64, 64)).astype('float32')
    for band in ('vv', 'vh'):
        write_cog(tmp_path / f'{band}.tif', value, left, top, epsg=32760)
    assets = {band: {'href': str(tmp_path / f'{band}.tif')} for band in ('vv', 'vh')}
    own = item_of(assets, tmp_path / 'vv.tif')
    assert own.geometry['type'] == 'MultiPolygon'
    corners = [(179.995, -17), (-179.999, -17), (-179.999, -17.006), (179.995, -17.006)]
    if outline != 'split':
        ring = corners if outline == 'one polygon' else [(lon, -lat) for lon, lat in corners]
        own.geometry = {'type': 'Polygon', 'coordinates': [[*ring, ring[0]]]}
    grid = Grid(crs_of(32760), from_origin(left - 40, top, 10, 10), 68, 64)
    assert image_of(own, 's1', grid)(tmp_path / 'out.tif').left_out == ''
    expected = np.pad(value, ((0, 0), (4, 0)), constant_values=np.nan)
    np.testing.assert_array_equal(read_raster(tmp_path / 'out.tif'), [expected, expected])


@pytest.mark.parametrize(
    ('value', 'dtype', 'nodata', 'written'),
    [
        (1500, 'uint16', 0, 500),
        (1500, 'int16', -9999, 500),
        (1500.4, 'float32', np.nan, 500),
        (1500.6, 'float64', -9999, 501),
        (0.15, 'float32', np.nan, None),
    ],
)
def test_files_of_any_type(
    value: float, dtype: str, nodata: float, written: int | None, tmp_path: Path
) -> None:
    """Of which the item says nothing; the first row has no observation."""
    path = tmp_path / 'a.tif'
    image = np.full((8, 8), value, dtype)
    image[0] = nodata
    write_cog(path, image, LEFT, TOP, nodata=nodata)
    own = item_of({band: {'href': str(path)} for band in BANDS}, path)
    write = image_of(own, 's2', GRID)
    if written is None:
        with pytest.raises(ImplausibleValuesError, match=r's2 holds reflectance itself .*0\.15'):
            write(tmp_path / 'out.tif')
        return
    write(tmp_path / 'out.tif')
    expected = np.repeat([-10000] + 7 * [written], 8).reshape(8, 8)
    np.testing.assert_array_equal(read_raster(tmp_path / 'out.tif'), [expected] * 10)


@pytest.mark.parametrize('place', ['gsd', 'bands', 'raster:bands'])
def test_of_several_assets_of_a_band_the_finest_is_taken(place: str, somewhere: Path) -> None:
    """As CDSE names them; a common name counts only where no name tells."""

    def asset(size: int) -> dict[str, Any]:
        told = {'gsd': size} if place == 'gsd' else {place: [{'spatial_resolution': size}]}
        return {'href': 'a.tif', 'eo:common_name': 'blue'} | told

    assets = {f'{b}_{m}m': asset(m) for b in BANDS for m in (60, 10, 20)}
    known = stac._assets(item_of(assets, somewhere), 's2', OWN)
    assert known == {b: f'{b}_10m' for b in BANDS}
    for also in (asset(10), {'href': 'a.tif'}):
        twice = {'B02': also, 'B02_10m': asset(10)} | {b: asset(10) for b in BANDS[1:]}
        own = item_of(twice, somewhere)
        with pytest.raises(DataError, match='a has B02 as B02 and B02_10m; say which is meant, as'):
            stac._assets(own, 's2', OWN)
        assert stac._assets(own, 's2', replace(OWN, bands={'B02': 'B02'}))['B02'] == 'B02'


@pytest.mark.parametrize('source', ['earth-search', 'earth-search-c1', 'planetary-computer'])
def test_the_assets_of_each_source_are_found(source: str, somewhere: Path) -> None:
    """By the names that its items have, with the JPEG 2000 twins and pictures of Earth Search."""
    earth = source != 'planetary-computer'
    names = COMMON if earth else {band: band for band in BANDS}
    others = ('coastal', 'nir09', 'visual', 'aot', 'wvp', 'scl', 'thumbnail')
    others = others if earth else ('B01', 'B09', 'AOT', 'WVP', 'SCL', 'visual', 'preview')
    assets: dict[str, dict[str, Any]] = {
        key: {'href': f'{key}.tif'} for key in (*names.values(), *others)
    }
    for key in NAMES if earth else ():
        name = 'rededge' if 'rededge' in key else key
        common: dict[str, Any] = {'eo:bands': [{'common_name': name}]}
        assets[key] |= common
        assets[f'{key}-jp2'] = {'href': f'{key}.jp2'} | common
    own = item_of(assets, somewhere)
    assert stac._assets(own, 's2', stac.SOURCES[source]['s2']) == names
