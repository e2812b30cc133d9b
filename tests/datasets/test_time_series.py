from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchgeo_s1s2.datasets import (
    AllDates,
    Catalog,
    DateRule,
    EvenlySpaced,
    MonthlySeries,
    MultiSenGE,
    NoSeriesError,
    RandomDates,
    series_report,
)
from torchgeo_s1s2.datasets.time_series import Times


def days(*dates: str) -> Times:
    return np.array(sorted(dates), 'datetime64[s]')


def chosen(rule: DateRule, s2: Times, s1: Times | None = None) -> Any:
    """Dates of each slot by sensor, parted by blanks, or why there is no series."""
    times = {'s2': s2} if s1 is None else {'s2': s2, 's1': s1}
    try:
        selected = rule.select(times)
    except NoSeriesError as error:
        return str(error)
    return {
        sensor: [' '.join(str(times[sensor][p])[:10] for p in slot) for slot in slots]
        for sensor, slots in selected.items()
    }


def s2_of(rule: DateRule, *dates: str) -> Any:
    found = chosen(rule, days(*dates))
    return found if isinstance(found, str) else found['s2']


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
        (('2020-07-31', '2020-08-10', '2020-09-01', '2020-11-01'), 'no S2 date for August'),
        (SERIES[:3], 'no S2 date for November'),
        ((*SERIES[:2], '2021-09-01', '2021-11-20'), 'no S2 date for September'),
        ((), 'no S2 acquisition'),
    ],
)
def test_earliest_date_that_keeps_the_gap(dates: Sequence[str], expected: Any) -> None:
    found = s2_of(MonthlySeries(), *dates)
    assert found == (expected if isinstance(expected, str) else list(expected))


def test_year_and_winter() -> None:
    two_years = [f'{y}-{m:02d}-15' for y in (2019, 2020) for m in (7, 8, 9, 11)]
    assert s2_of(MonthlySeries(), *two_years)[0] == '2019-07-15'
    assert s2_of(MonthlySeries(year=2020), *two_years)[0] == '2020-07-15'
    winter = ('2020-01-10', '2020-11-02', '2020-12-20', '2021-01-10', '2021-02-20')
    found = s2_of(MonthlySeries(months=(11, 12, 1)), *winter)
    assert found == ['2020-11-02', '2020-12-20', '2021-01-10']


YEAR = ('2020-07-08', '2020-07-12', '2020-08-01', '2020-08-05', '2020-09-09', '2020-11-05')


@pytest.mark.parametrize(
    ('options', 's1', 'expected'),
    [
        # 8 and 12 July are two days from the tenth: the earlier counts.
        ({}, YEAR, [YEAR[0], YEAR[2], YEAR[4], YEAR[5]]),
        ({'s1': 'first'}, YEAR[1:], [YEAR[1], YEAR[2], YEAR[4], YEAR[5]]),
        ({'s1': 'first'}, YEAR[:-1], 'no S1 date for November within s1_max_days=45'),
        # Two of a slot come in order.
        (
            {'s1_per_slot': 2, 's1_max_days': 60},
            YEAR,
            [' '.join(YEAR[i] for i in pair) for pair in ((0, 1), (2, 3), (3, 4), (5,))],
        ),
    ],
)
def test_s1_of_the_months(options: Any, s1: Sequence[str], expected: Any) -> None:
    found = chosen(MonthlySeries(**options), days(*SERIES), days(*s1))
    assert (found if isinstance(expected, str) else found['s1']) == expected


def test_missing_slots_are_kept_or_filled_from_near_by() -> None:
    dates = ('2020-07-10', '2020-09-01', '2020-10-28')
    assert s2_of(MonthlySeries(missing='keep'), *dates) == ['2020-07-10', '', '2020-09-01', '']
    assert s2_of(MonthlySeries(missing='keep')) == ['', '', '', '']
    near = MonthlySeries(months=(7, 9, 11), missing='nearest', max_days=4)
    assert s2_of(near, *dates) == ['2020-07-10', '2020-09-01', '2020-10-28']
    nearer = replace(near, max_days=3)
    assert s2_of(nearer, *dates) == 'no S2 date for November'


