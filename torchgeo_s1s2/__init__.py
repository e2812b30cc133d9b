"""Land cover from Sentinel-1 and Sentinel-2 time series, for TorchGeo.

Importing the package registers its backbones in segmentation_models_pytorch and TorchGeo.
"""

from torchgeo_s1s2 import models

__all__ = ('models',)
__version__ = '0.1.0'
