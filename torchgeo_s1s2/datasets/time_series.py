"""Date rules: from the acquisitions of a patch to T time slots, before anything is read."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Integral
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from torchgeo_s1s2.errors import NoSeriesError

Times = NDArray[np.datetime64]
Span = tuple[np.datetime64, np.datetime64]
Slots = dict[str, tuple[tuple[int, ...], ...]]
"""For each sensor T slots, each a tuple of positions in that sensor's sorted times.

A slot is empty where the sensor did not see it, and holds several positions where they are to be
averaged. Times may be equal (two orbits on one day); positions tell them apart.
"""

Missing = Literal['drop', 'keep', 'nearest']
Match = Literal['nearest', 'first']
BOUNDS = (3, 6, 12, 20, 30, 45, 60)
"""Days whose cost a report tells."""
_DAY, _MONTH = np.timedelta64(1, 'D'), np.timedelta64(1, 'M')


class Slot(NamedTuple):
    """One time slot of the leading sensor.

    Attributes:
        name: What the slot is called in messages.
        position: Position in the sorted times, None where no acquisition fits.
        start: First moment that the slot stands for.
        end: First moment that it no longer stands for.
        time: What other sensors are matched with: the acquisition, or else the slot's middle.
    """

    name: str
    position: int | None
    start: np.datetime64
    end: np.datetime64
    time: np.datetime64


def _number(default: int, least: int) -> int:
    """A number of a date rule, which must not be below the least one."""
    number: int = field(default=default, metadata={'least': least})
    return number


@dataclass(frozen=True, kw_only=True)
class DateRule(ABC):
    """Chooses T time slots for the leading sensor and gives the other sensors' dates to each.

    A rule sees the acquisitions of one patch, and of a window ``dataset[x, y, tmin:tmax]`` those
    from ``tmin`` to ``tmax`` as if there were no others. So, of TorchGeo's temporal samplers:

    - ``RandomTimedeltaSampler`` and ``SequentialTimedeltaSampler`` lay a period of fixed duration
      anywhere over the year. :class:`EvenlySpaced`, :class:`RandomDates` and :class:`AllDates` make
      their T slots from whatever lies in it; :class:`MonthlySeries` fills the months that it
      covers, of the first year that it reaches.
    - ``RandomPeriodSampler`` and ``SequentialPeriodSampler`` cut at the borders of calendar
      periods: with ``freq='Y'`` a series is of one year, with ``freq='Q'`` of one quarter.

    T does not change with the period, so these samples make batches. Where a period holds fewer
    acquisitions than the rule needs, ``missing='keep'`` leaves their slots empty; the others end
    with an IndexError.

    Attributes:
        missing: What to do where acquisitions of the leading sensor are missing: ``'drop'`` leaves
            the patch out, ``'keep'`` leaves slots empty, ``'nearest'`` takes other acquisitions
            instead. Each rule says what these are, and which slots stay empty.
        max_days: How many days away these other acquisitions may lie, in the rules whose slots
            stand for days: from the days of the slot or its target. A patch without any is left
            out.
        leader: Sensor whose acquisitions make the slots. The arguments that begin with ``s1`` hold
            for every other sensor, which is Sentinel-1 beside the usual ``'s2'``.
        s1: Which acquisitions of the others go with a slot: the ``'nearest'`` to the leader's date
            (the earlier one of two as near), or the ``'first'`` within the slot's days. A slot
            without a leader's date takes the one nearest to its middle, within its days.
        s1_per_slot: How many of them at most, to be averaged (Sentinel-1 in linear power).
        s1_max_days: How many calendar days they may lie from the leader's date, or from the middle
            of a slot without one. Beyond, ``missing='keep'`` leaves their slot empty. The others
            choose among the leader's dates that have all other sensors so near, and leave the
            patch out if these make no series. Of the files that MultiSenGE's label files list, S1
            lies within 2 days in all 3,369 training patches of the protocol. With a random fifth
            (quarter) of them, about what the archive holds, 45 days keep 3,353 (3,362) of these
            patches, 30 days 3,256 (3,337) and 12 days 1,907 (2,472).
            :func:`series_report` tells what a bound costs.

    Raises:
        ValueError: If an attribute has no such value.
    """

    #: Whether the choice depends on the random draw.
    draws: ClassVar[bool] = False

    missing: Missing = 'drop'
    max_days: int = _number(15, least=0)
    leader: str = 's2'
    s1: Match = 'nearest'
    s1_per_slot: int = _number(1, least=1)
    s1_max_days: int = _number(45, least=0)

    def __post_init__(self) -> None:
        """Check what a configuration can get wrong."""
        for name, choices in (('missing', get_args(Missing)), ('s1', get_args(Match))):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f'{name} is {value!r}; choose one of {", ".join(choices)}')
        for number in fields(self):
            if 'least' in number.metadata:
                check_at_least(number.name, getattr(self, number.name), number.metadata['least'])

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of slots T."""

    @abstractmethod
    def slots(self, times: Times, span: Span, draw: int) -> list[Slot]:
        """Slots of the leading sensor, at most T; the others come after them and stay empty.

        Args:
            times: Its sorted acquisition times.
            span: First and last acquisition of any sensor.
            draw: Number of the random draw, for rules that draw. Whether there is a series must
                not depend on it.

        Raises:
            NoSeriesError: If a slot that must not stay empty cannot be filled.
        """

    def select(self, times: Mapping[str, Times], draw: int = 0) -> Slots:
        """Choose the acquisitions of one patch.

        Args:
            times: Sorted acquisition times of each sensor in use; the leader must be among them.
            draw: Number of the random draw; the same number makes the same choice.

        Returns:
            T slots for each of these sensors.

        Raises:
            NoSeriesError: If a slot that must not stay empty cannot be filled.
            ValueError: If the times of the leader are not given.
        """
        if self.leader not in times:
            raise ValueError(f'leader is {self.leader!r}; choose one of {", ".join(times)}')
        seen = [t for t in times.values() if len(t)]
        if not seen:
            if self.missing != 'keep':
                raise NoSeriesError(f'no {_any_of(times)} acquisition')
            return dict.fromkeys(times, ((),) * self.length)
        span = min(t[0] for t in seen), max(t[-1] for t in seen)
        leader, usable = times[self.leader], self._usable(times)
        try:
            slots = self.slots(leader[usable], span, draw)
        except NoSeriesError:  # what the slots of all of them lack is the reason
            usable = np.arange(len(leader))
            slots = self.slots(leader, span, draw)
        chosen = {
            sensor: tuple(self._match(sensor, t, slot) for slot in slots)
            for sensor, t in times.items()
            if sensor != self.leader
        }
        chosen[self.leader] = tuple(
            () if slot.position is None else (int(usable[slot.position]),) for slot in slots
        )
        unused = ((),) * (self.length - len(slots))
        return {sensor: chosen[sensor] + unused for sensor in times}

    def reads(self, sensors: Sequence[str]) -> tuple[str, ...]:
        """Sensors whose times the rule needs to choose slots of some: the leading one before them.

        Args:
            sensors: Names of sensors.
        """
        return tuple(dict.fromkeys((self.leader, *sensors)))

    def candidates(self, times: Mapping[str, Times]) -> dict[str, set[int]]:
        """Acquisitions of one patch that any draw may choose; a rule that draws overrides this.

        Args:
            times: As in ``select``.

        Returns:
            For each of these sensors the positions in its times.

        Raises:
            NoSeriesError: As ``select`` does.
        """
        slots = self.select(times)
        return {sensor: {p for slot in chosen for p in slot} for sensor, chosen in slots.items()}

    def _usable(self, times: Mapping[str, Times]) -> NDArray[np.intp]:
        """Positions of the leader's acquisitions that may make slots."""
        leader = times[self.leader]
        usable = np.ones(len(leader), bool)
        if self.missing != 'keep':
            for sensor, t in times.items():
                if sensor != self.leader:
                    usable &= (_days_apart(leader[:, None], t) <= self.s1_max_days).any(axis=1)
        return np.flatnonzero(usable)

    def _match(self, sensor: str, times: Times, slot: Slot) -> tuple[int, ...]:
        """Acquisitions of another sensor that go with a slot."""
        first = self.s1 == 'first'
        fits = _days_apart(times, slot.time) <= self.s1_max_days
        if first or slot.position is None:
            fits &= (times >= slot.start) & (times < slot.end)
        chosen = np.flatnonzero(fits)
        if not first:
            chosen = chosen[np.argsort(np.abs(times[chosen] - slot.time), kind='stable')]
        if not len(chosen) and self.missing != 'keep':
            raise NoSeriesError(
                f'no {sensor.upper()} date for {slot.name} within s1_max_days={self.s1_max_days}'
            )
        return tuple(sorted(chosen[: self.s1_per_slot].tolist()))

    def _check_count(self, times: Times, least: int) -> None:
        """Raise an error where the leader has fewer dates than must be."""
        if self.missing != 'keep' and len(times) < (least if self.missing == 'drop' else 1):
            leader = self.leader.upper()
            raise NoSeriesError(
                f'fewer than {least} {leader} dates' if len(times) else f'no {leader} date'
            )


