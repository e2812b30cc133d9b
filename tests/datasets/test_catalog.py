import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
from conftest import ORIGINS, S1_DATES, S2_DATES, write_label_file, write_patch, write_raster
from geopandas.testing import assert_geodataframe_equal
from pandas.testing import assert_frame_equal
from rasterio.errors import NotGeoreferencedWarning

from torchgeo_s1s2.datasets import AllDates, Catalog, EvenlySpaced, MultiSenGE, cache, rasters
from torchgeo_s1s2.errors import DataError, NoPatchesError, S1S2Warning, UnreadableError

IMAGE = '31UEQ_20200704_S1_0_0.tif'


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
    table = catalog.acquisitions
    assert list(table.columns) == ['patch', 'sensor', 'time', 'path']
    assert table['patch'].value_counts().to_dict() == {0: 8, 1: 8, 2: 8}
    assert table.iloc[4].tolist() == [0, 's1', np.datetime64('2020-07-04'), f's1/{IMAGE}']
    assert all((two_zones / path).exists() for path in table['path'])
    assert catalog.path(1, 's2', 2) == two_zones / 's2' / '31UEQ_20200904_S2_33_0.tif'
    assert catalog.ground_reference(2) == two_zones / 'ground_reference' / '32ULU_GR_0_0.tif'


def test_dates_are_sorted_whatever_the_label_file_says(tmp_path: Path) -> None:
    write_label_file(tmp_path, '31UEQ', 0, 0, s2=S2_DATES[::-1], s1=('20201231', '20190101'))
    catalog = Catalog(tmp_path, files=False)
    assert pd.to_datetime(catalog.times(0, 's2')).strftime('%Y%m%d').tolist() == [*S2_DATES]
    assert pd.to_datetime(catalog.times(0, 's1')).year.tolist() == [2019, 2020]
    assert catalog.patches.geometry.isna().all()


def test_counts_of_the_real_label_files(real_labels: Path) -> None:
    catalog = Catalog(real_labels, files=False, progress=False)
    assert len(catalog.patches) == 8157
    count = {s: sum(len(catalog.times(i, s)) for i in range(8157)) for s in ('s1', 's2')}
    assert count == {'s1': 1012227, 's2': 72033}
    holds = [sum(c in classes for classes in catalog.patches['classes']) for c in range(1, 15)]
    expected = [2098, 6264, 2607, 1779, 5445, 7305, 572, 911, 7893, 164, 7889, 77, 2536, 2258]
    assert holds == expected


def test_each_patch_has_its_own_size(two_zones: Path) -> None:
    write_patch(two_zones, '31UEQ', 99, 0, size=48)
    write_patch(two_zones, '31UEQ', 199, 0, size=32)
    patches = Catalog(two_zones).patches.set_index('name')
    assert patches['width'].to_dict() == {
        '31UEQ_0_0': 32, '31UEQ_33_0': 32, '31UEQ_99_0': 48, '31UEQ_199_0': 32, '32ULU_0_0': 32,
    }  # fmt: skip
    assert patches.loc['31UEQ_99_0', 'xmax'] == 501470
    dataset = MultiSenGE(two_zones, 'all')
    names = [dataset.name(i) for i in range(5)]
    assert [dataset[i]['mask'].shape[0] for i in range(5)] == patches['width'][names].tolist()


