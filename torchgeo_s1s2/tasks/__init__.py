"""Lightning tasks."""

from torchgeo_s1s2.tasks.segmentation import S1S2SemanticSegmentation

__all__ = ('S1S2SemanticSegmentation',)
