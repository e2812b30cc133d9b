from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, jaccard_score, precision_recall_fscore_support
from torch import Tensor
from torchgeo.tasks import SemanticSegmentation

from torchgeo_s1s2.tasks.metrics import SegmentationScores

LABELS = ['Town', 'Field', 'Water', 'Wood']


def drawn(truth: list[int], predicted: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictions and masks of these values, with pixels that have no label."""
    rng = np.random.default_rng(seed)
    prediction, mask = rng.choice(predicted, (3, 20, 30)), rng.choice([*truth, 255], (3, 20, 30))
    return torch.from_numpy(prediction), torch.from_numpy(mask)


CASES = {
    'all classes': ([0, 1, 2, 3], [0, 1, 2, 3]),
    'one class is in neither': ([0, 1, 2], [0, 1, 2]),
    'one class is predicted only': ([0, 1], [0, 1, 3]),
    'one class is never predicted': ([0, 1, 3], [0, 3]),
    'nothing is right': ([0, 1], [2, 3]),
    'no pixel has a label': ([255], [0, 1]),
}


@pytest.mark.parametrize(('truth', 'predicted'), CASES.values(), ids=CASES)
def test_scores_are_those_of_torchgeo_and_scikit_learn(
    truth: list[int], predicted: list[int]
) -> None:
    scores = SegmentationScores(4, 255, LABELS)
    stock = SemanticSegmentation(
        'fcn', num_classes=4, labels=LABELS, ignore_index=255, num_filters=1
    ).val_metrics
    pairs = [drawn(truth, predicted, seed) for seed in range(2)]
    for prediction, mask in pairs:
        scores.update(prediction, mask)
        stock.update(prediction, mask)
    ours = scores.compute()
    theirs = {name.removeprefix('val_'): value for name, value in stock.compute().items()}
    assert len(theirs) == 10 + 5 * 4
    assert {k: ours[k].item() for k in theirs} == pytest.approx(
        {k: v.nan_to_num().item() for k, v in theirs.items()}, abs=1e-6
    )
    p, y = (torch.stack(parts).numpy().ravel() for parts in zip(*pairs, strict=True))
    p, y = p[y < 255], y[y < 255]
    if not len(y):
        assert ours['Kappa'] == 0
        return
    each: Any = precision_recall_fscore_support(y, p, labels=range(4), zero_division=0)
    mean: Any = precision_recall_fscore_support(y, p, average='weighted', zero_division=0)
    for name, values, weighted in zip(('Precision', 'Recall', 'F1Score'), each, mean, strict=False):
        assert [ours[f'{name}_{k}'].item() for k in LABELS] == pytest.approx(values, abs=1e-6)
        assert ours[f'Weighted{name}'].item() == pytest.approx(weighted, abs=1e-6)
    assert ours['Kappa'].item() == pytest.approx(cohen_kappa_score(y, p), abs=1e-6)
    iou = jaccard_score(y, p, average='macro', zero_division=0)
    assert ours['AverageJaccardIndex'].item() == pytest.approx(iou, abs=1e-6)


def test_the_confusion_matrix_of_logits_by_hand() -> None:
    """Of 10 pixels of A 6 are found, and of 10 of B 8; one unlabelled pixel does not count."""
    scores = SegmentationScores(3, labels=['A', 'B', 'C'])
    truth = torch.tensor([[0] * 10 + [1] * 10 + [255]])
    prediction = torch.tensor([[0] * 6 + [1] * 4 + [1] * 8 + [0] * 2 + [2]])
    scores.update(torch.nn.functional.one_hot(prediction, 3).movedim(-1, 1).float(), truth)
    assert scores.compute()['Precision_A'].item() == pytest.approx(6 / 8)
    assert scores.counted.tolist() == [[6, 4, 0], [2, 8, 0], [0, 0, 0]]


def test_one_class_alone_has_no_kappa_and_a_reset_starts_anew() -> None:
    scores = SegmentationScores(2)
    scores.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    scores.compute()
    scores.reset()
    assert scores.counted.tolist() == [[1, 1], [0, 0]]
    scores.update(torch.ones(1, 4, 4).long(), torch.ones(1, 4, 4).long())
    values = scores.compute()
    assert (values['OverallAccuracy'], values['Kappa']) == (1, 0)


def test_an_ignored_class_is_no_class_of_the_means() -> None:
    """Of 8 pixels of class 1, 2 are taken for the ignored class 0: only class 1 has a score."""
    scores = SegmentationScores(3, ignore_index=0)
    truth = torch.tensor([[0] * 5 + [1] * 8 + [2] * 4])
    prediction = torch.tensor([[1] * 5 + [0] * 2 + [1] * 6 + [2] * 4])
    scores.update(prediction, truth)
    values = scores.compute()
    assert values['AverageRecall'].item() == pytest.approx((6 / 8 + 1) / 2)
    assert values['AverageJaccardIndex'].item() == pytest.approx((6 / 8 + 1) / 2)
    assert values['OverallAccuracy'].item() == pytest.approx(10 / 12)
