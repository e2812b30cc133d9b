"""Lightning callbacks that put predictions on the map."""

from torchgeo_s1s2.callbacks.geotiff import GeoTIFFWriter

__all__ = ('GeoTIFFWriter',)
