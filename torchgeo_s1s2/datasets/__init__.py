"""Data sets of Sentinel-1 and Sentinel-2 time series with land-cover labels."""

from torchgeo_s1s2.datasets.catalog import Catalog
from torchgeo_s1s2.datasets.classes import NO_LABEL, SCHEMES, ClassScheme, LandCoverClass
from torchgeo_s1s2.datasets.download import DownloadPlan, SeasonDownload
from torchgeo_s1s2.datasets.ground import BlockSplits, GroundSplits, PolygonSplits
from torchgeo_s1s2.datasets.labels import write_label_files
from torchgeo_s1s2.datasets.multisenge import MultiSenGE, MultiSenNA
from torchgeo_s1s2.datasets.pastis import PASTIS_CLASSES, PASTISSeries
from torchgeo_s1s2.datasets.region import write_series
from torchgeo_s1s2.datasets.sensors import SENSOR_BANDS
from torchgeo_s1s2.datasets.series import SeriesDataset
from torchgeo_s1s2.datasets.sources import (
    Copy,
    Download,
    Source,
    Synthetic,
    VectorLabels,
    copy_series,
)
from torchgeo_s1s2.datasets.stac import SentinelRegion, StacCollection
from torchgeo_s1s2.datasets.time_series import (
    AllDates,
    DateRule,
    EvenlySpaced,
    MonthlySeries,
    RandomDates,
    SeriesReport,
    series_report,
)
from torchgeo_s1s2.datasets.vectors import rasterize_labels
from torchgeo_s1s2.errors import DownloadError, NoSeriesError

__all__ = (
    'NO_LABEL',
    'PASTIS_CLASSES',
    'SCHEMES',
    'SENSOR_BANDS',
    'AllDates',
    'BlockSplits',
    'Catalog',
    'ClassScheme',
    'Copy',
    'DateRule',
    'Download',
    'DownloadError',
    'DownloadPlan',
    'EvenlySpaced',
    'GroundSplits',
    'LandCoverClass',
    'MonthlySeries',
    'MultiSenGE',
    'MultiSenNA',
    'NoSeriesError',
    'PASTISSeries',
    'PolygonSplits',
    'RandomDates',
    'SeasonDownload',
    'SentinelRegion',
    'SeriesDataset',
    'SeriesReport',
    'Source',
    'StacCollection',
    'Synthetic',
    'VectorLabels',
    'copy_series',
    'rasterize_labels',
    'series_report',
    'write_label_files',
    'write_series',
)
