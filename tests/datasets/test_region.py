"""write_series: what the usual sources of xarray give comes back pixel by pixel."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
from conftest import COMMON, full_disk

from torchgeo_s1s2.datasets import SENSOR_BANDS, AllDates, MultiSenGE, write_series
from torchgeo_s1s2.errors import DataError, ImplausibleValuesError, S1S2Warning

xr = pytest.importorskip('xarray', reason='the extra stac is not installed')
pytest.importorskip('dask', reason='the extra stac is not installed')

BANDS = SENSOR_BANDS['s2']
HEIGHT, WIDTH, LEFT, TOP = 40, 50, 600000.0, 5400000.0
TIMES = pd.to_datetime(['2020-07-03T10:30:21', '2020-08-05T10:30:22'])
X, Y = LEFT + 10 * np.arange(WIDTH) + 5, TOP - 10 * np.arange(HEIGHT) - 5
WKT = rasterio.CRS.from_epsg(32632).to_wkt()
RNG = np.random.default_rng(0)
VALUES = RNG.integers(1, 9000, (2, len(BANDS), HEIGHT, WIDTH))
VALUES[0, :, 3, 4] = 0  # no observation
POWER = RNG.gamma(4, 0.02, (2, 2, HEIGHT, WIDTH)).astype('float32')
DIMS = ('time', 'y', 'x')


def odc(values: Any = VALUES, names: Any = BANDS, dtype: str = 'uint16', **attrs: Any) -> Any:
    attrs = attrs or {'nodata': 0}
    bands = {n: (DIMS, values[:, i].astype(dtype), attrs) for i, n in enumerate(names)}
    crs = ((), 32632, {'spatial_ref': WKT, 'grid_mapping_name': 'transverse_mercator'})
    return xr.Dataset(bands, {'time': TIMES, 'y': Y, 'x': X, 'spatial_ref': crs})


def coded(epsg: Any) -> Any:
    return odc().drop_vars('spatial_ref').assign_attrs(epsg=epsg)


def xee() -> Any:
    """Earth Engine: decoded floats, the CRS in an attribute."""
    values = np.where(VALUES == 0, np.nan, VALUES)
    names = [name.replace('B0', 'B') for name in BANDS]
    data = odc(values, names, 'float32', crs='EPSG:32632', id='B2').drop_vars('spatial_ref')
    return data.assign(SCL=data['B2'])


def openeo() -> Any:
    """A netCDF of openEO as decode_cf=False leaves it: t, a variable crs, -32768."""
    values = np.where(VALUES == 0, -32768, VALUES)
    data = odc(values, BANDS, 'int16', _FillValue=-32768, grid_mapping='crs')
    crs = xr.DataArray(0, attrs={'crs_wkt': WKT})
    return data.drop_vars('spatial_ref').rename(time='t').assign(crs=crs)


def cubo() -> Any:
    """stackstac below cubo: one array with the corners of pixels, the EPSG code in an attribute."""
    array = xr.DataArray(
        np.where(VALUES == 0, np.nan, VALUES),
        dims=('time', 'band', 'y', 'x'),
        coords={'time': TIMES, 'band': [*BANDS], 'y': Y + 5, 'x': X - 5, 'epsg': 32632},
        attrs={'epsg': 32632, 'resolution': 10, 'central_x': 600250.0, 'edge_size_m': 500},
    )
    return array.assign_coords({'title': ('band', [*BANDS]), 's2:mgrs_tile': '32ULU'})


def sentle() -> Any:
    """sentle: both sensors in one array, latest time first, corners, NaN where not seen."""
    seen = np.concatenate([np.where(VALUES == 0, np.nan, VALUES), np.full_like(POWER, np.nan)], 1)
    array = xr.DataArray(
        seen.astype('float32'),
        dims=('time', 'band', 'y', 'x'),
        coords={'time': TIMES, 'band': [*BANDS, 'vv_asc', 'vh_asc'], 'spatial_ref': 0},
    )
    array['spatial_ref'].attrs['crs_wkt'] = WKT
    x = ('x', (X - 5).astype('float32'), {'coord_save_mode': 'top-left'})
    y = ('y', (Y + 5).astype('float32'), {'coord_save_mode': 'top-left'})
    return array.assign_coords(x=x, y=y).isel(time=[1, 0])


SHAPES: dict[str, Callable[[], Any]] = {
    'odc-stac': odc,
    'common names': lambda: odc(names=COMMON),
    'FORCE': lambda: odc(names=('blue', *COMMON[1:6], 'broadnir', 'nir', 'swir1', 'swir2')),
    'numbered common names': lambda: odc().rename(
        B05='rededge071', B06='rededge075', B07='rededge078'
    ),
    'xee': xee,
    'openEO': openeo,
    'cubo': cubo,
    'sentle': sentle,
    'y ascending': lambda: odc().isel(y=slice(None, None, -1)),
    'x descending, transposed': lambda: odc().isel(x=slice(None, None, -1)).transpose('x', ...),
    'time with a zone': lambda: odc().assign_coords(
        time=np.array([*TIMES.tz_localize('UTC').tz_convert('Asia/Tokyo')], object)
    ),
    'NaN of whole numbers': lambda: odc(nodata=np.nan),
    'EPSG code as text': lambda: coded('32632'),
    'EPSG code of NumPy': lambda: coded(np.int64(32632)),
    'EPSG code as a fraction': lambda: coded(32632.0),
    '65535': lambda: odc(np.where(VALUES == 0, 65535, VALUES), nodata=65535),
    'dask': lambda: odc().chunk({'time': 1, 'y': 17, 'x': 30}),
}


def read(path: Path) -> Any:
    with rasterio.open(path) as src:
        return src.read(masked=True)


def images(root: Path, sensor: str, fill: float) -> list[Any]:
    return [read(path).filled(fill) for path in sorted((root / sensor).iterdir())]


@pytest.mark.parametrize('shape', SHAPES)
def test_shapes(shape: str, tmp_path: Path) -> None:
    write_series(tmp_path, SHAPES[shape](), tile='32ULU', progress=False)
    paths = sorted((tmp_path / 's2').iterdir())
    assert [p.name for p in paths] == [
        '32ULU_20200703T103021_S2_0_0.tif',
        '32ULU_20200805T103022_S2_0_0.tif',
    ]
    for path, expected in zip(paths, VALUES, strict=True):
        value = read(path)
        with rasterio.open(path) as src:
            assert src.descriptions == BANDS
            assert src.transform[:6] == (10, 0, LEFT, 0, -10, TOP)
            assert src.crs.to_epsg() == 32632
        np.testing.assert_array_equal(value.filled(0), expected)
        np.testing.assert_array_equal(value.mask, expected == 0)


def test_where_no_attribute_tells_corners_from_centres_the_user_does(tmp_path: Path) -> None:
    data = cubo().drop_attrs()  # as arithmetic of xarray does
    with pytest.raises(DataError, match='attributes that tell are lost; give corners=False or'):
        write_series(tmp_path, data, progress=False)
    for corners, left in ((True, LEFT), (False, LEFT - 5)):
        root = write_series(tmp_path / str(corners), data, corners=corners, progress=False)
        with rasterio.open(next((root / 's2').iterdir())) as src:
            assert src.bounds.left == left


def test_reads_as_a_data_set(tmp_path: Path) -> None:
    labels = xr.DataArray(RNG.integers(1, 15, (HEIGHT, WIDTH)), {'y': Y, 'x': X}, ('y', 'x'))
    labels.attrs['crs'] = 'EPSG:32632'
    s1 = odc(POWER, ('vv', 'vh'), 'float32', nodata=np.nan)
    write_series(tmp_path, odc(), s1, labels=labels[::-1], progress=False)
    sample = MultiSenGE(tmp_path, 'all', AllDates(2))[0]
    image = sample['image'].numpy()
    expected = np.where(VALUES == 0, np.nan, VALUES * 1e-4)
    np.testing.assert_allclose(image[:, :10], expected, rtol=1e-6)
    np.testing.assert_allclose(image[:, 10:], 10 * np.log10(POWER), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(sample['mask'], labels.values - 1)


def test_coordinates_that_differ_by_rounding_are_the_same_pixels(tmp_path: Path) -> None:
    s1 = odc(POWER, ('vv', 'vh'), 'float32', nodata=np.nan)
    write_series(tmp_path, odc(), s1.assign_coords(x=X + 1e-4), progress=False)
    image = MultiSenGE(tmp_path, 'all', AllDates(2))[0]['image'].numpy()
    np.testing.assert_allclose(image[:, 10:], 10 * np.log10(POWER), rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match=r'lie on different pixels, 50 x 40 pixels .*600001'):
        write_series(tmp_path, odc(), s1.assign_coords(x=X + 1), progress=False)


BOTH = ['descending', 'descending', 'ascending']


def orbits(states: list[str]) -> Any:
    """Two slices of one pass, each with half of the columns, and another pass of that day."""
    half = np.where(np.arange(WIDTH) < WIDTH // 2, POWER[:1], np.nan)
    values = np.concatenate([half, np.where(np.isnan(half), 2 * POWER[:1], np.nan), 3 * POWER[:1]])
    s1 = odc(POWER, ('vv', 'vh'), 'float32', nodata=np.nan).isel(time=[0, 0, 0])
    times = pd.to_datetime(['2020-07-03T05:40:10', '2020-07-03T05:40:35', '2020-07-03T17:10:00'])
    s1 = s1.assign_coords(time=times, **{'sat:orbit_state': ('time', states)})
    return s1.assign({n: (DIMS, values[:, i]) for i, n in enumerate(('vv', 'vh'))})


@pytest.mark.parametrize(
    ('states', 'merge', 'names'),
    [
        (BOTH, 'pass', ['20200703T054010_S1_DESC', '20200703T171000_S1_ASC']),
        (BOTH, 'day', ['20200703T054010_S1']),
        (
            BOTH,
            None,
            [f'20200703T{n}' for n in ('054010_S1_DESC', '054035_S1_DESC', '171000_S1_ASC')],
        ),
        ([''] * 3, 'pass', ['20200703T054010_S1', '20200703T171000_S1']),
        (['ASCENDING'] * 3, 'pass', ['20200703T054010_S1_ASC', '20200703T171000_S1_ASC']),
    ],
)
def test_merge(states: list[str], merge: Any, names: list[str], tmp_path: Path) -> None:
    write_series(tmp_path, s1=orbits(states), merge=merge, progress=False)
    paths = sorted((tmp_path / 's1').iterdir())
    assert [p.name for p in paths] == [f'region_{name}_0_0.tif' for name in names]
    if merge:
        left = np.arange(WIDTH) < WIDTH // 2
        np.testing.assert_array_equal(read(paths[0]), np.where(left, POWER[0], 2 * POWER[0]))


def test_offset_and_unit(tmp_path: Path) -> None:
    data = odc().assign_coords({'s2:processing_baseline': ('time', ['03.01', '05.00'])})
    with pytest.warns(S1S2Warning, match=r'processing baseline 04.00 and later \(1\)'):
        write_series(tmp_path / 'as it is', data, progress=False)
    offset = xr.where(data['s2:processing_baseline'].astype(float) >= 4, -1000, 0)
    db = odc(10 * np.log10(POWER), ('vv', 'vh'), 'float32')
    write_series(tmp_path, data, db, unit='db', offset=offset, progress=False)
    expected = np.where(VALUES == 0, -10000, VALUES - np.array([0, 1000])[:, None, None, None])
    np.testing.assert_array_equal(images(tmp_path, 's2', -10000), expected)
    np.testing.assert_allclose(images(tmp_path, 's1', np.nan), POWER, rtol=1e-5)
    reflectance = odc(VALUES * 1e-4, BANDS, 'float32', nodata=0)
    write_series(tmp_path, reflectance, tile='b', unit='reflectance', progress=False)
    path = next((tmp_path / 's2').glob('b_202008*'))
    np.testing.assert_allclose(read(path), VALUES[1], rtol=1e-6)


def test_db_for_power_is_refused_and_what_is_neither_is_missing(tmp_path: Path) -> None:
    first = np.arange(HEIGHT)[:, None] == 0
    power, db = (np.where(first, value, -9999) for value in (POWER, 10 * np.log10(POWER)))
    with pytest.raises(ImplausibleValuesError, match=r"are no power.*unit=\{'s1': 'db'\}"):
        write_series(tmp_path, s1=odc(db, ('vv', 'vh'), 'float32'), progress=False)
    write_series(tmp_path, s1=odc(power, ('vv', 'vh'), 'float32'), progress=False)
    expected = np.where(first, POWER, np.nan)
    np.testing.assert_allclose(images(tmp_path, 's1', np.nan), expected, rtol=1e-5)


@pytest.mark.parametrize(('label', 'written'), [(254, 254), (255, 255), (np.nan, 255)])
def test_labels_are_whole_numbers_below_255(label: float, written: int, tmp_path: Path) -> None:
    labels = xr.full_like(odc()['B02'].isel(time=0), 6, float)
    labels[0, 0] = label
    write_series(tmp_path, odc(), labels=labels, progress=False)
    (path,) = (tmp_path / 'ground_reference').iterdir()
    assert read(path).data[0, 0, :2].tolist() == [written, 6]
    for odd in (300, -1, 2.5):
        labels[0, 1] = odd
        with (
            warnings.catch_warnings(action='ignore'),
            pytest.raises(DataError, match=f'hold {odd}'),
        ):
            write_series(tmp_path, odc(), labels=labels, progress=False)


def test_goes_on(tmp_path: Path) -> None:
    def fail(block: Any) -> Any:
        raise OSError('the disk of the source broke')

    data = odc().chunk({'time': 1})
    broken = data.copy(deep=False)
    first, second = data['B12'].isel(time=[0]), data['B12'].isel(time=[1])
    second = second.copy(data=second.data.map_blocks(fail, dtype='uint16', meta=np.empty(0)))
    broken['B12'] = xr.concat([first, second], 'time')
    with pytest.raises(OSError, match='the source broke'):
        write_series(tmp_path, broken, progress=False)
    (path,) = (tmp_path / 's2').iterdir()
    written = path.stat().st_mtime_ns
    with pytest.warns(S1S2Warning, match='images of region that are there already, not .*: 1 of 2'):
        write_series(tmp_path, data, progress=False)
    assert path.stat().st_mtime_ns == written
    assert len([*(tmp_path / 's2').iterdir()]) == 2
    with pytest.raises(DataError, match='choose another tile or root'):
        write_series(tmp_path, data.isel(x=slice(1, None)), progress=False)


def test_leaves_empty_dates_out(tmp_path: Path) -> None:
    data = odc(VALUES * np.array([0, 1])[:, None, None, None])
    with pytest.warns(S1S2Warning, match=r'images left out: 1 of 2 \(1 without a pixel'):
        write_series(tmp_path, data, progress=False)
    assert len([*(tmp_path / 's2').iterdir()]) == 1


def test_on_the_workers_of_a_cluster(tmp_path: Path) -> None:
    distributed = pytest.importorskip('distributed', reason='the extra stac is not installed')
    data = odc().chunk({'time': 1, 'y': 20})
    options = {'n_workers': 1, 'threads_per_worker': 2, 'dashboard_address': None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        write_series(tmp_path, data, progress=False)
        ran = client.run(lambda dask_worker: len(dask_worker.state.log))
    assert all(ran.values())
    np.testing.assert_array_equal(images(tmp_path, 's2', 0), VALUES)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda d: d.rename(x='lon', y='lat'), 'lat, lon, in degrees; warp them'),
        (lambda d: d.drop_vars('spatial_ref'), 'does not say its CRS'),
        (lambda d: d.assign_coords(spatial_ref=0).assign_attrs(crs='EPSG:4326'), 'in degrees'),
        (lambda d: d.rename(time='day'), 'lack time'),
        (lambda d: d.assign_coords(x=X + 3 * (X[9] < X)), 'not the even steps of a grid'),
        (lambda d: d.assign(blue=d['B02']), 'B02 is there twice'),
        (lambda d: d[['B02']].rename(B02='reflectance'), 'no band of s2'),
        (lambda d: d.assign(B02=d['B02'].assign_attrs(scale_factor=1e-4)), 'B02 is packed'),
        (lambda d: d.assign(B02=d['B02'].astype(complex)), 'expected real numbers'),
        (lambda d: d * 0, 'has a pixel'),
        (lambda _: None, 'nothing to write'),
        (lambda d: d.expand_dims(platform=['a']), 'B02 has the dimension platform too'),
        (lambda d: d.assign_coords(time=[TIMES[0], pd.NaT]), 'not all of which are times'),
        (lambda d: d.assign_coords(time=[2020, 2021]), 'not all of which are times'),
        (lambda d: d.drop_vars(['x', 'y']), 'no coordinates of the pixels along x; give them'),
        (lambda d: d.isel(x=[]), 'no coordinates of the pixels along x; give them'),
        (lambda d: d.drop_vars('spatial_ref').assign_attrs(crs='EPSG:zz'), 'not say its CRS'),
        (lambda d: d.to_array().values, 'ndarray is no Dataset or DataArray of xarray'),
    ],
)
def test_refuses(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(action='ignore'), pytest.raises(DataError, match=message):
        write_series(tmp_path, change(odc()), progress=False)
    with pytest.raises(ValueError, match="merge is 'week'; expected 'pass', 'day' or None"):
        write_series(tmp_path, odc(), merge='week')  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no such sensor in nodata: \['S2'\]"):
        write_series(tmp_path, odc(), nodata={'S2': 0})


def test_tiles_whose_names_begin_alike_are_apart(tmp_path: Path) -> None:
    for tile in ('town_2', 'town_20200703'):
        write_series(tmp_path, odc(), tile=tile, progress=False)
    with (
        pytest.warns(S1S2Warning),
        pytest.raises(DataError, match=r'images of town \(2\) has a pixel'),
    ):
        write_series(tmp_path, odc(VALUES * 0), tile='town', progress=False)
    write_series(tmp_path, odc().isel(x=slice(1, None)), tile='town', progress=False)
    assert len([*(tmp_path / 's2').iterdir()]) == 6


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (VALUES[0, 0], 'labels are a ndarray; expected a DataArray'),
        (odc()[['B02']], 'labels are a Dataset; expected a DataArray'),
        (odc()['B02'], 'labels has the dimension time too; choose with data.isel'),
    ],
)
def test_labels_are_one_array_without_time(labels: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        write_series(tmp_path, odc(), labels=labels, progress=False)


def test_a_band_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.warns(S1S2Warning, match='S2 has no B02, B12 along time, .* others of blau, B03'):
        write_series(tmp_path, odc().rename(B02='blau').drop_vars('B12'), progress=False)


def test_what_was_told_of_files_when_they_were_written_is_not_applied_again(tmp_path: Path) -> None:
    s2 = odc(np.full_like(VALUES, 2200))  # reflectance 0.12 and the offset of baseline 04.00
    s1 = odc(np.full_like(POWER, -10), ('VV', 'VH'), 'float32', nodata=np.nan)
    told: dict[str, Any] = {'unit': {'s1': 'db'}, 'offset': {'2020-01-01': -1000}}
    silent = write_series(tmp_path / 'silent', s2, progress=False)
    root = write_series(tmp_path / 'told', s2, s1, **told, progress=False)
    rule = AllDates(max_length=2)
    first = MultiSenGE(silent, 'all', rule, sensors=['s2'], offset=-1000)[0]
    np.testing.assert_allclose(first['image'], 0.12, rtol=1e-6)
    like: dict[str, Any] = {'unit': {'s1': 'linear', 's2': 'dn'}, 'offset': 0}
    for same in ({}, like):
        with warnings.catch_warnings(action='error', category=S1S2Warning):
            plain = MultiSenGE(root, 'all', rule, **same)[0]['image']
        np.testing.assert_allclose(plain[:, :10], 0.12, rtol=1e-6)
        np.testing.assert_allclose(plain[:, 10:], -10, rtol=1e-6)
    again = MultiSenGE(root, 'all', rule, **told)
    with pytest.warns(S1S2Warning, match='images that say their') as warned:
        assert all(again[0]['image'].equal(plain) for _ in range(2))
    s2_said, s1_said = (str(warning.message) for warning in warned)
    assert 'told/s2 has images that say their offset (0.0), as' in s2_said
    assert 'the one given (-1000.0) is ignored for them' in s2_said
    assert 'told/s1 has images that say their unit (linear), as' in s1_said
    assert 'the one given (db) is ignored for them' in s1_said


def test_offsets_belong_to_their_times(tmp_path: Path) -> None:
    offset = xr.DataArray([-1000, 0], {'time': TIMES[::-1]}, ('time',))
    write_series(tmp_path, odc(), offset=offset, progress=False)
    first, second = (image[0, 0, 0] for image in images(tmp_path, 's2', 0))
    assert (first, second) == (VALUES[0, 0, 0, 0], VALUES[1, 0, 0, 0] - 1000)
    for odd in (offset[:1], xr.DataArray([0, 1, 2], dims='time'), offset.where(offset < 0)):
        with pytest.raises(DataError, match='along time; expected a number at each time of s2'):
            write_series(tmp_path / 'odd', odc(), offset=odd, progress=False)


@pytest.mark.parametrize('chunk', [None, 20])
def test_a_full_disk_leaves_no_image(chunk: int | None, tmp_path: Path) -> None:
    data = odc().chunk({'y': chunk}) if chunk else odc()
    message = r'S2_0_0.tif cannot be written.* the disk is full'
    with full_disk(20_000), pytest.raises(OSError, match=message):
        write_series(tmp_path, data, progress=False)
    assert not [*(tmp_path / 's2').iterdir()]
