"""Scores from the confusion matrices of test patches, and intervals over those patches."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def confusions(
    prediction: NDArray[np.uint8], mask: NDArray[np.uint8], classes: int
) -> NDArray[np.int64]:
    """Confusion matrix (true, found) of each patch (N, H, W): (N, K, K); other labels are none."""
    matrices = np.zeros((len(mask), classes, classes), np.int64)
    for matrix, found, true in zip(matrices, prediction, mask, strict=True):
        known = true < classes
        np.add.at(matrix, (true[known], found[known]), 1)
    return matrices


def scores(confusion: NDArray[np.number]) -> dict[str, Numbers]:
    """Scores of confusion matrices (..., K, K).

    Precision, recall and F1 are weighted by the pixels of each class; macro F1 and mean IoU are
    means over the classes that have a true or found pixel.

    Returns:
        Arrays (...), and ``class_f1`` (..., K).
    """
    matrix = confusion.astype(float)
    right, true, found = np.diagonal(matrix, 0, -2, -1), matrix.sum(-1), matrix.sum(-2)
    total = true.sum(-1, keepdims=True)
    occurs = true + found > 0
    f1, iou = _share(2 * right, true + found), _share(right, true + found - right)
    chance = (true * found).sum(-1) / total[..., 0] ** 2
    agreed = right.sum(-1) / total[..., 0]
    return {
        'f1': (f1 * true / total).sum(-1),
        'macro_f1': f1.sum(-1) / occurs.sum(-1),
        'miou': iou.sum(-1) / occurs.sum(-1),
        'kappa': _share(agreed - chance, 1 - chance),
        'precision': (_share(right, found) * true / total).sum(-1),
        'recall': agreed,
        'class_f1': f1,
    }


def _share(part: Numbers, whole: Numbers) -> Numbers:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def resampled(
    matrices: Mapping[str, Sequence[NDArray[np.int64]]], draws: int = 2000, seed: int = 0
) -> dict[str, Numbers]:
    """Weighted F1 on test patches drawn with replacement, the same for all contestants.

    Args:
        matrices: For each contestant the confusion matrices (N, K, K) of each of its seeds.
        draws: Number of draws.
        seed: Seed of the draws.

    Returns:
        For each contestant the mean over its seeds, (draws,); see Efron and Tibshirani, An
        Introduction to the Bootstrap, 1993.
    """
    patches = len(next(iter(matrices.values()))[0])
    rng = np.random.default_rng(seed)
    times = rng.multinomial(patches, np.full(patches, 1 / patches), draws)
    return {
        name: np.mean([scores(np.tensordot(times, seen, 1))['f1'] for seen in seeds], 0)
        for name, seeds in matrices.items()
    }


def interval(values: Numbers) -> tuple[float, float]:
    """The 95 % that lie in the middle."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
