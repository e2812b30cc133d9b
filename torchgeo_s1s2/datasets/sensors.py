"""What a sensor is, said once: its bands, and how its files' values become those of a sample."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Offset = float | Mapping[str, float]

UNIT, OFFSET = 'TORCHGEO_S1S2_UNIT', 'TORCHGEO_S1S2_OFFSET'
"""Tags of images that are written here: the ``unit`` and ``offset`` that they are to be read with.

What nobody told when an image was written, it does not say.
"""


def _unchanged(value: Array) -> Array:
    return value


def _from_dn(value: Array) -> Array:
    value *= np.float32(1e-4)
    return value


def _from_db(value: Array) -> Array:
    value /= np.float32(10)
    return np.power(np.float32(10), value, out=value)


def _from_amplitude(value: Array) -> Array:
    value[value < 0] = 0  # what stands for none, or its square would be a power
    return np.square(value, out=value)


def _to_db(power: Array) -> Array:
    np.log10(power, out=power)
    power *= np.float32(10)
    return power


@lru_cache(maxsize=256)
def words_of(text: str) -> tuple[str, ...]:
    """Words of a name, in lower case."""
    return tuple(re.split(r'[^a-z0-9]+', text.lower()))


@lru_cache(maxsize=256)
def _spellings(bands: tuple[str, ...]) -> dict[str, str]:
    """Bands by what files call them, in lower case: B02 is also B2."""
    return {name: b for b in bands for name in (b.lower(), b.lower().replace('b0', 'b'))}


@dataclass(frozen=True)
class Sensor:
    """A sensor of a data set.

    Attributes:
        name: Its name, which is also that of its folder.
        bands: Its bands, in the order of files that do not name them.
        units: What the values of a file may be, each with the function that brings them, in place,
            to the physical unit, in which images are warped and averaged; the first is the default.
        nodata: Value of a pixel without an observation in files that do not say.
        positive: Whether only physical values above 0 are observations.
        finish: Function from the physical unit to that of a sample, in place.
        aliases: Other names that files give the bands, in lower case and without spaces.
        ratios: Those of the bands that are a quotient of others, so no backscatter.
    """

    name: str
    bands: tuple[str, ...]
    units: Mapping[str, Callable[[Array], Array]] = field(repr=False)
    nodata: float
    positive: bool
    finish: Callable[[Array], Array] = field(repr=False)
    aliases: Mapping[str, str]
    ratios: tuple[str, ...] = ()

    def band(self, text: str | None) -> str | None:
        """Name of the band that a file calls ``text``, None if it is none of the sensor's."""
        words, spellings = words_of(text or ''), _spellings(self.bands)
        named = {spellings[word] for word in words if word in spellings}
        return named.pop() if len(named) == 1 else self.aliases.get(''.join(words))

    def named(self, texts: Sequence[str | None]) -> list[str | None]:
        """Names of the bands that a file calls so, None for those that are none of the sensor's.

        ``nir`` beside a broad one is narrow, as in FORCE's products.
        """
        plain = [''.join(words_of(text or '')) for text in texts]
        if {'broadnir', 'bnr'} & {*plain}:
            pairs = zip(texts, plain, strict=True)
            texts = ['narrownir' if spelt == 'nir' else text for text, spelt in pairs]
        return [*map(self.band, texts)]


SENSORS = {
    's2': Sensor(
        's2',
        ('B02', 'B03', 'B04', 'B05', 'B06', 'B07', 'B08', 'B8A', 'B11', 'B12'),
        {'dn': _from_dn, 'reflectance': _unchanged},
        nodata=-10000,
        positive=False,
        finish=_unchanged,
        aliases={'rededge071': 'B05', 'rededge075': 'B06', 'rededge078': 'B07'}
        | {'blue': 'B02', 'green': 'B03', 'red': 'B04', 'rededge': 'B05', 'rededge1': 'B05'}
        | {'re1': 'B05', 'rededge2': 'B06', 're2': 'B06', 'rededge3': 'B07', 're3': 'B07'}
        | {'nir': 'B08', 'nir08': 'B8A', 'nir2': 'B8A', 'nirnarrow': 'B8A', 'narrownir': 'B8A'}
        | {'b08a': 'B8A', 'swir16': 'B11', 'swir1': 'B11', 'swir22': 'B12', 'swir2': 'B12'}
        | {'blu': 'B02', 'grn': 'B03', 'broadnir': 'B08', 'bnr': 'B08', 'sw1': 'B11', 'sw2': 'B12'},
    ),
    's1': Sensor(
        's1',
        ('VV', 'VH'),
        {'linear': _unchanged, 'db': _from_db, 'amplitude': _from_amplitude},
        nodata=0,
        positive=True,
        finish=_to_db,
        aliases={},
    ),
}
"""The sensors by name, in the order of a sample's channels.

Sentinel-2 leaves a data set as reflectance; its files hold that (``reflectance``) or, unless told,
10,000 times that (``dn``). Sentinel-1 leaves it in dB; its files hold power (``linear``, unless
told), ``db`` or ``amplitude``.
"""