def test_empty_slot_takes_the_s1_date_nearest_to_its_middle() -> None:
    s1 = days('2020-07-10', '2020-08-01', '2020-08-14', '2020-08-30')
    rule = MonthlySeries(months=(7, 8), missing='keep')
    found = chosen(rule, days('2020-07-10'), s1)
    assert found == {'s2': ['2020-07-10', ''], 's1': ['2020-07-10', '2020-08-14']}


@pytest.mark.parametrize(
    ('missing', 's1_max_days', 'expected'),
    [
        # 31 July is 30 days from 1 July and 21 from 10 July.
        ('drop', 30, ['2020-07-01', '2020-07-31']),
        ('drop', 21, ['2020-07-10', '2020-07-31']),
        ('drop', 20, 'no S1 date for July within s1_max_days=20'),
        ('nearest', 20, ['2020-08-02', '2020-07-31']),
        ('nearest', 1, 'no S1 date for July within s1_max_days=1'),
        ('keep', 30, ['2020-07-01', '2020-07-31']),
        ('keep', 29, ['2020-07-01', '']),
    ],
)
def test_how_far_s1_may_lie(missing: Any, s1_max_days: int, expected: Any) -> None:
    s2, s1 = days('2020-07-01', '2020-07-10', '2020-08-02'), days('2020-07-31T17:40:00')
    rule = MonthlySeries(months=(7,), missing=missing, s1_max_days=s1_max_days)
    found = chosen(rule, s2, s1)
    assert (found if isinstance(found, str) else [*found['s2'], *found['s1']]) == expected


def test_sensors_of_any_name() -> None:
    times = {
        'a': days('2020-07-10', '2020-07-20'),
        'b': days('2020-07-18'),
        'c': days('2020-07-21', '2020-07-22', '2020-07-23'),
    }
    rule = MonthlySeries(months=(7,), leader='a', s1_max_days=3, s1_per_slot=2)
    assert rule.reads(('b', 'c')) == ('a', 'b', 'c')
    # Only 20 July has both others within three days.
    assert rule.select(times) == {'a': ((1,),), 'b': ((0,),), 'c': ((0, 1),)}
    with pytest.raises(NoSeriesError, match='no A date for July'):
        rule.select({**times, 'a': times['a'][:0]})
    with pytest.raises(NoSeriesError, match='no B date for July within s1_max_days=3'):
        rule.select({**times, 'a': times['a'][:1]})
    with pytest.raises(ValueError, match="leader is 'd'; choose one of a, b, c"):
        MonthlySeries(leader='d').select(times)


def test_two_images_of_one_day() -> None:
    """Day 9 twice, of two orbits; the days of its slots reach from day 4.5 to 14.5."""
    s1 = numbered(0, 9, 9, 20)
    times, alone = {'s1': s1, 's2': numbered(8, 10)}, ((0,), (1,), (2,), (3,))
    every = AllDates(max_length=4, leader='s1', s1='first', missing='keep').select(times)
    assert every == {'s1': alone, 's2': ((), (0,), (0,), ())}
    assert EvenlySpaced(n=4, leader='s1').select(times)['s1'] == alone
    assert MonthlySeries(months=(3,)).select({'s2': s1[1:2], 's1': s1})['s1'] == ((1,),)
    # 31 March is a day from April, and an acquisition serves one slot only.
    months = MonthlySeries(months=(3, 4), min_gap_days=0, leader='s1', missing='nearest')
    assert months.select({'s1': numbered(30, 30)})['s1'] == ((0,), (1,))
    with pytest.raises(NoSeriesError, match='no S1 date for April'):
        months.select({'s1': numbered(30)})


