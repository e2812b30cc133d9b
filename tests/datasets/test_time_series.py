from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchgeo_s1s2.datasets import Catalog, MonthlySeries, MultiSenGE, NoSeriesError
from torchgeo_s1s2.datasets.time_series import Times


def days(*dates: str) -> Times:
    return np.array(sorted(dates), 'datetime64[s]')


def chosen(rule: MonthlySeries, s2: Times, s1: Times | None = None) -> dict[str, list[list[str]]]:
    times = {'s2': s2} if s1 is None else {'s2': s2, 's1': s1}
    return {
        sensor: [[str(times[sensor][p])[:10] for p in slot] for slot in slots]
        for sensor, slots in rule.select(times).items()
    }


def s2_of(rule: MonthlySeries, *dates: str) -> list[str]:
    return [slot[0] if slot else '' for slot in chosen(rule, days(*dates))['s2']]


SERIES = ('2020-07-10', '2020-08-02', '2020-09-01', '2020-11-20')


@pytest.mark.parametrize(
    ('dates', 'expected'),
    [
        (SERIES, SERIES),
        # The first date of a month that fits, whatever else there is.
        ((*SERIES, '2020-07-05', '2020-08-25'), ('2020-07-05', *SERIES[1:])),
        # 16 days after the one before is too early, 17 days are enough.
        (
            ('2020-07-20', '2020-08-05', '2020-08-06', '2020-09-01', '2020-11-20'),
            ('2020-07-20', '2020-08-06', '2020-09-01', '2020-11-20'),
        ),
        # Taking 30 August would leave September without a date; 29 August does not.
        (
            ('2020-07-31', '2020-08-16', '2020-08-29', '2020-08-30', '2020-09-15', '2020-11-01'),
            ('2020-07-31', '2020-08-29', '2020-09-15', '2020-11-01'),
        ),
        # 2019 has no November, so nothing of it is used.
        (('2019-07-01', '2019-08-01', '2019-09-01', *SERIES), SERIES),
    ],
)
def test_earliest_date_that_keeps_the_gap(dates: Sequence[str], expected: Sequence[str]) -> None:
    assert s2_of(MonthlySeries(), *dates) == list(expected)


@pytest.mark.parametrize(
    ('dates', 'message'),
    [
        (('2020-07-31', '2020-08-10', '2020-09-01', '2020-11-01'), 'no S2 date for August'),
        (SERIES[:3], 'no S2 date for November'),
        ((*SERIES[:2], '2021-09-01', '2021-11-20'), 'no S2 date for September'),
        ((), 'no acquisition at all'),
    ],
)
def test_patch_without_a_full_series_is_left_out(dates: Sequence[str], message: str) -> None:
    with pytest.raises(NoSeriesError, match=message):
        MonthlySeries().select({'s2': days(*dates)})


def test_year_and_winter() -> None:
    two_years = [f'{y}-{m:02d}-15' for y in (2019, 2020) for m in (7, 8, 9, 11)]
    assert s2_of(MonthlySeries(), *two_years)[0] == '2019-07-15'
    assert s2_of(MonthlySeries(year=2020), *two_years)[0] == '2020-07-15'
    winter = ('2020-01-10', '2020-11-02', '2020-12-20', '2021-01-10', '2021-02-20')
    assert s2_of(MonthlySeries(months=(11, 12, 1)), *winter) == [
        '2020-11-02',
        '2020-12-20',
        '2021-01-10',
    ]


def test_s1_nearest_prefers_the_earlier_of_two_as_near() -> None:
    s1 = days('2020-07-08', '2020-07-12', '2020-08-03', '2020-09-09', '2020-11-19')
    found = chosen(MonthlySeries(), days(*SERIES), s1)
    assert found['s1'] == [['2020-07-08'], ['2020-08-03'], ['2020-09-09'], ['2020-11-19']]


def test_s1_first_of_the_month() -> None:
    s1 = days('2020-07-31', '2020-08-01', '2020-08-02', '2020-09-30', '2020-11-05')
    found = chosen(MonthlySeries(s1='first'), days(*SERIES), s1)
    assert found['s1'] == [['2020-07-31'], ['2020-08-01'], ['2020-09-30'], ['2020-11-05']]
    with pytest.raises(NoSeriesError, match='no S1 date for November'):
        MonthlySeries(s1='first').select({'s2': days(*SERIES), 's1': s1[:-1]})


def test_several_s1_a_slot_come_in_order() -> None:
    s1 = days('2020-07-01', '2020-07-09', '2020-07-12', '2020-11-20')
    found = chosen(MonthlySeries(s1_per_slot=2), days(*SERIES), s1)
    assert found['s1'][0] == ['2020-07-09', '2020-07-12']


def test_missing_slots_are_kept_or_filled_from_near_by() -> None:
    dates = ('2020-07-10', '2020-09-01', '2020-10-28')
    assert s2_of(MonthlySeries(missing='keep'), *dates) == ['2020-07-10', '', '2020-09-01', '']
    assert s2_of(MonthlySeries(missing='keep')) == ['', '', '', '']
    near = MonthlySeries(months=(7, 9, 11), missing='nearest', max_days=4)
    assert s2_of(near, *dates) == ['2020-07-10', '2020-09-01', '2020-10-28']
    with pytest.raises(NoSeriesError, match='no S2 date for November'):
        s2_of(MonthlySeries(months=(7, 9, 11), missing='nearest', max_days=3), *dates)


def test_empty_slot_takes_the_s1_date_nearest_to_its_middle() -> None:
    s1 = days('2020-07-10', '2020-08-01', '2020-08-14', '2020-08-30')
    rule = MonthlySeries(months=(7, 8), missing='keep')
    found = chosen(rule, days('2020-07-10'), s1)
    assert found == {'s2': [['2020-07-10'], []], 's1': [['2020-07-10'], ['2020-08-14']]}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'missing': 'skip'}, "missing is 'skip'; choose one of drop, keep, nearest"),
        ({'s1': 'last'}, "s1 is 'last'; choose one of nearest, first"),
        ({'leader': 's3'}, "leader is 's3'; choose one of s2, s1"),
        ({'months': (0, 13)}, 'expected one or more numbers 1..12'),
        ({'months': ()}, 'expected one or more numbers 1..12'),
        ({'s1_per_slot': 0}, 's1_per_slot is 0'),
    ],
)
def test_rules_refuse_what_they_do_not_know(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MonthlySeries(**options)


@pytest.mark.parametrize('s1', ['nearest', 'first'])
def test_training_set_of_the_paper_has_3369_patches(real_labels: Path, s1: Any) -> None:
    catalog = Catalog(real_labels, files=False, progress=False)
    rule, count = MonthlySeries(s1=s1), Counter[str]()
    split = {tile: name for name, tiles in MultiSenGE.splits.items() for tile in tiles}
    for row, tile in enumerate(catalog.patches['tile']):
        try:
            rule.select({sensor: catalog.times(row, sensor) for sensor in ('s2', 's1')})
        except NoSeriesError:
            continue
        count[split.get(tile, 'unused')] += 1
    assert count['train'] == 3369
