"""Transforms of time series that keep time, sensors and mask together."""

from torchgeo_s1s2.transforms.series import (
    AugmentSeries,
    DayOfYear,
    NormalizeSeries,
    SeriesDropout,
)

__all__ = ('AugmentSeries', 'DayOfYear', 'NormalizeSeries', 'SeriesDropout')
