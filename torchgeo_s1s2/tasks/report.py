"""What a run leaves behind: pictures, and a summary in the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix


def confusion_figure(confusion: MulticlassConfusionMatrix, labels: Sequence[str]) -> Figure:
    """Draw a confusion matrix with the share of each true class (rows sum to 1).

    Args:
        confusion: An updated metric with K classes.
        labels: K names.

    Returns:
        A figure.
    """
    size = 3 + 0.55 * len(labels)
    figure, ax = plt.subplots(figsize=(size, size), layout='constrained')
    counts = confusion.compute().cpu().numpy()
    matrix = counts / counts.sum(1, keepdims=True).clip(1)
    ax.imshow(matrix, cmap='Blues', vmin=0, vmax=1)
    for (row, column), share in _cells(matrix):
        ax.text(
            column,
            row,
            f'{share:.2f}',
            ha='center',
            va='center',
            fontsize=7,
            color='white' if share > 0.5 else 'black',
        )
    ticks = range(len(labels))
    ax.set_xticks(ticks, labels, rotation=45, ha='right', fontsize=7)
    ax.set_yticks(ticks, labels, fontsize=7)
    ax.set(xlabel='Prediction', ylabel='Truth', title='Share of the true class')
    return figure


def _cells(matrix: 'Sequence[Sequence[float]]') -> list[tuple[tuple[int, int], float]]:
    return [((i, j), v) for i, row in enumerate(matrix) for j, v in enumerate(row)]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def summary(
    stage: str,
    metrics: Mapping[str, Tensor],
    labels: Sequence[str],
    folder: Path,
    files: Sequence[Path],
) -> str:
    """Text that ends a run.

    Args:
        stage: Prefix of the metrics: ``'val'`` or ``'test'``.
        metrics: What the trainer logged.
        labels: Names of the classes.
        folder: Where everything is.
        files: Pictures and checkpoints.

    Returns:
        Lines with the metrics, those of each class, the folder and the files.
    """
    values = {
        name.removeprefix(f'{stage}_'): float(value)
        for name, value in metrics.items()
        if name.startswith(f'{stage}_')
    }
    whole = [name for name in values if not any(name.endswith(f'_{label}') for label in labels)]
    lines = [f'{stage} metrics', *(f'  {name:<24}{values[name]:8.4f}' for name in whole)]
    lines.append(f'  {"class":<34}{"precision":>10}{"recall":>10}{"F1":>10}')
    for label in labels:
        scores = (
            values.get(f'{n}_{label}', float('nan')) for n in ('Precision', 'Recall', 'F1Score')
        )
        lines.append(f'  {label:<34}' + ''.join(f'{score:10.4f}' for score in scores))
    lines += [f'results in {folder}', *(f'  {path}' for path in files)]
    return '\n'.join(lines)
