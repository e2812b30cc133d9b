import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_patch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from torchgeo.tasks import SemanticSegmentation

from torchgeo_s1s2.datamodules import MultiSenGEDataModule
from torchgeo_s1s2.datasets import ClassScheme, LandCoverClass, MonthlySeries
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation

# Rows are the truth, columns the prediction; class 3 is in neither.
CONFUSION = np.array([[50, 10, 4, 0], [6, 30, 0, 0], [5, 15, 80, 0], [0, 0, 0, 0]])
CLASSES = ClassScheme(
    (
        LandCoverClass('Town', (255, 0, 0), (2,)),
        LandCoverClass('Field', (0, 255, 0), (6,)),
        LandCoverClass('Water', (0, 0, 255), (14,)),
    )
)


class Pass(nn.Module):
    """Gives the image back as the logits, so that a test chooses what is predicted."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Board(CSVLogger):
    """A logger that takes figures, as TensorBoard's does."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, name='', version='')
        self.figures: list[tuple[str, int]] = []

    @property
    def experiment(self) -> Any:
        writer = super().experiment
        writer.add_figure = lambda name, figure, global_step: self.figures.append(
            (name, global_step)
        )
        return writer


def passing(**options: Any) -> S1S2SemanticSegmentation:
    """A task whose model gives its input back."""
    defaults: dict[str, Any] = {
        'model': 'fcn',
        'in_channels': 4,
        'num_classes': 4,
        'num_filters': 1,
    }
    task = S1S2SemanticSegmentation(**(defaults | options))
    task.model = Pass()
    return task


def small(**options: Any) -> S1S2SemanticSegmentation:
    defaults: dict[str, Any] = {'backbone': 'resnet18_convlstm_inception', 'num_classes': 3}
    return S1S2SemanticSegmentation(**(defaults | options))


def batch_of(confusion: NDArray[np.int_], unlabelled: int = 20) -> dict[str, Tensor]:
    """A batch of one row of pixels with that confusion matrix, and pixels without a label."""
    truth, prediction = np.indices(confusion.shape).reshape(2, -1)
    counts = confusion.ravel()
    y = torch.tensor([*np.repeat(truth, counts), *[255] * unlabelled])
    p = torch.tensor([*np.repeat(prediction, counts), *[0] * unlabelled])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    logits = 5 * F.one_hot(p[order], len(confusion)).float()
    return {'image': logits.T[None, :, None], 'mask': y[order][None, None]}


def trainer_in(root: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        'accelerator': 'cpu',
        'logger': False,
        'enable_checkpointing': False,
        'enable_progress_bar': False,
        'enable_model_summary': False,
        'log_every_n_steps': 1,
        'max_epochs': 1,
    }
    return Trainer(default_root_dir=root, **(defaults | options))


def loader(*batches: dict[str, Tensor]) -> Any:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def expected_metrics(confusion: NDArray[np.int_]) -> dict[str, float]:
    """The textbook formulas; classes neither true nor predicted are left out of averages."""
    c = confusion.astype(float)
    total, true, predicted, hit = c.sum(), c.sum(1), c.sum(0), c.diagonal()
    precision, recall = hit / predicted.clip(1), hit / true.clip(1)
    f1 = 2 * hit / (true + predicted).clip(1)
    seen = true + predicted > 0
    chance = (true * predicted).sum() / total**2
    weighted = {'Precision': precision, 'Recall': recall, 'F1Score': f1}
    expected = {f'Weighted{k}': float((v * true).sum() / total) for k, v in weighted.items()}
    for name, values in weighted.items():
        expected |= {f'{name}_{k}': v for k, v in enumerate(values)}
    return expected | {
        'OverallAccuracy': hit.sum() / total,
        'AverageF1Score': f1[seen].mean(),
        'AverageJaccardIndex': (hit / (true + predicted - hit).clip(1))[seen].mean(),
        'Kappa': (hit.sum() / total - chance) / (1 - chance),
    }


@pytest.fixture
def two_splits(tmp_path: Path) -> MultiSenGEDataModule:
    """Four training and two validation and test patches of half fields, half town."""
    root = tmp_path / 'data'
    for x in range(4):
        write_patch(root, '32ULU', 33 * x)
    for x in range(2):
        write_patch(root, '31UEQ', 33 * x)
    return MultiSenGEDataModule(
        root, batch_size=2, classes=CLASSES, splits={s: [t] for s, t in TILES.items()}
    )


