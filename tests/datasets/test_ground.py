from collections import Counter
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import torch
from conftest import write_patch, write_raster
from shapely import box

from torchgeo_s1s2.datamodules.batches import RandomCrops
from torchgeo_s1s2.datasets import (
    BlockSplits,
    EvenlySpaced,
    GroundSplits,
    MultiSenGE,
    PolygonSplits,
    write_label_files,
)
from torchgeo_s1s2.errors import DataError, NoPatchesError, S1S2Warning

LEFT, TOP, SIZE = 500000, 5500000, 24
NAMED: dict[str, Any] = {'descriptions': ('B02',)}
SHARES = {'train': 0.5, 'val': 0.25, 'test': 0.25}
Pixel = tuple[str, int]


def write(root: Path, *places: tuple[str, int, int], size: int = SIZE) -> Path:
    """Patches whose band B02 numbers their pixels."""
    for tile, x, y in places:
        image = np.arange(size * size).reshape(1, size, size).astype(np.int32)
        write_patch(root, tile, x, y, size, {'20200701': image}, {}, s2_options=NAMED)
    return root


def part(root: Path, splits: GroundSplits, split: str, crs: Any = None) -> MultiSenGE:
    given: Any = {'sensors': ['s2'], 'bands': ['B02'], 'raw': True, 'splits': splits, 'crs': crs}
    return MultiSenGE(root, split, EvenlySpaced(n=1), **given)


def held(dataset: MultiSenGE) -> list[Pixel]:
    """Each pixel that the rows of a data set hold: patch and number."""
    pixels = []
    for i in range(len(dataset)):
        name, image = dataset.name_of(dataset._patch(i)), dataset[i]['image'][0, 0]
        pixels += [(name, int(number)) for number in image[~image.isnan()]]
    return pixels


def ground(pixel: Pixel, size: int = SIZE) -> tuple[float, float]:
    """Centre of a pixel, of zone 31."""
    _, x, y = pixel[0].split('_')
    row, col = divmod(pixel[1], size)
    return LEFT + 10 * (int(x) + col + 0.5), TOP - 10 * (int(y) + row + 0.5)


PATCHES = [('31UEQ', 0, 0), ('31UEQ', 24, 0), ('31UEQ', 12, 20), ('32ULU', 0, 0)]