SENSOR_BANDS = {name: sensor.bands for name, sensor in SENSORS.items()}
"""Bands of each sensor in the order of its files."""


def tags_of(sensor: str, unit: bool = True, offset: bool = True) -> dict[str, str]:
    """Tags of an image in the unit of the layout, to which no offset is to be added.

    Args:
        sensor: ``'s2'`` or ``'s1'``.
        unit: Whether the unit is known.
        offset: Whether it is known that none is left.
    """
    known = {UNIT: next(iter(SENSORS[sensor].units))} if unit else {}
    return known | ({OFFSET: '0'} if offset and sensor == 's2' else {})


def _orbit(name: str) -> Sensor:
    """Sentinel-1 of one orbit of PASTIS-R: VV, VH and VV / VH in dB, the last being VV - VH."""
    bands = tuple(f'{name.upper()}_{band}' for band in ('VV', 'VH', 'VV_VH'))
    units = {'db': _from_db, 'linear': _unchanged, 'amplitude': _from_amplitude}
    return Sensor(name, bands, units, np.nan, True, _to_db, aliases={}, ratios=bands[2:])


PASTIS_SENSORS = {'s2': SENSORS['s2'], 's1a': _orbit('s1a'), 's1d': _orbit('s1d')}
"""The sensors of PASTIS-R; its bands of Sentinel-1 have the names that TorchGeo gives them."""


@dataclass(frozen=True)
class Reading:
    """How the files of a sensor are read: what they cannot say themselves.

    Attributes:
        sensor: The sensor.
        bands: Bands to read, in the sensor's order.
        unit: What the values are, a key of ``sensor.units``; None for the default, or for the
            physical unit where a file has a scale.
        offsets: What is added to the values of a file from a day on, in the order of the days.
        nodata: Value without an observation in files that do not say.
        file_bands: Bands of files that do not name them; the sensor's if empty.
        raw: Whether a sample holds the values of the files.
    """

    sensor: Sensor
    bands: tuple[str, ...]
    unit: str | None
    offsets: tuple[tuple[str, float], ...]
    nodata: float
    file_bands: tuple[str, ...]
    raw: bool = False

    @property
    def stored(self) -> str:
        """What the values of a file without a scale are."""
        return self.unit or next(iter(self.sensor.units))

    def offset(self, time: np.datetime64) -> float:
        """What is added to the values of an acquisition."""
        known = (value for day, value in reversed(self.offsets) if np.datetime64(day) <= time)
        return next(known, 0.0)

    def stored_value(self, value: float, time: np.datetime64) -> float:
        """What a file without a scale holds for a reflectance, with three decimals."""
        scale = 1 if self.unit == 'reflectance' else 1e4
        return round(value * scale - self.offset(time), 3) + 0.0  # and never -0

    def of_file(self, tags: Mapping[str, str]) -> 'Reading':
        """How a file is read after its tags, which are believed before what is given."""
        unit = tags[UNIT] if tags.get(UNIT) in self.sensor.units else self.unit
        return replace(self, unit=unit, offsets=() if OFFSET in tags else self.offsets)

    def physical(self, value: Array, scaled: bool) -> Array:
        """Values of a file in the physical unit, NaN where there is none.

        Args:
            value: Values, NaN without an observation; scale and offset are applied.
            scaled: Whether the file has a scale.
        """
        if not self.raw and (self.unit or not scaled):
            with np.errstate(over='ignore'):
                value = self.sensor.units[self.stored](value)
        if self.sensor.positive and not (self.raw and self.stored == 'db'):
            missing = ~((value > 0) & (value < np.inf))
            if missing.any():
                value[missing] = np.nan
        return value

    def finish(self, value: Array) -> Array:
        """Physical values in the unit of a sample."""
        return value if self.raw else self.sensor.finish(value)


