"""A raster says what it is: no data, types, units, bands and place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from conftest import COMMON, ORIGINS, write_patch, write_raster
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.transform import from_bounds, from_origin
from rasterio.warp import transform

from torchgeo_s1s2.datasets import (
    SENSOR_BANDS,
    ClassScheme,
    EvenlySpaced,
    LandCoverClass,
    MultiSenGE,
)
from torchgeo_s1s2.datasets.sensors import SENSORS
from torchgeo_s1s2.errors import S1S2Warning

NAN, INF = np.nan, np.inf
DAY = '20220706'
ALPHA = [*[ColorInterp.gray] * 10, ColorInterp.alpha]
FLOOR = float(np.finfo('float32').min)
Image = NDArray[np.float32]


def read(
    root: Path,
    s2: NDArray[Any] | None = None,
    s1: NDArray[Any] | None = None,
    labels: NDArray[Any] | None = None,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """The only slot of the only patch, of 8 x 8 pixels; options are of the rasters."""
    s2 = np.full((10, 8, 8), 1000, np.int16) if s2 is None else s2
    s1 = np.full((2, 8, 8), 0.1, np.float32) if s1 is None else s1
    labels = np.ones((8, 8), np.uint8) if labels is None else labels
    write_patch(root, '31UEQ', 0, 0, 8, {DAY: s2}, {DAY: s1}, labels, **(options or {}))
    sample = MultiSenGE(root, 'all', EvenlySpaced(n=1), **arguments)[0]
    return {**sample, 's2': sample['image'][0, :10].numpy(), 's1': sample['image'][0, 10:].numpy()}


def half(value: float, dtype: str, rest: float = 1000, bands: int = 10) -> NDArray[Any]:
    """An image whose left half holds a value, and its right half another one."""
    return np.where(np.arange(8) < 4, value, np.full((bands, 8, 8), rest)).astype(dtype)


def check_halves(image: Image, right: float, left: float = NAN) -> None:
    """Of an image of ``half``."""
    for part, value in ((image[..., :4], left), (image[..., 4:], right)):
        np.testing.assert_allclose(part, np.full_like(part, value), rtol=1e-5)


@pytest.mark.parametrize(
    ('dtype', 'value', 'nodata'),
    [
        ('int16', -10000, None),  # MultiSenGE, which has no tag
        ('uint16', 0, None),  # products of ESA, which have none either
        ('float32', NAN, None),
        ('float32', INF, None),
        ('int16', 0, 0),
        ('uint16', 0, 0),
        ('int16', -9999, -9999),
        ('int16', -32768, -32768),
        ('uint16', 65535, 65535),
        ('float32', NAN, NAN),
        ('float32', -INF, -INF),
        ('float32', NAN, -9999),
        ('float32', FLOOR, FLOOR),
        ('float32', FLOOR, -3.40282e38),  # as GDAL prints it
        ('float64', -1.7e308, -1.7e308),
        ('int32', -(2**31), -(2**31)),
        ('uint32', 2**32 - 1, 2**32 - 1),
    ],
)
@pytest.mark.parametrize('sensor', ['s2', 's1'])
def test_no_data_of_any_kind_is_missing(
    tmp_path: Path, sensor: str, dtype: str, value: float, nodata: float | None
) -> None:
    untagged = nodata is None
    image = half(value, dtype, bands=len(SENSOR_BANDS[sensor]))
    options = {f'{sensor}_options': {} if untagged else {'nodata': nodata}}
    sample = read(tmp_path, **{sensor: image}, options=options)
    check_halves(sample[sensor], {'s2': 0.1, 's1': 30}[sensor])


@pytest.mark.parametrize(
    ('nodata', 'value', 'seen'),
    [(-9999, 0, 0), (None, 0, 0), (-9999, -10000, -1), (0, -5, -0.0005)],
)
def test_what_is_not_tagged_is_a_value(
    tmp_path: Path, nodata: float | None, value: float, seen: float
) -> None:
    options = {'s2_options': {'nodata': nodata}}
    check_halves(read(tmp_path, half(value, 'int16'), options=options)['s2'], 0.1, seen)


def test_no_data_of_all_bands_together(tmp_path: Path) -> None:
    """GDAL's NODATA_VALUES: a pixel is missing where each band has its own value."""
    image = half(7, 'int16')
    image[3, 0] = 8
    tags = {'NODATA_VALUES': ' '.join(['7'] * 10)}
    got = read(tmp_path, image, options={'s2_options': {'tags': tags}})['s2']
    check_halves(got[:, 1:], 0.1)
    assert np.isfinite(got[:, 0]).all()