@pytest.mark.parametrize('size', [80, 97.3, 240, 1000])
def test_each_pixel_is_in_one_block_of_one_split(tmp_path: Path, size: float) -> None:
    splits = BlockSplits(size, SHARES if size < 500 else {'train': 0.5, 'test': 0.5}, seed=1)
    root = write(tmp_path, *PATCHES)
    pixels = {split: held(part(root, splits, split)) for split in splits}
    count = Counter(pixel for own in pixels.values() for pixel in own)
    assert set(count.values()) == {1}
    assert len(count) == len(PATCHES) * SIZE**2
    # By hand: the block that a pixel's centre lies in tells its split, in overlapping patches too.
    owners: dict[tuple[float, float], set[str]] = {}
    for split, own in pixels.items():
        for x, y in (ground(pixel) for pixel in own if pixel[0].startswith('31')):
            owners.setdefault((x // size, y // size), set()).add(split)
    assert all(len(names) == 1 for names in owners.values())


@pytest.mark.parametrize('crs', ['EPSG:4326', 'EPSG:3035', 'EPSG:32632'])
def test_blocks_that_meet_at_centres_of_pixels_share_none_in_another_crs(
    tmp_path: Path, crs: str
) -> None:
    splits, root = BlockSplits(115, SHARES), write(tmp_path, *PATCHES)
    count = Counter(pixel for split in splits for pixel in held(part(root, splits, split, crs)))
    assert set(count.values()) == {1}
    assert len(count) == len(PATCHES) * SIZE**2


def test_the_draw_follows_shares_and_seed_and_no_date_rule(tmp_path: Path) -> None:
    root = write(tmp_path, ('31UEQ', 0, 0), size=80)
    splits = BlockSplits(80, SHARES)
    counts = [len(part(root, splits, split)) for split in splits]
    assert counts == [50, 25, 25]
    train = held(part(root, splits, 'train'))
    assert held(part(root, BlockSplits(80, SHARES), 'train')) == train
    assert held(part(root, BlockSplits(80, SHARES, seed=2), 'train')) != train
    write(root, ('31UEQ', 80, 0), size=16)  # four more blocks, each of which moves at most two
    assert sum(len(part(root, splits, split)) for split in splits) == 104
    assert len({*train} - {*held(part(root, splits, 'train'))}) <= 8 * 64


def test_a_buffer_keeps_splits_apart(tmp_path: Path) -> None:
    root = write(tmp_path, ('31UEQ', 0, 0))
    splits = BlockSplits(80, {'train': 0.5, 'test': 0.5}, buffer=20)
    train, test = ([*map(ground, held(part(root, splits, split)))] for split in splits)
    assert len(train) + len(test) == 9 * 6 * 6  # blocks of 8 pixels lose one on each side
    apart = np.abs(np.array(train)[:, None] - np.array(test)[None]).max(-1)
    assert apart.min() == 30


def test_crops_of_a_scene_lie_within_the_blocks(tmp_path: Path) -> None:
    root = write(tmp_path, ('31UEQ', 0, 0), size=128)
    splits = BlockSplits(320, SHARES)
    crops = RandomCrops(part(root, splits, 'train'), (16, 16))
    # The scene is 128 x 128 pixels, its blocks 32 x 32.
    message = r'size is \(16, 33\), .* or part of one in its blocks .* the widest 32. Make it sm'
    with pytest.raises(ValueError, match=message):
        RandomCrops(part(root, splits, 'train'), (16, 33))
    own = set(held(part(root, splits, 'train')))
    assert len(crops) == len(own) / 16**2
    seen = set()
    for i in range(len(crops)):
        image = crops[i]['image'][0, 0]
        assert image.shape == (16, 16)
        seen |= {('31UEQ_0_0', int(value)) for value in image.flatten()}
    assert seen <= own


def polygons(path: Path, *shapes: Any, split: list[Any], crs: int = 32631) -> PolygonSplits:
    gpd.GeoDataFrame({'part': split}, geometry=[*shapes], crs=crs).to_crs(4326).to_file(path)
    return PolygonSplits(str(path), 'part')


def test_polygons_name_the_split_of_their_ground(tmp_path: Path) -> None:
    root = write(tmp_path / 'data', ('31UEQ', 0, 0))
    west = box(LEFT, TOP - 240, LEFT + 100, TOP), box(LEFT + 52, TOP - 240, LEFT + 121, TOP)
    east = box(LEFT + 121, TOP - 120, LEFT + 240, TOP)
    splits = polygons(tmp_path / 'parts.gpkg', *west, east, split=['train', 'train', 'test'])
    assert [*splits] == ['test', 'train']
    columns = {split: [n % SIZE for _, n in held(part(root, splits, split))] for split in splits}
    assert Counter(columns['train']) == dict.fromkeys(range(12), 24)
    assert Counter(columns['test']) == dict.fromkeys(range(12, 24), 12)
    assert [*part(root, splits, 'train').index['name']] == ['31UEQ_0_0']
    with pytest.raises(NoPatchesError, match="no split 'val'; choose one of test, train, all"):
        part(root, splits, 'val')
    splits = polygons(tmp_path / 'more.gpkg', *west, east.boundary, split=['all', None, 'test'])
    left_out = '1 without area or no polygon, .*; 1 without part, left out'
    with (
        pytest.warns(S1S2Warning, match=f'more.gpkg: of its features {left_out}') as said,
        pytest.raises(ValueError, match="'all' stands for every patch"),
    ):
        part(root, splits, 'all')
    assert len(said) == 1
    over = polygons(tmp_path / 'over.gpkg', west[0], west[1], split=['train', 'test'])
    with pytest.raises(DataError, match=r'overlap that are of the splits test and train'):
        part(root, over, 'train')


@pytest.mark.parametrize('halved', [0, 1])
def test_polygons_that_meet_in_degrees_share_no_pixel_and_leave_none(
    tmp_path: Path, halved: int
) -> None:
    """A border of 72 km along a parallel is 100 m off a straight line in metres."""
    root = write(tmp_path, ('31UEQ', 0, 0))
    (lat,) = gpd.GeoSeries.from_xy([LEFT], [TOP - 120], crs=32631).to_crs(4326).y
    shapes = [box(2.5, lat, 3.5, 50), box(2.5, 49, 3.5, lat)]
    west, south, _, north = shapes[halved].bounds
    shapes[halved] = box(2.9, south, 3.5, north)
    shapes.append(box(west, south, 2.9, north))
    names = ['north', 'south', 'west']
    splits = polygons(tmp_path / 'parts.gpkg', *shapes, split=names, crs=4326)
    for split, rows in (('north', range(12)), ('south', range(12, 24))):
        count = Counter(n // SIZE for _, n in held(part(root, splits, split)))
        assert count == dict.fromkeys(rows, 24)


def test_pieces_have_names_of_their_own_and_bad_numbers_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path, ('31UEQ', 0, 0))
    names = {*part(root, BlockSplits(80, {'train': 1.0}), 'all').index['name']}
    assert names == {'31UEQ_0_0'}
    names = {*part(root, BlockSplits(80, {'train': 1.0}), 'train').index['name']}
    assert names == {f'31UEQ_0_0_{n}' for n in range(1, 10)}
    for shares in ({'train': 0.5, 'test': 0.4}, {'train': 1.0, 'test': 0}, {}, ['train']):
        with pytest.raises(ValueError, match=r'shares are .* give each split one above 0, 1 t'):
            BlockSplits(80, shares)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='size is 0; give the side of a block in metres'):
        BlockSplits(0, SHARES)
    with pytest.raises(ValueError, match='seed is -1; give a whole number from 0'):
        BlockSplits(80, SHARES, seed=-1)
    with pytest.raises(ValueError, match='buffer is 80; give 0 or more, and less than 80'):
        BlockSplits(80, SHARES, buffer=80)
    with pytest.raises(DataError, match=r'size is 0\.08, less than a pixel, 10 metre; make'):
        part(root, BlockSplits(0.08, SHARES), 'train')
    with pytest.raises(DataError, match='1 blocks of 10000 metre are too few for the shares'):
        part(root, BlockSplits(10000, SHARES), 'train')
    degrees, image = tmp_path / 'degrees', np.ones((1, SIZE, SIZE), np.int16)
    write_raster(degrees / 's2' / 'a_20200701_S2_0_0.tif', image, 4326, 3, 49, 1e-4, **NAMED)
    (degrees / 's1').mkdir()
    write_label_files(degrees, progress=False)
    with pytest.raises(DataError, match='1 blocks of 80 degree are too few for the shares'):
        part(degrees, BlockSplits(80, SHARES), 'train')
    own = BlockSplits(8e-4, SHARES)  # 3 x 3 blocks
    assert [len(part(degrees, own, split)) for split in own] == [4, 3, 2]
    assert torch.equal(*(part(root, BlockSplits(80, SHARES), 'test')[0]['bounds'] for _ in '12'))
