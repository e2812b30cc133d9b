"""What TorchGeo does to any data set holds for series: their state is their index."""

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shapely
import torch
from conftest import write_patch
from shapely import Polygon, box
from torchgeo.datasets import RasterDataset, splits
from torchgeo.samplers import GriddedPatchSampler, RandomPatchSampler

from torchgeo_s1s2.datamodules.statistics import Statistics
from torchgeo_s1s2.datasets import AllDates, EvenlySpaced, MultiSenGE, multisenge
from torchgeo_s1s2.datasets.rasters import Grid, read_image
from torchgeo_s1s2.errors import S1S2Warning

SIZE, COLUMNS, ROWS = 16, 4, 2
LEFT, TOP = 500000, 5500000
RIGHT, BOTTOM = LEFT + 10 * SIZE * COLUMNS, TOP - 10 * SIZE * ROWS
EVERYWHERE = (slice(LEFT, RIGHT), slice(BOTTOM, TOP))
ALL = frozenset(range(SIZE * COLUMNS * SIZE * ROWS))
DAYS = ('20200701', '20200801', '20200901', '20201001')
B02 = {'descriptions': ('B02',)}
Parts = Sequence[Any]


def write_numbered(root: Path, columns: Sequence[int], days: Sequence[str] = DAYS[:1]) -> None:
    """Patches side by side; band B02 of each pixel is its number on the ground, row by row."""
    numbers = np.arange(len(ALL), dtype=np.int32).reshape(1, -1, SIZE * COLUMNS)
    labels = np.full((SIZE, SIZE), 6, np.uint8)
    for column in columns:
        for row in range(ROWS):
            x, y = column * SIZE, row * SIZE
            last = len(days) - (column == 0)  # the patches of column 0 end one date earlier
            s2 = dict.fromkeys(days[: max(last, 1)], numbers[:, y : y + SIZE, x : x + SIZE])
            write_patch(root, '31UEQ', x, y, SIZE, s2, {}, labels, s2_options=B02)


def write_days(root: Path, *days: str) -> None:
    """Patches side by side, each of one date."""
    for i, day in enumerate(days):
        image = np.full((1, SIZE, SIZE), 5, np.int16)
        write_patch(root, '31UEQ', i * SIZE, 0, SIZE, {day: image}, {}, s2_options=B02)


def numbered(root: Path, **options: Any) -> MultiSenGE:
    given: dict[str, Any] = {'series': EvenlySpaced(n=1), 'raw': True} | options
    return MultiSenGE(root, 'all', sensors=['s2'], bands=['B02'], **given)


@pytest.fixture(scope='module')
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('ground')
    write_numbered(root, range(COLUMNS))
    return root


def pixels(sample: dict[str, Any]) -> list[int]:
    """Numbers of the pixels that a sample holds; its labels are of the same."""
    image = sample['image'][0, 0]
    assert torch.equal(image.isnan(), sample['mask'] == 255)
    return image[~image.isnan()].int().tolist()


def by_number(part: Any) -> list[int]:
    return [pixel for i in range(len(part)) for pixel in pixels(part[i])]


def bboxes(d: MultiSenGE) -> Parts:
    return splits.random_bbox_assignment(d, [0.5, 0.5], torch.Generator().manual_seed(1))


def cut_bboxes(d: MultiSenGE) -> Parts:
    return splits.random_bbox_splitting(d, [0.5, 0.3, 0.2], torch.Generator().manual_seed(1))


def strips(d: MultiSenGE) -> Parts:
    """Of about a pixel."""
    return splits.random_bbox_splitting(d, [0.94, 0.06], torch.Generator().manual_seed(1))


def cells(d: MultiSenGE) -> Parts:
    generator = torch.Generator().manual_seed(1)
    return splits.random_grid_cell_assignment(d, [0.5, 0.5], grid_size=3, generator=generator)


def boxes(d: MultiSenGE) -> Parts:
    middle = LEFT + 203  # no border of pixels
    return splits.roi_split(d, [box(LEFT, BOTTOM, middle, TOP), box(middle, BOTTOM, RIGHT, TOP)])


def polygons(d: MultiSenGE) -> Parts:
    across = (RIGHT, TOP), (LEFT, BOTTOM)  # through no centre of a pixel
    return splits.roi_split(
        d, [Polygon([(LEFT, TOP), *across]), Polygon([*across, (RIGHT, BOTTOM)])]
    )


def wholes(d: MultiSenGE) -> Parts:
    """Of whole patches, whose borders touch those of the others."""
    grounds = d.index.geometry.tolist()
    return splits.roi_split(d, [shapely.union_all(grounds[:5]), shapely.union_all(grounds[5:])])


