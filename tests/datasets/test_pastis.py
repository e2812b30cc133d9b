import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_pastis
from numpy.typing import NDArray
from torchgeo.datasets import PASTIS
from torchgeo.samplers import GriddedPatchSampler

from benchmarks.pastis import save
from torchgeo_s1s2.datasets import AllDates, EvenlySpaced, PASTISSeries, pastis
from torchgeo_s1s2.errors import DataError, NoPatchesError, S1S2Warning, UnreadableError


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pastis(tmp_path_factory.mktemp('pastis'))


def seconds(day: str) -> int:
    return int(np.datetime64(day, 's').astype(int))


def test_a_sample_holds_the_dates_the_pixels_and_the_classes(root: Path) -> None:
    """S2 is seen on 1, 11, 21 and 31 October; of S1A 2, 8, 14, ... and of S1D 4, 11, 18, ..."""
    series = AllDates(max_length=6, s1_max_days=2, missing='keep')
    dataset = PASTISSeries(root.parent, series=series)
    assert dataset.index['name'].tolist() == [f'{10000 + i}' for i in range(5)]
    sample = dataset[1]
    days: list[list[str | None]] = [
        ['2018-10-01', '2018-10-02', None],
        ['2018-10-11', None, '2018-10-11'],  # 8 and 14 October are 3 days away
        ['2018-10-21', '2018-10-20', None],
        ['2018-10-31', '2018-11-01', '2018-11-01'],
        [None] * 3,
        [None] * 3,
    ]
    times = [[-1 if day is None else seconds(day) for day in slot] for slot in days]
    assert sample['acquisition_times'].tolist() == times
    assert sample['valid'].tolist() == [[day is not None for day in slot] for slot in days]
    image = sample['image']
    assert image.shape == (6, 16, 32, 32)
    # Date 2, band 3 (B05), column 7: 3,000 + 300 + 7.
    assert image[2, 3, 0, 7].item() == pytest.approx(0.3307)
    # Dates 3 of S1A (20 October) and 1 of S1D (11 October): VV, VH and their quotient.
    assert image[2, 10:13, 5, 5].tolist() == pytest.approx([-13, -19, 6], abs=1e-5)
    assert image[1, 13:16, 5, 5].tolist() == pytest.approx([-12, -18, 6], abs=1e-5)
    assert image[1, 10:13].isnan().all()
    assert image[4:].isnan().all()
    expected = torch.arange(32)[:, None].expand(32, 32) % 19
    torch.testing.assert_close(sample['mask'][:, :-1], expected[:, :-1])
    assert (sample['mask'][:, -1] == 255).all()
    assert dataset.classes.names[:3] == ('Background', 'Meadow', 'Soft winter wheat')
    assert len(dataset.classes) == 19
    dataset.plot(sample)


def test_raw_values_are_those_of_torchgeo(root: Path) -> None:
    for sensor in ('s2', 's1a', 's1d'):
        bands = getattr(PASTIS, f'{sensor}_bands')
        theirs = PASTIS(root.parent, folds=(4,), bands=bands)[0]
        series = AllDates(max_length=len(theirs['image']), leader=sensor)
        ours = PASTISSeries(root, (4,), series, sensors=[sensor], raw=True)[0]
        torch.testing.assert_close(ours['image'], theirs['image'])
        labelled = ours['mask'] != 255
        assert labelled.sum() == 32 * 31
        torch.testing.assert_close(ours['mask'][labelled], theirs['mask'][labelled])


def test_any_sensor_leads_and_dates_are_chosen_evenly(root: Path) -> None:
    """Of the 7 dates of S1A of patch 10002 the first, the fourth and the last."""
    series = EvenlySpaced(n=3, leader='s1a')
    dataset = PASTISSeries(root, (3,), series, sensors=['s2', 's1a'], bands=['B08', 'S1A_VH'])
    sample = dataset[0]
    days = ['2018-10-02', '2018-10-20', '2018-11-07']
    assert sample['acquisition_times'][:, 1].tolist() == [seconds(day) for day in days]
    assert sample['image'][:, 1, 0, 0].tolist() == pytest.approx([-16, -19, -22], abs=1e-5)
    # S2 of 1 October, 21 October and 10 November; B08 is band 6.
    assert sample['image'][:, 0, 0, 1].tolist() == pytest.approx([0.1601, 0.3601, 0.5601])


