"""Lightning callbacks that put predictions on the map."""

from torchgeo_s1s2.callbacks.geotiff import GeoTIFFWriter, MapWriter
from torchgeo_s1s2.callbacks.scene import SceneWriter

__all__ = ('GeoTIFFWriter', 'MapWriter', 'SceneWriter')