def test_no_data_that_no_file_tells_is_an_argument(tmp_path: Path) -> None:
    images = {'s2': half(-1, 'int16'), 's1': half(-9999, 'float32', 1, 2)}
    sample = read(tmp_path, **images, nodata={'s2': -1, 's1': -9999})  # type: ignore[arg-type]
    check_halves(sample['s2'], 0.1)
    check_halves(sample['s1'], 0)


@pytest.mark.parametrize(
    ('unit', 'value', 'right', 'seen'),
    [('amplitude', -9999, 0.1, -20), ('amplitude', FLOOR, 0.1, -20), ('db', 9999, -12.5, -12.5)],
)
def test_what_has_no_power_is_missing(
    tmp_path: Path, unit: str, value: float, right: float, seen: float
) -> None:
    image = half(right, 'float32', right, 2)
    image[:, 2:, 2:4] = value
    power = read(tmp_path, s1=image, unit=unit)['s1']
    np.testing.assert_allclose(power[:, :2], seen, rtol=1e-5)
    check_halves(power[:, 2:, 2:6].repeat(2, axis=2), seen)


def test_what_stands_for_no_power_may_fill_a_window(tmp_path: Path) -> None:
    write_patch(tmp_path, '31UEQ', 0, 0, 8, s1={DAY: half(-9999, 'float32', 0.1, 2)})
    dataset = MultiSenGE(tmp_path, 'all', EvenlySpaced(n=1, leader='s1'), sensors=['s1'])
    check_halves(dataset[0]['image'][0].numpy(), -10)
    assert dataset.crop(0, 0, 0, 8, 4)['image'].isnan().all()


@pytest.mark.parametrize('how', ['internal', 'sidecar', 'alpha'])
@pytest.mark.parametrize(('dtype', 'tag'), [('uint16', None), ('float32', None), ('uint16', 5)])
def test_masks_are_obeyed(tmp_path: Path, how: str, dtype: str, tag: float | None) -> None:
    """Zero is a value where a mask says which pixels are, or a tag says another one."""
    image = half(7, dtype)
    image[:, 0] = 0
    seen = np.broadcast_to(np.arange(8) >= 4, (8, 8))
    options: dict[str, Any] = {'mask': seen} if how == 'internal' else {}
    if how == 'alpha':
        image = np.concatenate([image, seen[None] * np.iinfo('uint8').max]).astype(dtype)
        options = {'colorinterp': ALPHA}
    options |= {'nodata': tag}
    write_patch(tmp_path, '31UEQ', size=8, s2={DAY: image}, s1={}, s2_options=options)
    (path,) = (tmp_path / 's2').iterdir()
    if how == 'sidecar':
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, 'r+') as dst:
            dst.write_mask(seen)
        assert path.with_suffix('.tif.msk').exists()
    sample = MultiSenGE(tmp_path, 'all', EvenlySpaced(n=1), sensors=['s2'])[0]
    expected = np.full((10, 8, 8), 0.1)
    expected[:, 0] = 0
    expected[:, :, :4] = NAN
    np.testing.assert_allclose(sample['image'][0].numpy(), expected, rtol=1e-5)


def test_each_band_may_have_a_mask_of_its_own(tmp_path: Path) -> None:
    read(tmp_path)
    mask = np.full((10, 8, 8), 255, np.uint8)
    mask[3, :, :4] = 0
    beside = tmp_path / 's2' / f'31UEQ_{DAY}_S2_0_0.tif.msk'
    flags = {f'INTERNAL_MASK_FLAGS_{band}': '0' for band in range(1, 11)}
    write_raster(beside, mask, *ORIGINS['31UEQ'], tags=flags)
    image = MultiSenGE(tmp_path, 'all', EvenlySpaced(n=1))[0]['image'][0, :10].numpy()
    check_halves(image[3], 0.1)
    assert np.isfinite(np.delete(image, 3, 0)).all()


