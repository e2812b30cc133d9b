import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from conftest import read_raster, write_patch, write_raster
from numpy.typing import NDArray
from shapely import LineString, Polygon, box
from shapely.affinity import translate

from torchgeo_s1s2.datasets import (
    Catalog,
    MultiSenGE,
    VectorLabels,
    rasterize_labels,
    vectors,
    write_label_files,
)
from torchgeo_s1s2.errors import DataError, S1S2Warning, UnreadableError

LEFT, TOP = 500000.0, 5500000.0
IDS = {'field': 6, 'forest': 11}


def square(col: float, row: float, width: float, height: float) -> Polygon:
    """Pixels of the first patch."""
    x, y = LEFT + 10 * col, TOP - 10 * row
    return box(x, y - 10 * height, x + 10 * width, y)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Patches of 8 x 8 in zones 31 and 32, without labels."""
    for tile in ('31UEQ', '32ULU'):
        write_patch(tmp_path / 'data', tile, size=8)
    for path in (tmp_path / 'data').glob('[gl]*/*'):
        path.unlink()
    return tmp_path / 'data'


def polygons(root: Path, *shapes: Any, crs: str = 'EPSG:32631', **columns: Any) -> Path:
    """A file of a field in the columns 0 to 4 and a forest in 3 to 5, rows 0 to 3."""
    shapes = shapes or (square(0, 0, 5, 4), square(3, 0, 3, 4))
    columns = columns or {'cover': ['field', 'forest']}
    path = root.parent / 'polygons.gpkg'
    gpd.GeoDataFrame(columns, geometry=[*shapes], crs='EPSG:32631').to_crs(crs).to_file(path)
    return path


def labels(root: Path, name: str = '31UEQ_GR_0_0.tif') -> NDArray[Any]:
    return read_raster(root / 'ground_reference' / name)[0]


def write(root: Path, path: Path, attribute: str, classes: Any = None, **options: Any) -> int:
    with pytest.warns(S1S2Warning, match='without a label: 1 of 2, such as 32ULU_0_0; no p'):
        return rasterize_labels(root, path, attribute, classes, progress=False, **options)


EXPECTED = np.zeros((8, 8), int)
EXPECTED[:4, :3], EXPECTED[:4, 3:6] = 6, 11


@pytest.mark.parametrize('crs', ['EPSG:32631', 'EPSG:4326', 'EPSG:3035', 'EPSG:32632'])
@pytest.mark.parametrize('ending', ['gpkg', 'parquet', 'shp'])
def test_polygons_in_any_file_and_crs_become_labels(root: Path, crs: str, ending: str) -> None:
    table = gpd.read_file(polygons(root)).to_crs(crs)
    path = root / f'polygons.{ending}'
    table.to_parquet(path) if ending == 'parquet' else table.to_file(path)
    assert write(root, path, 'cover', IDS) == 2
    assert labels(root).tolist() == EXPECTED.tolist()
    assert not labels(root, '32ULU_GR_0_0.tif').any()
    with rasterio.open(root / 'ground_reference' / '31UEQ_GR_0_0.tif') as src:
        assert (src.nodata, src.dtypes[0], src.crs.to_epsg()) == (0, 'uint8', 32631)
        assert src.transform[:6] == (10, 0, LEFT, 0, -10, TOP)
    assert Catalog(root).patches['classes'].tolist() == [(6, 11), ()]
    mask = MultiSenGE(root, split='all', classes=10)[0]['mask']
    assert mask[0].tolist() == [5] * 3 + [8] * 3 + [255] * 2


def test_an_accent_may_be_a_character_of_its_own(root: Path) -> None:
    path = polygons(root, square(0, 0, 5, 4), cover=['Fore\u0302t'])
    write(root, path, 'cover', {'For\u00eat': 11})
    assert (labels(root) == 11).sum() == 20


def test_overlaps_follow_the_order_and_borders_the_rule(root: Path) -> None:
    path = polygons(root, square(0, 0, 4.4, 2), square(2.6, 0, 2, 2), code=['311', '12'])
    write(root, path, 'code')
    assert labels(root).dtype == np.uint16
    assert labels(root)[0].tolist() == [311] * 3 + [12] * 2 + [0] * 3
    write(root, path, 'code', order=[12, 311])
    assert labels(root)[0].tolist() == [311] * 4 + [12] + [0] * 3
    write(root, path, 'code', order=['311'], all_touched=True)
    assert labels(root)[0].tolist() == [311] * 5 + [0] * 3
    with pytest.raises(ValueError, match='order names 13, which no polygon and no class has'):
        rasterize_labels(root, path, 'code', order=[13])
    with pytest.raises(ValueError, match=r'order is .*; name each value once, from the lowest on'):
        rasterize_labels(root, path, 'code', order=[12, 311, '12'])


def test_what_is_left_out_is_counted(root: Path) -> None:
    bow = Polygon([(LEFT, TOP), (LEFT + 40, TOP - 40), (LEFT + 40, TOP), (LEFT, TOP - 40)])
    shapes = bow, LineString([(LEFT, TOP), (LEFT + 9, TOP)]), square(6, 6, 1, 1), square(5, 5, 1, 1)
    path = polygons(root, *shapes, cover=['field', 'field', 'lake', None])
    with pytest.warns(S1S2Warning) as caught:
        rasterize_labels(root, path, 'cover', IDS, progress=False)
    assert (
        'of its features 1 invalid, mended; 1 without area or no polygon, left out; 1 without '
        'cover, left out; 1 of a value that classes do not name, left out: lake (1)'
    ) in str(caught[0].message)
    # The two triangles of the bow tie, without the pixels whose centre lies on no side of it.
    assert labels(root)[0, 1:3].tolist() == [0, 0]
    assert labels(root)[1, 0] == labels(root)[1, 3] == 6
    assert set(np.unique(labels(root)[4:])) == {0}


def test_label_files_are_told_the_labels_where_they_lie(root: Path, capsys: Any) -> None:
    path = polygons(root)
    write_label_files(root, progress=False)
    (root / 'labels' / 'below').mkdir()
    for listing in (root / 'labels').glob('*.json'):
        listing.rename(root / 'labels' / 'below' / listing.name)
    assert write(root, path, 'cover', IDS) == 2
    assert [p.name for p in (root / 'labels').iterdir()] == ['below']
    content = json.loads((root / 'labels' / 'below' / '31UEQ_0_0.json').read_text())
    assert content['labels'] == '6;11'
    with pytest.warns(S1S2Warning, match='patch'):
        assert rasterize_labels(root, path, 'cover', IDS) == 0
    assert 'Rasterizing' not in capsys.readouterr().err  # no bar of nothing


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    'attribute': ({}, {'attribute': 'class'}, "has no attribute 'class'; it has cover"),
    'names': ({}, {'classes': None}, "what is no id .*: field, forest. Give classes, such as {'fi"),
    'zero': ({'cover': [0, 1]}, {'classes': None}, r'no id \(a whole number 1..65535, 0 is none\)'),
    'large': ({'cover': [1, 70000]}, {'classes': None}, 'what is no id .*: 70000'),
    'fraction': ({'cover': [1, 2.5]}, {'classes': None}, 'what is no id .*: 2.5'),
    'id': ({}, {'classes': {'field': 1.5}}, r'classes has what is no id \(.*: field: 1.5. Give'),
    'twice': ({}, {'classes': {3: 1, '3': 2}}, 'classes has several ids of 3; give one'),
    'unmapped': (
        {},
        {'classes': {'lake': 1}},
        "no polygon with a class in 'cover'; 2 of a value",
    ),
    'layer': ({}, {'layer': 'roads'}, r'gpkg cannot be read: .*roads.*; expected a GeoPackage'),
}


@pytest.mark.parametrize(('columns', 'options', 'message'), BAD.values(), ids=BAD.keys())
@pytest.mark.filterwarnings('ignore:.*of its features')
def test_bad_input_is_named_before_anything_is_written(
    root: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {'attribute': 'cover', 'classes': IDS} | options
    path = polygons(root, **columns)
    with pytest.raises((DataError, UnreadableError), match=message):
        rasterize_labels(root, path, **given)
    assert not [*root.glob('ground_reference/*')]


def test_polygons_elsewhere_or_nowhere_are_refused(root: Path) -> None:
    far = polygons(root, translate(square(0, 0, 5, 4), 5000), cover=['field'])
    with pytest.raises(DataError, match=r'no polygon of .* lies on a patch.*Check the CRS'):
        rasterize_labels(root, far, 'cover', IDS, progress=False)
    nowhere = root / 'nowhere.parquet'
    gpd.read_file(far).set_crs(None, allow_override=True).to_parquet(nowhere)
    with pytest.raises(DataError, match='does not say its CRS'):
        rasterize_labels(root, nowhere, 'cover', IDS)
    undefined = root / 'undefined.gpkg'
    table = gpd.read_file(far).set_crs(None, allow_override=True)
    table.to_file(undefined, layer_options={'SRID': '-1'})
    with pytest.raises(DataError, match=r'does not say its CRS \(Undefined Cartesian SRS\)'):
        rasterize_labels(root, undefined, 'cover', IDS)
    with pytest.raises(UnreadableError, match=r'gone.gpkg cannot be read'):
        rasterize_labels(root, root / 'gone.gpkg', 'cover', IDS)


def test_other_rasters_stay_and_the_same_are_not_written_again(root: Path) -> None:
    path = polygons(root)
    assert write(root, path, 'cover', IDS) == 2
    assert write(root, path, 'cover', IDS) == 0
    assert write(root, path, 'cover', IDS | {'field': 5}) == 2
    assert labels(root)[0, 0] == 5
    own = root / 'ground_reference' / '31UEQ_GR_0_0.tif'
    write_raster(own, np.full((1, 8, 8), 9, np.uint8), 32631, LEFT, TOP)
    with pytest.raises(DataError, match='was not made from polygons here'):
        rasterize_labels(root, path, 'cover', IDS, progress=False)
    assert (labels(root) == 9).all()
    assert write(root, path, 'cover', IDS, overwrite=True) == 1 + 1
    assert labels(root).tolist() == EXPECTED.tolist()


@pytest.mark.parametrize('step', ['write_json', 'check_written'])
def test_an_interrupted_run_goes_on(step: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    path = polygons(root)
    with monkeypatch.context() as patch:
        patch.setattr(vectors, step, stop)
        with pytest.raises(KeyboardInterrupt):
            rasterize_labels(root, path, 'cover', IDS, progress=False)
    assert write(root, path, 'cover', IDS) == 2
    assert labels(root).tolist() == EXPECTED.tolist()
    assert Catalog(root).patches['classes'].tolist() == [(6, 11), ()]


def test_rasters_without_a_label_are_told_each_time(root: Path) -> None:
    path = polygons(root, square(2.6, 2.6, 0.8, 0.3), code=['11'])
    for written in (2, 0):
        with pytest.warns(
            S1S2Warning, match=r'without a label: 2 of 2, such as 31UEQ_0_0; .* centre'
        ):
            assert rasterize_labels(root, path, 'code', progress=False) == written
    assert write(root, path, 'code', all_touched=True) == 2
    assert [*zip(*labels(root).nonzero(), strict=True)] == [(2, 2), (2, 3)]


def test_a_polygon_of_the_whole_world_and_names_in_yaml(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(root))
    names = root / 'classes.yaml'
    names.write_text('field: 6\n311: 11\n')
    path = root / 'world.parquet'
    world = [box(-180, -90, 180, 90)]
    gpd.GeoDataFrame({'cover': [311.0]}, geometry=world, crs='EPSG:4326').to_parquet(path)
    source = VectorLabels(file='~/world.parquet', attribute='cover', classes='~/classes.yaml')
    source.fill(root, None)  # type: ignore[arg-type]
    names.write_text('field: [')
    with pytest.raises(DataError, match=r'~/classes\.yaml is no YAML'):
        source.fill(root, None)  # type: ignore[arg-type]
    assert (labels(root) == 11).all()
    assert (labels(root, '32ULU_GR_0_0.tif') == 11).all()