def test_one_raster_of_a_patch_is_opened(two_zones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (two_zones / 'ground_reference' / '31UEQ_GR_33_0.tif').unlink()
    opened: list[str] = []
    real = rasters.read_grid
    monkeypatch.setattr(rasters, 'read_grid', lambda *a: opened.append(a[0].name) or real(*a))  # type: ignore[func-returns-value]
    for _ in range(2):  # the second start opens none
        with pytest.warns(S1S2Warning, match='1 of ground_reference'):
            assert len(Catalog(two_zones).patches) == 3
        names = ['31UEQ_20200706_S2_33_0.tif', '31UEQ_GR_0_0.tif', '32ULU_GR_0_0.tif']
        assert sorted(opened) == names


def rename(root: Path, folder: str, change: Callable[[str], str]) -> None:
    """Rename every raster in a folder; a new name may lie in a folder below it."""
    for path in sorted((root / folder).iterdir()):
        target = root / folder / change(path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


NAMES: dict[str, Callable[[str], str]] = {
    'ending': lambda name: name.replace('.tif', '.tiff'),
    'upper case': lambda name: name.replace('.tif', '.TIF'),
    'folder of the archive': lambda name: f'archive/{name}',
    'folder of each date': lambda name: f'{name.split("_")[1]}/deep/{name}',
}


@pytest.mark.parametrize('change', NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize('folder', ['s1', 's2', 'ground_reference'])
def test_rasters_are_found_by_name(
    two_zones: Path, folder: str, change: Callable[[str], str]
) -> None:
    before = MultiSenGE(two_zones, 'all')[1]
    rename(two_zones, folder, change)
    with warnings.catch_warnings(action='error', category=S1S2Warning):
        dataset = MultiSenGE(two_zones, 'all')
    assert all(np.array_equal(before[key], value) for key, value in dataset[1].items())


def test_folders_behind_links_are_read_and_hidden_files_are_not(two_zones: Path) -> None:
    (two_zones / 's2').rename(two_zones / 'elsewhere')
    (two_zones / 's2').mkdir()
    (two_zones / 's2' / '2020').symlink_to(two_zones / 'elsewhere')
    (two_zones / 's2' / 'circle').symlink_to(two_zones)
    (two_zones / 'labels' / '._31UEQ_0_0.json').write_bytes(b'of a Mac')
    with warnings.catch_warnings(action='error', category=S1S2Warning):
        catalog = Catalog(two_zones)
    assert catalog.path(0, 's2', 0).parent == two_zones / 's2' / '2020'
    assert len(catalog.times(0, 's2')) == 4


@pytest.mark.parametrize(
    ('date', 'ending'),
    [
        *((d, 'tif') for d in ('20201331', '00000000', '00010101', '99991231', '20200706T250000')),
        *(('20200710', ending) for ending in ('jp2', 'tif.gz', 'vrt')),
        ('T105031_B02_10m', 'jp2'),
    ],
)
def test_images_without_a_date_or_of_another_format_are_counted_and_left_out(
    two_zones: Path, date: str, ending: str
) -> None:
    path = two_zones / 's2' / f'31UEQ_{date}_S2_0_0.{ending}'
    shutil.copy(two_zones / 's2' / '31UEQ_20200706_S2_0_0.tif', path)
    (two_zones / 's2' / '31UEQ_20200706_S2_0_0.png').write_bytes(b'a picture of an image')
    with pytest.warns(S1S2Warning, match=f'files in s2 of other names.* {path.name}, left out: 1'):
        dataset = MultiSenGE(two_zones, 'all', AllDates())
    assert int(dataset[0]['valid'][:, 0].sum()) == 4


def test_images_that_no_label_file_names_are_read_and_counted(two_zones: Path) -> None:
    write_label_file(two_zones, '31UEQ', 0, 0, s2=S2_DATES[:1], s1=())
    with pytest.warns(S1S2Warning, match='images that no label file names, read too: 7'):
        catalog = Catalog(two_zones)
    assert [len(catalog.times(0, sensor)) for sensor in ('s2', 's1')] == [4, 4]
    (two_zones / 'labels' / '31UEQ_33_0.json').unlink()
    (two_zones / 's1' / 'mosaic.tif').write_bytes(b'')
    message = (
        'files in s1 of other names.*mosaic.tif, left out: 1; '
        'rasters in s1 of places without a label file, such as 31UEQ_33_0, left out: 4'
    )
    with pytest.warns(S1S2Warning, match=message):
        assert len(Catalog(two_zones).patches) == 2


def test_a_date_that_is_listed_twice_counts_once(two_zones: Path) -> None:
    write_label_file(two_zones, '31UEQ', 0, 0, s1=(*S1_DATES, *S1_DATES[:2]))
    for files in (True, False):
        with pytest.warns(
            S1S2Warning, match='images that a label file names twice, each counted once: 2'
        ):
            catalog = Catalog(two_zones, files=files)
        assert len(catalog.times(0, 's1')) == 4


@pytest.mark.parametrize(
    'names',
    [
        ('31UEQ_20200704_S1A_0_0.tif', '31UEQ_20200704_S1B_0_0.tif'),
        ('31UEQ_20200704_S1_ASC_0_0.tif', '31UEQ_20200704_S1_DES_0_0.tif'),
        ('31UEQ_20200704T055103_S1_0_0.tif', '31UEQ_20200704T172345_S1_0_0.tif'),
        ('31UEQ_20200704_S1_0_0.tif', '31UEQ_20200704T172345_S1_0_0.tif'),
        ('morning/31UEQ_20200704_S1_0_0.tif', 'evening/31UEQ_20200704_S1_0_0.tif'),
    ],
)
def test_two_images_of_a_day_are_both_kept(tmp_path: Path, names: tuple[str, str]) -> None:
    """Of -10 and -20 dB; their mean in power is 0.055."""
    write_patch(tmp_path, '31UEQ', size=8, s1={})
    for name, power in zip(names, (0.1, 0.01), strict=True):
        image = np.full((2, 8, 8), power, np.float32)
        write_raster(tmp_path / 's1' / name, image, *ORIGINS['31UEQ'])
    write_label_file(tmp_path, '31UEQ', 0, 0, s1=('20200704', '20200704'))
    rule = AllDates(max_length=2, leader='s1')
    with warnings.catch_warnings(action='ignore', category=S1S2Warning):
        catalog = Catalog(tmp_path)
        dataset = MultiSenGE(tmp_path, 'all', rule, sensors=['s1'])
        single = EvenlySpaced(n=1, s1_per_slot=2)
        both = MultiSenGE(tmp_path, 'all', single)[0]['image'][0, 10, 0, 0]
    assert len(catalog.times(0, 's1')) == 2
    assert {catalog.path(0, 's1', i) for i in (0, 1)} == {tmp_path / 's1' / n for n in names}
    assert sorted(dataset[0]['image'][:, 0, 0, 0].tolist()) == pytest.approx([-20, -10])
    assert both == pytest.approx(10 * np.log10(0.055))


def test_one_name_of_a_tile_in_two_zones(tmp_path: Path) -> None:
    for x, epsg in ((0, 32631), (50, 32632)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(ORIGINS, '31UEQ', (epsg, 500000.0, 5500000.0))
            write_patch(tmp_path, '31UEQ', x, size=8)
    dataset = MultiSenGE(tmp_path, 'all')
    assert [int(dataset[i]['crs']) for i in (0, 1)] == [32631, 32632]
    assert dataset.catalog.patches['epsg'].tolist() == [32631, 32632]
    west, east = (g.centroid.x for g in dataset.catalog.patches.geometry)
    assert east - west == pytest.approx(6, abs=0.01)  # degrees from one zone to the next
    assert [len(zone) for zone in dataset.zones()] == [1, 1]
    assert [zone.crs.to_epsg() for zone in dataset.zones()] == [32631, 32632]


def test_root_without_what_it_needs(two_zones: Path) -> None:
    path = two_zones / 'ground_reference' / '32ULU_GR_0_0.tif'
    path.write_bytes(b'not a raster')
    with pytest.raises(OSError, match=f'{path} cannot be read'):
        Catalog(two_zones)
    (two_zones / 's1').rename(two_zones / 'S1')
    with pytest.raises(FileNotFoundError, match=r"has no folder 's1'.*as root"):
        Catalog(two_zones)
    for path in (two_zones / 'labels').iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r'labels holds no label file, expected TILE_X_Y'):
        Catalog(two_zones, files=False)
    (two_zones / 'labels').rename(two_zones / 'LABELS')
    with pytest.raises(FileNotFoundError, match=r"has no folder 'labels'.*write_label_files"):
        Catalog(two_zones)


def test_label_files_are_found_at_any_depth(two_zones: Path) -> None:
    before = Catalog(two_zones).patches
    deeper = two_zones / 'labels' / 'labels'
    deeper.mkdir()
    for path in [*(two_zones / 'labels').glob('*.json')]:
        path.rename(deeper / path.name)
    assert_frame_equal(Catalog(two_zones).patches, before)
    shutil.copy(deeper / '31UEQ_0_0.json', two_zones / 'labels')
    with pytest.warns(S1S2Warning, match='label files with the name of another, which is read: 1'):
        assert_frame_equal(Catalog(two_zones).patches, before)
    (deeper / '31UEQ_0_0.json').unlink()
    (deeper / '32ULU_0_0.json').unlink()
    with pytest.warns(S1S2Warning, match='of places without a label file'):
        assert len(Catalog(two_zones).patches) == 2


def test_labels_without_rasters_and_rasters_of_one_sensor_say_what_to_do(two_zones: Path) -> None:
    for path in (two_zones / 's2').iterdir():
        path.unlink()
    with (
        pytest.warns(S1S2Warning, match='not on disk'),
        pytest.raises(NoPatchesError, match=r"Choose another series, or leader='s1'"),
    ):
        MultiSenGE(two_zones, 'all', AllDates(missing='keep'))
    for folder in ('s1', 'ground_reference'):
        for path in (two_zones / folder).iterdir():
            path.unlink()
    with (
        pytest.warns(S1S2Warning, match='not on disk'),
        pytest.raises(NoPatchesError, match=r'has label files, and no raster .* fetch these'),
    ):
        MultiSenGE(two_zones, 'all', AllDates())


def test_a_world_file_that_is_mended_counts(two_zones: Path) -> None:
    path = two_zones / 'ground_reference' / '31UEQ_GR_0_0.tif'
    with rasterio.open(path) as src:
        profile = {k: v for k, v in src.profile.items() if k != 'transform'}
    path.unlink()
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(path, 'w', **profile) as dst:
        dst.write(np.ones((1, 32, 32), np.uint8))
    for left in (500000, 500080):  # corrected in place
        path.with_suffix('.tfw').write_text(f'10\n0\n0\n-10\n{left + 5}\n5499995\n')
        assert Catalog(two_zones).patches['xmin'].iat[0] == left


def with_text(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


def with_image(name: str) -> Callable[[Path], Any]:
    return lambda path: write_label_file(path.parents[1], '31UEQ', 1, 1, corresponding_s2=name)


NO_IMAGE = 'as an image of s2; expected 31UEQ_YYYYMMDD_S2_1_1.tif'


@pytest.mark.parametrize(
    ('write', 'message'),
    [
        (with_text('{"labels": '), 'is malformed .JSONDecodeError.*Fetch the file again or delete'),
        (with_text('[]'), 'is malformed .TypeError'),
        (with_text('{"labels": "1"}'), "is malformed .KeyError: 'projection'"),
        (
            with_text('{"labels": 1, "projection": "", "corresponding_s1": ""}'),
            'is malformed .(CRSError|AttributeError)',
        ),
        (with_image('31UEQ_20200706_S2_0_257.tif'), f'names .*_0_257.tif. {NO_IMAGE}'),
        (with_image('31UEQ_20201340_S2_1_1.tif'), NO_IMAGE),
        (with_image('32ULU_20200706_S2_1_1.tif'), NO_IMAGE),
        (lambda path: path.symlink_to('/nowhere'), 'cannot be read: .*Fetch the file again or'),
    ],
)
def test_a_label_file_that_cannot_be_used_names_itself(
    two_zones: Path, write: Callable[[Path], Any], message: str
) -> None:
    path = two_zones / 'labels' / '31UEQ_1_1.json'
    write(path)
    with pytest.raises((DataError, UnreadableError), match=f'{path}.*{message}'):
        Catalog(two_zones)


def test_label_file_that_spells_its_crs_otherwise(two_zones: Path) -> None:
    write_label_file(two_zones, '31UEQ', 0, 0, projection='EPSG:32631')
    assert Catalog(two_zones).patches['epsg'].tolist() == [32631, 32631, 32632]


def assert_same(one: Catalog, other: Catalog) -> None:
    assert_geodataframe_equal(one.patches, other.patches)
    assert_frame_equal(one.acquisitions, other.acquisitions)  # paths as well
    for patch in range(len(one.patches)):
        assert repr(one.patch(patch)) == repr(other.patch(patch))  # nan is not nan
        assert one.ground_reference(patch) == other.ground_reference(patch)


def never(*args: Any) -> Any:
    raise AssertionError(f'not to be called: {args}')


def test_missing_files_are_counted_and_a_later_start_says_the_same(
    two_zones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (two_zones / 's1' / IMAGE).unlink()
    (two_zones / 'ground_reference' / '31UEQ_GR_33_0.tif').unlink()
    # A patch without any raster has no footprint.
    write_label_file(two_zones, '32ULU', 33, 0, s2=(), s1=())
    message = r'not on disk \(1 of s1, 2 of ground_reference\)'
    with pytest.warns(UserWarning, match=message):
        first = Catalog(two_zones)
    assert len(first.times(0, 's1')) == 3
    assert first.ground_reference(1) is None
    # Without its label raster a patch still lies where its images do.
    assert first.patches.loc[1, 'xmin'] == 500330
    monkeypatch.setattr('torchgeo_s1s2.datasets.catalog._read_label', never)
    monkeypatch.setattr(rasters, 'read_grid', never)
    with pytest.warns(UserWarning, match=message):
        later = Catalog(two_zones)
    assert_same(first, later)
    assert later.patches['geometry'].isna().tolist() == [False, False, False, True]


def rewrite_label_file_in_place(root: Path) -> None:
    path = root / 'labels' / '31UEQ_0_0.json'
    path.write_text(path.read_text().replace('"2;6"', '"3;6"'))


def rewrite_tile_in_place(root: Path) -> None:
    for path in root.rglob('32ULU*.tif'):
        write_raster(path, np.ones((1, 48, 48), np.uint8), 32632, 300000, 5400000)


CHANGES: dict[str, Callable[[Path], Any]] = {
    'image removed': lambda root: (root / 's1' / IMAGE).unlink(),
    'image renamed': lambda root: (root / 's1' / IMAGE).rename(root / 's1' / 'hidden'),
    'image moved below': lambda root: rename(root, 's2', lambda name: f'below/{name}'),
    'labels removed': lambda root: (root / 'ground_reference' / '31UEQ_GR_33_0.tif').unlink(),
    'patch added': lambda root: write_patch(root, '31UEQ', 66),
    'patch removed': lambda root: (root / 'labels' / '32ULU_0_0.json').unlink(),
    'label file rewritten': rewrite_label_file_in_place,
    'tile rewritten': rewrite_tile_in_place,
}


@pytest.mark.filterwarnings('ignore:.*(not on disk|without a label file)')
@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES.keys())
def test_changes_are_noticed(two_zones: Path, change: Callable[[Path], Any]) -> None:
    before = Catalog(two_zones)
    change(two_zones)
    true = Catalog(two_zones, cache=False)
    with pytest.raises(AssertionError):
        assert_same(before, true)
    assert_same(Catalog(two_zones), true)
    assert_same(Catalog(two_zones), true)


@pytest.mark.filterwarnings('ignore:.*not on disk')
def test_a_change_during_the_listing_is_noticed_later(
    two_zones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = two_zones / 's1' / IMAGE
    content = path.read_bytes()
    path.unlink()
    real = rasters.read_grid

    def arrive(*args: Any) -> Any:
        path.write_bytes(content)  # rasters are opened after the folders were listed
        return real(*args)

    monkeypatch.setattr(rasters, 'read_grid', arrive)
    assert [len(Catalog(two_zones).times(0, 's1')) for _ in '12'] == [3, 4]


def test_a_change_within_a_tick_of_the_clock_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, slept = 1_600_000_000_000_000_000, list[float]()
    monkeypatch.setattr(cache.time, 'time_ns', lambda: now)
    monkeypatch.setattr(cache.time, 'sleep', slept.append)
    cache.wait_for_next_tick({'s1': [now - 5_000_001, now - 9_000_000, 7], 's2': [0, 0, 0]})
    cache.wait_for_next_tick({'s1': [now - 30_000_001, 0, 7]})  # long ago
    cache.wait_for_next_tick({'s1': [now, now, 7]})  # whole seconds
    cache.wait_for_next_tick({'s1': [now + 10**12 + 1, 0, 7]})  # a clock that is ahead
    assert slept == pytest.approx([0.015, 2, 0.02], abs=1e-6)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    'truncated': lambda content: content[: len(content) // 2],
    'bits': lambda content: (
        content[:200] + bytes(255 - b for b in content[200:210]) + content[210:]
    ),
    'version': lambda content: content.replace(b'"version": 2', b'"version": 1'),
    'empty': lambda content: b'',
}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_cache_is_made_anew(
    two_zones: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, path = Catalog(two_zones), two_zones / 'catalog.parquet'
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))
    assert_same(Catalog(two_zones), first)
    monkeypatch.setattr('torchgeo_s1s2.datasets.catalog._read_label', never)
    assert_same(Catalog(two_zones), first)


def test_a_folder_that_cannot_be_written(two_zones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError('read-only')

    monkeypatch.setattr('geopandas.GeoDataFrame.to_parquet', refuse)
    with pytest.warns(UserWarning, match=r'catalog.parquet cannot be written \(read-only\)'):
        first = Catalog(two_zones)
    with warnings.catch_warnings(action='error'):  # nothing is cached unless asked for
        again = Catalog(two_zones, cache=False)
        Catalog(two_zones, files=False)
    assert sorted(path.name for path in two_zones.iterdir()) == [
        'ground_reference', 'labels', 's1', 's2',
    ]  # fmt: skip
    assert_same(first, again)


def test_many_starts_at_once(two_zones: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        catalogs = list(pool.map(Catalog, [two_zones] * 16))
    true = Catalog(two_zones, cache=False)
    for one in catalogs:
        assert_same(one, true)
    assert not list(two_zones.glob('*.part')) + list(two_zones.glob('.*'))