def test_training_set_of_the_paper_has_3369_patches(real_labels: Path) -> None:
    catalog = Catalog(real_labels, files=False, progress=False)
    rows = np.flatnonzero(catalog.patches['tile'].isin(MultiSenGE.splits['train']))
    times = [{s: catalog.times(int(row), s) for s in ('s2', 's1')} for row in rows]
    for rule, farthest in ((MonthlySeries(), 2), (MonthlySeries(s1='first'), 29)):
        report = series_report(rule, times)
        assert report.reasons.count('') == 3369
        assert report.days['s1'].max() == farthest


def test_report_by_hand() -> None:
    """S1 lies 4 and 7 days from S2 in one patch, 0 and 30 in another, and a third has no July."""
    s2 = days('2020-07-10', '2020-08-05')
    patches = [
        {'s2': s2, 's1': days('2020-07-06', '2020-08-12')},
        {'s2': s2, 's1': days('2020-07-10', '2020-09-04')},
        {'s2': s2[1:], 's1': s2},
    ]
    rule = MonthlySeries(months=(7, 8))
    report = series_report(rule, patches)
    assert report.reasons == ('', '', 'no S2 date for July')
    # 10 July is 26 days from 5 August, which is nearer than 4 September.
    assert report.days['s1'].tolist() == [[4, 7], [0, 26]]
    costs = {bound: report.cost('s1', bound) for bound in (3, 6, 7, 26)}
    assert costs == {3: (3, 2), 6: (2, 2), 7: (1, 1), 26: (0, 0)}
    assert str(report).splitlines() == [
        'patches with the series: 2 of 3',
        '  1 without: no S2 date for July',
        'days from S1 to S2: up to 7 in half of the slots (4), 26 in 90 %, 26 in all',
        '  beyond  3: 3 of the slots, 2 of the patches',
        '  beyond  6: 2 of the slots, 2 of the patches',
        '  beyond 12: 1 of the slots, 1 of the patches',
        '  beyond 20: 1 of the slots, 1 of the patches',
    ]
    kept = series_report(replace(rule, missing='keep', s1_max_days=6), patches)
    assert np.isnan(kept.days['s1']).tolist() == [[False, True], [False, True], [True, False]]
    nothing = series_report(rule, [{'s2': s2[:0], 's1': s2}] * 2)
    assert str(nothing).endswith('2 without: no S2 date for July')


@pytest.mark.parametrize(
    ('s2', 's1', 'sensors', 'reason'),
    [
        ((), SERIES, ('s2', 's1'), 'no S2 acquisition'),
        ((), (), ('s2', 's1'), 'no S2 or S1 acquisition'),
        (SERIES, (), ('s1',), 'no S1 acquisition'),
        (SERIES, ('2022-01-01',), ('s1',), 'no S1 acquisition in a slot'),
    ],
)
def test_the_reason_names_the_sensors_that_lack(
    s2: Sequence[str], s1: Sequence[str], sensors: Sequence[str], reason: str
) -> None:
    times = {'s2': days(*s2), 's1': days(*s1)}
    assert series_report(RandomDates(n=2, missing='keep'), [times], sensors).reasons == (reason,)


DAY_0 = np.datetime64('2020-03-01', 's')


def numbered(*numbers: int) -> Times:
    return DAY_0 + np.array(numbers, 'timedelta64[D]')


def numbers_of(rule: DateRule, *numbers: int, draw: int = 0) -> Any:
    """Days since day 0 of the slots, None where empty, or why there is no series."""
    try:
        slots = rule.select({'s2': numbered(*numbers)}, draw)['s2']
    except NoSeriesError as error:
        return str(error)
    return [numbers[slot[0]] if slot else None for slot in slots]


@pytest.mark.parametrize(
    ('n', 'numbers', 'expected'),
    [
        (3, (0, 1, 2, 50, 100), [0, 50, 100]),
        (3, (0, 4, 95, 100), [0, 95, 100]),  # 95 is 45 days from 50, and 4 is 46
        (1, (0, 40, 90, 100), [40]),
        # Targets 0, 33, 67, 100: 3 is nearest to both in the middle, and each needs its own.
        (4, (0, 1, 2, 3, 100), [0, 2, 3, 100]),
        (5, (0, 1, 2, 3, 100), [0, 1, 2, 3, 100]),
    ],
)
def test_evenly_spaced_by_hand(n: int, numbers: tuple[int, ...], expected: list[int]) -> None:
    assert numbers_of(EvenlySpaced(n=n), *numbers) == expected


