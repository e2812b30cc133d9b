"""Lightning data modules."""

from torchgeo_s1s2.datamodules.multisenge import MultiSenGEDataModule
from torchgeo_s1s2.datamodules.pastis import PASTISSeriesDataModule
from torchgeo_s1s2.datamodules.series import SeriesDataModule
from torchgeo_s1s2.datamodules.statistics import Statistics

__all__ = ('MultiSenGEDataModule', 'PASTISSeriesDataModule', 'SeriesDataModule', 'Statistics')
