"""Transforms of time series that keep time, sensors and mask together."""

from torchgeo_s1s2.transforms.series import AugmentSeries, NormalizeSeries

__all__ = ('AugmentSeries', 'NormalizeSeries')