def test_evenly_spaced_is_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        n, days_ = int(rng.integers(2, 6)), np.sort(rng.choice(200, 9, replace=False))
        targets = np.linspace(days_[0], days_[-1], n)
        found = np.array(numbers_of(EvenlySpaced(n=n), *days_.tolist()))
        least = min(np.abs(np.array(c) - targets).sum() for c in combinations(days_, n))
        assert np.abs(found - targets).sum() == pytest.approx(least, abs=1e-3)


def test_evenly_spaced_with_too_few_dates() -> None:
    """Targets 0, 25, 50, 75 and 100."""
    numbers = 0, 20, 100
    assert numbers_of(EvenlySpaced(n=5), *numbers) == 'fewer than 5 S2 dates'
    assert numbers_of(EvenlySpaced(n=5, missing='keep'), *numbers) == [0, 20, None, None, 100]
    nearest = EvenlySpaced(n=5, missing='nearest', max_days=30)
    assert numbers_of(nearest, *numbers) == [0, 20, 20, 100, 100]
    assert numbers_of(replace(nearest, max_days=29), *numbers) == 'no S2 date within max_days=29'


def test_evenly_spaced_gives_s1_dates_to_slots() -> None:
    """The slots reach from day 0 to 25, to 75 and to 100."""
    times = {'s2': numbered(0, 40, 100), 's1': numbered(-5, 1, 24, 26, 44, 80)}
    nearest = EvenlySpaced(n=3).select(times)
    assert nearest == {'s2': ((0,), (1,), (2,)), 's1': ((1,), (4,), (5,))}
    assert EvenlySpaced(n=3, s1='first').select(times)['s1'] == ((0,), (3,), (5,))
    two = EvenlySpaced(n=3, s1_per_slot=2)  # day 44 is 56 days from day 100
    assert two.select(times)['s1'] == ((0, 1), (3, 4), (5,))
    assert replace(two, s1_max_days=56).select(times)['s1'] == ((0, 1), (3, 4), (4, 5))
    by_s1 = EvenlySpaced(n=2, leader='s1').select(times)
    assert by_s1 == {'s2': ((0,), (2,)), 's1': ((0,), (5,))}
    times['s2'] = numbered(0, 100)
    empty = EvenlySpaced(n=3, missing='keep').select(times)
    assert empty == {'s2': ((0,), (), (1,)), 's1': ((1,), (4,), (5,))}


def test_random_dates_are_a_draw_without_replacement() -> None:
    numbers, rule = (0, 3, 10, 20, 50), RandomDates(n=3)
    draws = [numbers_of(rule, *numbers, draw=draw) for draw in range(400)]
    assert {tuple(draw) for draw in draws} == set(combinations(numbers, 3))
    share = Counter(number for draw in draws for number in draw)
    # Each date is in 3/5 of the draws; four standard deviations of 400 draws are 0.1.
    assert all(abs(share[number] / 400 - 0.6) < 0.1 for number in numbers)
    assert numbers_of(rule, *numbers, draw=7) == draws[7]
    other = [numbers_of(RandomDates(n=3, seed=1), *numbers, draw=draw) for draw in range(20)]
    assert other != draws[:20]


def test_random_dates_with_too_few_dates() -> None:
    assert numbers_of(RandomDates(n=3), 0, 9) == 'fewer than 3 S2 dates'
    assert numbers_of(RandomDates(n=3, missing='keep'), 0, 9) == [0, 9, None]
    again = {tuple(numbers_of(RandomDates(n=3, missing='nearest'), 0, 9, draw=d)) for d in range(9)}
    assert again == {(0, 0, 9), (0, 9, 9)}
    assert numbers_of(RandomDates(n=2, missing='keep')) == [None, None]