TILES = {'train': '32ULU', 'val': '31UEQ', 'test': '31UEQ'}


def test_metrics_are_those_of_the_labelled_pixels(tmp_path: Path) -> None:
    task = passing()
    logged = trainer_in(tmp_path).test(task, loader(batch_of(CONFUSION)), verbose=False)[0]
    expected = {f'test_{k}': v for k, v in expected_metrics(CONFUSION).items()}
    # By hand: 160 of 200 pixels are right; (64 * 61 + 36 * 55 + 100 * 84) / 200**2 are by chance.
    assert expected['test_OverallAccuracy'] == 0.8
    assert expected['test_Kappa'] == pytest.approx((0.8 - 0.3571) / (1 - 0.3571))
    assert logged.keys() == {*expected, 'test_loss'}
    assert {k: logged[k] for k in expected} == pytest.approx(expected, abs=1e-6)
    assert task._confusion.compute().tolist() == CONFUSION.tolist()


def test_metrics_add_up_over_batches_and_start_anew_each_epoch(tmp_path: Path) -> None:
    task, trainer = passing(), trainer_in(tmp_path)
    parts = CONFUSION // 2, CONFUSION - CONFUSION // 2
    for _ in range(2):
        batches = [batch_of(part) for part in parts]
        logged = trainer.validate(task, loader(*batches), verbose=False)[0]
        assert task._confusion.compute().tolist() == CONFUSION.tolist()
        assert logged['val_Kappa'] == pytest.approx(expected_metrics(CONFUSION)['Kappa'])


