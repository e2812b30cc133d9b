"""Scores of a segmentation, all of them from one confusion matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class SegmentationScores(Metric):
    """Scores of the labelled pixels, under TorchGeo's names and those of this package.

    TorchGeo's are ``Overall*`` (all pixels), ``Average*`` (mean over the classes) and
    ``Classwise*_NAME``, of ``Accuracy``, ``Precision``, ``Recall``, ``F1Score`` and
    ``JaccardIndex``. The package adds ``WeightedPrecision``, ``WeightedRecall`` and
    ``WeightedF1Score`` (weighted by the pixels of the true class), ``Precision_NAME``,
    ``Recall_NAME`` and ``F1Score_NAME``, and ``Kappa``
    (Cohen, https://doi.org/10.1177/001316446002000104), 0 where chance alone explains everything.

    A score without a pixel is 0. A class that is neither true nor predicted is left out of the
    means, and so is *ignore_index*, if a class has that number: predicting it is an error of the
    true class only.

    Attributes:
        counted: Confusion matrix (K, K) of the last ``compute``, over all processes: rows are the
            true classes. ``reset`` keeps it.
    """

    full_state_update = False
    confusion: Tensor

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Start without a pixel.

        Args:
            num_classes: Number of classes K.
            ignore_index: Value of the mask that does not count, nor does any but 0..K-1.
            labels: Names of the classes; their numbers unless given.
        """
        super().__init__()
        self.ignore_index = ignore_index
        self.labels = [str(k) for k in range(num_classes)] if labels is None else list(labels)
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.add_state('confusion', zeros, dist_reduce_fx='sum')
        self.counted = zeros.clone()

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the pixels of a batch, without making the host wait for its device.

        Args:
            preds: Classes (B, H, W), or scores of them (B, K, H, W).
            target: Classes (B, H, W).
        """
        if preds.ndim > target.ndim:
            preds = preds.max(1).indices  # on a CPU four times as fast as argmax
        classes = len(self.labels)
        labelled = is_labelled(target, classes, self.ignore_index)
        pairs = torch.add(preds, target, alpha=classes).masked_fill_(~labelled, classes**2)
        # As torch.bincount, for which a GPU makes the host wait; what has no label comes last.
        counts = self.confusion.new_zeros(classes**2 + 1)
        counts.scatter_add_(0, pairs.flatten(), counts.new_ones(1).expand(pairs.numel()))
        # Not in place: a test makes the metrics of a later fit, too, and in inference mode.
        self.confusion = self.confusion + counts[:-1].view(classes, classes)

    def compute(self) -> dict[str, Tensor]:
        """All scores, float32 scalars in the memory of the host."""
        self.counted = self.confusion.clone().cpu()
        confusion = self.counted.double()
        hit, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        either, total = true + predicted - hit, true.sum()
        each = {
            'Accuracy': _divide(hit, true),
            'Precision': _divide(hit, predicted),
            'Recall': _divide(hit, true),
            'F1Score': _divide(2 * hit, true + predicted),
            'JaccardIndex': _divide(hit, either),
        }
        observed, chance = _divide(hit.sum(), total), _divide((true * predicted).sum(), total**2)
        kept = torch.tensor([k != self.ignore_index for k in range(len(self.labels))])
        seen = kept & (either > 0)
        scores = {'Kappa': _divide(observed - chance, 1 - chance)}
        for name, values in each.items():
            scores[f'Overall{name}'] = observed
            scores[f'Average{name}'] = _divide(values[seen].sum(), seen.sum())
            classes = dict(zip(self.labels, values, strict=True))
            scores |= {f'Classwise{name}_{label}': value for label, value in classes.items()}
            if name in ('Precision', 'Recall', 'F1Score'):
                scores[f'Weighted{name}'] = _divide((values * true).sum(), total)
                scores |= {f'{name}_{label}': value for label, value in classes.items()}
        scores['OverallJaccardIndex'] = _divide(hit[kept].sum(), either[kept].sum())
        return {name: value.float() for name, value in scores.items()}


def is_labelled(mask: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Which pixels of a mask hold one of the classes 0..K-1 that is not ignored."""
    labelled = (mask >= 0) & (mask < classes)
    return labelled if ignore_index is None else labelled & (mask != ignore_index)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """The quotient, 0 where the divisor is 0."""
    return torch.where(b == 0, 0.0, a / b)