def test_an_infinite_pixel_is_missing_in_its_image_only(tmp_path: Path) -> None:
    image = np.full((2, 8, 8), 0.1, np.float32)
    image[0, 5, 5], image[1, 0, 0] = INF, -INF
    expected = np.full((2, 8, 8), -10.0)
    expected[0, 5, 5] = expected[1, 0, 0] = NAN
    np.testing.assert_allclose(read(tmp_path, s1=image)['s1'], expected, rtol=1e-5)


@pytest.mark.parametrize(
    'dtype', ['uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'float32', 'float64']
)
def test_any_type_within_beyond_and_between_pixels(tmp_path: Path, dtype: str) -> None:
    """Columns 1..8 are 0.0100, 0.0101 and so on; a window half a pixel off has their means."""
    image = np.broadcast_to(100 + np.arange(8), (10, 8, 8)).astype(dtype)
    write_patch(tmp_path, '31UEQ', size=8, s2={DAY: image}, s1={})
    dataset = MultiSenGE(tmp_path, 'all', EvenlySpaced(n=1), sensors=['s2'])
    columns = (100 + np.arange(8)) * 1e-4
    for start, expected in (
        (500020, columns[2:6]),
        (500060, [*columns[6:], NAN, NAN]),
        (499980, [NAN, NAN, *columns[:2]]),
        (500015, (columns[1:5] + columns[2:6]) / 2),
    ):
        window = dataset[start : start + 40, 5499960:5499990]
        got = window['image'][0].numpy()
        np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=1e-5)


CORINE = ClassScheme(
    tuple(LandCoverClass(str(n), (n % 255, 0, 0), (n,)) for n in (111, 211, 311, 6, -1))
)


@pytest.mark.parametrize(
    ('dtype', 'nodata', 'left', 'right', 'classes'),
    [
        ('uint8', None, 111, 6, (0, 3)),
        ('uint16', None, 111, 211, (0, 1)),
        ('uint16', None, 262, 311, (255, 2)),  # 262 is 6 in eight bits
        ('int32', None, 65542, -65530, (255, 255)),  # and these are in sixteen
        ('int8', None, -1, 6, (4, 3)),
        ('int8', -1, -1, 6, (255, 3)),
        ('int16', -1, -1, 211, (255, 1)),
        ('int32', -9999, -9999, 211, (255, 1)),
        ('float32', None, NAN, 311, (255, 2)),
        ('float32', None, INF, 311, (255, 2)),
        ('float64', -9999, -9999, 111, (255, 0)),
        ('uint32', 2**32 - 1, 2**32 - 1, 211, (255, 1)),
        ('uint8', 6, 6, 111, (255, 0)),  # no data, though a class claims it
        ('uint16', 65535, 65535, 6, (255, 3)),
    ],
)
def test_labels_of_any_type(
    tmp_path: Path, dtype: str, nodata: float | None, left: float, right: float, classes: Any
) -> None:
    labels = half(left, dtype, right, 1)[0]
    options = {'labels_options': {'nodata': nodata}}
    mask = read(tmp_path, labels=labels, options=options, classes=CORINE)['mask']
    assert mask.tolist() == [[classes[0]] * 4 + [classes[1]] * 4] * 8


@pytest.mark.parametrize('how', ['mask', 'alpha'])
def test_labels_under_a_mask_are_none(tmp_path: Path, how: str) -> None:
    labels, seen = np.full((8, 8), 6, np.uint8), np.broadcast_to(np.arange(8) < 4, (8, 8))
    write_patch(tmp_path, '31UEQ', size=8, labels=labels, labels_options={'mask': seen})
    if how == 'alpha':
        path = tmp_path / 'ground_reference' / '31UEQ_GR_0_0.tif'
        bands = np.stack([labels, seen * np.uint8(255)])
        write_raster(path, bands, *ORIGINS['31UEQ'], colorinterp=[ColorInterp.gray, *ALPHA[-1:]])
    mask = MultiSenGE(tmp_path, 'all', classes=CORINE)[0]['mask']
    assert mask.tolist() == [[3] * 4 + [255] * 4] * 8


def test_labels_have_a_scale_and_an_offset_too(tmp_path: Path) -> None:
    options = {'nodata': 6, 'scales': [100], 'offsets': [11]}
    labels = half(6, 'uint8', 1, 1)[0]
    mask = read(tmp_path, labels=labels, options={'labels_options': options}, classes=CORINE)
    assert mask['mask'].tolist() == [[255] * 4 + [0] * 4] * 8