def test_all_dates_and_empty_slots_after_them() -> None:
    rule = AllDates(max_length=5)
    times = {'s2': numbered(0, 3, 50), 's1': numbered(1, 30)}
    assert rule.select(times) == {
        's2': ((0,), (1,), (2,), (), ()),
        's1': ((0,), (0,), (1,), (), ()),
    }
    # Half way between the dates are days 1.5 and 26.5, and day 3 sees no Sentinel-1 of its own.
    with pytest.raises(NoSeriesError, match='no S1 date for slot 2'):
        AllDates(max_length=5, s1='first').select(times)
    kept = AllDates(max_length=5, s1='first', missing='keep').select(times)
    assert kept['s1'] == ((0,), (), (1,), (), ())
    by_s1 = AllDates(max_length=3, leader='s1').select(times)
    assert by_s1 == {'s2': ((0,), (2,), ()), 's1': ((0,), (1,), ())}


@pytest.mark.parametrize(
    ('max_length', 'expected'), [(10, [*range(10)]), (4, [0, 3, 6, 9]), (2, [0, 9]), (1, [0])]
)
def test_too_many_dates_are_thinned_evenly(max_length: int, expected: list[int]) -> None:
    numbers = tuple(number**2 for number in range(10))
    rule = AllDates(max_length=max_length)
    assert numbers_of(rule, *numbers) == [number**2 for number in expected]


@pytest.mark.parametrize('missing', ['drop', 'nearest', 'keep'])
@pytest.mark.parametrize('rule', [EvenlySpaced, AllDates, RandomDates])
def test_patch_without_a_date_of_the_leader(rule: Any, missing: Any) -> None:
    times = {'s2': numbered(), 's1': numbered(1, 2)}
    chosen_rule = rule(missing=missing)
    if missing == 'keep':
        nothing = ((),) * chosen_rule.length
        assert chosen_rule.select(times) == {'s2': nothing, 's1': nothing}
    else:
        with pytest.raises(NoSeriesError, match='no S2 date'):
            chosen_rule.select(times)


@pytest.mark.parametrize(
    ('rule', 'options', 'message'),
    [
        (MonthlySeries, {'missing': 'skip'}, "is 'skip'; choose one of drop, keep, nearest"),
        (MonthlySeries, {'s1': 'last'}, "s1 is 'last'; choose one of nearest, first"),
        (MonthlySeries, {'min_gap_days': -1}, 'min_gap_days is -1; it must be 0 or more'),
        (MonthlySeries, {'s1_max_days': -1}, 's1_max_days is -1; it must be 0 or more'),
        (MonthlySeries, {'s1_max_days': None}, 's1_max_days is None; .* a whole number'),
        (EvenlySpaced, {'n': 2.5}, 'n is 2.5; it must be 1 or more, a whole number'),
        (MonthlySeries, {'months': (0, 13)}, 'expected one or more numbers 1..12'),
        (MonthlySeries, {'months': ()}, 'expected one or more numbers 1..12'),
        (MonthlySeries, {'months': (7.5,)}, 'expected one or more numbers 1..12'),
        (MonthlySeries, {'year': '2020'}, "year is '2020'; it must be 1 or more, a whole number"),
        (MonthlySeries, {'s1_per_slot': 0}, 's1_per_slot is 0'),
        (EvenlySpaced, {'n': 0}, 'n is 0; it must be 1 or more'),
        (RandomDates, {'n': 0}, 'n is 0; it must be 1 or more'),
        (RandomDates, {'seed': -1}, 'seed is -1; it must be 0 or more'),
        (RandomDates, {'s1': 'first'}, "random dates have no days of their own; take 'nearest'"),
        (AllDates, {'max_length': 0}, 'max_length is 0; it must be 1 or more'),
        (AllDates, {'max_days': -1}, 'max_days is -1; it must be 0 or more'),
    ],
)
def test_rules_refuse_what_they_do_not_know(
    rule: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**options)
