import re
from pathlib import Path

import numpy as np
import pytest
from conftest import S2_DATES, write_label_file, write_patch, write_raster

from torchgeo_s1s2.datasets import Catalog


def test_patches_and_acquisitions_of_two_zones(two_zones: Path) -> None:
    catalog = Catalog(two_zones)
    patches = catalog.patches
    assert list(patches['name']) == ['31UEQ_0_0', '31UEQ_33_0', '32ULU_0_0']
    assert list(patches['epsg']) == [32631, 32631, 32632]
    assert list(patches['classes']) == [(2, 6)] * 3
    bounds = patches.loc[1, ['xmin', 'ymin', 'xmax', 'ymax']]
    assert list(bounds) == [500330, 5499680, 500650, 5500000]
    assert (patches[['width', 'height']] == 32).all(axis=None)
    # 500000 E in zone 31 is 3 degrees east, the zone's central meridian.
    assert patches.geometry[0].bounds[0] == pytest.approx(3.0, abs=1e-9)
    assert len(catalog.acquisitions) == 3 * (4 + 4)
    assert catalog.missing == {'s2': 0, 's1': 0}
    assert catalog.path(1, 's2', 2) == two_zones / 's2' / '31UEQ_20200904_S2_33_0.tif'
    assert catalog.ground_reference(2) == two_zones / 'ground_reference' / '32ULU_GR_0_0.tif'


def test_dates_are_sorted_whatever_the_label_file_says(tmp_path: Path) -> None:
    write_label_file(tmp_path, '31UEQ', 0, 0, s2=S2_DATES[::-1], s1=('20201231', '20190101'))
    catalog = Catalog(tmp_path, files=False)
    assert catalog.times(0, 's2').astype('datetime64[D]').tolist() == [
        np.datetime64(f'{d[:4]}-{d[4:6]}-{d[6:]}').item() for d in S2_DATES
    ]
    assert catalog.times(0, 's1').astype('datetime64[Y]').astype(str).tolist() == ['2019', '2020']
    assert catalog.patches.geometry.isna().all()


def test_counts_of_the_real_label_files(real_labels: Path) -> None:
    catalog = Catalog(real_labels, files=False, progress=False)
    assert len(catalog.patches) == 8157
    assert catalog.acquisitions['sensor'].value_counts().to_dict() == {'s1': 1012227, 's2': 72033}
    holds = [sum(c in classes for classes in catalog.patches['classes']) for c in range(1, 15)]
    expected = [2098, 6264, 2607, 1779, 5445, 7305, 572, 911, 7893, 164, 7889, 77, 2536, 2258]
    assert holds == expected


def test_missing_files_are_counted_and_left_out(two_zones: Path) -> None:
    (two_zones / 's1' / '31UEQ_20200704_S1_0_0.tif').unlink()
    (two_zones / 'ground_reference' / '31UEQ_GR_33_0.tif').unlink()
    with pytest.warns(UserWarning, match=r'not on disk \(1 of s1, 1 of ground_reference\)'):
        catalog = Catalog(two_zones)
    assert catalog.missing == {'s2': 0, 's1': 1}
    assert len(catalog.times(0, 's1')) == 3
    assert catalog.ground_reference(1) is None
    # Without its label raster a patch still lies where its images do.
    assert catalog.patches.loc[1, 'xmin'] == 500330


def test_patches_of_different_size_in_one_tile(two_zones: Path) -> None:
    write_patch(two_zones, '31UEQ', 99, 0, size=48)
    patches = Catalog(two_zones).patches.set_index('name')
    assert patches['width'].to_dict() == {
        '31UEQ_0_0': 32,
        '31UEQ_33_0': 32,
        '31UEQ_99_0': 48,
        '32ULU_0_0': 32,
    }
    assert patches.loc['31UEQ_99_0', 'xmax'] == 501470


def test_few_rasters_are_opened(two_zones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for x in range(66, 330, 33):
        write_patch(two_zones, '31UEQ', x)
    opened: list[Path] = []
    from torchgeo_s1s2.datasets import catalog

    real = catalog.open_raster
    monkeypatch.setattr(catalog, 'open_raster', lambda p: opened.append(p) or real(p))  # type: ignore[func-returns-value]
    assert len(Catalog(two_zones).patches) == 11
    assert len(opened) == 2 * 2  # the first and the last patch of each tile


def test_root_without_a_folder(two_zones: Path) -> None:
    (two_zones / 's1').rename(two_zones / 'S1')
    with pytest.raises(FileNotFoundError, match=r"has no folder 's1'.*as root"):
        Catalog(two_zones)


def test_root_without_label_files(two_zones: Path) -> None:
    for path in (two_zones / 'labels').iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r'labels holds no label file; expected TILE_X_Y'):
        Catalog(two_zones)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"labels": ', 'JSONDecodeError'),
        ('[]', 'TypeError'),
        ('{"labels": "1"}', "KeyError: 'projection'"),
        (
            '{"labels": 1, "projection": "", "corresponding_s1": "", "corresponding_s2": ""}',
            'projection|AttributeError|CRSError',
        ),
    ],
)
def test_malformed_label_file_names_itself(two_zones: Path, text: str, message: str) -> None:
    path = two_zones / 'labels' / '31UEQ_0_0.json'
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Catalog(two_zones)
    assert str(path) in str(error.value)
    assert 'Fetch the file again or delete it' in str(error.value)


def test_label_file_that_names_another_patch(two_zones: Path) -> None:
    changes = {'corresponding_s2': '31UEQ_20200706_S2_0_257.tif'}
    write_label_file(two_zones, '31UEQ', 0, 0, **changes)
    expected = re.escape("'31UEQ_20200706_S2_0_257.tif' as an image of s2; expected 31UEQ_YYYYMMDD")
    with pytest.raises(ValueError, match=expected):
        Catalog(two_zones)


def test_impossible_date(two_zones: Path) -> None:
    changes = {'corresponding_s2': '31UEQ_20201340_S2_0_0.tif'}
    path = write_label_file(two_zones, '31UEQ', 0, 0, **changes)
    with pytest.raises(ValueError, match='20201340') as error:
        Catalog(two_zones, files=False)
    assert str(path) in str(error.value)


def test_raster_in_another_zone_than_its_label_file(two_zones: Path) -> None:
    path = two_zones / 'ground_reference' / '31UEQ_GR_0_0.tif'
    write_raster(path, np.ones((1, 32, 32), np.uint8), 32632, 500000, 5500000)
    with pytest.raises(ValueError, match='in EPSG:32632, its label file says EPSG:32631') as error:
        Catalog(two_zones)
    assert str(path) in str(error.value)


def test_unreadable_raster_names_itself(two_zones: Path) -> None:
    path = two_zones / 'ground_reference' / '32ULU_GR_0_0.tif'
    path.write_bytes(b'not a raster')
    with pytest.raises(OSError, match='cannot be opened') as error:
        Catalog(two_zones)
    assert str(path) in str(error.value)
