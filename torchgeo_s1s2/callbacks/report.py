"""What a run leaves behind: a summary in the terminal, and pictures on disk and in loggers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch import Tensor
from torchgeo.datasets import unbind_samples
from torchmetrics.utilities.plot import plot_confusion_matrix

from torchgeo_s1s2.datasets.series import Sample
from torchgeo_s1s2.files import whole
from torchgeo_s1s2.tasks.metrics import SegmentationScores

_CURVES = {'loss': ('loss',), 'F1': ('WeightedF1Score', 'AverageF1Score')}


class Report(Callback):
    """Prints the scores of a run, and draws samples, the confusion matrix and learning curves.

    After a fit, a validation or a test, a table of the scores is printed, and the figures are in
    the folder ``figures`` of the run. Loggers of TensorBoard, Weights & Biases and MLflow get the
    figures after each evaluation, and at the end of a fit the curves: loss and F1, weighted and
    mean over the classes, over the epochs.

    Works with any task that logs TorchGeo's scores; samples need the data module and, as does the
    confusion matrix, the task of this package.

    Attributes:
        history: For each epoch its number and what the curves show; see :func:`curves_figure`.
    """

    def __init__(self, figures: int = 4) -> None:
        """Keep the settings.

        Args:
            figures: Number of samples to draw of each evaluation.
        """
        self.figures = figures
        self.history: list[dict[str, float]] = []
        self._drawn: list[Sample] = []
        self._losses: list[Tensor] = []
        self._evaluated: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin new curves; a checkpoint brings its own after this."""
        if stage == 'fit':
            self.history, self._losses, self._evaluated = [], [], {}

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, so that a run that goes on has them whole."""
        return {'history': self.history, 'evaluated': self._evaluated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of a checkpoint."""
        self.history = list(state_dict['history'])
        self._evaluated = dict(state_dict.get('evaluated', {}))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Keep the loss, which Lightning has divided by the number of batches of a step."""
        if outputs is not None:
            loss = outputs['loss'] if isinstance(outputs, Mapping) else outputs
            self._losses.append(loss.detach() * trainer.accumulate_grad_batches)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the samples of the epoch before."""
        self._drawn.clear()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Sample, *args: Any
    ) -> None:
        """Keep the first samples."""
        missing = self.figures - len(self._drawn)
        if missing > 0 and isinstance(outputs, Mapping) and 'prediction' in outputs:
            everything = {**batch, 'prediction': outputs['prediction']}
            tensors = {k: v for k, v in everything.items() if isinstance(v, Tensor)}
            samples = unbind_samples({k: v[:missing].cpu() for k, v in tensors.items()})
            self._drawn.extend(samples)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the figures to the loggers; after ``torchgeo validate``, print and write too."""
        if trainer.sanity_checking:
            self._drawn.clear()
            if scores := _scores(pl_module, 'val'):
                scores.counted.zero_()
            return
        self._evaluated = _points(trainer.callback_metrics, 'val')
        self._log(trainer, self._figures(trainer, pl_module, 'val'))
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._say(trainer, pl_module, 'val')

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the figures to the loggers, print and write."""
        self._log(trainer, self._figures(trainer, pl_module, 'test'))
        self._say(trainer, pl_module, 'test')

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the epoch achieved."""
        train: dict[str, float] = {}
        if self._losses:  # none if a checkpoint is of the time after the last step
            metrics: Any = getattr(pl_module, 'train_metrics', None)
            scores = metrics.compute() if metrics is not None else {}  # the task takes the same
            train = _points({**scores, 'train_loss': torch.stack(self._losses).mean()}, 'train')
        self.history.append({'epoch': trainer.current_epoch + 1.0} | train | self._evaluated)
        self._losses, self._evaluated = [], {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last validation and the curves, and say where everything is."""
        self._log(trainer, self._curves())
        self._say(trainer, pl_module, 'val')

    def _figures(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> Iterator[tuple[str, Figure]]:
        """Kept samples and the confusion matrix of the last evaluation."""
        datamodule: Any = getattr(trainer, 'datamodule', None)
        for number, sample in enumerate(self._drawn if hasattr(datamodule, 'denormalize') else ()):
            yield f'{stage}_sample_{number}', datamodule.plot(datamodule.denormalize(sample))
        scores = _scores(pl_module, stage)
        if scores is not None and scores.counted.any():
            yield f'{stage}_confusion_matrix', confusion_figure(scores.counted, scores.labels)

    def _curves(self) -> Iterator[tuple[str, Figure]]:
        if self.history:
            yield 'curves', curves_figure(self.history)

    @staticmethod
    def _log(trainer: Trainer, figures: Iterator[tuple[str, Figure]]) -> None:
        loggers = [logger for logger in trainer.loggers if _takes_figures(logger)]
        if trainer.is_global_zero and loggers:
            for name, figure in figures:
                for logger in loggers:
                    log_figure(logger, name, figure, trainer.global_step)

    def _say(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the figures, and print scores and files."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks every process
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        figures = [*self._figures(trainer, pl_module, stage), *(self._curves() if fitting else ())]
        files = [save_figure(fig, folder / 'figures' / f'{name}.png') for name, fig in figures]
        best = _best_checkpoint(trainer) if stage == 'val' else ()
        scores, when = _scores(pl_module, stage), ' of the last epoch' if fitting else ''
        labels = scores.labels if scores else ()
        metrics = trainer.callback_metrics
        print(summary(stage, metrics, labels, folder, [*best, *files], when))


def _best_checkpoint(trainer: Trainer) -> list[Path]:
    """The best checkpoint, none if what was kept had no score that is a number."""
    keep = trainer.checkpoint_callback
    score = getattr(keep, 'best_model_score', None)
    is_number = score is None or score.isfinite()
    path = getattr(keep, 'best_model_path', '') if is_number else ''
    return [Path(path)] if path else []


def _scores(pl_module: LightningModule, stage: str) -> SegmentationScores | None:
    """The scores of a stage, if the task is that of this package."""
    metrics: Any = getattr(pl_module, f'{stage}_metrics', {})
    return next((m for m in metrics.values() if isinstance(m, SegmentationScores)), None)


def _points(metrics: Mapping[str, Tensor], stage: str) -> dict[str, float]:
    """What the curves show of a stage."""
    names = [f'{stage}_{name}' for curves in _CURVES.values() for name in curves]
    return {name: float(metrics[name]) for name in names if name in metrics}


def _takes_figures(logger: Logger) -> bool:
    is_known = isinstance(logger, MLFlowLogger | WandbLogger)
    return is_known or hasattr(getattr(logger, 'experiment', None), 'add_figure')


def log_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    """Give a figure to TensorBoard (or what takes figures as it does), W&B or MLflow."""
    if isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f'figures/{name}_{step}.png')
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [figure], step=step)
    else:
        logger.experiment.add_figure(name, figure, global_step=step)


