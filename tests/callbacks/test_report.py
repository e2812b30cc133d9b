import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import Board, quiet_trainer
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from torchgeo.tasks import SemanticSegmentation

from torchgeo_s1s2.callbacks import Report
from torchgeo_s1s2.callbacks.report import confusion_figure, curves_figure, save_figure, summary
from torchgeo_s1s2.errors import S1S2Warning
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation

PICTURES = ['val_sample_0', 'val_confusion_matrix']


class Data(LightningDataModule):
    """One batch for every stage, twice."""

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        batch = {
            'image': torch.randn(2, 1, 32, 32, generator=generator),
            'mask': torch.randint(0, 3, (2, 32, 32), generator=generator),
        }
        return DataLoader([batch, batch], batch_size=None)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader

    def denormalize(self, sample: dict[str, Any]) -> dict[str, Any]:
        return sample

    def plot(self, sample: dict[str, Any]) -> Figure:
        assert sample['prediction'].shape == sample['mask'].shape == (32, 32)
        return Figure(figsize=(1, 1))


def small(stock: bool = False, **changes: Any) -> SemanticSegmentation:
    kind: Any = SemanticSegmentation if stock else S1S2SemanticSegmentation
    options = {'in_channels': 1, 'num_classes': 3, 'labels': ['Town', 'Field', 'Water']}
    options |= {'ignore_index': 255} | changes
    task: SemanticSegmentation = kind('fcn', num_filters=1, **options)
    return task


def run(root: Path, report: Report | None = None, epochs: int = 2, **options: Any) -> Trainer:
    task, ckpt_path = options.pop('task', None) or small(), options.pop('ckpt_path', None)
    callbacks = [report or Report(figures=1), *options.pop('callbacks', [])]
    trainer = quiet_trainer(root, max_epochs=epochs, callbacks=callbacks, **options)
    trainer.fit(task, datamodule=Data(), ckpt_path=ckpt_path)
    return trainer


def test_a_fit_leaves_scores_pictures_and_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board(tmp_path / 'log')
    trainer = run(tmp_path, logger=board)
    # Two steps an epoch, and nothing from the sanity check.
    after_epochs = [(name, step) for step in (2, 4) for name in PICTURES]
    assert board.figures == [*after_epochs, ('curves', 4)]
    written = {p.stem for p in (tmp_path / 'log' / 'figures').iterdir()}
    assert written == {*PICTURES, 'curves'}
    out = capsys.readouterr().out
    assert f'{trainer.callback_metrics["val_Kappa"]:8.4f}' in out
    assert 'Water' in out
    assert str(tmp_path / 'log' / 'figures' / 'val_sample_0.png') in out