def test_colours_are_no_labels(tmp_path: Path) -> None:
    write_patch(tmp_path, '31UEQ', size=8)
    path = tmp_path / 'ground_reference' / '31UEQ_GR_0_0.tif'
    write_raster(path, np.zeros((4, 8, 8), np.uint8), *ORIGINS['31UEQ'], alpha='yes')
    with pytest.raises(ValueError, match='has 3 bands, a label raster has one; write the class'):
        MultiSenGE(tmp_path, 'all')[0]


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (np.full((8, 8), 1.5, np.float32), 'holds the label 1.5; labels are whole numbers'),
        (np.full((8, 8), 2**32 - 1, np.uint32), r'the label 4294967295.0; .* up to 2\*\*31'),
        (np.full((8, 8), -1e300), r'the label -1e\+300; .* up to 2\*\*31'),
        (np.full((8, 8), 6, np.complex64), 'complex'),
    ],
)
def test_what_is_no_label_is_refused(tmp_path: Path, labels: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, labels=labels)
    assert '31UEQ_GR_0_0.tif' in str(error.value)


@pytest.mark.parametrize(
    ('sensor', 'value', 'dtype', 'options', 'arguments', 'expected'),
    [
        ('s2', 1500, 'int16', {'scales': 1e-4, 'offsets': -0.1}, {}, 0.05),
        ('s2', 1500, 'uint16', {'scales': 1e-4}, {'offset': -1000}, 0.05),
        ('s2', 1500, 'uint16', {'offsets': -1000}, {}, 0.05),  # of the file's DN
        ('s2', 1500, 'uint16', {'scales': 1e-4}, {'raw': True}, 1500),
        ('s2', 0.25, 'float32', {}, {'unit': 'reflectance'}, 0.25),
        ('s2', 25, 'uint8', {'scales': 0.01}, {'unit': 'reflectance'}, 0.25),
        ('s2', 2500, 'float32', {}, {'unit': {'s2': 'dn'}}, 0.25),
        ('s2', 1500, 'int16', {}, {'offset': {'2022-07-06': -1000}}, 0.05),
        ('s2', 1500, 'int16', {}, {'offset': {'20220706': -1000}}, 0.05),
        ('s2', 1500, 'int16', {}, {'offset': {20220706: -1000}}, 0.05),
        ('s2', 1500, 'int16', {}, {'offset': {'2022-07-07': -1000}}, 0.15),
        ('s2', 1500, 'int16', {}, {'offset': {'2022-01-25': -1000, '2022-07-01': 500}}, 0.2),
        ('s1', 0.1, 'float32', {}, {}, -10),
        ('s1', -12.5, 'float32', {}, {'unit': 'db'}, -12.5),
        ('s1', 3, 'float32', {}, {'unit': 'db'}, 3),
        ('s1', -1250, 'int16', {'scales': 0.01}, {'unit': 'db'}, -12.5),
        ('s1', -1250, 'int16', {'scales': 0.01, 'nodata': -32768}, {'unit': {'s1': 'db'}}, -12.5),
        ('s1', 0.1, 'float32', {}, {'unit': 'amplitude'}, -20),
        ('s1', 100, 'uint16', {'scales': 0.001}, {}, -10),
        ('s1', -12.5, 'float32', {}, {'unit': 'db', 'raw': True}, -12.5),
        ('s1', 0.1, 'float32', {}, {'offset': -1000}, -10),  # which is of Sentinel-2
    ],
)
def test_units_scales_and_offsets(
    tmp_path: Path,
    sensor: str,
    value: float,
    dtype: str,
    options: dict[str, Any],
    arguments: dict[str, Any],
    expected: float,
) -> None:
    count = len(SENSOR_BANDS[sensor])
    image = np.full((count, 8, 8), value).astype(dtype)
    per_band = {k: [v] * count if k in ('scales', 'offsets') else v for k, v in options.items()}
    sample = read(tmp_path, **{sensor: image}, options={f'{sensor}_options': per_band}, **arguments)
    np.testing.assert_allclose(sample[sensor], np.full((count, 8, 8), expected), rtol=1e-5)


def test_no_data_is_compared_before_scale_and_offset(tmp_path: Path) -> None:
    options = {'s2_options': {'nodata': 0, 'scales': [1e-4] * 10, 'offsets': [-0.1] * 10}}
    check_halves(read(tmp_path, half(0, 'uint16', 1500), options=options)['s2'], 0.05)


