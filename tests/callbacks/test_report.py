from pathlib import Path

import matplotlib.image
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from torchgeo_s1s2.callbacks.report import confusion_figure, save_figure, summary


def test_confusion_figure_shows_shares_of_the_true_class(tmp_path: Path) -> None:
    metric = MulticlassConfusionMatrix(3, ignore_index=255)
    # Of four pixels of class 0 three are right; class 2 has no pixel.
    metric.update(torch.tensor([0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 0, 1, 255]))
    figure = confusion_figure(metric, ('Town', 'Field', 'Water'))
    (ax,) = figure.axes
    shares = [
        [float(ax.texts[3 * row + column].get_text()) for column in range(3)] for row in (0, 1, 2)
    ]
    assert shares == [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ['Town', 'Field', 'Water']
    assert ax.get_ylabel() == 'True class'
    path = save_figure(figure, tmp_path / 'new' / 'confusion.png')
    height, width, _ = matplotlib.image.imread(path).shape
    # 3 inches and 0.55 for each class, 120 dots an inch.
    assert (height, width) == (558, 558)


def test_summary_lists_metrics_classes_and_files() -> None:
    metrics = {
        'val_loss': 0.5,
        'val_Kappa': 0.25,
        'val_Precision_Town': 1.0,
        'val_Recall_Town': 0.125,
        'val_F1Score_Town': 0.2222,
        'train_loss': 9.0,
    }
    tensors = {name: torch.tensor(value) for name, value in metrics.items()}
    files = [Path('out/best.ckpt')]
    text = summary('val', tensors, ['Town'], Path('out'), files, ' of the last epoch')
    assert [line.split() for line in text.splitlines()] == [
        ['val', 'metrics', 'of', 'the', 'last', 'epoch'],
        ['loss', '0.5000'],
        ['Kappa', '0.2500'],
        ['class', 'precision', 'recall', 'F1'],
        ['Town', '1.0000', '0.1250', '0.2222'],
        ['results', 'in', 'out'],
        ['out/best.ckpt'],
    ]


def test_summary_without_an_evaluation_has_the_files_only() -> None:
    text = summary('val', {'train_loss': torch.tensor(1.0)}, ['Town'], Path('out'), [])
    assert text == 'results in out'
