"""Lightning callbacks: reports, maps of the predictions, and fine-tuning in stages."""

from torchgeo_s1s2.callbacks.finetuning import GradualUnfreezing, Stage
from torchgeo_s1s2.callbacks.geotiff import GeoTIFFWriter, MapWriter
from torchgeo_s1s2.callbacks.published import PublishedResults
from torchgeo_s1s2.callbacks.report import Report
from torchgeo_s1s2.callbacks.scene import SceneWriter

__all__ = (
    'GeoTIFFWriter',
    'GradualUnfreezing',
    'MapWriter',
    'PublishedResults',
    'Report',
    'SceneWriter',
    'Stage',
)