def confusion_figure(counts: Tensor, labels: Sequence[str]) -> Figure:
    """Draw a confusion matrix with the share of each true class (rows sum to 1).

    Args:
        counts: Numbers of pixels (K, K); rows are the true classes.
        labels: K names.
    """
    size = 3 + 0.55 * len(labels)
    figure = Figure(figsize=(size, size), layout='constrained')
    ax = figure.subplots()
    plot_confusion_matrix(counts / counts.sum(1, keepdim=True).clamp(min=1), ax, labels=[*labels])
    for text in (*ax.texts, *ax.get_yticklabels()):
        text.set(fontsize=7, rotation=0)
    for text in ax.get_xticklabels():
        text.set(fontsize=7, ha='right')
    ax.set_title('Share of the true class')
    return figure


def curves_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw loss and F1 of training and validation over the epochs.

    Args:
        history: For each epoch its number as ``epoch``, and what is known of ``train_`` and
            ``val_``: ``loss``, ``WeightedF1Score`` and ``AverageF1Score``.
    """
    figure = Figure(figsize=(9, 3.5), layout='constrained')
    for ax, (title, names) in zip(figure.subplots(1, 2), _CURVES.items(), strict=True):
        for stage, style in (('train', '--'), ('val', '-')):
            for color, name in enumerate(names):
                points = [(h['epoch'], h[k]) for h in history if (k := f'{stage}_{name}') in h]
                if points:
                    ax.plot(*zip(*points, strict=True), style, marker='.', c=f'C{color}', label=k)
        ax.set(title=title, xlabel='epoch')
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def summary(
    stage: str,
    metrics: Mapping[str, Tensor],
    labels: Sequence[str],
    folder: Path,
    files: Sequence[Path],
    when: str = '',
) -> str:
    """Text that ends a run: the metrics, those of each class, the folder and the files.

    Args:
        stage: Prefix of the metrics: ``'val'`` or ``'test'``.
        metrics: What the trainer logged.
        labels: Names of the classes.
        folder: Where everything is.
        files: Pictures and checkpoints.
        when: Which evaluation the metrics are of, where there was more than one.
    """
    prefix = f'{stage}_'
    values = {k.removeprefix(prefix): float(v) for k, v in metrics.items() if k.startswith(prefix)}
    lines = [f'{stage} metrics{when}', *_table(values, labels)] if values else []
    return '\n'.join([*lines, f'results in {folder}', *(f'  {path}' for path in files)])


def _table(values: Mapping[str, float], labels: Sequence[str]) -> Iterator[str]:
    scores = {'precision': 'Precision', 'recall': 'Recall', 'F1': 'F1Score', 'IoU': 'JaccardIndex'}
    each = {f'{score}_{label}' for score in scores.values() for label in labels}
    for name, value in values.items():
        if name not in each and 'Classwise' not in name:
            yield f'  {name:<24}{value:8.4f}'
    yield f'  {"class":<34}' + ''.join(f'{title:>10}' for title in scores)
    for label in labels:
        row = (values.get(f'Classwise{score}_{label}', float('nan')) for score in scores.values())
        yield f'  {label:<34}' + ''.join(f'{value:10.4f}' for value in row)
