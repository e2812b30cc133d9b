"""What a run leaves behind: pictures, and a summary in the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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
    figure = Figure(figsize=(size, size), layout='constrained')
    ax = figure.subplots()
    counts = confusion.compute()
    confusion.plot(counts / counts.sum(1, keepdim=True).clamp(min=1), ax, labels=list(labels))
    for text in (*ax.texts, *ax.get_yticklabels()):
        text.set(fontsize=7, rotation=0)
    for text in ax.get_xticklabels():
        text.set(fontsize=7, ha='right')
    ax.set_title('Share of the true class')
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def summary(
    stage: str,
    metrics: Mapping[str, Tensor],
    labels: Sequence[str],
    folder: Path,
    files: Sequence[Path],
    when: str = '',
) -> str:
    """Text that ends a run.

    Args:
        stage: Prefix of the metrics: ``'val'`` or ``'test'``.
        metrics: What the trainer logged.
        labels: Names of the classes.
        folder: Where everything is.
        files: Pictures and checkpoints.
        when: Which evaluation the metrics are of, where there was more than one.

    Returns:
        Lines with the metrics, those of each class, the folder and the files.
    """
    values = {
        name.removeprefix(f'{stage}_'): float(value)
        for name, value in metrics.items()
        if name.startswith(f'{stage}_')
    }
    lines = [f'{stage} metrics{when}', *_table(values, labels)] if values else []
    return '\n'.join([*lines, f'results in {folder}', *(f'  {path}' for path in files)])


def _table(values: Mapping[str, float], labels: Sequence[str]) -> Iterator[str]:
    scores = ('Precision', 'Recall', 'F1Score')
    each = {f'{score}_{label}' for score in scores for label in labels}
    for name, value in values.items():
        if name not in each:
            yield f'  {name:<24}{value:8.4f}'
    yield f'  {"class":<34}{"precision":>10}{"recall":>10}{"F1":>10}'
    for label in labels:
        row = (values.get(f'{score}_{label}', float('nan')) for score in scores)
        yield f'  {label:<34}' + ''.join(f'{value:10.4f}' for value in row)
