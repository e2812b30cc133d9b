import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import S1_DATES, S2_DATES, random_images, write_label_file, write_patch

from torchgeo_s1s2.datasets import (
    SENSOR_BANDS,
    AllDates,
    EvenlySpaced,
    MonthlySeries,
    MultiSenGE,
    RandomDates,
    copy_series,
    sources,
)
from torchgeo_s1s2.datasets.sensors import OFFSET
from torchgeo_s1s2.errors import NoRoomError, S1S2Warning

SIZE = 12


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three patches of noise in two zones, with what is missing in all ways."""
    folder, rng = tmp_path / 'data', np.random.default_rng(0)
    for tile, x in (('31UEQ', 0), ('31UEQ', 12), ('32ULU', 0)):
        images = random_images(rng, SIZE)
        images['s2'][S2_DATES[1]][:, :3] = -10000
        images['s2'][S2_DATES[2]][:] = -10000
        images['s1'][S1_DATES[0]][:, 5] = 0
        labels = rng.integers(0, 15, (SIZE, SIZE)).astype(np.uint8)
        write_patch(folder, tile, x, 0, SIZE, labels=labels, **images)
    return folder


def check_same(one: MultiSenGE, other: MultiSenGE) -> None:
    """Both give the same samples and windows."""
    assert [one.name(i) for i in range(len(one))] == [other.name(i) for i in range(len(other))]
    west = slice(500000, 500240), slice(5499880, 5500000)  # the two patches of zone 31
    windows = [west, (slice(500005, 500235, 20), west[1])] if one.name(0) == '31UEQ_0_0' else []
    for what in (*range(len(one)), *windows):
        ours, theirs = one[what], other[what]
        assert ours.keys() == theirs.keys()
        theirs['bounds'][6:8] = ours['bounds'][6:8]  # a copy of fewer dates ends with the last
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=0, equal_nan=True)


def copied(root: Path, **options: Any) -> MultiSenGE:
    """The copy of what a data set may read."""
    plain = MultiSenGE(root, **({'split': 'all'} | options))
    assert copy_series(plain, root.parent / 'copy', progress=False) == root.parent / 'copy'
    return MultiSenGE(root.parent / 'copy', **({'split': 'all'} | options))


RULES: dict[str, dict[str, Any]] = {
    'monthly': {},
    'averaged': {'sensors': ['s1'], 'series': MonthlySeries(s1_per_slot=2)},
    'bands': {'bands': ['B08', 'VH'], 'classes': 6},
    'all': {'series': AllDates(max_length=6)},
    'random': {'series': RandomDates(n=2)},
    'gaps': {'series': MonthlySeries(months=(7, 10), missing='keep')},
    'raw': {'raw': True},
}


@pytest.mark.parametrize('options', RULES.values(), ids=RULES.keys())
def test_the_copy_gives_the_same_samples(root: Path, options: dict[str, Any]) -> None:
    copy = copied(root, **options)
    for epoch in (0, 1):
        plain = MultiSenGE(root, **({'split': 'all'} | options))
        plain.epoch = copy.epoch = epoch
        check_same(plain, copy)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*.*') if p.suffix != '.parquet')


def test_the_copy_stands_alone_under_other_rules_and_classes(root: Path) -> None:
    other: dict[str, Any] = {'series': EvenlySpaced(n=2), 'classes': 6, 'split': 'test'}
    expected = MultiSenGE(root, **other)
    samples = [expected[i] for i in range(2)]
    copy = copied(root)
    assert files(copy.root) == files(root)
    shutil.rmtree(root)
    for index, sample in enumerate(samples):
        again = MultiSenGE(copy.root, **other)[index]
        assert torch.equal(again['mask'], sample['mask'])
        assert torch.equal(again['image'].nan_to_num(), sample['image'].nan_to_num())


def test_it_holds_the_dates_of_the_rule_and_names_them(root: Path) -> None:
    with warnings.catch_warnings(action='error', category=S1S2Warning):
        copy = copied(root, series=MonthlySeries(months=(7, 8)), split='test')
    assert files(copy.root / 's2') == [
        f'31UEQ_{date}_S2_{x}_0.tif' for date in S2_DATES[:2] for x in (0, 12)
    ]
    assert files(copy.root / 'ground_reference') == ['31UEQ_GR_0_0.tif', '31UEQ_GR_12_0.tif']
    plain = MultiSenGE(root, 'test').catalog.patches
    assert copy.catalog.patches['classes'].tolist() == plain['classes'].tolist()[:2]
    # Another data set joins what is there, and what was there stays.
    both = copied(root, series=MonthlySeries(months=(8, 9)))
    assert len(files(both.root / 's2')) == 2 * 3 + 2
    assert [len(both.catalog.times(i, 's2')) for i in range(3)] == [3, 3, 2]
    early: dict[str, Any] = {'split': 'test', 'series': MonthlySeries(months=(7, 8))}
    check_same(MultiSenGE(root, **early), MultiSenGE(both.root, **early))


def test_what_the_data_set_has_no_longer_is_said(root: Path) -> None:
    copied(root)
    path = root / 's2' / '31UEQ_20200805_S2_0_0.tif'
    path.rename(path.with_name('31UEQ_20200806_S2_0_0.tif'))
    (root / 'ground_reference' / '31UEQ_GR_0_0.tif').unlink()
    which = f's2/{path.name}, ground_reference/31UEQ_GR_0_0.tif'
    with pytest.warns(S1S2Warning, match=rf'has no longer, still read \(2\): {which}. Del'):
        copied(root)


def test_rasters_are_uncompressed_and_say_what_they_said(tmp_path: Path) -> None:
    own = {'nodata': 7, 'scales': [1e-4] * 10, 'offsets': [-0.1] * 10, 'compress': 'deflate'}
    names = SENSOR_BANDS['s2'][::-1]
    image = np.full((10, 8, 8), 2000, np.uint16)
    image[:, 0] = 7
    write_patch(
        tmp_path / 'data', '31UEQ', size=8, s2=dict.fromkeys(S2_DATES, image),
        s2_options=own | {'descriptions': names, 'tags': {OFFSET: 0}},
        labels_options={'mask': np.broadcast_to(np.arange(8) < 4, (8, 8))},
    )  # fmt: skip
    copy = copied(tmp_path / 'data', offset=-1000)
    check_same(MultiSenGE(tmp_path / 'data', 'all'), copy)
    with rasterio.open(copy.catalog.path(0, 's2', 0)) as src:
        assert src.compression is None
        assert (src.dtypes[0], src.nodata, *src.descriptions) == ('uint16', 7, *names)
        assert (src.scales[0], src.offsets[0]) == (1e-4, -0.1)


def test_what_lies_beside_or_below_is_copied_too(tmp_path: Path) -> None:
    root = tmp_path / 'data'
    write_patch(root, '31UEQ', size=8)
    (path,) = (root / 's1').glob('*20200904*')
    seen = np.broadcast_to(np.arange(8) < 4, (8, 8))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, 'r+') as dst:
        dst.write_mask(seen)
    assert path.with_suffix('.tif.msk').exists()
    (root / 's2' / 'below').mkdir()
    for image in (root / 's2').glob('*.tif'):
        image.rename(root / 's2' / 'below' / image.name.replace('.tif', '.TIFF'))
    plain, copy = MultiSenGE(root, 'all'), copied(root)
    assert plain[0]['image'][2, 10:, :, 4:].isnan().all()
    check_same(plain, copy)


def test_an_interrupted_copy_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, begun = sources._copy, list[str]()

    def interrupted(job: Any) -> str:
        begun.append(job[0].name)
        if len(begun) == 5:
            raise KeyboardInterrupt
        return real(job)

    plain, folder = MultiSenGE(root, 'all'), root.parent / 'copy'
    monkeypatch.setattr(sources, '_copy', interrupted)
    with pytest.raises(KeyboardInterrupt):
        copy_series(plain, folder, num_workers=1, progress=False)
    done = set(begun[:4])
    assert done <= {path.name for path in folder.rglob('*.tif')}
    copy_series(plain, folder, num_workers=1, progress=False)
    assert len(begun) == len(set(begun[5:])) + 5
    assert not done & set(begun[5:])
    check_same(plain, MultiSenGE(folder, 'all'))


def test_a_raster_that_has_changed_is_copied_again(root: Path) -> None:
    copy = copied(root)
    before = {path: path.stat().st_mtime_ns for path in copy.root.rglob('*.tif')}
    copied(root)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    path = root / 's2' / f'31UEQ_{S2_DATES[0]}_S2_12_0.tif'
    with rasterio.open(path, 'r+') as dst:
        dst.write(dst.read() + 1)
    write_label_file(root, '31UEQ', 0, 0, labels='3;6')
    again = copied(root)
    assert again.catalog.patches['classes'][0] == (3, 6)
    changed = [p.name for p in before if p.stat().st_mtime_ns != before[p]]
    assert changed == [path.name]
    check_same(MultiSenGE(root, 'all'), again)


def test_a_file_system_that_keeps_whole_seconds_is_copied_to_once(root: Path) -> None:
    paths = [*copied(root).root.rglob('*.tif')]
    for path in paths:
        seconds = path.stat().st_mtime_ns // 10**9
        os.utime(path, ns=(0, seconds * 10**9))
    first = {path: path.stat().st_ino for path in paths}
    copied(root)
    assert {path: path.stat().st_ino for path in paths} == first
    (changed,) = (root / 's2').glob(f'31UEQ_{S2_DATES[0]}_S2_12_0.tif')
    os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 3 * 10**9))
    copied(root)
    assert [p.name for p in paths if p.stat().st_ino != first[p]] == [changed.name]


@pytest.mark.parametrize('date', [0, 2], ids=['first', 'later'])
@pytest.mark.parametrize('content', [b'', b'II*\0'])
def test_an_unreadable_raster_is_left_out_and_named(root: Path, content: bytes, date: int) -> None:
    path = root / 's1' / f'31UEQ_{S1_DATES[date]}_S1_0_0.tif'
    path.write_bytes(content)
    with pytest.warns(S1S2Warning, match=rf'rasters that cannot be .* \(1\): {path}') as told:
        copy = copied(root)
    assert len(told) == 1  # the label file of the copy names what is there
    assert len(copy.catalog.times(0, 's1')) == 3
    with pytest.warns(S1S2Warning, match='Another date takes its place'):
        check_same(MultiSenGE(root, 'all'), copy)


def test_a_disk_without_the_room_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images of 2,880 and four of 1,152 bytes a patch, and labels of 144."""
    need = 3 * (4 * 2880 + 4 * 1152 + 144)
    disk = SimpleNamespace(free=need - 1)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: disk)
    with pytest.raises(NoRoomError, match=r'about 0.0 GB are to be .* make room, or choose fewer'):
        copied(root)
    assert not [*(root.parent / 'copy').rglob('*.tif')]
    disk.free = need
    plain = MultiSenGE(root, 'all')
    plain.index = plain.index.iloc[[0, 1, 2, 0, 1, 2]]  # as of patches in pieces
    copy_series(plain, root.parent / 'copy', progress=False)
    check_same(MultiSenGE(root, 'all'), MultiSenGE(root.parent / 'copy', 'all'))
