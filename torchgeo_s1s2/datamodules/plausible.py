"""Checks that values are in the units that they are taken for, when statistics are made."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from torchgeo_s1s2.datasets.sensors import Reading
from torchgeo_s1s2.errors import ImplausibleValuesError, warn

# Of reflectance: no band is brighter on average than fresh snow, and some band is brighter than
# deep water.
_DARK, _BRIGHT = 0.01, 1.5
# Of a single pixel: what stands for none, such as -9999, lies further below 0 than a correction of
# relief or haze that overshoots, and no cloud or roof is as bright.
_LEAST, _MOST = -0.9, 5.0
_COLOURS = 0.0255  # the brightest that 8 bits hold as reflectance x 10,000
_ALIKE = 0.01  # share of the pixels in which all bands hold one value that is no reflectance
# Lowest reflectance of an image whose values are 1,000 too high: shadows, water and forest have
# 0 to 0.05 in some band, which the offset of processing baseline 04.00 makes 0.1 to 0.2.
_OFFSET_FLOOR = 0.095, 0.2
_LOUD, _SILENT = 5.0, -50.0  # dB
_SWAPPED = 1.0  # dB; all ground gives less back across polarisations than along them
_LOUDEST = 100.0  # dB of a single pixel; 16 bits of amplitude make 96
_MOST_POWER = float(np.finfo(np.float32).max)


class Floor(NamedTuple):
    """Lowest value of any band in an image, and when it was acquired (seconds since 1970)."""

    time: int
    value: float


def check_values(
    readings: Mapping[str, Reading],
    mean: Mapping[str, Sequence[float]],
    span: Mapping[str, tuple[float, float]],
    floors: Sequence[Floor],
    alike: Mapping[float, float],
) -> None:
    """Compare statistics of training images with what their sensors can measure.

    Args:
        readings: How the files of each sensor are read.
        mean: Mean of each band by sensor.
        span: Lowest and highest value by sensor.
        floors: Of Sentinel-2 images.
        alike: Share of the pixels in which all bands of Sentinel-2 hold a value of the files.

    Raises:
        ImplausibleValuesError: If the values look like others; the message says which argument to
            set.
    """
    for name, reading in readings.items():
        look = _reflectance if name == 's2' else _backscatter
        why = '' if reading.raw else look(reading, mean[name], *span[name])
        if why:
            raise ImplausibleValuesError(why)
    if 's2' not in readings or readings['s2'].raw:
        return
    for value, share in alike.items():
        if share > _ALIKE:
            raise ImplausibleValuesError(
                f'{share:.1%} of the pixels of Sentinel-2 hold {value:g} in all bands'
                f'{_stands_for_none(readings["s2"], value)}'
            )
    if not readings['s2'].offsets:
        _check_offset(floors)


def _reflectance(reading: Reading, mean: Sequence[float], lowest: float, highest: float) -> str:
    low, high = min(mean), max(mean)
    seen = f'Sentinel-2 has mean reflectances of {low:.3g} to {high:.3g}'
    if low < 0 and reading.offsets:
        return f'{seen}: the offset takes away too much; leave offset out, or give it by day'
    if lowest < _LEAST or (highest > _MOST and (high < _BRIGHT or highest > 2**16)):
        odd = lowest if lowest < _LEAST else highest
        stored = reading.stored_value(odd, np.datetime64('now'))
        return f'{seen}, and a value of {odd:.5g}{_stands_for_none(reading, stored)}'
    if high < _DARK:
        return (
            f'{seen}: the files seem to hold reflectance itself; give unit="reflectance", or write '
            'their scale into them'
        )
    if highest <= _COLOURS and reading.unit != 'reflectance':
        return (
            f'{seen} and no value above 255: the files seem to hold colours of 8 bits; take files '
            'of reflectance, or write their scale into them'
        )
    if high > _BRIGHT:
        return (
            f'{seen}: the files seem to hold reflectance x 10,000; give unit="dn", or '
            'write their scale and no-data value into them'
        )
    return ''


def _stands_for_none(reading: Reading, stored: float) -> str:
    nodata = f'nodata={{{reading.sensor.name!r}: {stored:g}}}'
    return f', which seems to stand for none: give {nodata}, as it is in the files, or tag it there'


def _backscatter(reading: Reading, mean: Sequence[float], lowest: float, highest: float) -> str:
    pairs = zip(reading.bands, mean, strict=True)
    known = {band: value for band, value in pairs if band not in reading.sensor.ratios}
    bands, mean = [*known], [*known.values()]
    if not mean:
        return ''
    seen = f'Sentinel-1 has mean backscatters of {min(mean):.3g} to {max(mean):.3g} dB'
    if reading.stored == 'db' and lowest >= 0:
        return f'{seen} and none below 0: the files seem to hold power; give unit="linear"'
    if highest > _LOUDEST:
        stored = highest if reading.stored == 'db' else min(10 ** (highest / 10), _MOST_POWER)
        stored = stored**0.5 if reading.stored == 'amplitude' else stored
        return f'{seen}, and a value of {highest:.5g}{_stands_for_none(reading, stored)}'
    if max(mean) > _LOUD and reading.unit != 'amplitude':
        return (
            f'{seen}: the files seem to hold uncalibrated amplitudes; calibrate them to sigma0 or '
            'gamma0, or give unit="amplitude", whose dB are right but for a constant'
        )
    if min(mean) < _SILENT:
        return f'{seen}: no such signal can be measured; look for the unit and scale of the files'
    if len(mean) == 2 and mean[1] - mean[0] > _SWAPPED:
        return (
            f'{seen}, and {bands[1]} is above {bands[0]}, as on no ground: the files seem to hold '
            f'them in the other order; give file_bands={{{reading.sensor.name!r}: {bands[::-1]}}}, '
            'or mend the names that they have'
        )
    return ''


def _check_offset(floors: Sequence[Floor]) -> None:
    """Look for images that are 1,000 too bright: all, those from some day on, or here and there."""
    floors = sorted(floors)
    low, high = _OFFSET_FLOOR
    lifted = np.array([low <= floor.value <= high for floor in floors])
    if lifted.sum() < max(3, 0.2 * len(lifted)):
        return
    first = int(lifted.argmax())
    day = str(np.datetime64(floors[first].time, 's').astype('datetime64[D]'))
    why = (
        f'in {lifted.sum()} of {len(lifted)} Sentinel-2 images (the first of {day}) no pixel of '
        f'any band is darker than {low}: they seem to hold the offset of +1000 of products since '
        'processing baseline 04.00 (25 January 2022)'
    )
    if lifted.mean() > 0.5:
        offset = 'offset=-1000, or offset={day: -1000} with the day from which on it holds'
    elif lifted[first:].mean() > 0.9:
        offset = f'offset={{{day!r}: -1000}}'
    else:
        warn(f'{why}, and others lack it. Tell these files so, as with gdal_edit -offset -1000')
        return
    raise ImplausibleValuesError(f'{why}. Give {offset}; if the ground is so bright, offset=0')