def test_a_scale_of_some_bands_is_refused(tmp_path: Path) -> None:
    options = {'s2_options': {'scales': [1e-4] + [1.0] * 9}}
    with pytest.raises(ValueError, match='has a scale for some of its bands only'):
        read(tmp_path, half(0, 'uint16', 1500), options=options)


ESA = ('B01', *SENSOR_BANDS['s2'][:8], 'B09', *SENSOR_BANDS['s2'][8:])
STAC = ('coastal', *COMMON[:8], 'nir09', *COMMON[8:])
EDGES = 'REDEDGE1', 'REDEDGE2', 'REDEDGE3'
FORCE = 'BLUE', 'GREEN', 'RED', *EDGES, 'BROADNIR', 'NIR', 'SWIR1', 'SWIR2'
SHORT = 'BLU', 'GRN', 'RED', 'RE1', 'RE2', 'RE3', 'BNR', 'NIR', 'SW1', 'SW2'
FOUR = 'B08', 'B04', 'B03', 'B02'
NUMBERS = {band: number for number, band in enumerate((*ESA, 'VV', 'VH', 'angle'), 1)}
ORDERS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    'reversed': (SENSOR_BANDS['s2'][::-1], SENSOR_BANDS['s2'][::-1]),
    '12 named': (ESA, ESA),
    'short and lower': (ESA, tuple(name.lower().replace('b0', 'b') for name in ESA)),
    'with their colours': (ESA, tuple(f'{name} - of the sensor' for name in ESA)),
    'by number': (ESA[::-1], tuple(name[1:] for name in ESA[::-1])),
    'four by number': (FOUR, tuple(f'Band {int(name[1:])}' for name in FOUR)),
    'counted': (ESA, tuple(f'Band {i}' for i in range(1, 13))),
    'with a zero too many': (ESA, tuple(name.replace('B8A', 'B08A') for name in ESA)),
    'common names': (ESA, STAC),
    'FORCE': (SENSOR_BANDS['s2'], FORCE),
    'FORCE, another order': (SENSOR_BANDS['s2'][::-1], SHORT[::-1]),
    'named in part': (ESA, tuple('vegetation' if n in ('B05', 'B06') else n for n in ESA)),
    '12 unnamed': (ESA, None),
    'four': (FOUR, FOUR),
    'Sentinel-1 with an angle': (('angle', 'VH', 'VV'), ('angle', 'Gamma0_VH', 'Gamma0_VV')),
}


@pytest.mark.parametrize(('bands', 'names'), ORDERS.values(), ids=ORDERS.keys())
def test_bands_go_by_name(
    tmp_path: Path, bands: tuple[str, ...], names: tuple[str, ...] | None
) -> None:
    """Each band holds its number wherever it lies in the file."""
    sensor = 's1' if 'VV' in bands else 's2'
    chosen = [band for band in SENSOR_BANDS[sensor] if band in bands]
    image = np.stack([np.full((8, 8), NUMBERS[band], np.int16) for band in bands])
    options = {f'{sensor}_options': {'descriptions': names} if names else {}}
    # The names that a file has count more than what is said of files without.
    said = [name.lower().replace('b0', 'b') for name in ESA]
    told: Any = {'sensors': [sensor], 'bands': chosen, 'file_bands': {'s2': said}, 'raw': True}
    sample = read(tmp_path, **{sensor: image}, options=options, **told)
    assert sample['image'][0, :, 0, 0].tolist() == [NUMBERS[band] for band in chosen]


def test_bands_of_one_sensor_are_none_of_another() -> None:
    assert SENSORS['s1'].named((*FORCE, 'VV')) == [*[None] * len(FORCE), 'VV']


