"""Date rules: from the acquisitions of a patch to T time slots, before anything is read."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.datetime64]
Span = tuple[np.datetime64, np.datetime64]
Slots = dict[str, tuple[tuple[int, ...], ...]]
"""For each sensor T slots, each a tuple of positions in that sensor's sorted times.

A slot is empty where the sensor did not see it, and holds several positions where they are to be
averaged.
"""

Missing = Literal['drop', 'keep', 'nearest']
_DAY = np.timedelta64(1, 'D')


class NoSeriesError(ValueError):
    """The acquisitions of a patch do not make a series; the message names the slot that fails."""


@dataclass(frozen=True)
class Slot:
    """One time slot of the leading sensor.

    Attributes:
        position: Position in the sorted times, None where no acquisition fits.
        start: First day that the slot stands for.
        end: Day after the last one.
        time: What other sensors are matched with: the acquisition, or else the slot's middle.
    """

    position: int | None
    start: np.datetime64
    end: np.datetime64
    time: np.datetime64


@dataclass(frozen=True, kw_only=True)
class DateRule(ABC):
    """Chooses T time slots for the leading sensor and gives the other sensor's dates to each.

    Attributes:
        missing: What to do where no acquisition fits a slot: ``'drop'`` leaves the patch out,
            ``'keep'`` leaves the slot empty, ``'nearest'`` takes the nearest acquisition within
            ``max_days`` and leaves the patch out where there is none.
        max_days: How many days outside a slot an acquisition may lie with ``missing='nearest'``.
        leader: Sensor whose acquisitions make the slots, ``'s2'`` or ``'s1'``.
        s1: Which Sentinel-1 acquisitions go with a slot: the ``'nearest'`` to the Sentinel-2 date
            (the earlier one of two as near), or the ``'first'`` within the slot's days. A slot
            without a Sentinel-2 date takes the one nearest to its middle, within its days.
        s1_per_slot: How many of them, to be averaged in linear power.

    Raises:
        ValueError: If an attribute has no such value.
    """

    missing: Missing = 'drop'
    max_days: int = 15
    leader: Literal['s2', 's1'] = 's2'
    s1: Literal['nearest', 'first'] = 'nearest'
    s1_per_slot: int = 1

    def __post_init__(self) -> None:
        """Check what a configuration can get wrong."""
        _check_choice('missing', self.missing, ('drop', 'keep', 'nearest'))
        _check_choice('leader', self.leader, ('s2', 's1'))
        _check_choice('s1', self.s1, ('nearest', 'first'))
        if self.s1_per_slot < 1:
            raise ValueError(f's1_per_slot is {self.s1_per_slot}; it must be 1 or more')

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of slots T."""

    @abstractmethod
    def slots(self, times: Times, span: Span) -> list[Slot]:
        """Slots of the leading sensor.

        Args:
            times: Its sorted acquisition times.
            span: First and last acquisition of any sensor.

        Raises:
            NoSeriesError: If a slot that must not stay empty cannot be filled.
        """

    def select(self, times: Mapping[str, Times]) -> Slots:
        """Choose the acquisitions of one patch.

        Args:
            times: Sorted acquisition times of each sensor in use; the leader must be among them.

        Returns:
            T slots for each of these sensors.

        Raises:
            NoSeriesError: If a slot that must not stay empty cannot be filled.
        """
        seen = [t for t in times.values() if len(t)]
        if not seen:
            if self.missing != 'keep':
                raise NoSeriesError('no acquisition at all')
            return dict.fromkeys(times, ((),) * self.length)
        span = min(t[0] for t in seen), max(t[-1] for t in seen)
        slots = self.slots(times[self.leader], span)
        return {
            sensor: tuple(
                _alone(slot.position) if sensor == self.leader else self._match(sensor, t, slot)
                for slot in slots
            )
            for sensor, t in times.items()
        }

    def _match(self, sensor: str, times: Times, slot: Slot) -> tuple[int, ...]:
        """Acquisitions of another sensor that go with a slot."""
        first = sensor == 's1' and self.s1 == 'first'
        inside = (times >= slot.start) & (times < slot.end)
        candidates = np.flatnonzero(inside | (slot.position is not None and not first))
        distance = np.zeros(len(candidates)) if first else np.abs(times[candidates] - slot.time)
        count = self.s1_per_slot if sensor == 's1' else 1
        chosen = np.sort(candidates[np.argsort(distance, kind='stable')[:count]])
        if not len(chosen) and self.missing != 'keep':
            raise NoSeriesError(f'no {sensor.upper()} date for {_label(slot.start)}')
        return tuple(chosen.tolist())


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
        year: Year of the first month; None takes the first year with a full series (or, where
            slots may stay empty, the first of those with the most dates).
    """

    months: Sequence[int] = (7, 8, 9, 11)
    min_gap_days: int = 17
    year: int | None = None

    def __post_init__(self) -> None:
        """Check what a configuration can get wrong."""
        super().__post_init__()
        object.__setattr__(self, 'months', tuple(self.months))
        if not self.months or not all(1 <= month <= 12 for month in self.months):
            raise ValueError(f'months is {self.months}; expected one or more numbers 1..12')

    @property
    def length(self) -> int:
        """Number of slots T, one a month."""
        return len(self.months)

    def slots(self, times: Times, span: Span) -> list[Slot]:
        """Slots of the first year that fits; see DateRule."""
        best: list[Slot] = []
        failed: NoSeriesError | None = None
        for year in self._years(span):
            try:
                slots = self._slots_of_year(times, year)
            except NoSeriesError as error:
                failed = failed or error
                continue
            if _filled(slots) > _filled(best) or not best:
                best = slots
            if _filled(best) == self.length:
                break
        if failed and not best:
            raise failed
        return best

    def _years(self, span: Span) -> Sequence[int]:
        if self.year is not None:
            return (self.year,)
        first, last = (int(t.astype('datetime64[Y]').astype(int)) + 1970 for t in span)
        into_next_year = any(b <= a for a, b in pairwise(self.months))
        return range(first - into_next_year, last + 1)

    def _slots_of_year(self, times: Times, year: int) -> list[Slot]:
        slots: list[Slot] = []
        not_before = np.datetime64('0001-01-01')
        reach = self.max_days if self.missing == 'nearest' else 0
        for month in _months_from(year, self.months):
            start, end = month.astype('datetime64[D]'), (month + 1).astype('datetime64[D]')
            position = _earliest(times, start, end, not_before, reach)
            if position is None:
                if self.missing != 'keep':
                    raise NoSeriesError(f'no {self.leader.upper()} date for {_label(start)}')
                slots.append(Slot(None, start, end, start + (end - start) // 2))
                continue
            slots.append(Slot(position, start, end, times[position]))
            not_before = times[position] + self.min_gap_days * _DAY
        return slots


def _months_from(year: int, months: Sequence[int]) -> list[np.datetime64]:
    """The months in calendar order, the first one in the given year."""
    dated: list[np.datetime64] = []
    for before, month in zip((0, *months), months, strict=False):
        year += month <= before
        dated.append(np.datetime64(f'{year:04d}-{month:02d}', 'M'))
    return dated


def _earliest(
    times: Times, start: np.datetime64, end: np.datetime64, not_before: np.datetime64, reach: int
) -> int | None:
    """Position of the first of the dates that lie nearest to start..end, None beyond reach days."""
    days = times.astype('datetime64[D]')
    outside = np.maximum(start - days, days - (end - _DAY)).astype(int).clip(0)
    fits = np.flatnonzero((outside <= reach) & (times >= not_before))
    return int(fits[np.argmin(outside[fits])]) if len(fits) else None


def _filled(slots: Sequence[Slot]) -> int:
    return sum(slot.position is not None for slot in slots)


def _alone(position: int | None) -> tuple[int, ...]:
    return () if position is None else (position,)


def _label(day: np.datetime64) -> str:
    return day.astype(object).strftime('%B')


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f'{name} is {value!r}; choose one of {", ".join(choices)}')