def test_a_sanity_check_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a validation after it, there are no scores and no pictures of one."""
    run(tmp_path, check_val_every_n_epoch=5)
    assert 'metrics' not in capsys.readouterr().out
    assert [p.name for p in (tmp_path / 'figures').iterdir()] == ['curves.png']


@pytest.mark.parametrize('labelled', [True, False])
def test_only_a_checkpoint_with_a_score_is_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], labelled: bool
) -> None:
    keep = ModelCheckpoint(tmp_path, filename='best', monitor='val_loss')
    # A weight of 0 for every class leaves nothing that counts.
    task = small(class_weights=[float(labelled)] * 3)
    run(tmp_path, task=task, callbacks=[keep], enable_checkpointing=True)
    assert ('best.ckpt' in capsys.readouterr().out) == labelled


def test_a_test_and_torchgeo_s_own_task_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(tmp_path, epochs=1, task=small(stock=True))
    f1 = float(trainer.callback_metrics['val_AverageF1Score'])
    assert f'  AverageF1Score          {f1:8.4f}' in capsys.readouterr().out
    assert [p.name for p in (tmp_path / 'figures').iterdir()] == ['curves.png']
    trainer.test(small(), Data(), verbose=False)
    assert 'test metrics\n' in capsys.readouterr().out
    assert (tmp_path / 'figures' / 'test_confusion_matrix.png').exists()


def test_curves_go_on_where_a_run_was_interrupted(tmp_path: Path) -> None:
    whole, first, second = Report(), Report(), Report()
    torch.manual_seed(0)
    run(tmp_path, whole, epochs=3)
    torch.manual_seed(0)
    keep = ModelCheckpoint(tmp_path, filename='half')
    run(tmp_path, first, epochs=2, callbacks=[keep], enable_checkpointing=True)
    run(tmp_path, second, epochs=3, ckpt_path=tmp_path / 'half.ckpt')
    assert [list(epoch.values()) for epoch in second.history] == [
        pytest.approx(list(epoch.values())) for epoch in whole.history
    ]
    assert [epoch['epoch'] for epoch in second.history] == [1, 2, 3]
    run(tmp_path, second, epochs=1)
    assert [epoch['epoch'] for epoch in second.history] == [1]


def test_an_epoch_that_only_has_to_end_keeps_its_validation_and_has_no_training(
    tmp_path: Path,
) -> None:
    """The checkpoint is of the validation, after the steps of the second epoch."""
    keep, second = ModelCheckpoint(tmp_path, filename='half'), Report(figures=0)
    options: dict[str, Any] = {'check_val_every_n_epoch': 2, 'num_sanity_val_steps': 0}
    run(tmp_path, epochs=2, callbacks=[keep], enable_checkpointing=True, **options)
    with warnings.catch_warnings(action='error', category=S1S2Warning):
        run(tmp_path, second, epochs=3, ckpt_path=tmp_path / 'half.ckpt', **options)
    known = [{name.split('_')[0] for name in epoch} for epoch in second.history]
    assert known == [{'epoch', 'train'}, {'epoch', 'val'}, {'epoch', 'train'}]


def test_the_training_loss_is_that_of_a_batch_however_many_make_a_step(tmp_path: Path) -> None:
    """Training and validation have the same batches here, and nothing is learned."""
    report = Report(figures=0)
    run(tmp_path, report, epochs=1, task=small(lr=0.0), accumulate_grad_batches=2)
    (epoch,) = report.history
    assert epoch['train_loss'] == pytest.approx(epoch['val_loss'])


def in_tensorboard(root: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return set(EventAccumulator(str(root)).Reload().Tags()['images'])


@pytest.mark.parametrize('kind', ['tensorboard', 'wandb', 'mlflow'])
def test_real_loggers_get_the_figures(tmp_path: Path, kind: str) -> None:
    pytest.importorskip(kind)
    root = tmp_path / 'log'
    logger: Any = {
        'tensorboard': lambda: TensorBoardLogger(root, name='', version=''),
        'wandb': lambda: WandbLogger(save_dir=root, offline=True),
        'mlflow': lambda: MLFlowLogger(
            tracking_uri=f'sqlite:///{root}/mlflow.db', artifact_location=f'file:{root}/artifacts'
        ),
    }[kind]()
    run(tmp_path, epochs=1, logger=logger)
    # W&B calls a file name_step_hash.png, MLflow name_step.png.
    logged = {
        'tensorboard': lambda: in_tensorboard(root),
        'wandb': lambda: {p.stem.rsplit('_', 2)[0] for p in root.glob('**/media/images/*.png')},
        'mlflow': lambda: {p.stem.rsplit('_', 1)[0] for p in root.glob('**/figures/*.png')},
    }[kind]()
    assert logged == {*PICTURES, 'curves'}


def test_curves_are_those_of_the_history() -> None:
    history = [
        {'epoch': 1.0, 'train_loss': 2.0, 'val_loss': 3.0, 'val_AverageF1Score': 0.25},
        {'epoch': 2.0, 'train_loss': 1.0},
    ]
    lines = {
        line.get_label(): np.asarray(line.get_xydata()).tolist()
        for ax in curves_figure(history).axes
        for line in ax.lines
    }
    assert lines == {
        'train_loss': [[1, 2], [2, 1]],
        'val_loss': [[1, 3]],
        'val_AverageF1Score': [[1, 0.25]],
    }


def test_confusion_figure_shows_shares_of_the_true_class(tmp_path: Path) -> None:
    # Of four pixels of class 0 three are right; class 2 has no pixel.
    counts = torch.tensor([[3, 1, 0], [0, 1, 0], [0, 0, 0]])
    figure = confusion_figure(counts, ('Town', 'Field', 'Water'))
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
        'val_ClasswisePrecision_Town': 1.0,
        'val_ClasswiseRecall_Town': 0.125,
        'val_ClasswiseF1Score_Town': 0.2222,
        'val_ClasswiseJaccardIndex_Town': 0.125,
        'train_loss': 9.0,
    }
    tensors = {name: torch.tensor(value) for name, value in metrics.items()}
    files = [Path('out/best.ckpt')]
    text = summary('val', tensors, ['Town'], Path('out'), files, ' of the last epoch')
    assert [line.split() for line in text.splitlines()] == [
        ['val', 'metrics', 'of', 'the', 'last', 'epoch'],
        ['loss', '0.5000'],
        ['Kappa', '0.2500'],
        ['class', 'precision', 'recall', 'F1', 'IoU'],
        ['Town', '1.0000', '0.1250', '0.2222', '0.1250'],
        ['results', 'in', 'out'],
        ['out/best.ckpt'],
    ]
    assert summary('test', tensors, ['Town'], Path('out'), []) == 'results in out'
