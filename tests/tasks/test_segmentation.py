import inspect
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from conftest import write_patch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchgeo.datasets.utils import pad_across_batches
from torchgeo.tasks import SemanticSegmentation

from torchgeo_s1s2.datamodules import MultiSenGEDataModule
from torchgeo_s1s2.datasets import ClassScheme, LandCoverClass, MonthlySeries
from torchgeo_s1s2.errors import S1S2Warning
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


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split('.')[0]
        by_booleans = name == 'index' and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        waiting = ('_local_scalar_dense', 'nonzero', 'bincount', '_unique2', 'masked_select')
        if by_booleans or name in waiting:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


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


def test_metrics_are_logged_under_the_names_of_torchgeo_and_ours(tmp_path: Path) -> None:
    logged = trainer_in(tmp_path).test(passing(), loader(batch_of(CONFUSION)), verbose=False)[0]
    stock = SemanticSegmentation('fcn', num_classes=4, num_filters=1).test_metrics
    ours = {'loss', 'Kappa', *(f'Weighted{n}' for n in ('Precision', 'Recall', 'F1Score'))}
    ours |= {f'{n}_{k}' for n in ('Precision', 'Recall', 'F1Score') for k in range(4)}
    stock.update(torch.tensor([[0]]), torch.tensor([[0]]))
    assert logged.keys() == {*stock.compute(), *(f'test_{name}' for name in ours)}
    # By hand: 160 of 200 pixels are right; (64 * 61 + 36 * 55 + 100 * 84) / 200**2 are by chance.
    assert logged['test_OverallAccuracy'] == pytest.approx(0.8)
    assert logged['test_Kappa'] == pytest.approx((0.8 - 0.3571) / (1 - 0.3571))


def test_metrics_add_up_over_batches_and_start_anew_each_epoch(tmp_path: Path) -> None:
    task, trainer = passing(), trainer_in(tmp_path)
    parts = CONFUSION // 2, CONFUSION - CONFUSION // 2
    for _ in range(2):
        batches = [batch_of(part) for part in parts]
        logged = trainer.validate(task, loader(*batches), verbose=False)[0]
        metrics: Any = task.val_metrics
        (scores,) = metrics.values()
        assert scores.counted.tolist() == CONFUSION.tolist()
        assert logged['val_OverallAccuracy'] == pytest.approx(0.8)


@pytest.mark.parametrize(
    'options',
    [{}, {'class_weights': [1.0, 2.0, 0.0]}, {'loss': 'focal'}, {'backbone': 'resnet18'}],
)
def test_a_training_step_never_makes_the_host_wait(tmp_path: Path, options: Any) -> None:
    """Neither the model nor the loss, the metrics or the logging."""
    task, waits = small(**options), []
    step = task.training_step

    def counted(batch: Any, batch_idx: int) -> Tensor:
        with Waits() as mode:
            loss = step(batch, batch_idx)
        waits.append(mode.found)
        return loss

    task.training_step = counted  # type: ignore[assignment, method-assign]
    batch = {'image': torch.randn(2, 4, 12, 32, 32), 'mask': torch.randint(0, 3, (2, 32, 32))}
    batch['mask'][0, 0] = 255
    batch['valid'] = torch.rand(2, 4, 2) > 0.5
    trainer_in(tmp_path, enable_progress_bar=True).fit(task, loader(batch, batch))
    assert waits == [Counter(), Counter()]