def test_several_dates_in_a_slot_are_averaged_as_power(root: Path) -> None:
    """S1A of 2 and 8 October, -10 and -11 dB."""
    series = AllDates(max_length=1, s1_per_slot=2)
    sample = PASTISSeries(root, (1,), series, sensors=['s2', 's1a'])[0]
    mean = 10 * np.log10((10**-1 + 10**-1.1) / 2)
    assert sample['image'][0, 10, 0, 0].item() == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize('spell', [dict, json.dumps])
def test_dates_in_any_order_and_any_spelling(tmp_path: Path, spell: Callable[..., Any]) -> None:
    root = write_pastis(tmp_path, {0: (3, 2, 2)})
    change(root, 'dates-S2', spell({'0': 20181021, '10': 20181001, '9': 20181011}))
    image = PASTISSeries(root, series=AllDates(max_length=3), sensors=['s2'])[0]['image']
    # 1 October is the third image of the file, 11 October the second.
    assert image[:, 0, 0, 0].tolist() == pytest.approx([0.3, 0.2, 0.1])


def test_what_is_missing_is_nan(tmp_path: Path) -> None:
    root = write_pastis(tmp_path, {0: (2, 2, 2)})
    np.lib.format.open_memmap(root / S2, mode='r+')[0] = -10000
    np.lib.format.open_memmap(root / S1D, mode='r+')[0, :, 0] = -np.inf
    sample = PASTISSeries(root, series=AllDates(max_length=2))[0]
    assert sample['valid'].tolist() == [[False, True, True], [True, True, True]]
    assert sample['acquisition_times'][0, 0] == -1
    assert sample['image'][0, :10].isnan().all()
    assert sample['image'][0, 13:16].isnan().all(0).sum(1).tolist() == [32] + [0] * 31


def test_only_the_chosen_dates_and_pixels_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PASTISSeries(root, (5,), EvenlySpaced(n=2), sensors=['s2'])
    taken: list[Any] = []

    class Spy:
        def __init__(self, array: NDArray[Any]) -> None:
            self.array = array

        def __getitem__(self, key: Any) -> NDArray[Any]:
            taken.append(key)
            value: NDArray[Any] = self.array[key]
            return value

    real = pastis._open
    monkeypatch.setattr(pastis, '_open', lambda p: Spy(real(p)) if 'S2_' in p.name else real(p))
    crop = dataset.crop(0, 4, 8, 2, 3)
    assert taken == [0, 6]  # of seven dates
    assert crop['image'][1, 0, 0].tolist() == pytest.approx([0.7008, 0.7009, 0.7010])


def test_a_patch_lies_in_the_zone_of_its_tile(root: Path) -> None:
    """The footprints in Lambert 93 are turned by several degrees."""
    dataset = PASTISSeries(root, sensors=['s2'], series=EvenlySpaced(n=2))
    sample = dataset[1]
    assert sample['crs'] == 32630
    assert sample['transform'].tolist() == [10, 0, 600320, 0, -10, 5500000, 0, 0, 1]
    # Two patches side by side make one window, and windows make a mosaic.
    window = dataset[600160:600480:10, 5499680:5500000:10]
    assert window['image'][0, 0, 0].mul(1e4).round().tolist() == [
        *range(1016, 1032),
        *range(1000, 1016),
    ]
    assert len(GriddedPatchSampler(dataset, size=32)) == 5


def test_a_rectangle_in_lambert_93_is_taken_as_it_is(tmp_path: Path) -> None:
    root = write_pastis(tmp_path, {0: (2, 2, 2)})
    corners = [[700000, 6600000], [700320, 6600000], [700320, 6600320], [700000, 6600320]]
    reshape(root, [*corners, corners[0]])
    sample = PASTISSeries(root, series=AllDates(max_length=2))[0]
    assert sample['crs'] == 2154
    assert sample['transform'].tolist()[:6] == [10, 0, 700000, 0, -10, 6600320]
    reshape(root, [[700000, 6600160], [700160, 6600000], [700320, 6600160], [700000, 6600160]])
    with pytest.warns(S1S2Warning, match=r'of 1 of 1 patches .* no rectangles in EPSG:2154, EPSG'):
        PASTISSeries(root, series=AllDates(max_length=2))


S2, S1D = 'DATA_S2/S2_10000.npy', 'DATA_S1D/S1D_10000.npy'
TARGET = 'ANNOTATIONS/TARGET_10000.npy'
ONE = {'0': 20181001}


