from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_patch

from torchgeo_s1s2.datasets import MonthlySeries, MultiSenGE, MultiSenNA
from torchgeo_s1s2.errors import NoPatchesError, S1S2Warning


def test_split_without_patches_names_the_tiles(two_zones: Path) -> None:
    message = r"split 'val' has no patch: its tiles are \('31UFP', '31UGP'\).*has 31UEQ, 32ULU"
    with pytest.raises(ValueError, match=message):
        MultiSenGE(two_zones, split='val')
    dataset = MultiSenGE(two_zones, split='val', splits={'val': ['32ULU']})
    assert [dataset.name(i) for i in range(len(dataset))] == ['32ULU_0_0']


def test_a_tile_in_two_splits_or_misspelt_is_said(two_zones: Path) -> None:
    splits = {'train': ['31UEQ', '31UQE'], 'val': ['31UEQ', '32ULU']}
    twice, misspelt = 'tile 31UEQ is in the splits train, val', "no tile '31UQE' of split 'train'"
    with pytest.warns(S1S2Warning, match=rf'{twice}; .*{misspelt} \(tiles there: 31UEQ, 32ULU\)'):
        assert len(MultiSenGE(two_zones, 'train', splits=splits)) == 2


def test_patches_that_the_date_rule_leaves_out_are_counted(two_zones: Path) -> None:
    for path in (two_zones / 's2').glob('31UEQ_20200904*_33_0.tif'):
        path.unlink()
    message = r"patches of split 'all' in .* left out: 1 of 3: no S2 date for September \(1\)"
    with pytest.warns(S1S2Warning, match=message):
        dataset = MultiSenGE(two_zones, 'all')
    assert [dataset.name(i) for i in range(len(dataset))] == ['31UEQ_0_0', '32ULU_0_0']
    for path in (two_zones / 's2').glob('*20200904*'):
        path.unlink()
    message = (
        r'none of the patches .*\(3\) has .*: no S2 date for September \(3\). Choose another ser'
    )
    with pytest.raises(NoPatchesError, match=message), pytest.warns(S1S2Warning):
        MultiSenGE(two_zones, 'all')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'split': 'dev'}, "no split 'dev'; choose one of train, val, test, all"),
        ({'classes': 15}, 'no scheme of 15 classes'),
        ({'sensors': ['s3']}, r"no such sensor: \['s3'\]; choose from s2, s1"),
        ({'sensors': 's2'}, r"no such sensor: 's2'; give a list, as in \['s2'\]"),
        ({'series': [7, 8]}, r'series is \[7, 8\]; expected a date rule, such as MonthlySeries'),
        ({'splits': ['31UEQ']}, r"splits is \['31UEQ'\]; expected tiles by split"),
        ({'catalog': 'data'}, r"catalog is 'data'; expected a Catalog\(root\)"),
        ({'unit': ['dn']}, r"unit is \['dn'\]; expected it by sensor"),
        ({'res': 0}, 'res is 0; give width and height of a pixel, numbers above 0'),
        ({'res': (10, np.nan)}, r'res is \(10, nan\); give width and height'),
        ({'res': 10, 'crs': 4326}, r'res is 10, and a pixel of the patches is \(0.0001'),
        ({'res': 1e-4}, r'res is 0.0001, and a pixel of the patches is \(10'),
        ({'bands': ['B01']}, r"no such band: \['B01'\]"),
        ({'bands': ['VV']}, 'no band of s2'),
        ({'unit': 'feet'}, 'no such unit: .*choose from s2: dn, reflectance; s1: linear, db'),
        ({'unit': {'s1': 'dn'}}, 'no such unit'),
        ({'offset': {'january': -1000}}, 'offset is .*expected a number such as -1000, or one by'),
        ({'offset': 'much'}, 'offset is .much.; expected a number'),
        ({'nodata': {'s3': 0}}, r"no such sensor in nodata: \['s3'\]"),
        ({'file_bands': {'S2': ['B02']}}, 'no such sensor in file_bands'),
        ({'nodata': 0}, 'nodata is 0; expected it by sensor'),
        ({'nodata': {'s2': None}}, 'nodata of s2 is None; expected a number'),
        ({'offset': np.nan}, 'offset is nan; expected a number'),
        ({'file_bands': {'s1': ['VV', 'VV']}}, 'list each band once, in order'),
        ({'file_bands': {'s1': [1, 2]}}, 'list the names of its bands'),
        ({'file_bands': {'s1': 'VV'}}, 'list the names of its bands'),
        ({'splits': {'test': '31UEQ'}}, r"split 'test' is '31UEQ'; give a list of tiles: \[31UEQ"),
        ({'series': MonthlySeries(months=(1, 7))}, r'no S2 date for January \(2\). Cho'),
    ],
)
def test_bad_arguments(two_zones: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiSenGE(two_zones, **({'split': 'test'} | options))


def test_multisenna_adds_a_class_and_takes_its_own_split(tmp_path: Path) -> None:
    labels = np.full((16, 16), 15, np.uint8)
    write_patch(tmp_path, '31UEQ', size=16, labels=labels)
    dataset = MultiSenNA(tmp_path)
    assert (dataset[0]['mask'] == 14).all()
    assert dataset.classes.names[14] == 'Beaches, Sand'
    assert len(MultiSenNA(tmp_path, split='train', splits={'train': ['31UEQ']})) == 1
    with pytest.raises(ValueError, match="no split 'train'; choose one of all"):
        MultiSenNA(tmp_path, split='train')