@pytest.mark.parametrize('named', [True, False])
def test_four_bands_of_red_green_blue_and_transparency_are_four_bands(
    tmp_path: Path, named: bool
) -> None:
    """As GDAL takes four bands of bytes for, unless told."""
    bands, values = ('B04', 'B03', 'B02', 'B08'), (40, 30, 20, 80)
    image = np.stack([half(0 if v == 80 else v, 'uint8', v, 1)[0] for v in values])
    options = {'s2_options': {'descriptions': bands if named else 4 * [None], 'photometric': 'rgb'}}
    said: dict[str, Any] = {} if named else {'file_bands': {'s2': bands}}
    chosen = ['B02', 'B03', 'B04', 'B08', 'VV']
    seen = read(tmp_path, image, options=options, bands=chosen, **said)['image'][0]
    np.testing.assert_allclose(seen[:, 0, 7], [0.002, 0.003, 0.004, 0.008, -10], rtol=1e-5)
    np.testing.assert_allclose(seen[:, 0, 0], [0.002, 0.003, 0.004, NAN, -10], rtol=1e-5)


@pytest.mark.parametrize(
    ('sensor', 'count', 'names', 'message'),
    [
        ('s2', 12, None, r'12 bands of which no name is known.*expected 10: B02.*file_bands=\{.s2'),
        ('s2', 4, None, r'has 4 bands of which no name.*expected 10'),
        ('s1', 1, None, 'has 1 bands of which no name.*expected 2: VV, VH'),
        ('s1', 2, ('HH', 'HV'), 'HH'),
        ('s2', 10, ('B02', 'B02', *ESA[2:10]), 'names a band twice'),
        (
            's1',
            2,
            ('VV', 'angle'),
            r'has the bands VV and lacks VH; .* or name ..angle.. in file_bands',
        ),
    ],
)
def test_bands_that_are_not_known_are_refused(
    tmp_path: Path, sensor: str, count: int, names: tuple[str, ...] | None, message: str
) -> None:
    options = {f'{sensor}_options': {'descriptions': names} if names else {}}
    image = np.ones((count, 8, 8), np.int16)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, **{sensor: image}, options=options)
    assert f'31UEQ_{DAY}_{sensor.upper()}_0_0.tif' in str(error.value)


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'holds complex numbers .complex64.; give power or dB'):
        read(tmp_path, s1=np.ones((2, 8, 8), np.complex64))