def shapes(path: str, found: tuple[int, ...], expected: object) -> str:
    return re.escape(f'{path} has the shape {found}, expected {expected}')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda r: (r / S1D).unlink(), r'S1D_10000.npy is no array that can be read.*No such'),
        (lambda r: truncate(r / S2), r'S2_10000.npy is no array that can be'),
        (lambda r: (r / S2).write_text(''), r'S2_10000.npy is no array'),
        (
            lambda r: save(r / S1D, np.zeros((2, 2, 9, 9))),
            shapes(S1D, (2, 2, 9, 9), (2, 3, 32, 32)),
        ),
        (lambda r: change(r, 'dates-S2', ONE), shapes(S2, (2, 10, 32, 32), (1, 10, 32, 32))),
        (lambda r: save(r / TARGET, np.zeros((9, 9))), shapes(TARGET, (9, 9), '(3, H, W)')),
        (lambda r: save(r / S2, np.array(['a'])), r'holds <U1, expected num'),
        (lambda r: change(r, 'dates-S1A', {'0': 'May', '1': 3}), r'dates-S1A of patch 10000 is {'),
        (lambda r: change(r, 'dates-S2', [20181001] * 2), r'dates-S2 .*; expected dates by number'),
        (lambda r: change(r, 'dates-S2', ONE | {'1': 17891001}), r'dates-S2 of patch 10000'),
        (lambda r: change(r, 'Fold', None), r'metadata.geojson lacks Fold; it has ID_PATCH'),
        (lambda r: change(r, 'dates-S2', None), r'lacks dates-S2; it .* Choose other sensors'),
        (lambda r: change(r, 'Fold', 1.5), r'2 of 2 patches of .* have a Fold other than \(1, 2'),
        (lambda r: change(r, 'ID_PATCH', 'x'), r'2 of 2 patches of .* ID_PATCH that is no whole'),
        (lambda r: change(r, 'ID_PATCH', 10000), r'1 of 2 patches of .* the ID_PATCH of another'),
        (lambda r: reshape(r, []), r'1 of 2 patches of .* have no footprint'),
        (lambda r: truncate(r / 'metadata.geojson'), r'geojson cannot be read: .*archive again'),
        (lambda r: (r / 'metadata.geojson').unlink(), r'no .*metadata.geojson; .*download=True'),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    root = write_pastis(tmp_path, {0: (2, 2, 2), 1: (2, 2, 2)})
    spoil(root)
    with pytest.raises((DataError, UnreadableError, FileNotFoundError), match=message):
        PASTISSeries(root)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'folds': (0, 1)}, ValueError, r'folds is \(0, 1\); expected a list of some of \(1, 2'),
        ({'folds': 1}, ValueError, r'folds is 1; expected a list of some of \(1, 2, 3, 4, 5\)'),
        ({'folds': np.array([6])}, ValueError, r'folds is array.*; expected a list of some of'),
        ({'folds': (2,)}, NoPatchesError, 'folds 2 in .* no patch of these folds'),
        ({'sensors': ['s1']}, ValueError, "no such sensor: .'s1'.; choose from s2, s1a, s1d"),
        ({'bands': ['VV']}, ValueError, "no such band: .'VV'.; choose from B02, .* S1D_VV_VH"),
        ({'unit': 'dB'}, ValueError, 'no such unit: .* s1d: db, linear, amplitude'),
    ],
)
def test_arguments_that_mean_nothing_are_named(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    root = write_pastis(tmp_path, {0: (2, 2, 2)})
    with pytest.raises(error, match=message):
        PASTISSeries(root, **options)


def test_folds_of_numpy_are_folds_and_labels_are_whole_numbers(tmp_path: Path) -> None:
    root = write_pastis(tmp_path, {0: (2, 2, 2), 1: (2, 2, 2)})
    dataset = PASTISSeries(root, folds=np.array([1]))  # type: ignore[arg-type]
    assert dataset.folds == (1,)
    labels = np.full((3, 32, 32), 11.5)
    save(root / TARGET, labels)
    with pytest.raises(DataError, match=r'TARGET_10000.npy holds the label 11.5; labels are whole'):
        PASTISSeries(root, folds=(1,))[0]


def change(root: Path, key: str, value: Any) -> None:
    """Change what the metadata say of every patch, or take it away."""
    path = root / 'metadata.geojson'
    content = json.loads(path.read_text())
    for feature in content['features']:
        feature['properties'].pop(key)
        feature['properties'] |= {} if value is None else {key: value}
    path.write_text(json.dumps(content))


def reshape(root: Path, corners: list[list[int]]) -> None:
    path = root / 'metadata.geojson'
    content = json.loads(path.read_text())
    content['features'][0]['geometry'] = {'type': 'Polygon', 'coordinates': [corners]}
    path.write_text(json.dumps(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])