@dataclass(frozen=True)
class MonthlySeries(DateRule):
    """One acquisition a month, the gap kept along the series.

    Of each month it takes the earliest date that is at least ``min_gap_days`` after the one
    before, as the protocol of Wenger et al. does (Remote Sensing 2023, 15(1), 151,
    https://doi.org/10.3390/rs15010151). A month that does not follow the one before it in the
    calendar belongs to the next year, so ``(11, 12, 1)`` is a winter.

    Attributes:
        months: Month of each slot, 1..12.
        min_gap_days: Least number of days between dates of consecutive slots.
        missing: As in DateRule; ``'nearest'`` takes the acquisition with the fewest days to the
            month, which keeps the gap and lies within ``max_days`` of the month. No acquisition
            serves two slots.
        year: Year of the first month; None takes the first year with a full series (or, where
            slots may stay empty, the first of those with the most dates).
    """

    months: Sequence[int] = (7, 8, 9, 11)
    min_gap_days: int = _number(17, least=0)
    year: int | None = None

    def __post_init__(self) -> None:
        """Check what a configuration can get wrong."""
        super().__post_init__()
        object.__setattr__(self, 'months', tuple(self.months))
        whole = all(isinstance(month, Integral) and 1 <= month <= 12 for month in self.months)
        if not self.months or not whole:
            raise ValueError(f'months is {self.months}; expected one or more numbers 1..12')
        if self.year is not None:
            check_at_least('year', self.year, 1)

    @property
    def length(self) -> int:
        """Number of slots T, one a month."""
        return len(self.months)

    def slots(self, times: Times, span: Span, draw: int) -> list[Slot]:
        """Slots of the first year that fits; see DateRule."""
        found: list[list[Slot]] = []
        failed: list[NoSeriesError] = []
        for year in self._years(span):
            try:
                found.append(self._slots_of_year(times, year))
            except NoSeriesError as error:
                failed.append(error)
        if not found:
            raise failed[0]
        return max(found, key=lambda slots: sum(slot.position is not None for slot in slots))

    def _years(self, span: Span) -> Sequence[int]:
        if self.year is not None:
            return (self.year,)
        first, last = (int(t.astype('datetime64[Y]').astype(int)) + 1970 for t in span)
        into_next_year = any(b <= a for a, b in pairwise(self.months))
        return range(first - into_next_year, last + 1)

    def _slots_of_year(self, times: Times, year: int) -> list[Slot]:
        slots, first = list[Slot](), 0
        days = times.astype('datetime64[D]')
        reach = self.max_days if self.missing == 'nearest' else 0
        for month in _months_from(year, self.months):
            start, end = month.astype('datetime64[D]'), (month + _MONTH).astype('datetime64[D]')
            name = month.astype(object).strftime('%B')
            position = _earliest(days, start, end, first, reach)
            if position is None:
                if self.missing != 'keep':
                    raise NoSeriesError(f'no {self.leader.upper()} date for {name}')
                slots.append(Slot(name, None, start, end, start + (end - start) // 2))
                continue
            slots.append(Slot(name, position, start, end, times[position]))
            gap = self.min_gap_days * _DAY
            first = max(position + 1, int(np.searchsorted(times, times[position] + gap)))
        return slots


@dataclass(frozen=True)
class EvenlySpaced(DateRule):
    """A number of acquisitions as evenly apart as the dates of a patch allow.

    The targets lie at equal steps from the leading sensor's first acquisition to its last; a
    single one lies half way. Each gets an acquisition of its own, in order, so that the sum of the
    days between targets and acquisitions is least.

    Attributes:
        n: Number of slots T.
        missing: What to do with a patch that has fewer dates than slots: ``'drop'`` leaves it out;
            ``'keep'`` gives each date to a slot in the same way and leaves the other slots empty;
            ``'nearest'`` takes for each target the nearest acquisition within ``max_days``, also
            if another slot has it.
        s1: The days of a slot reach half way to the targets of its neighbours.
    """

    n: int = _number(4, least=1)

    @property
    def length(self) -> int:
        """Number of slots T."""
        return self.n

    def slots(self, times: Times, span: Span, draw: int) -> list[Slot]:
        """Slots around evenly spaced targets; see DateRule."""
        self._check_count(times, self.n)
        if not len(times):
            return []
        # Equal steps from the first to the last, or half way if there is but one.
        shares = np.linspace(0, 1, self.n) if self.n > 1 else np.array([0.5])
        steps = ((times[-1] - times[0]).astype('timedelta64[s]') * shares).astype('timedelta64[s]')
        targets = times[0] + steps
        positions: list[int | None] = [None] * self.n
        if len(times) >= self.n:
            positions = [*_assign(targets, times)]
        elif self.missing == 'nearest':
            positions = [self._nearest(times, target) for target in targets]
        else:
            for position, slot in enumerate(_assign(times, targets)):
                positions[slot] = position
        return _slots_around(targets, positions, times, span)

    def _nearest(self, times: Times, target: np.datetime64) -> int:
        distance = np.abs(times - target)
        nearest = int(distance.argmin())
        if distance[nearest] > self.max_days * _DAY:
            raise NoSeriesError(f'no {self.leader.upper()} date within max_days={self.max_days}')
        return nearest


@dataclass(frozen=True)
class RandomDates(DateRule):
    """A number of acquisitions drawn without replacement, in order of time.

    In training :class:`~torchgeo_s1s2.datamodules.MultiSenGEDataModule` makes every epoch a new
    draw; in evaluation it is always the same. A draw depends on the seed, the name of the patch
    and the epoch only, so it is the same in every process and in every replay, and all windows of
    a patch share it.

    Attributes:
        n: Number of slots T.
        seed: Seed of all draws.
        missing: What to do with a patch that has fewer dates than slots: ``'drop'`` leaves it out;
            ``'keep'`` takes all of its dates and leaves the last slots empty; ``'nearest'`` takes
            all and draws as many of them again as it needs, in order of time; ``max_days`` has no
            meaning here. A patch without any date is left out, or with ``'keep'`` empty.
        s1: ``'nearest'`` only.
    """

    draws: ClassVar[bool] = True

    n: int = _number(4, least=1)
    seed: int = _number(0, least=0)

    def __post_init__(self) -> None:
        """Check what a configuration can get wrong."""
        super().__post_init__()
        if self.s1 != 'nearest':
            raise ValueError(
                f's1 is {self.s1!r}, but the slots of random dates have no days of their own; '
                "take 'nearest'"
            )

    @property
    def length(self) -> int:
        """Number of slots T."""
        return self.n

    def slots(self, times: Times, span: Span, draw: int) -> list[Slot]:
        """Slots of the dates that are drawn; see DateRule."""
        self._check_count(times, self.n)
        rng = np.random.default_rng((self.seed, draw))
        chosen = rng.choice(len(times), min(self.n, len(times)), replace=False)
        again = rng.choice(len(times), self.n - len(chosen)) if self.missing == 'nearest' else ()
        positions = sorted([*chosen.tolist(), *again])
        return _slots_around(times[positions], positions, times, span)

    def candidates(self, times: Mapping[str, Times]) -> dict[str, set[int]]:
        """Every acquisition of the leading sensor and what goes with it; see DateRule."""
        self.select(times)
        shared = {setting.name: getattr(self, setting.name) for setting in fields(DateRule)}
        every = AllDates(max_length=max(len(times[self.leader]), 1), **shared)
        return every.candidates(times)


@dataclass(frozen=True)
class AllDates(DateRule):
    """Every acquisition, and empty slots up to a fixed length.

    A patch with more dates than slots keeps a selection that is evenly spread over their order:
    the first, the last, and those at equal steps between them (a single slot keeps the first).

    Attributes:
        max_length: Number of slots T; those that a patch does not need are its last, and empty.
        missing: Slots are never filled with other dates. A patch without any date is left out, or
            with ``'keep'`` empty.
        s1: The days of a slot reach half way to the dates of its neighbours.
    """

    max_length: int = _number(24, least=1)

    @property
    def length(self) -> int:
        """Number of slots T."""
        return self.max_length

    def slots(self, times: Times, span: Span, draw: int) -> list[Slot]:
        """One slot for each date; see DateRule."""
        self._check_count(times, 1)
        count = min(len(times), self.max_length)
        positions = np.linspace(0, max(len(times) - 1, 0), count).round().astype(int).tolist()
        return _slots_around(times[positions], positions, times, span)


def _assign(few: Times, many: Times) -> list[int]:
    """A position in ``many`` for each of ``few``, increasing, with the least sum of distances.

    ``total[j]`` is the least sum up to one of the few if that one gets date j, and ``steps`` keep
    which date the one before it then has.
    """
    distance = np.abs(few[:, None] - many).astype('timedelta64[s]').astype(float)
    total, steps = distance[0], []
    for row in distance[1:]:
        best = np.minimum.accumulate(total)
        before = np.concatenate([[np.inf], best[:-1]])
        steps.append(np.maximum.accumulate(np.where(total < before, np.arange(len(many)), 0)))
        total = row + before
    positions = [int(total.argmin())]
    for step in reversed(steps):
        positions.append(int(step[positions[-1] - 1]))
    return positions[::-1]


def _slots_around(
    centers: Times, positions: Sequence[int | None], times: Times, span: Span
) -> list[Slot]:
    """Slots whose days reach half way to their neighbours, and to the ends of the span.

    Centers that are equal share their days.
    """
    if not len(centers):
        return []
    days, number = np.unique(centers, return_inverse=True)
    between = days[:-1] + (days[1:] - days[:-1]) // 2
    borders = [span[0], *between, span[1] + _DAY]
    return [
        Slot(f'slot {i + 1}', p, borders[n], borders[n + 1], center if p is None else times[p])
        for i, (p, center, n) in enumerate(zip(positions, centers, number, strict=True))
    ]


def _months_from(year: int, months: Sequence[int]) -> list[np.datetime64]:
    """The months in calendar order, the first one in the given year."""
    dated: list[np.datetime64] = []
    for before, month in zip((0, *months), months, strict=False):
        year += month <= before
        dated.append(np.datetime64(f'{year:04d}-{month:02d}', 'M'))
    return dated


def _earliest(
    days: Times, start: np.datetime64, end: np.datetime64, first: int, reach: int
) -> int | None:
    """Position from ``first`` on of the first of the days that lie nearest to start..end.

    None where even these lie more than ``reach`` days outside.
    """
    outside = np.maximum(start - days, days - (end - _DAY))[first:].astype(int).clip(0)
    if not len(outside) or outside.min() > reach:
        return None
    return first + int(outside.argmin())


def _days_apart(times: Times, others: Times | np.datetime64) -> NDArray[np.int64]:
    """Calendar days between moments."""
    days = times.astype('datetime64[D]') - others.astype('datetime64[D]')
    return np.abs(days).astype(np.int64)


@dataclass(frozen=True)
class SeriesReport:
    """What a date rule makes of patches, and how far apart the dates of its slots lie.

    Attributes:
        rule: The rule.
        reasons: For each patch why it has no series, empty if it has one.
        days: For each sensor but the leader the calendar days between its dates and the leader's,
            (N, T) of the N patches with a series; of several dates in a slot the farthest, NaN
            where one of the two sensors has none.
    """

    rule: DateRule
    reasons: tuple[str, ...]
    days: Mapping[str, NDArray[np.float64]]

    def cost(self, sensor: str, max_days: int) -> tuple[int, int]:
        """Number of slots, and of patches with such slots, whose dates lie beyond a bound.

        A rule with this bound leaves these slots empty, or else out these patches at most: it may
        find other dates of the leader. What a wider bound brings, a report of that rule tells.
        """
        beyond = self.days[sensor] > max_days
        return int(beyond.sum()), int(beyond.any(axis=1).sum())

    def __str__(self) -> str:
        """How many patches have the series, why others have none, and what each bound costs."""
        failed = Counter(filter(None, self.reasons))
        kept = len(self.reasons) - failed.total()
        rows = [f'patches with the series: {kept:,} of {len(self.reasons):,}']
        rows += [f'  {count:,} without: {reason}' for reason, count in failed.most_common()]
        for sensor, days in self.days.items():
            known = days[~np.isnan(days)]
            if not len(known):
                continue
            half, most = np.quantile(known, (0.5, 0.9), method='higher')
            rows.append(
                f'days from {sensor.upper()} to {self.rule.leader.upper()}: up to {half:.0f} in '
                f'half of the slots ({len(known):,}), {most:.0f} in 90 %, {known.max():.0f} in all'
            )
            for bound in filter(lambda bound: bound < known.max(), BOUNDS):
                slots, patches = self.cost(sensor, bound)
                rows.append(
                    f'  beyond {bound:2}: {slots:,} of the slots, {patches:,} of the patches'
                )
        return '\n'.join(rows)


def series_report(
    rule: DateRule, patches: Iterable[Mapping[str, Times]], sensors: Collection[str] | None = None
) -> SeriesReport:
    """Apply a date rule to the times of patches; no file is opened.

    Args:
        rule: The rule.
        patches: For each patch the sorted times of each sensor in use, the leader's among them.
        sensors: Sensors of which a patch must have an image; any unless given.
    """
    known: dict[tuple[bytes, ...], str | dict[str, list[float]]] = {}
    results = []
    for times in patches:
        key = tuple(t.tobytes() for t in times.values())  # many patches have the same times
        if key not in known:
            known[key] = _days_or_reason(rule, times, sensors or times)
        results.append(known[key])
    days = [result for result in results if not isinstance(result, str)]
    return SeriesReport(
        rule,
        tuple(result if isinstance(result, str) else '' for result in results),
        {sensor: np.array([row[sensor] for row in days]) for sensor in (days[0] if days else ())},
    )


def _days_or_reason(
    rule: DateRule, times: Mapping[str, Times], sensors: Collection[str]
) -> str | dict[str, list[float]]:
    """Days that the other sensors lie from the leader in each slot, or why there is no series."""
    try:
        slots = rule.select(times)
    except NoSeriesError as error:
        return str(error)
    if not any(any(slots[sensor]) for sensor in sensors):
        dated = [sensor for sensor in sensors if len(times[sensor])]
        if dated and len(times[rule.leader]):
            return f'no {_any_of(dated)} acquisition in a slot'
        return f'no {_any_of([rule.leader] if dated else sensors)} acquisition'
    lead = times[rule.leader]
    return {
        sensor: [
            max(map(float, _days_apart(t[[*slot], None], lead[[*at]]).flat), default=np.nan)
            for slot, at in zip(slots[sensor], slots[rule.leader], strict=True)
        ]
        for sensor, t in times.items()
        if sensor != rule.leader
    }


def _any_of(sensors: Iterable[str]) -> str:
    """Names of sensors in a sentence that says that there is none of them."""
    return ' or '.join(map(str.upper, sensors))


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], example: str) -> None:
    """Raise a ValueError that names a value of another kind, and what to give instead."""
    if value is not None and not isinstance(value, kinds):
        raise ValueError(f'{name} is {value!r}; expected {example}')


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise a ValueError that names a value that is no whole number, or below the least one."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f'{name} is {value!r}; it must be {least} or more, a whole number')
