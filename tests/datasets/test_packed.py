import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import S1_DATES, S2_DATES, write_patch
from safetensors.numpy import load_file
from torch.utils.data import DataLoader
from torchgeo.datasets import stack_samples
from torchgeo.samplers import GriddedPatchSampler

from torchgeo_s1s2.datasets import (
    AllDates,
    EvenlySpaced,
    MonthlySeries,
    MultiSenGE,
    RandomDates,
    pack,
    packed,
    rasters,
)

SIZE = 12


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three patches of noise in two zones, with what is missing in all ways."""
    folder, rng = tmp_path / 'data', np.random.default_rng(0)
    for tile, x in (('31UEQ', 0), ('31UEQ', 12), ('32ULU', 0)):
        s2 = {d: rng.integers(1, 9000, (10, SIZE, SIZE)).astype(np.int16) for d in S2_DATES}
        s1 = {d: rng.uniform(0.01, 1, (2, SIZE, SIZE)).astype(np.float32) for d in S1_DATES}
        s2[S2_DATES[1]][:, :3] = -10000
        s2[S2_DATES[2]][:] = -10000
        s1[S1_DATES[0]][:, 5] = 0
        labels = rng.integers(0, 15, (SIZE, SIZE)).astype(np.uint8)
        write_patch(folder, tile, x, 0, SIZE, s2, s1, labels)
    return folder


def check_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key].isnan(), value.isnan()), key
        assert torch.equal(got[key].nan_to_num(), value.nan_to_num()), key


def pair(root: Path, **options: Any) -> tuple[MultiSenGE, MultiSenGE]:
    """The data set, and the same one that reads a packed copy."""
    plain = MultiSenGE(root, **({'split': 'all'} | options))
    folder = pack(plain, root.parent / 'copy', progress=False)
    return plain, MultiSenGE(root, **({'split': 'all'} | options), packed=folder)


def folder_of(copy: MultiSenGE) -> Path:
    assert isinstance(copy.rasters, packed.PackedCopy)
    return copy.rasters.folder


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every attempt to open a raster fail."""

    def fail(path: Path) -> None:
        raise AssertionError(f'{path} is opened')

    monkeypatch.setattr(rasters, 'open_raster', fail)


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'raw': True},
        {'sensors': ['s1'], 'series': MonthlySeries(s1_per_slot=2)},
        {'bands': ['B08', 'VH'], 'classes': 6},
        {'series': AllDates(max_length=6)},
        {'series': EvenlySpaced(n=6, missing='nearest', max_days=60)},
        {'series': MonthlySeries(months=(7, 10), missing='keep')},
    ],
)
def test_samples_are_those_of_the_rasters(
    root: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, copy = pair(root, **options)
    expected = [plain[i] for i in range(3)]
    hide(monkeypatch)
    with pytest.raises(AssertionError, match='is opened'):
        plain[0]
    copy.check()
    for i in (0, 1, 2):
        check_same(copy[i], expected[i])
    check_same(pickle.loads(pickle.dumps(copy))[1], expected[1])


def test_samplers_of_torchgeo_cut_windows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 8 pixels in two patches side by side, which reach beyond them."""
    plain, copy = pair(root, split='test')
    windows = list(GriddedPatchSampler(plain, size=8, stride=5))
    expected = [plain[w] for w in windows]
    assert any((sample['mask'] == 255).all(0).any() for sample in expected)
    hide(monkeypatch)
    loader = DataLoader(copy, 1, sampler=windows, collate_fn=stack_samples)
    for batch, sample in zip(loader, expected, strict=True):
        check_same({key: value[0] for key, value in batch.items()}, sample)


def test_what_the_copy_does_not_hold_comes_from_the_rasters(root: Path) -> None:
    plain, copy = pair(root, series=EvenlySpaced(n=2, missing='keep'))
    summer = slice(pd.Timestamp('2020-07-01'), pd.Timestamp('2020-09-30'))
    window = slice(500000, 500120), slice(5499880, 5500000), summer
    assert plain[window]['acquisition_times'][1, 0] == -1  # 4 September: no value at all
    check_same(copy[window], plain[window])
    x, y, _ = plain.bounds
    whole = (slice(x.start, x.stop, 100), slice(y.start, y.stop, 100))  # warped to 100 m
    check_same(copy[whole], plain[whole])


def test_an_interrupted_copy_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, folder = MultiSenGE(root, 'all'), root.parent / 'copy'
    real, written = packed.save_file, []

    def interrupted(arrays: Any, path: Path, made_of: Any) -> None:
        real(arrays, path, made_of)
        written.append(path)
        if len(written) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(packed, 'save_file', interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(plain, folder, progress=False)
    assert [path.name for path in folder.iterdir()] == ['31UEQ_0_0.safetensors']
    with pytest.raises(ValueError, match=r'lacks 2 of the 3 patches .* for example 31UEQ_12_0'):
        MultiSenGE(root, 'all', packed=folder)
    pack(plain, folder, progress=False)
    assert [path.name.split('.')[0] for path in written] == [
        '31UEQ_0_0', '31UEQ_12_0', '31UEQ_12_0', '32ULU_0_0',
    ]  # fmt: skip
    check_same(MultiSenGE(root, 'all', packed=folder)[1], plain[1])


def test_workers_write_the_same_files(root: Path) -> None:
    plain = MultiSenGE(root, 'all')
    folders = [pack(plain, root.parent / f'{n}', n, progress=False) for n in (0, 2)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == [f'{plain.name(i)}.safetensors' for i in range(3)]
    for name in names[0]:
        first, second = (load_file(folder / name) for folder in folders)
        assert first.keys() == second.keys() > {'s2_0', 's2_3', 's1_0', 'labels'}
        assert all(np.array_equal(first[key], second[key], True) for key in first)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'series': MonthlySeries(months=(7, 8))}, r'other settings.*months=\(7, 8, 9, 11\)'),
        ({'series': MonthlySeries(min_gap_days=10)}, 'min_gap_days=10'),
        ({'sensors': ['s2']}, 'expected .*"bands": {"s2"'),
        ({'bands': ['B02', 'VV']}, 'Give a folder of its own'),
        ({'raw': True}, '"raw": true'),
        ({'split': 'all'}, "lacks 1 of the 3 patches of split 'all'.*32ULU_0_0.*pack"),
    ],
)
def test_it_is_refused_for_another(root: Path, options: dict[str, Any], message: str) -> None:
    folder = pack(MultiSenGE(root, 'test'), root.parent / 'copy', progress=False)
    with pytest.raises(ValueError, match=message):
        MultiSenGE(root, **({'split': 'test'} | options), packed=folder)


def test_it_is_not_overwritten_by_another(root: Path) -> None:
    folder = pack(MultiSenGE(root, 'test'), root.parent / 'copy', progress=False)
    content = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"made for split 'test'.*Give a folder of its own"):
        pack(MultiSenGE(root, 'all', raw=True), folder, progress=False)
    assert {path: path.read_bytes() for path in folder.iterdir()} == content


def test_a_copy_of_every_patch_serves_each_split(root: Path) -> None:
    _, copy = pair(root)
    test = MultiSenGE(root, 'test', packed=folder_of(copy))
    assert len(test) == 2
    check_same(test[1], MultiSenGE(root, 'test')[1])


def test_rasters_that_changed_are_packed_again(root: Path) -> None:
    plain, copy = pair(root)
    path = root / 's1' / f'31UEQ_{S1_DATES[1]}_S1_12_0.tif'
    os.utime(path, (1, 1))
    folder = folder_of(copy)
    with pytest.raises(ValueError, match=r'was made of other files for 1 of the 3.*31UEQ_12_0'):
        MultiSenGE(root, 'all', packed=folder)
    pack(plain, folder, progress=False)
    MultiSenGE(root, 'all', packed=folder)


def test_another_choice_of_dates_is_noticed(root: Path) -> None:
    """An earlier date comes to the disk, and the rule takes it."""
    _, copy = pair(root, split='test')
    label = root / 'labels' / '31UEQ_0_0.json'
    new, old = (f'31UEQ_{day}_S2_0_0.tif' for day in ('20200701', S2_DATES[0]))
    label.write_text(label.read_text().replace(old, f'{new};{old}'))
    shutil.copy(root / 's2' / old, root / 's2' / new)
    with pytest.raises(ValueError, match=r'was made of other files for 1 of the 2 .*31UEQ_0_0'):
        MultiSenGE(root, 'test', packed=folder_of(copy))


def test_rules_that_draw_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='draws other dates every epoch'):
        pack(MultiSenGE(root, 'test', RandomDates(n=2)), tmp_path / 'copy')


def test_a_truncated_file_names_itself(root: Path) -> None:
    _, copy = pair(root)
    path = folder_of(copy) / '31UEQ_0_0.safetensors'
    path.write_bytes(path.read_bytes()[:-5])
    for read in (lambda: copy[0], lambda: MultiSenGE(root, 'all', packed=path.parent)):
        with pytest.raises(OSError, match=f'{path} cannot be read.*Delete it and pack again'):
            read()
    with pytest.raises(FileNotFoundError, match='there is no packed copy'):
        MultiSenGE(root, 'all', packed=root.parent / 'nowhere')


def test_the_disk_must_have_room(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, folder = MultiSenGE(root, 'test'), root.parent / 'copy'
    disk = SimpleNamespace(free=10)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: disk)
    with pytest.raises(OSError, match=r'takes 0.0 GB, but .* has 0.0 GB free; make room'):
        pack(plain, folder)
    assert not list(folder.iterdir())


def test_its_size_is_known_beforehand(root: Path) -> None:
    """Four dates of 10 int16 and 2 float32, and the labels: 113 bytes a pixel."""
    plain = MultiSenGE(root, 'all')
    assert packed._Packing(plain, root).size == 3 * SIZE * SIZE * (4 * (10 * 2 + 2 * 4) + 1)
    folder = pack(plain, root.parent / 'copy', progress=False)
    headers = [path.stat().st_size - 113 * SIZE * SIZE for path in folder.iterdir()]
    assert all(0 < header < 4000 for header in headers)