def twice(d: MultiSenGE) -> Parts:
    first, second = boxes(d)
    return [first, *cut_bboxes(second)]


def filters(d: MultiSenGE) -> Parts:
    upper = d.index['name'].str.endswith('_0')
    parts = [copy.copy(d) for _ in range(2)]
    parts[0].index, parts[1].index = d.index[upper], d.index[~upper].iloc[::-1]
    return parts


def without_crs(d: MultiSenGE) -> Parts:
    """As random_grid_cell_assignment of TorchGeo 0.10.0."""
    parts = filters(d)
    for part in parts:
        part.index = part.index.set_crs(None, allow_override=True)
    return parts


SPLITTERS = (bboxes, cut_bboxes, cells, boxes, wholes, polygons, twice, filters, without_crs)


@pytest.mark.filterwarnings('ignore:rows of the index that hold no pixel')
@pytest.mark.parametrize('split', SPLITTERS)
def test_parts_hold_each_pixel_once(ground: Path, split: Callable[[MultiSenGE], Parts]) -> None:
    parts = split(numbered(ground))
    held = [by_number(part) for part in parts]
    assert all(held)
    assert Counter(pixel for part in held for pixel in part) == Counter(ALL)
    for part, own in zip(parts, held, strict=True):
        window = part[EVERYWHERE]
        assert sorted(pixels(window)) == sorted(own)
        for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
            assert by_number(again) == own
        statistics = Statistics.compute(part)
        assert statistics.labels == ((6, len(own)),)
        assert statistics.mean[0] == pytest.approx(np.mean(own))
        assert statistics.std[0] == pytest.approx(np.std(own))


@pytest.mark.parametrize('crs', ['EPSG:32632', 'EPSG:4326'])
@pytest.mark.parametrize('split', [bboxes, cut_bboxes, strips])
def test_parts_in_another_crs_hold_each_pixel_once(
    ground: Path, split: Callable[[MultiSenGE], Parts], crs: str
) -> None:
    held = Counter(pixel for part in split(numbered(ground, crs=crs)) for pixel in by_number(part))
    assert set(held.values()) == {1}
    assert set(held) == ALL


@pytest.mark.parametrize('split', SPLITTERS)
def test_samplers_stay_within_a_part(ground: Path, split: Callable[[MultiSenGE], Parts]) -> None:
    for part in split(numbered(ground)):
        shape = part.index.geometry.union_all()
        seen = 0
        for sampler in (
            GriddedPatchSampler(part, size=8, stride=8),
            RandomPatchSampler(part, size=8, length=8, generator=0),
        ):
            for window in sampler:
                sample = part[window]
                a, _, c, _, e, f = sample['transform'][:6].tolist()
                rows, cols = np.nonzero(~sample['image'][0, 0].isnan().numpy())
                points = shapely.points(c + a * (cols + 0.5), f + e * (rows + 0.5))
                assert shapely.covers(shape, points).all()
                seen += len(points)
        assert seen > 64


def test_a_window_reads_of_each_patch_what_it_shows(
    ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, tuple[int, int]]] = []

    def spy(path: Path, reading: Any, grid: Grid, *args: Any) -> Any:
        read.append((path.stem.split('_S2_')[1], grid.shape))
        return read_image(path, reading, grid, *args)

    monkeypatch.setattr(multisenge, 'read_image', spy)
    dataset = numbered(ground)
    patch = slice(LEFT + 160, LEFT + 320), slice(TOP - 160, TOP)  # five others touch it
    assert pixels(dataset[patch]) == pixels(dataset[2])
    assert {name for name, _ in read} == {'16_0'}
    del read[:]
    assert sorted(pixels(dataset[EVERYWHERE])) == sorted(ALL)
    assert len(read) == 8
    assert max(max(shape) for _, shape in read) <= SIZE + 2 * 3  # of 64, and 3 for a warp