def readings(
    sensors: Sequence[str],
    bands: Sequence[str] | None = None,
    unit: str | Mapping[str, str] | None = None,
    offset: Offset | None = None,
    nodata: Mapping[str, float] | None = None,
    file_bands: Mapping[str, Sequence[str]] | None = None,
    raw: bool = False,
    table: Mapping[str, Sensor] = SENSORS,
) -> dict[str, Reading]:
    """How the files of each sensor are read; see :class:`~torchgeo_s1s2.datasets.MultiSenGE`.

    The sensors are those of a ``table``.

    Raises:
        ValueError: If an argument has no such value; the message says which there are.
    """
    chosen = in_order(sensors, [*table], 'sensor')
    by_sensor = _bands_of(bands, {name: table[name].bands for name in chosen})
    units = _units(unit, table)
    none = _by_sensor('nodata', nodata, table)
    named = _by_sensor('file_bands', file_bands, table)
    for name, value in none.items():
        if not isinstance(value, Real):
            raise ValueError(f'nodata of {name} is {value!r}; expected a number')
    for name, names in named.items():
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not all(isinstance(band, str) for band in names):
            raise ValueError(f'file_bands of {name} is {names!r}; list the names of its bands')
        known = zip(table[name].named(names), names, strict=True)
        named[name] = tuple(band or text for band, text in known)
        if len({*named[name]}) < len(names):
            raise ValueError(f'file_bands of {name} is {names!r}; list each band once, in order')
    return {
        name: Reading(
            sensor=table[name],
            bands=by_sensor[name],
            unit=units.get(name),
            offsets=_offsets(offset) if name == 's2' else (),
            nodata=none.get(name, table[name].nodata),
            file_bands=named.get(name, ()),
            raw=raw,
        )
        for name in chosen
    }


def in_order(chosen: Sequence[str], allowed: Sequence[str], what: str) -> tuple[str, ...]:
    """The chosen names in the order of the allowed ones.

    Raises:
        ValueError: If there is none, or no such name.
    """
    if isinstance(chosen, str):
        raise ValueError(f'no such {what}: {chosen!r}; give a list, as in {[chosen]}')
    unknown = [name for name in chosen if name not in allowed]
    if unknown or not chosen:
        raise ValueError(f'no such {what}: {unknown or chosen!r}; choose from {", ".join(allowed)}')
    return tuple(name for name in allowed if name in chosen)


def _by_sensor(what: str, given: Any, table: Mapping[str, Sensor]) -> dict[str, Any]:
    """An argument that is given by sensor, empty without it."""
    if not isinstance({} if given is None else given, Mapping):
        raise ValueError(f'{what} is {given!r}; expected it by sensor, as in {{s2: ...}}')
    if given:
        in_order(list(given), [*table], f'sensor in {what}')
    return dict(given or {})


def _bands_of(
    bands: Sequence[str] | None, known: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    allowed = [band for names in known.values() for band in names]
    chosen = in_order(allowed if bands is None else bands, allowed, 'band')
    by_sensor = {s: tuple(b for b in names if b in chosen) for s, names in known.items()}
    for sensor, names in by_sensor.items():
        if not names:
            raise ValueError(f'no band of {sensor} in {bands}; add one or leave {sensor} out')
    return by_sensor


def _units(unit: str | Mapping[str, str] | None, table: Mapping[str, Sensor]) -> dict[str, str]:
    """Unit by sensor; a single one is that of the sensors that have it."""
    if isinstance(unit, str):
        units = {s: unit for s in table if unit in table[s].units}
    else:
        units = _by_sensor('unit', unit, table)
    if (unit and not units) or any(value not in table[s].units for s, value in units.items()):
        known = '; '.join(f'{s}: {", ".join(sensor.units)}' for s, sensor in table.items())
        raise ValueError(f'no such unit: {unit!r}; choose from {known}')
    return units


def _offsets(offset: Offset | None) -> tuple[tuple[str, float], ...]:
    if offset is None:
        return ()
    by_day = offset if isinstance(offset, Mapping) else {'1700-01-01': offset}
    try:
        days = {str(date.fromisoformat(str(d)[:10])): float(v) for d, v in by_day.items()}
        if not all(map(math.isfinite, days.values())):
            raise ValueError('not finite')
        return tuple(sorted(days.items()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'offset is {offset!r}; expected a number such as -1000, or one by first day, such as '
            '{2022-01-25: -1000}'
        ) from error