def plane(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """What the ground is like around a patch: 3,000, 1 more a metre east and 2 more one south."""
    return 3000 + (x - 500000) + 2 * (5500000 - y)


def around(crs: str, width: int, height: int) -> Affine:
    """Pixels of a CRS over 700 m around the middle of the patch."""
    x, y = transform(
        CRS.from_epsg(32631), CRS.from_user_input(crs), [499800, 500520], [5499480, 5500200]
    )
    return from_bounds(min(x), min(y), max(x), max(y), width, height)


TURN = Affine.rotation(20) @ Affine.scale(10, -10) @ Affine.translation(-48, -48)
ROTATED = Affine.translation(500160, 5499840) @ TURN
UTM, WIDER = 'EPSG:32631', from_origin(499800, 5500200, 10, 10)
PLACES: dict[str, tuple[str, Affine]] = {
    '20 m': (UTM, from_origin(499800, 5500200, 20, 20)),
    '5 m': (UTM, from_origin(499900, 5500100, 5, 5)),
    'half a pixel off': (UTM, from_origin(499795, 5500205, 10, 10)),
    'not square': (UTM, from_origin(499800, 5500200, 12, 9)),
    'south up': (UTM, Affine(10, 0, 499800, 0, 10, 5499600)),
    'west to the right': (UTM, Affine(-10, 0, 500700, 0, -10, 5500200)),
    'columns go south': (UTM, Affine(0, 10, 499800, -10, 0, 5500200)),
    'sheared': (UTM, Affine(10, 2, 499700, 1, -10, 5500100)),
    'rotated': (UTM, ROTATED),
    'zone 32': ('EPSG:32632', around('EPSG:32632', 96, 96)),
    'degrees': ('EPSG:4326', around('EPSG:4326', 96, 96)),
    'Mercator': ('EPSG:3857', around('EPSG:3857', 96, 96)),
    'ETRS89': ('EPSG:25831', WIDER),
    'Lambert': ('EPSG:3035', around('EPSG:3035', 96, 96)),
    'southern zone': ('EPSG:32731', from_origin(499800, 15500200, 10, 10)),
    'ESRI': (CRS.from_epsg(32631).to_wkt(version='WKT1_ESRI'), WIDER),
    'no authority': ('+proj=utm +zone=31 +datum=WGS84', WIDER),
}


def elsewhere(root: Path, crs: str, where: Affine, values: NDArray[Any]) -> MultiSenGE:
    """A band of a patch on pixels of its own."""
    options = {'crs': CRS.from_user_input(crs), 'transform': where, 'descriptions': ('B02',)}
    write_patch(root, '31UEQ', 0, 0, 32, {DAY: values}, {}, s2_options=options)
    return MultiSenGE(root, 'all', EvenlySpaced(n=1), sensors=['s2'], bands=['B02'], raw=True)


@pytest.mark.parametrize(('crs', 'where'), PLACES.values(), ids=PLACES.keys())
def test_other_pixels_than_the_patch_are_warped(tmp_path: Path, crs: str, where: Affine) -> None:
    """A plane stays a plane under bilinear interpolation, whatever the pixels."""
    columns, rows = np.meshgrid(np.arange(96) + 0.5, np.arange(96) + 0.5)
    x, y = where @ (columns, rows)
    theirs, ours = CRS.from_user_input(crs), CRS.from_epsg(32631)
    east, south = transform(theirs, ours, np.ravel(x), np.ravel(y))
    values = plane(np.array(east), np.array(south)).reshape(1, 96, 96).astype(np.float32)
    got = elsewhere(tmp_path, crs, where, values)[0]['image'][0, 0].numpy()
    xs, ys = 500005 + 10.0 * np.arange(32), 5499995 - 10.0 * np.arange(32)
    # GDAL keeps to an eighth of a pixel, of 10 m here.
    np.testing.assert_allclose(got, plane(*np.meshgrid(xs, ys)), rtol=0, atol=2)


@pytest.mark.parametrize(('crs', 'where'), PLACES.values(), ids=PLACES.keys())
def test_a_warped_pixel_is_the_same_in_any_window(tmp_path: Path, crs: str, where: Affine) -> None:
    values = np.random.default_rng(0).integers(1, 10000, (1, 96, 96)).astype(np.int16)
    dataset = elsewhere(tmp_path, crs, where, values)
    whole = dataset[0]['image'][..., 3:20, 11:16]
    np.testing.assert_allclose(dataset.crop(0, 3, 11, 17, 5)['image'], whole, atol=1)


def test_images_that_are_finer_than_their_labels_are_averaged_which_is_said(tmp_path: Path) -> None:
    image = np.broadcast_to(1000 + 100 * np.arange(8), (10, 8, 8)).astype(np.int16)
    write_patch(tmp_path, '31UEQ', size=8, s2={DAY: image}, s1={})
    path = tmp_path / 'ground_reference' / '31UEQ_GR_0_0.tif'
    write_raster(path, np.full((1, 4, 4), 6, np.uint8), *ORIGINS['31UEQ'], res=20)
    dataset = MultiSenGE(tmp_path, 'all', EvenlySpaced(n=1), sensors=['s2'])
    with pytest.warns(S1S2Warning, match=r's2 has images of finer pixels \(10\) than .* \(20\)'):
        seen = dataset[0]['image'][0].numpy()
    assert seen.shape == (10, 4, 4)
    np.testing.assert_allclose(
        seen[..., 1:3], np.broadcast_to([0.125, 0.145], (10, 4, 2)), atol=2e-3
    )


LAST_DIGIT = Affine(10.000000000000002, 0, 500000.00000000006, 0, -9.999999999999998, 5500000)


@pytest.mark.parametrize('sensor', ['s2', 's1', 'labels'])
def test_pixels_square_but_for_the_last_digit(tmp_path: Path, sensor: str) -> None:
    image = np.broadcast_to(np.arange(8), (10, 8, 8)).astype(np.int16)
    options = {f'{sensor}_options': {'transform': LAST_DIGIT}}
    sample = read(tmp_path, image, options=options, raw=True)
    assert sample['s2'][0, 0].tolist() == [*range(8)]
    assert sample['mask'].tolist() == [[0] * 8] * 8
    assert sample['valid'].all()


@pytest.mark.parametrize('how', ['world file', 'aux.xml'])
@pytest.mark.parametrize('folder', ['s2', 'ground_reference'])
def test_georeference_beside_a_raster(tmp_path: Path, how: str, folder: str) -> None:
    """As an image on other pixels shows: 20 m in a world file, or all in GDAL's metadata."""
    image = np.broadcast_to(np.arange(8), (10, 8, 8)).astype(np.int16)
    write_patch(tmp_path, '31UEQ', size=8, s2={DAY: image}, s1={})
    (path,) = (tmp_path / folder).iterdir()
    with rasterio.open(path) as src:
        data, profile = src.read(), src.profile
    path.unlink()
    place = profile.pop('transform')
    if how == 'world file':
        lines = (place.a, place.d, place.b, place.e, place.c + place.a / 2, place.f + place.e / 2)
        path.with_suffix('.tfw').write_text('\n'.join(map(str, lines)))
    else:
        numbers, crs = ', '.join(map(str, place.to_gdal())), profile.pop('crs').to_wkt()
        content = f'<SRS>{crs}</SRS><GeoTransform>{numbers}</GeoTransform>'
        path.with_suffix('.tif.aux.xml').write_text(f'<PAMDataset>{content}</PAMDataset>')
    with rasterio.open(path, 'w', **profile) as dst:
        dst.write(data)
    sample = MultiSenGE(tmp_path, 'all', EvenlySpaced(n=1), sensors=['s2'], raw=True)[0]
    assert sample['image'][0, 0, 0].tolist() == [*range(8)]
    assert sample['transform'].tolist()[:6] == [10, 0, 500000, 0, -10, 5500000]
    assert sample['mask'].tolist() == [[5] * 4 + [1] * 4] * 8


NOWHERE = Affine.identity()
CORNERS = [GroundControlPoint(row, col, 3 + col, 49 - row) for row in (0, 8) for col in (0, 8)]


@pytest.mark.parametrize(
    ('sensor', 'options', 'message'),
    [
        ('s2', {'crs': None}, r'does not say where it lies \(CRS None.*gdal_edit'),
        ('s1', {'transform': NOWHERE}, 'does not say where it lies'),
        ('s1', {'transform': None, 'gcps': CORNERS}, 'has control points only: correct'),
        ('labels', {'crs': None}, 'does not say where it lies'),
        ('labels', {'crs': CRS.from_epsg(32632)}, 'in EPSG:32632, its label file says EPSG:32631'),
        ('labels', {'transform': Affine(10, 0, 500000, 0, 10, 5499920)}, 'is not north-up'),
        ('labels', {'transform': Affine(10, 2, 500000, 1, -10, 5500000)}, 'is not north-up'),
        ('s2', {'transform': from_origin(500080, 5500000, 10, 10)}, 'beside its patch at'),
        ('s1', {'crs': CRS.from_epsg(32632)}, 'beside its patch at'),
        ('s2', {'crs': CRS.from_wkt('LOCAL_CS["mine",UNIT["metre",1]]')}, 'beside its patch at'),
        ('s1', {'crs': CRS.from_epsg(4326), 'transform': from_origin(50, 3, 1e-4, 1e-4)}, 'beside'),
    ],
)
@pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning')
def test_a_raster_that_lies_elsewhere_names_itself(
    tmp_path: Path, sensor: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, options={f'{sensor}_options': options})
    name = {'labels': 'GR', 's1': f'{DAY}_S1', 's2': f'{DAY}_S2'}[sensor]
    assert f'31UEQ_{name}_0_0.tif' in str(error.value)


def test_a_raster_that_covers_a_part_leaves_the_rest_missing(tmp_path: Path) -> None:
    options = {'s2_options': {'transform': from_origin(500040, 5500000, 10, 10)}}
    check_halves(read(tmp_path, options=options)['s2'], 0.1)


@pytest.mark.parametrize('bits', [16, 12])
def test_a_raster_that_the_faster_driver_does_not_know_is_read(tmp_path: Path, bits: int) -> None:
    image = np.full((10, 8, 8), 1000, np.uint16)
    check_halves(read(tmp_path, image, options={'s2_options': {'nbits': bits}})['s2'], 0.1, 0.1)


@pytest.mark.parametrize(
    'kind', [{'BIGTIFF': 'YES'}, {'ENDIANNESS': 'BIG', 'compress': 'packbits'}], ids=str
)
@pytest.mark.parametrize(('dtype', 'tag'), [('uint16', 65535), ('int16', -9999)])
def test_what_the_faster_driver_overlooks_counts(
    tmp_path: Path, kind: dict[str, str], dtype: str, tag: int
) -> None:
    options = {'s2_options': {'nodata': tag, **kind}}
    check_halves(read(tmp_path, half(tag, dtype), options=options)['s2'], 0.1)