def test_the_loss_of_an_epoch_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, 2.0, 4.0, 8.0])
    parts = [batch_of(part) for part in (CONFUSION // 7, CONFUSION - CONFUSION // 7)]
    image, mask = (torch.cat([part[key] for part in parts], -1) for key in ('image', 'mask'))
    expected = F.cross_entropy(image, mask, weight, ignore_index=255)
    task = passing(class_weights=weight.tolist())
    logged = trainer_in(tmp_path).validate(task, loader(*parts), verbose=False)[0]
    assert logged['val_loss'] == pytest.approx(expected.item(), rel=1e-5)


def test_an_epoch_without_labels_does_not_stop_a_run(tmp_path: Path) -> None:
    batch = {'image': torch.randn(2, 48, 32, 32), 'mask': torch.full((2, 32, 32), 255)}
    task = small()
    before = {k: v.clone() for k, v in task.named_parameters()}
    trainer = trainer_in(tmp_path)
    trainer.fit(task, loader(batch), loader(batch))
    assert trainer.callback_metrics['val_loss'] == 0
    assert task._confusion.compute().sum() == 0
    assert all(torch.equal(v, before[k]) for k, v in task.named_parameters())


def test_names_of_classes_name_the_metrics(tmp_path: Path) -> None:
    task = passing(labels=['a', 'b', 'c', 'd'])
    logged = trainer_in(tmp_path).test(task, loader(batch_of(CONFUSION)), verbose=False)[0]
    assert logged['test_Recall_b'] == pytest.approx(30 / 36)
    with pytest.raises(ValueError, match='2 labels for num_classes=4'):
        passing(labels=['a', 'b'])


def test_signature_accepts_what_torchgeo_accepts() -> None:
    theirs = inspect.signature(SemanticSegmentation.__init__).parameters
    ours = inspect.signature(S1S2SemanticSegmentation.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)


@pytest.mark.parametrize('weights', [[1.0, 2.0, 4.0, 0.5], torch.tensor([1.0, 2.0, 4.0, 0.5])])
def test_class_weights_enter_cross_entropy(weights: Any) -> None:
    batch = batch_of(CONFUSION)
    task = passing(class_weights=weights)
    loss = task._loss(batch['image'], batch['mask'])
    expected = F.cross_entropy(
        batch['image'], batch['mask'], weight=torch.as_tensor(weights), ignore_index=255
    )
    torch.testing.assert_close(loss, expected)
    # A right pixel costs log(1 + 3 exp(-5)), a wrong one 5 more; each by the weight of its truth.
    right, wrong = math.log1p(3 * math.exp(-5)), 5 + math.log1p(3 * math.exp(-5))
    total = (50 + 30 * 2 + 80 * 4) * right + (14 + 6 * 2 + 20 * 4) * wrong
    assert loss == pytest.approx(total / (64 + 36 * 2 + 100 * 4), rel=1e-5)


def test_balanced_weights_come_from_the_training_patches(
    two_splits: MultiSenGEDataModule, tmp_path: Path
) -> None:
    task = small(class_weights='balanced')
    trainer_in(tmp_path, limit_train_batches=1, limit_val_batches=1).fit(task, two_splits)
    # Half of the pixels are town and half are field, none is water; the sum is 1000.
    weight = torch.tensor([500.0, 500.0, 0.0])
    assert task.criterion.weight.tolist() == weight.tolist()  # type: ignore[operator]
    logits = torch.randn(2, 3, 8, 8)
    mask = torch.randint(0, 2, (2, 8, 8))
    mask[0, 0] = 255
    torch.testing.assert_close(
        task._loss(logits, mask), F.cross_entropy(logits, mask, weight, ignore_index=255)
    )


@pytest.mark.parametrize(
    'options', [{'loss': 'dice'}, {'task': 'binary'}, {'class_weights': 'equal'}]
)
def test_balanced_weights_act_in_cross_entropy_only(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"class_weights='.*for loss='ce' and task='multiclass'"):
        small(**({'class_weights': 'balanced'} | options))


def test_balanced_weights_need_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='needs a MultiSenGEDataModule; give a list of weights'):
        trainer_in(tmp_path).fit(passing(class_weights='balanced'), loader(batch_of(CONFUSION)))


LOSSES = {
    'multiclass': ('ce', 'jaccard', 'focal', 'dice'),
    'binary': ('bce', 'jaccard', 'focal', 'dice'),
    'multilabel': ('bce', 'jaccard', 'dice'),
}


@pytest.mark.parametrize(
    ('kind', 'loss'), [(kind, loss) for kind, losses in LOSSES.items() for loss in losses]
)
def test_losses_do_not_depend_on_unlabelled_pixels(kind: Any, loss: Any) -> None:
    """The loss of an image and of that image with an unlabelled border are the same."""
    numbers = {'multiclass': {'num_classes': 3}, 'binary': {}, 'multilabel': {'num_labels': 3}}
    task = passing(task=kind, loss=loss, **numbers[kind])
    logits = torch.randn(2, *((3,) if kind != 'binary' else ()), 6, 6)
    high = 3 if kind == 'multiclass' else 2
    shape = logits.shape if kind == 'multilabel' else (2, 6, 6)
    mask = torch.randint(0, high, shape)
    wide = F.pad(mask, (1, 1, 1, 1), value=255)
    noisy = F.pad(logits, (1, 1, 1, 1), value=3.0).requires_grad_()
    value = task._loss(noisy, wide)
    torch.testing.assert_close(value, task._loss(logits, mask))
    (gradient,) = torch.autograd.grad(value, noisy)
    assert gradient.isfinite().all()
    assert gradient[..., 0, :].abs().max() == 0
    assert gradient[..., 1:-1, 1:-1].abs().max() > 0


def test_focal_loss_of_labels_cannot_leave_pixels_out() -> None:
    options: dict[str, Any] = {'task': 'multilabel', 'num_labels': 3, 'loss': 'focal'}
    with pytest.raises(ValueError, match='ignore_index is 255; give ignore_index=None'):
        passing(**options)
    task = passing(ignore_index=None, **options)
    logits, mask = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4).long()
    # All pixels are as hard: the normalised loss is cross-entropy's over the number of pixels.
    assert task._loss(logits, mask) == pytest.approx(math.log(2) / 16)


def test_binary_cross_entropy_weighs_positives() -> None:
    weight = torch.tensor(3.0)
    task = passing(task='binary', loss='bce', pos_weight=weight, ignore_index=None)
    logits, mask = torch.randn(2, 6, 6), torch.randint(0, 2, (2, 6, 6))
    expected = F.binary_cross_entropy_with_logits(logits, mask.float(), pos_weight=weight)
    torch.testing.assert_close(task._loss(logits, mask), expected)