def test_a_row_without_a_pixel_is_left_out(ground: Path) -> None:
    border = LEFT + 10 * SIZE + 4  # less than half a pixel into the second column of patches
    region = [box(LEFT, BOTTOM, border, TOP), box(border, BOTTOM, RIGHT, TOP)]
    with pytest.warns(S1S2Warning, match='rows of the index .* left out: 2 of 4'):
        parts = splits.roi_split(numbered(ground), region)
    assert [len(part) for part in parts] == [2, 6]
    assert sorted(by_number(parts[0]) + by_number(parts[1])) == sorted(ALL)
    dataset, half = numbered(ground), box(LEFT, BOTTOM, LEFT + 10 * SIZE, TOP)
    with pytest.warns(S1S2Warning, match='left out: 6 of 8'):
        dataset.index = dataset.index.set_geometry(dataset.index.intersection(half))
    assert len(dataset) == 2
    with pytest.warns(S1S2Warning, match='left out: 1 of 2'):
        dataset.index = dataset.index.set_geometry([None, dataset.index.geometry.iat[1]])
    assert by_number(dataset) == pixels(numbered(ground)[1])
    dataset = numbered(ground)
    part = copy.copy(dataset)
    part.index.geometry = part.index.intersection(half)  # in place
    with pytest.warns(S1S2Warning, match='left out: 6 of 8'):
        assert len(part) == 2
    assert sorted(by_number(dataset)) == sorted(ALL)
    dataset.index.geometry = dataset.index.intersection(half)
    assert pixels(dataset[0]) == pixels(part[0])
    with pytest.raises(IndexError, match=r'31UEQ_48_16. holds no pixel'):
        dataset[7]


@pytest.mark.parametrize(
    'change',
    [
        lambda index: index.reset_index(drop=True),
        lambda index: index.dissolve('name'),
        lambda index: index.drop(columns='patch'),
        lambda index: index.rename(columns={'name': 'name_left'}),  # as sjoin does
        pd.DataFrame,
    ],
)
def test_an_index_without_patches_or_times_is_refused(
    ground: Path, change: Callable[[Any], Any]
) -> None:
    dataset = numbered(ground)
    for part in (dataset, dataset | numbered(ground)):
        with pytest.raises(ValueError, match='must keep their columns "patch" and "name"'):
            part.index = change(part.index)
    assert len(dataset) == 8


@pytest.mark.parametrize('shift', [1, 100])
def test_an_index_from_before_patches_were_added_is_refused(ground: Path, shift: int) -> None:
    dataset = numbered(ground)
    with pytest.raises(ValueError, match=r'of the index is .*, which is another one here'):
        dataset.index = dataset.index.assign(patch=dataset.index['patch'] + shift)
    assert len(dataset) == 8


@pytest.mark.parametrize('fractions', [[0.97, 0.03], [0.03, 0.97]])
def test_parts_thinner_than_a_pixel_are_left_out(ground: Path, fractions: list[float]) -> None:
    """TorchGeo changes the index of copies in place; half a pixel of 16 is 0.03 of a patch."""
    parts = splits.random_bbox_splitting(numbered(ground), fractions)
    samplers = [GriddedPatchSampler(part, size=8) for part in parts]  # before anything is read
    with pytest.warns(S1S2Warning, match='left out: 8 of 8'):
        held = [by_number(part) for part in parts]
    with warnings.catch_warnings(action='error', category=S1S2Warning):  # it is said once
        for part, own in zip(parts, held, strict=True):
            for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
                assert by_number(again) == own
    assert sorted(map(len, held)) == [0, len(ALL)]
    for sampler, part, own in zip(samplers, parts, held, strict=True):
        masks = [part[window]['mask'] for window in sampler]
        assert len(masks) > 8
        assert any(bool((mask != 255).any()) for mask in masks) == bool(own)
    with pytest.raises(IndexError, match='not found in dataset'):
        parts[0][0:10, 0:10]


def test_rows_of_a_part_know_their_patch(ground: Path) -> None:
    left, right = boxes(numbered(ground))
    assert {left.name(i) for i in range(len(left))} == {
        f'31UEQ_{x}_{y}' for x in (0, 16) for y in (0, 16)
    }
    # The border is at column 20.3: the part has four columns of the second patches.
    assert Counter(left.shape(i) for i in range(len(left))) == {(16, 16): 2, (16, 4): 2}
    assert Counter(right.shape(i) for i in range(len(right))) == {(16, 16): 4, (16, 12): 2}
    narrow = next(i for i in range(len(left)) if left.shape(i) == (16, 4))
    assert left[narrow]['index'] == narrow
    assert left[narrow]['bounds'][:3].tolist() == [LEFT + 160, LEFT + 200, 10]
    crop = left.crop(narrow, 2, 1, 4, 8)  # of these columns three are there
    assert crop['image'][0, 0].isfinite().tolist() == [[True] * 3 + [False] * 5] * 4
    assert left.labels(narrow, 0, 0, 16, 5)[0].tolist()[:4] == [6] * 4
    assert left.plot(left[narrow]).axes[0].images[0].get_array().shape[:2] == (16, 4)


