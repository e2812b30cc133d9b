import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import S1_DATES, S2_DATES, write_patch, write_raster
from pandas.testing import assert_frame_equal

from torchgeo_s1s2.datasets import Catalog, MonthlySeries, MultiSenGE, write_label_files
from torchgeo_s1s2.errors import S1S2Warning


@pytest.mark.parametrize('there', [True, False])
def test_label_files_tell_what_those_of_the_data_set_tell(
    two_zones: Path, there: bool, capsys: Any
) -> None:
    given = Catalog(two_zones)
    for path in (two_zones / 'labels').iterdir():
        path.unlink()
    if not there:
        (two_zones / 'labels').rmdir()
    with pytest.raises(FileNotFoundError, match=rf"write_label_files\('{two_zones}'\) writes"):
        MultiSenGE(two_zones, 'all')
    for count in (3, 0):
        assert write_label_files(two_zones) == count
        assert ('Writing labels' in capsys.readouterr().err) == bool(count)
    made = Catalog(two_zones)
    assert_frame_equal(made.acquisitions, given.acquisitions)
    assert_frame_equal(made.patches, given.patches)


@pytest.mark.parametrize('below', ['', 'north'])
def test_label_files_that_are_there_stay(two_zones: Path, below: str) -> None:
    labels, name = two_zones / 'labels', '31UEQ_0_0.json'
    (labels / below).mkdir(exist_ok=True)
    path = (labels / name).rename(labels / below / name)
    before = path.read_text()
    (labels / '31UEQ_33_0.json').unlink()
    (two_zones / 's2' / f'31UEQ_{S2_DATES[0]}_S2_33_0.tif').write_bytes(b'')  # others tell the CRS
    (two_zones / 's2' / f'31UEQ_{S2_DATES[0]}_S2_0_0.tif').unlink()
    assert write_label_files(two_zones, progress=False) == 1
    assert path.read_text() == before
    assert write_label_files(two_zones, overwrite=True, progress=False) == 3
    expected = ';'.join(f'31UEQ_{date}_S2_0_0.tif' for date in S2_DATES[1:])
    assert json.loads(path.read_text())['corresponding_s2'] == expected
    assert len([*labels.rglob('*.json')]) == 3


def test_a_scene_of_one_sensor_without_labels(tmp_path: Path) -> None:
    (tmp_path / 's2').mkdir()
    for date in S1_DATES:
        image = np.full((2, 8, 8), 0.1, np.float32)
        write_raster(tmp_path / 's1' / f'my_town_{date}_S1_0_0.tif', image, 32631, 500000, 5500000)
    assert write_label_files(tmp_path, progress=False) == 1
    series = MonthlySeries(leader='s1')
    with warnings.catch_warnings(action='error'):  # no label is named that would be missing
        dataset = MultiSenGE(tmp_path, split='all', sensors=['s1'], series=series)
    assert dataset.name(0) == 'my_town_0_0'
    assert (dataset[0]['mask'] == 255).all()
    assert (dataset[0]['image'] == -10).all()


def test_other_names_are_counted_and_missing_images_refused(
    two_zones: Path, tmp_path: Path
) -> None:
    (two_zones / 's1' / 'mosaic.tif').write_bytes(b'')
    with pytest.warns(S1S2Warning, match='s1 of other .*such as mosaic.tif, left out: 1') as told:
        assert write_label_files(two_zones, overwrite=True, progress=False) == 3
    assert {warning.filename for warning in told} == {__file__}  # where the user called
    (tmp_path / 'empty' / 's2').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r'no folder .*empty/s1; make it'):
        write_label_files(tmp_path / 'empty')
    (tmp_path / 'empty' / 's1').mkdir()
    with pytest.raises(FileNotFoundError, match='has no image; expected s2/TILE_YYYYMMDD_S2_X_Y'):
        write_label_files(tmp_path / 'empty')


@pytest.mark.parametrize(
    ('labels', 'options', 'expected'),
    [
        (np.array([[0, 1], [262, 311]], np.uint16), {}, '1;262;311'),
        (np.array([[-1, 1], [2, 3]], np.int8), {'nodata': -1}, '1;2;3'),
        (np.array([[np.nan, 1], [2, np.inf]], np.float32), {}, '1;2'),
        (np.array([[3, 1], [2, 3]], np.uint8), {'mask': np.array([[0, 1], [1, 0]], bool)}, '1;2'),
        (
            np.array([[0, 1], [2, 3]], np.uint8),
            {'scales': [100], 'offsets': [11]},
            '11;111;211;311',
        ),
    ],
)
def test_labels_present_are_those_that_are_data(
    tmp_path: Path, labels: np.ndarray, options: dict[str, Any], expected: str
) -> None:
    write_patch(tmp_path, '31UEQ', size=2, labels=labels, labels_options=options)
    write_label_files(tmp_path, overwrite=True, progress=False)
    content = json.loads((tmp_path / 'labels' / '31UEQ_0_0.json').read_text())
    assert content['labels'] == expected


def test_image_without_an_epsg_code_names_itself(tmp_path: Path) -> None:
    own = rasterio.CRS.from_string('+proj=tmerc +lon_0=7.3 +k=0.98 +datum=WGS84')
    write_patch(tmp_path, '31UEQ', size=8, s2_options={'crs': own})
    message = r'31UEQ_20200706_S2_0_0.tif has no CRS with an EPSG code.*; warp it to one'
    with pytest.raises(ValueError, match=message):
        write_label_files(tmp_path, overwrite=True, progress=False)