@pytest.mark.parametrize(
    ('options', 'outputs'),
    [({'task': 'binary'}, 1), ({'task': 'multilabel', 'num_labels': 5}, 5), ({}, 14)],
)
def test_binary_and_multilabel_tasks_train_and_validate(
    tmp_path: Path, options: dict[str, Any], outputs: int
) -> None:
    loss = 'bce' if options else 'ce'
    task = S1S2SemanticSegmentation(backbone='resnet18_convlstm_inception', loss=loss, **options)  # type: ignore[arg-type]
    shape = (2, 5, 32, 32) if outputs == 5 else (2, 32, 32)
    batch = {'image': torch.randn(2, 4, 12, 32, 32), 'mask': torch.randint(0, 2, shape)}
    trainer = trainer_in(tmp_path)
    trainer.fit(task, loader(batch), loader(batch))
    name = 'val_WeightedF1Score' if outputs == 14 else 'val_AverageF1Score'
    assert 0 <= trainer.callback_metrics[name] <= 1
    predicted = trainer.predict(task, loader(batch))
    assert predicted is not None
    assert predicted[0]['probabilities'].shape == (2, outputs, 32, 32)  # type: ignore[call-overload]


def test_a_multiclass_task_needs_a_number_of_classes() -> None:
    with pytest.raises(ValueError, match='needs num_classes'):
        S1S2SemanticSegmentation(num_classes=None)


def test_optimizer_is_that_of_the_paper() -> None:
    task = small()
    configured = task.configure_optimizers()
    optimizer, plateau = configured['optimizer'], configured['lr_scheduler']
    assert type(optimizer) is Adam
    assert optimizer.param_groups[0]['lr'] == 1e-3
    assert plateau['monitor'] == 'val_loss'
    scheduler = plateau['scheduler']
    assert type(scheduler) is ReduceLROnPlateau
    rates = []
    for _ in range(7):
        scheduler.step(1.0)
        rates.append(optimizer.param_groups[0]['lr'])
    # The first value is the best so far, then patience is 5 epochs.
    assert rates[:6] == [1e-3] * 6
    assert rates[6] == pytest.approx(1e-4)


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """Names of the two upper levels of the weights and buffers that are not what they were."""
    now = module.state_dict()
    return {'.'.join(k.split('.')[:2]) for k in now if not torch.equal(now[k], before[k])}


@pytest.mark.parametrize(
    ('backbone', 'frozen'),
    [('resnet18_convlstm_inception', 'encoder.spatial'), ('resnet18', 'encoder')],
)
def test_frozen_backbone_stays_as_it_was(tmp_path: Path, backbone: str, frozen: str) -> None:
    task = small(backbone=backbone, freeze_backbone=True)
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    batch = {
        'image': torch.randn(2, 4, 12, 32, 32) + 1,
        'mask': torch.randint(0, 3, (2, 32, 32)),
    }
    trainer = trainer_in(tmp_path, max_epochs=2)
    trainer.fit(task, loader(batch), loader(batch))
    parts = changed(before, task.model)
    assert {'decoder.blocks', 'segmentation_head.0'} <= parts
    assert not any(part.startswith(frozen) for part in parts)
    if frozen == 'encoder.spatial':
        assert {'encoder.convlstm', 'encoder.inception'} <= parts


def test_frozen_decoder_stays_as_it_was(tmp_path: Path) -> None:
    task = small(freeze_decoder=True)
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    batch = {'image': torch.randn(2, 48, 32, 32) + 1, 'mask': torch.randint(0, 3, (2, 32, 32))}
    trainer_in(tmp_path).fit(task, loader(batch))
    assert changed(before, task.model) == {
        'encoder.convlstm',
        'encoder.inception',
        'encoder.spatial',
        'segmentation_head.0',
    }