@pytest.fixture(scope='module')
def season(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('season')
    write_numbered(root, (0, 1), DAYS)
    return root


def seen(part: Any) -> Counter[tuple[str, str]]:
    """Patches and days of the acquisitions that a part gives."""
    return Counter((part.name(i), day) for i in range(len(part)) for day in days_of(part[i]))


def days_of(sample: dict[str, Any]) -> list[str]:
    times = sample['acquisition_times'].flatten().tolist()
    return [f'{pd.Timestamp(time, unit="s"):%Y%m%d}' for time in times if time >= 0]


def intervals(t: slice, *borders: str) -> Any:
    return [pd.Interval(*pair) for pair in pairwise([t.start, *map(pd.Timestamp, borders), t.stop])]


SPANS: dict[str, Callable[[slice], Any]] = {
    'fractions': lambda t: [0.5, 0.25, 0.25],
    'timedeltas': lambda t: [pd.Timedelta('40D'), t.stop - t.start - pd.Timedelta('40D')],
    'intervals': lambda t: intervals(t, '20200815'),
    'at a date': lambda t: intervals(t, '20200801', '20200901'),
}


@pytest.mark.parametrize('spans', SPANS.values(), ids=SPANS.keys())
def test_parts_of_a_season_hold_each_date_once(season: Path, spans: Callable[[slice], Any]) -> None:
    dataset = numbered(season, series=AllDates(max_length=4, missing='keep'))
    expected = seen(dataset)
    assert len(expected) == 2 * 4 + 2 * 3
    parts = splits.time_series_split(dataset, spans(dataset.bounds[2]))
    assert sum((seen(part) for part in parts), Counter()) == expected
    for part in parts:
        assert {*days_of(part[EVERYWHERE])} <= {day for _, day in seen(part)}
        assert seen(copy.deepcopy(part)) == seen(part)


def test_patches_of_one_date_each_are_split_in_time(tmp_path: Path) -> None:
    write_days(tmp_path, DAYS[0], DAYS[3])
    parts = splits.time_series_split(numbered(tmp_path), [0.5, 0.5])
    assert [dict(seen(part)) for part in parts] == [
        {('31UEQ_0_0', DAYS[0]): 1}, {('31UEQ_16_0', DAYS[3]): 1},
    ]  # fmt: skip


TIMES = {
    'naive': pd.Timestamp,
    'aware': lambda t: pd.Timestamp(t, tz='UTC'),
    'of another zone': lambda t: pd.Timestamp(t, tz='UTC').tz_convert('Asia/Tokyo'),
    'numpy': np.datetime64,
    'text': str,
    'python': lambda t: pd.Timestamp(t).to_pydatetime(),
}


@pytest.mark.parametrize('time', TIMES.values(), ids=TIMES.keys())
def test_times_of_any_kind_mean_the_same(season: Path, time: Callable[[str], Any]) -> None:
    dataset = numbered(season, series=AllDates(max_length=4, missing='keep'))
    sample = dataset[:, :, time('2020-08-01T00:00:00') : time('2020-09-01T00:00:00')]
    assert days_of(sample) == ['20200801', '20200901']
    assert sample['valid'].sum() == 2
    assert sample['bounds'][6:8].tolist() == [1596240000, 1598918400]


def test_a_number_is_no_time(season: Path) -> None:
    with pytest.raises(TypeError, match='20200801 is no time; give a date'):
        numbered(season)[:, :, 20200801:]


@pytest.fixture(scope='module')
def three(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> list[MultiSenGE]:
    """Neighbouring data sets: columns 0 and 1, 2, and 3 of the ground."""
    root = tmp_path_factory.mktemp('three')
    for i, columns in enumerate([(0, 1), (2,), (3,)]):
        write_numbered(root / str(i), columns)
    return [numbered(root / str(i)) for i in range(3)]


BORDER = (slice(LEFT + 240, LEFT + 560), slice(BOTTOM, TOP))


def test_a_union_gives_what_any_part_has(ground: Path, three: list[MultiSenGE]) -> None:
    expected = numbered(ground)[BORDER]
    a, b, c = three
    for union in ((a | b) | c, a | (b | c), c | b | a):
        sample = union[BORDER]
        assert torch.equal(sample['image'], expected['image'])
        assert torch.equal(sample['mask'], expected['mask'])
        assert sample['valid'].tolist() == [[True]]
        assert torch.equal(sample['acquisition_times'], expected['acquisition_times'])
        windows = list(RandomPatchSampler(union, size=8, length=4))
        assert {union[w]['image'].shape for w in windows} == {(1, 1, 8, 8)}
    # Of two that have a pixel the first counts, whole or in part.
    part, _ = boxes(a)
    assert sorted(pixels((part | a)[EVERYWHERE])) == sorted(by_number(a))


def test_a_union_and_its_copies_leave_their_data_sets_as_they_are(three: list[MultiSenGE]) -> None:
    other: Any = copy.copy(three[1])
    other.crs, other.res = 'EPSG:32632', 20
    union = three[0] | other
    again: Any = copy.copy(union)
    again.crs = 'EPSG:4326'
    assert [d.crs.to_epsg() for d in (*three[:2], other, union, again)] == [32631] * 2 + [
        32632, 32631, 4326,
    ]  # fmt: skip
    assert other.res == (20, 20)
    assert len(pixels(union[EVERYWHERE])) == len(ALL) * 3 / 4
    assert again[again.bounds[:2]]['crs'] == 4326


@pytest.mark.parametrize('split', SPLITTERS)
def test_parts_of_a_union_hold_each_pixel_once(
    three: list[MultiSenGE], split: Callable[[Any], Parts]
) -> None:
    a, b, c = three
    for union in ((a | b) | c, a | (b | c)):
        parts = split(union)
        held = [pixels(part[EVERYWHERE]) for part in parts]
        assert all(held)
        assert Counter(pixel for own in held for pixel in own) == Counter(ALL)
        again = pickle.loads(pickle.dumps(parts[0]))
        assert pixels(again[EVERYWHERE]) == held[0]
        assert len(pixels(union[EVERYWHERE])) == len(ALL)
        with pytest.raises(
            TypeError, match=r'0 is no window; a union .*: union.datasets\[0\]\[0\]'
        ):
            union[0]


def test_what_does_not_fit_is_not_joined(ground: Path, three: list[MultiSenGE]) -> None:
    class Raster(RasterDataset):
        filename_glob = '*_GR_*.tif'
        filename_regex = r'31UEQ_GR'

    a, other = three[0], Raster(str(ground / 'ground_reference'))
    joined: Any = a | three[1]
    for one in (a, joined):
        with pytest.raises(TypeError, match='for w in sampler'):
            one & other
        with pytest.raises(TypeError, match='Raster is no data set of series'):
            one | other
    for change in ({'series': EvenlySpaced(n=2, missing='keep')}, {'raw': False}):
        with pytest.raises(ValueError, match='samples of the two data sets differ'):
            a | numbered(ground, **change)


def test_a_crs_in_degrees_has_its_resolution_in_degrees(ground: Path) -> None:
    """10 m are 9.0e-5 degrees north and, at 49.6 degrees north, 1.4e-4 east."""
    given, changed, warped = numbered(ground, crs='EPSG:4326'), numbered(ground), numbered(ground)
    changed.crs, warped.index = given.crs, warped.index.to_crs(given.crs)
    for dataset in (given, changed, warped):
        xres, yres = dataset.res
        assert yres <= 1.2e-4
        assert 8e-5 < xres < 1.5e-4
        assert dataset.bounds[0].start == pytest.approx(3, abs=1e-3)
        sampler = RandomPatchSampler(dataset, size=16, length=4)
        samples = [dataset[window] for window in sampler]
        assert {tuple(s['image'].shape) for s in samples} == {(1, 1, 16, 16)}
        assert all((s['mask'] != 255).float().mean() > 0.9 for s in samples)
        assert {int(s['crs']) for s in samples} == {4326}
        # A row of the index is the patch on its own grid still.
        assert sorted(by_number(dataset)) == sorted(ALL)
    for res in ((2e-4, 1e-4), [2e-4, 1e-4]):
        assert numbered(ground, crs='EPSG:4326', res=res).res == (2e-4, 1e-4)


def test_a_part_in_another_crs_is_the_same_part(ground: Path) -> None:
    left, _ = boxes(numbered(ground))
    expected = sorted(by_number(left))
    empty = copy.copy(left)
    empty.index = empty.index[:0]
    left.crs = empty.crs = 'EPSG:32632'
    assert len(empty) == 0
    assert left.crs.to_epsg() == 32632
    assert sorted(by_number(left)) == expected


def test_times_of_a_window_are_those_of_most_of_its_pixels(tmp_path: Path) -> None:
    write_days(tmp_path, '20200731', '20200701')
    dataset = numbered(tmp_path)
    halves = [copy.copy(dataset) for _ in range(2)]
    for i, half in enumerate(halves):
        half.index = dataset.index.iloc[[i]]
    for first, count, day in ((10, 16, '20200701'), (0, 20, '20200731'), (8, 16, '20200701')):
        x = LEFT + 10 * first
        window = slice(x, x + 10 * count), slice(TOP - 160, TOP)
        for either in (dataset, halves[0] | halves[1], halves[1] | halves[0]):
            assert days_of(either[window]) == [day]  # the earlier one of two as frequent
