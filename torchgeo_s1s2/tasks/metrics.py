"""Scores of a segmentation, all of them from one confusion matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

_SCORES = ('Accuracy', 'Precision', 'Recall', 'F1Score', 'JaccardIndex')


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
        self.confusion += count(pairs, classes**2).view(classes, classes)

    def compute(self) -> dict[str, Tensor]:
        """All scores, float32 scalars in the memory of the host."""
        self.counted = self.confusion.clone().cpu()
        confusion = self.counted.double()
        hit, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        each = {
            'Accuracy': _divide(hit, true),
            'Precision': _divide(hit, predicted),
            'Recall': _divide(hit, true),
            'F1Score': _divide(2 * hit, true + predicted),
            'JaccardIndex': _divide(hit, true + predicted - hit),
        }
        total = true.sum()
        observed, chance = _divide(hit.sum(), total), _divide((true * predicted).sum(), total**2)
        kept = self._kept()
        overall = dict.fromkeys(_SCORES, observed)
        overall['JaccardIndex'] = _divide(hit[kept].sum(), (true + predicted - hit)[kept].sum())
        seen = kept & (true + predicted > 0)
        scores = {f'Overall{name}': value for name, value in overall.items()}
        scores |= {f'Average{k}': _divide(v[seen].sum(), seen.sum()) for k, v in each.items()}
        for name in ('Precision', 'Recall', 'F1Score'):
            scores[f'Weighted{name}'] = _divide((each[name] * true).sum(), total)
            scores |= self._by_class(name, each[name])
        for name, values in each.items():
            scores |= self._by_class(f'Classwise{name}', values)
        scores['Kappa'] = _divide(observed - chance, 1 - chance)
        return {name: value.float() for name, value in scores.items()}

    def _kept(self) -> Tensor:
        """Classes that count, all but an ignored one."""
        return torch.tensor([k != self.ignore_index for k in range(len(self.labels))])

    def _by_class(self, name: str, values: Tensor) -> dict[str, Tensor]:
        return {f'{name}_{label}': v for label, v in zip(self.labels, values, strict=True)}


def is_labelled(mask: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Which pixels of a mask hold one of the classes 0..K-1 that is not ignored."""
    labelled = (mask >= 0) & (mask < classes)
    return labelled if ignore_index is None else labelled & (mask != ignore_index)


def count(values: Tensor, length: int) -> Tensor:
    """Count how often 0..length-1 occur among values 0..length.

    As ``torch.bincount``, for which a GPU makes the host wait.
    """
    counts = torch.zeros(length + 1, dtype=torch.long, device=values.device)
    ones = torch.ones_like(counts[:1]).expand(values.numel())
    return counts.scatter_add_(0, values.flatten(), ones)[:length]


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """The quotient, 0 where the divisor is 0."""
    return torch.where(b == 0, 0.0, a / b)