@pytest.mark.parametrize('series', ['resnet18', 'resnet18_convlstm_inception'])
def test_time_is_a_dimension_or_folded(series: str) -> None:
    task = small(backbone=series).eval()
    x = torch.randn(1, 4, 12, 32, 32)
    torch.testing.assert_close(task(x), task(x.flatten(1, 2)))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_classes': 10}, 'num_classes=10, the data have 3 classes; give model and data'),
        (
            {'backbone': 'resnet18', 'in_channels': 36},
            'in_channels=36, the data give 4 time slots x 12 channels = 48; set in_channels',
        ),
        (
            {'backbone': 'resnet18_convlstm_s2', 'in_channels': 40},
            r"reads \{'s2': 10\} channels, the data give \{'s2': 10, 's1': 2\}; use the backbone",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused_before_the_first_step(
    two_splits: MultiSenGEDataModule, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    task = small(**options)
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path).fit(task, two_splits)
    assert task.global_step == 0


def test_a_backbone_of_series_takes_another_number_of_slots(
    two_splits: MultiSenGEDataModule, tmp_path: Path
) -> None:
    trainer = trainer_in(tmp_path, limit_train_batches=1)
    trainer.fit(small(), two_splits)
    trainer.save_checkpoint(tmp_path / 'four.ckpt')
    loaded = S1S2SemanticSegmentation.load_from_checkpoint(tmp_path / 'four.ckpt')
    root, splits = two_splits.root, two_splits.kwargs['splits']
    shorter = MultiSenGEDataModule(
        root, batch_size=2, classes=CLASSES, splits=splits, series=MonthlySeries(months=(7, 8, 9))
    )
    logged = trainer.validate(loaded, shorter, verbose=False)[0]
    assert 0 <= logged['val_OverallAccuracy'] <= 1
    predicted = trainer.predict(loaded, shorter)
    assert predicted is not None
    assert predicted[0]['probabilities'].shape == (2, 3, 32, 32)  # type: ignore[call-overload]


def test_predictions_carry_their_place(two_splits: MultiSenGEDataModule, tmp_path: Path) -> None:
    predicted: Any = trainer_in(tmp_path).predict(small(), two_splits)
    batch = predicted[0]
    torch.testing.assert_close(batch['probabilities'].sum(1), torch.ones(2, 32, 32))
    assert batch['crs'].tolist() == [32631, 32631]
    assert batch['index'].tolist() == [0, 1]
    # The second patch is 33 pixels of 10 m east of the first.
    assert (batch['transform'][1] - batch['transform'][0]).tolist() == [0, 0, 330, *[0] * 6]
    assert batch['valid'].all()


def test_figures_go_to_the_logger_and_to_files(
    two_splits: MultiSenGEDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board(tmp_path / 'log')
    trainer = trainer_in(tmp_path, max_epochs=2, logger=board, num_sanity_val_steps=1)
    trainer.fit(small(figures=1), two_splits)
    # Two steps an epoch, and nothing from the sanity check.
    names = ['val_sample_0', 'val_confusion_matrix']
    assert board.figures == [(name, step) for step in (2, 4) for name in names]
    written = {p.name for p in (tmp_path / 'log' / 'figures').iterdir()}
    assert written == {'val_sample_0.png', 'val_confusion_matrix.png'}
    out = capsys.readouterr().out
    assert f'{trainer.callback_metrics["val_Kappa"]:8.4f}' in out
    assert 'Town' in out
    assert str(tmp_path / 'log' / 'figures' / 'val_sample_0.png') in out


def test_a_sanity_check_leaves_nothing_behind(
    two_splits: MultiSenGEDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a validation after it, there are no metrics and no pictures."""
    trainer = trainer_in(tmp_path, num_sanity_val_steps=1, check_val_every_n_epoch=5)
    trainer.fit(small(), two_splits)
    assert 'metrics' not in capsys.readouterr().out
    assert not (tmp_path / 'figures').exists()


def test_other_data_modules_give_a_confusion_matrix_only(tmp_path: Path) -> None:
    board = Board(tmp_path)
    trainer = trainer_in(tmp_path, logger=board)
    trainer.test(passing(figures=0), loader(batch_of(CONFUSION)), verbose=False)
    assert board.figures == [('test_confusion_matrix', 0)]


@pytest.mark.parametrize('checkpoint', [False, True])
def test_checkpoint_reaches_every_recurrent_layer(checkpoint: bool) -> None:
    layers = small(checkpoint=checkpoint).model.encoder.convlstm
    assert {name: layer.checkpoint for name, layer in layers.items()} == {
        's2': checkpoint,
        's1': checkpoint,
    }


@pytest.mark.parametrize('options', [{'backbone': 'resnet18'}, {'model': 'fcn'}])
def test_checkpoint_needs_a_backbone_of_series(options: dict[str, Any]) -> None:
    message = r'checkpoint=True with .*, expected a backbone that reads'
    with pytest.raises(ValueError, match=message):
        small(checkpoint=True, **options)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match='no_such_model'):
        small(model='no_such_model')