def test_the_loss_of_an_epoch_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, 2.0, 4.0, 8.0])
    parts = [batch_of(part) for part in (CONFUSION // 7, CONFUSION - CONFUSION // 7)]
    image, mask = (torch.cat([part[key] for part in parts], -1) for key in ('image', 'mask'))
    expected = F.cross_entropy(image, mask, weight, ignore_index=255)
    task = passing(class_weights=weight.tolist())
    logged = trainer_in(tmp_path).validate(task, loader(*parts), verbose=False)[0]
    assert logged['val_loss'] == pytest.approx(expected.item(), rel=1e-5)


UNLABELLED = torch.full((2, 32, 32), 255)
WEIGHTLESS = torch.full((2, 32, 32), 2)


@pytest.mark.parametrize('mask', [UNLABELLED, WEIGHTLESS])
@pytest.mark.parametrize('loss', ['ce', 'focal', 'dice', 'jaccard'])
def test_a_batch_that_does_not_count_changes_nothing(
    tmp_path: Path, mask: Tensor, loss: Any
) -> None:
    weights = [1.0, 1.0, 0.0] if loss == 'ce' else None
    if weights is None and mask is WEIGHTLESS:
        pytest.skip('only cross-entropy has weights')
    batch = {'image': torch.randn(2, 48, 32, 32), 'mask': mask}
    task = small(loss=loss, class_weights=weights)
    before = {k: v.clone() for k, v in task.named_parameters()}
    with pytest.warns(S1S2Warning, match=r"split 'train' counts.* nothing is learned from it"):
        trainer_in(tmp_path).fit(task, loader(batch))
    assert all(torch.equal(v, before[k]) for k, v in task.named_parameters())
    logged = trainer_in(tmp_path).validate(task, loader(batch), verbose=False)[0]
    assert math.isnan(logged['val_loss'])


class Fading(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One batch, which has labels in some epochs only; the sanity check is the first."""

    def __init__(self, labelled: list[bool]) -> None:
        self.labelled = iter(labelled)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = torch.zeros(2, 32, 32).long() if next(self.labelled) else UNLABELLED
        return {'image': torch.ones(2, 48, 32, 32), 'mask': mask}


def test_a_validation_without_labels_is_never_the_best(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, '{epoch}', monitor='val_loss')
    stop = EarlyStopping('val_loss', check_finite=False, patience=9)
    trainer = trainer_in(tmp_path, max_epochs=3, callbacks=[best, stop], enable_checkpointing=True)
    batch = {'image': torch.randn(2, 48, 32, 32), 'mask': torch.zeros(2, 32, 32).long()}
    data = DataLoader(Fading([True, False, True, False]), batch_size=None)
    task = small(lr=1e-4, patience=0)
    with pytest.warns(S1S2Warning, match=r"split 'val' counts.* val_loss is NaN"):
        trainer.fit(task, loader(batch), data)
    assert Path(best.best_model_path).name == 'epoch=1.ckpt'
    assert math.isfinite(stop.best_score)
    # What could not be measured does not lower the learning rate.
    assert trainer.optimizers[0].param_groups[0]['lr'] == 1e-4


@pytest.mark.parametrize('ignore', [None, 0, 255, 7])
def test_255_never_counts_and_other_strangers_are_said(tmp_path: Path, ignore: int | None) -> None:
    mask = torch.tensor([[[0, 1, 255, 2, 2, 7]]])
    logits = torch.randn(1, 3, 1, 6)
    task = passing(num_classes=3, ignore_index=ignore)
    batch = {'image': logits, 'mask': mask}
    trainer = trainer_in(tmp_path)
    if ignore == 7:
        logged = trainer.validate(task, loader(batch), verbose=False)[0]
    else:
        with pytest.warns(S1S2Warning, match=r'1 pixels of the val masks hold .* class, 0..2'):
            logged = trainer.validate(task, loader(batch), verbose=False)[0]
    counting = [k for k in (0, 1, 3, 4) if mask[0, 0, k] != ignore]
    expected = F.cross_entropy(logits[..., counting], mask[..., counting])
    assert logged['val_loss'] == pytest.approx(expected.item(), rel=1e-5)


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
    'options',
    [
        {'loss': 'dice'},
        {'task': 'binary'},
        {'class_weights': 'equal'},
        *(
            {'loss': loss, 'class_weights': [1.0, 2.0, 3.0]}
            for loss in ('dice', 'focal', 'jaccard')
        ),
    ],
)
def test_weights_act_in_cross_entropy_only(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"class_weights=.*for loss='ce' and task='multiclass'"):
        small(**({'class_weights': 'balanced'} | options))


def test_weights_need_as_many_classes() -> None:
    with pytest.raises(ValueError, match='class_weights has 2 weights for num_classes=3'):
        small(class_weights=[1.0, 2.0])


def test_a_loss_has_to_go_with_the_task() -> None:
    with pytest.raises(ValueError, match="loss='bce' with task='multiclass': 'ce' is for"):
        small(loss='bce')


def test_balanced_weights_need_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'needs a data module that computes them.* give a list'):
        trainer_in(tmp_path).fit(passing(class_weights='balanced'), loader(batch_of(CONFUSION)))


LOSSES = {
    'multiclass': ('ce', 'jaccard', 'focal', 'dice'),
    'binary': ('bce', 'jaccard', 'focal', 'dice'),
    'multilabel': ('bce', 'jaccard', 'focal', 'dice'),
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


def test_focal_loss_by_hand() -> None:
    task = passing(task='multilabel', num_labels=3, loss='focal')
    logits, mask = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4).long()
    mask[..., 0] = 255
    # All pixels are as hard: the normalised loss is cross-entropy's over the number of pixels.
    assert task._loss(logits, mask) == pytest.approx(math.log(2) / 12)


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


@pytest.mark.parametrize('name', ['recompute_gates', 'checkpoint'])
def test_gates_are_recomputed_under_both_names(name: str) -> None:
    task = small(**{name: True})
    assert task.hparams['recompute_gates']
    assert not {'checkpoint', 'figures'} & set(task.hparams)
    image, mask = torch.randn(2, 48, 32, 32), torch.randint(0, 3, (2, 32, 32))
    held = [_held(t, image, mask) for t in (task, small())]
    assert held[0] < 0.8 * held[1]


def _held(task: S1S2SemanticSegmentation, image: Tensor, mask: Tensor) -> int:
    """Bytes that the recurrent layers keep for the backward pass."""
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        features = [
            layer(x, None)
            for layer, x in zip(
                task.model.encoder.convlstm.values(),
                image.unflatten(1, (4, 12)).split([10, 2], 2),
                strict=True,
            )
        ]
    assert features
    return sum(sizes.values())


@pytest.mark.parametrize('options', [{'backbone': 'resnet18'}, {'model': 'fcn'}])
def test_recomputing_needs_a_backbone_of_series(options: dict[str, Any]) -> None:
    message = r'recompute_gates=True with .*, expected a backbone that reads'
    with pytest.raises(ValueError, match=message):
        small(recompute_gates=True, **options)


def test_old_arguments_are_said() -> None:
    with pytest.warns(S1S2Warning, match=r'figures is an old argument.*callbacks.Report'):
        passing(figures=2)
    with pytest.warns(S1S2Warning, match='checkpoint is an old argument.* recompute_gates'):
        small(checkpoint=False)


def test_sizes_of_the_decoder_are_arguments() -> None:
    task = small(model_kwargs={'decoder_channels': [64, 32, 16, 8, 4]})
    assert task.model.segmentation_head[0].weight.shape == (3, 4, 3, 3)


def test_true_on_the_command_line_is_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    model = smp.Unet('resnet18', encoder_weights=None)
    monkeypatch.setattr(
        smp, 'create_model', lambda *_, **options: (asked.update(options), model)[1]
    )
    small(weights='true', backbone='resnet18')
    assert asked['encoder_weights'] == 'imagenet'
    small(weights='false', backbone='resnet18')
    assert asked['encoder_weights'] is None


@pytest.mark.parametrize('key', ['valid', 'length'])
def test_what_a_sensor_did_not_see_is_not_read(key: str) -> None:
    """Whatever the image holds there, such as noise that was added after the normalisation."""
    task = small().eval()
    image = torch.randn(2, 4, 12, 32, 32)
    if key == 'valid':
        known = torch.ones(2, 4, 2, dtype=torch.bool)
        known[0, 1, 0] = known[1, 2:] = False
        batch = {'image': image, 'valid': known}
    else:
        samples = [{'image': image[0, :3]}, {'image': image[1, :2]}]
        batch = pad_across_batches(samples, 4)
        known = (torch.arange(4) < batch['length'][:, None])[..., None].expand(-1, -1, 2)
    seen = known.repeat_interleave(torch.tensor([10, 2]), 2)[..., None, None]
    noisy = {**batch, 'image': batch['image'].where(seen, torch.randn_like(image))}
    expected = task(batch['image'].where(seen, 0)).softmax(1)
    torch.testing.assert_close(task.predict_step(noisy, 0)['probabilities'], expected)


def scheme(*order: int, names: tuple[str, ...] = ('Town', 'Field', 'Water')) -> ClassScheme:
    classes = zip(names, CLASSES.classes, strict=True)
    renamed = [LandCoverClass(name, c.color, c.labels) for name, c in classes]
    return ClassScheme(tuple(renamed[k] for k in order))


def data_of(two_splits: MultiSenGEDataModule, classes: ClassScheme) -> MultiSenGEDataModule:
    splits = two_splits.kwargs['splits']
    return MultiSenGEDataModule(two_splits.root, batch_size=2, classes=classes, splits=splits)


@pytest.fixture
def trained(two_splits: MultiSenGEDataModule, tmp_path: Path) -> Path:
    """A checkpoint of the classes Town, Field and Water."""
    trainer = trainer_in(tmp_path, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(small(), two_splits)
    trainer.save_checkpoint(tmp_path / 'trained.ckpt')
    return tmp_path / 'trained.ckpt'


RENAMED = scheme(0, 1, 2, names=('Town', 'Field', 'Ice'))


@pytest.mark.parametrize(
    ('stage', 'classes', 'message'),
    [
        ('fit', scheme(1, 0, 2), r'0: Town there, Field here; 1: Field there, Town here\. Give'),
        ('test', RENAMED, '2: Water there, Ice here'),
        ('predict', scheme(1, 0, 2), '0: Town there, Field here'),
    ],
)
def test_other_classes_than_those_of_the_checkpoint_are_refused(
    trained: Path,
    two_splits: MultiSenGEDataModule,
    tmp_path: Path,
    stage: str,
    classes: ClassScheme,
    message: str,
) -> None:
    data = data_of(two_splits, classes)
    loaded = S1S2SemanticSegmentation.load_from_checkpoint(trained)
    with pytest.raises(ValueError, match=message):
        getattr(trainer_in(tmp_path), stage)(loaded, data)
    with pytest.raises(ValueError, match=message):
        getattr(trainer_in(tmp_path, max_epochs=2), stage)(small(), data, ckpt_path=trained)


def test_classes_in_other_letters_are_the_same(
    trained: Path, two_splits: MultiSenGEDataModule, tmp_path: Path
) -> None:
    data = data_of(two_splits, scheme(0, 1, 2, names=('TOWN', 'field', 'Water')))
    loaded = S1S2SemanticSegmentation.load_from_checkpoint(trained)
    assert trainer_in(tmp_path).validate(loaded, data, verbose=False)


def test_a_head_of_other_classes_is_said(
    trained: Path, two_splits: MultiSenGEDataModule, tmp_path: Path
) -> None:
    data = data_of(two_splits, scheme(2, 1, 0))
    with pytest.warns(S1S2Warning, match='head .*0: Town there, Water here; 2: Water'):
        trainer_in(tmp_path, fast_dev_run=True).fit(small(weights=str(trained)), data)


def test_labels_in_another_order_than_the_data_are_refused(
    two_splits: MultiSenGEDataModule, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match='leave labels out'):
        trainer_in(tmp_path).test(small(labels=['Field', 'Town', 'Water']), two_splits)


def test_training_without_a_label_is_refused(tmp_path: Path) -> None:
    for x in range(2):
        write_patch(tmp_path / 'data', '32ULU', 33 * x, labels=np.full((32, 32), 9, np.uint8))
    data = MultiSenGEDataModule(
        tmp_path / 'data',
        batch_size=2,
        classes=CLASSES,
        splits={split: ['32ULU'] for split in TILES},
    )
    task = small()
    with pytest.raises(ValueError, match='no training pixel has a label'):
        trainer_in(tmp_path).fit(task, data)
    assert task.global_step == 0


def test_what_is_frozen_stays_so_whoever_calls_train(tmp_path: Path) -> None:
    task = small(freeze_backbone=True, freeze_decoder=True)
    task.model.train()
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    task(torch.randn(2, 48, 32, 32)).sum().backward()
    assert changed(before, task.model) == {'encoder.convlstm'}
    assert all(p.grad is None for p in task.model.decoder.parameters())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match='no_such_model'):
        small(model='no_such_model')
