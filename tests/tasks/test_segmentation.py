import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from conftest import Waits, quiet_trainer, write_patch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchgeo.tasks import SemanticSegmentation

from torchgeo_s1s2.datamodules import MultiSenGEDataModule
from torchgeo_s1s2.datasets import ClassScheme, LandCoverClass
from torchgeo_s1s2.errors import S1S2Warning
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation

# Rows are the truth, columns the prediction; class 3 is in neither.
CONFUSION = np.array([[50, 10, 4, 0], [6, 30, 0, 0], [5, 15, 80, 0], [0, 0, 0, 0]])
COLORS_AND_LABELS = ((255, 0, 0), (2,)), ((0, 255, 0), (6,)), ((0, 0, 255), (14,))


def scheme(*order: int, names: tuple[str, ...] = ('Town', 'Field', 'Water')) -> ClassScheme:
    classes = [LandCoverClass(n, *c) for n, c in zip(names, COLORS_AND_LABELS, strict=True)]
    return ClassScheme(tuple(classes[k] for k in order))


CLASSES = scheme(0, 1, 2)


def passing(**options: Any) -> S1S2SemanticSegmentation:
    """A task whose model gives the image back as the logits, so that a test chooses them."""
    defaults: dict[str, Any] = {'in_channels': 4, 'num_classes': 4, 'num_filters': 1}
    task = S1S2SemanticSegmentation('fcn', **(defaults | options))
    task.model = nn.Identity()
    return task


def small(**options: Any) -> S1S2SemanticSegmentation:
    defaults: dict[str, Any] = {'backbone': 'resnet18_convlstm_inception', 'num_classes': 3}
    return S1S2SemanticSegmentation(**(defaults | options))


def tiny(**options: Any) -> S1S2SemanticSegmentation:
    return small(model='fcn', num_filters=1, **options)


def batch_of(confusion: NDArray[np.int_], unlabelled: int = 20) -> dict[str, Tensor]:
    """A batch of one row of pixels with that confusion matrix, and pixels without a label."""
    truth, prediction = np.indices(confusion.shape).reshape(2, -1)
    counts = confusion.ravel()
    y = torch.tensor([*np.repeat(truth, counts), *[255] * unlabelled])
    p = torch.tensor([*np.repeat(prediction, counts), *[0] * unlabelled])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    logits = 5 * F.one_hot(p[order], len(confusion)).float()
    return {'image': logits.T[None, :, None], 'mask': y[order][None, None]}


def loader(*batches: dict[str, Tensor]) -> Any:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def images(**more: Tensor) -> dict[str, Tensor]:
    """Two random series with masks of three classes."""
    mask = torch.randint(0, 3, (2, 32, 32))
    return {'image': torch.randn(2, 4, 12, 32, 32) + 1, 'mask': mask, **more}


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two validation and test patches of half fields, half town."""
    root = tmp_path_factory.mktemp('data')
    for tile, x in [('32ULU', x) for x in range(4)] + [('31UEQ', 0), ('31UEQ', 1)]:
        write_patch(root, tile, 33 * x)
    return root


def data_of(
    root: Path, classes: ClassScheme = CLASSES, test: str = '31UEQ'
) -> MultiSenGEDataModule:
    splits = {'train': ['32ULU'], 'val': ['31UEQ'], 'test': [test]}
    return MultiSenGEDataModule(root, batch_size=2, classes=classes, splits=splits)


def test_metrics_of_torchgeo_and_ours_add_up_over_batches_and_start_anew(tmp_path: Path) -> None:
    labels = ['a', 'b', 'c', 'd']
    stock = SemanticSegmentation('fcn', num_classes=4, num_filters=1, labels=labels).test_metrics
    ours = {'loss', 'Kappa', *(f'Weighted{n}' for n in ('Precision', 'Recall', 'F1Score'))}
    ours |= {f'{n}_{k}' for n in ('Precision', 'Recall', 'F1Score') for k in labels}
    stock.update(torch.tensor([[0]]), torch.tensor([[0]]))
    task, trainer = passing(labels=labels), quiet_trainer(tmp_path)
    batches = [batch_of(part) for part in (CONFUSION // 2, CONFUSION - CONFUSION // 2)]
    for _ in range(2):
        logged = trainer.test(task, loader(*batches), verbose=False)[0]
        assert logged.keys() == {*stock.compute(), *(f'test_{name}' for name in ours)}
        # Right are 160 of 200 pixels, by chance (64 * 61 + 36 * 55 + 100 * 84) / 200**2.
        assert logged['test_OverallAccuracy'] == pytest.approx(0.8)
        assert logged['test_Recall_b'] == pytest.approx(30 / 36)
        assert logged['test_Kappa'] == pytest.approx((0.8 - 0.3571) / (1 - 0.3571))


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
    batch = images(valid=torch.rand(2, 4, 2) > 0.5)
    batch['mask'][0, 0] = 255
    quiet_trainer(tmp_path, enable_progress_bar=True).fit(task, loader(batch, batch))
    assert waits == [Counter(), Counter()]


def test_a_step_copies_nothing_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    task = small(class_weights=[1.0, 2.0, 0.0]).to('meta')
    monkeypatch.setattr(task, 'log', lambda *_, **options: None)
    batch = images(valid=torch.rand(2, 4, 2) > 0.5)
    batch = {name: value.to('meta') for name, value in batch.items()}
    with Waits() as mode:
        for stage in ('train', 'val'):
            task._step(stage, batch)
    assert not mode.found


@pytest.mark.parametrize('kind', [list, torch.tensor])
def test_the_weighted_loss_of_an_epoch_does_not_depend_on_its_batches(
    tmp_path: Path, kind: Any
) -> None:
    weights = [1.0, 2.0, 4.0, 8.0]
    parts = [batch_of(part) for part in (CONFUSION // 7, CONFUSION - CONFUSION // 7)]
    logged = quiet_trainer(tmp_path).validate(
        passing(class_weights=kind(weights)), loader(*parts), verbose=False
    )[0]
    # A right pixel costs log(1 + 3 exp(-5)), a wrong one 5 more; each by the weight of its truth.
    right, wrong = math.log1p(3 * math.exp(-5)), 5 + math.log1p(3 * math.exp(-5))
    total = (50 + 30 * 2 + 80 * 4) * right + (14 + 6 * 2 + 20 * 4) * wrong
    assert logged['val_loss'] == pytest.approx(total / (64 + 36 * 2 + 100 * 4), rel=1e-5)


UNLABELLED, WEIGHTLESS = torch.full((2, 32, 32), 255), torch.full((2, 32, 32), 2)
CASES = [(loss, UNLABELLED) for loss in ('ce', 'focal', 'dice', 'jaccard')]


@pytest.mark.parametrize(('loss', 'mask'), [*CASES, ('ce', WEIGHTLESS)])
def test_a_batch_that_does_not_count_changes_nothing(
    tmp_path: Path, loss: Any, mask: Tensor
) -> None:
    batch = {'image': torch.randn(2, 48, 32, 32), 'mask': mask}
    task = small(loss=loss, class_weights=[1.0, 1.0, 0.0] if loss == 'ce' else None)
    before = {k: v.clone() for k, v in task.named_parameters()}
    with pytest.warns(S1S2Warning, match=r"split 'train' counts.* nothing is learned from it"):
        quiet_trainer(tmp_path).fit(task, loader(batch))
    assert all(torch.equal(v, before[k]) for k, v in task.named_parameters())
    logged = quiet_trainer(tmp_path).validate(task, loader(batch), verbose=False)[0]
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
    trainer = quiet_trainer(
        tmp_path, max_epochs=3, callbacks=[best, stop], enable_checkpointing=True
    )
    data = DataLoader(Fading([True, False, True, False]), batch_size=None)
    task = small(lr=1e-4, patience=0)
    with pytest.warns(S1S2Warning, match=r"split 'val' counts.* val_loss is NaN"):
        trainer.fit(task, loader(images()), data)
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
    trainer = quiet_trainer(tmp_path)
    expects = pytest.warns(S1S2Warning, match=r'1 pixels of the val masks hold .* class, 0..2')
    with nullcontext() if ignore == 7 else expects:
        logged = trainer.validate(task, loader(batch), verbose=False)[0]
    counting = [k for k in (0, 1, 3, 4) if mask[0, 0, k] != ignore]
    expected = F.cross_entropy(logits[..., counting], mask[..., counting])
    assert logged['val_loss'] == pytest.approx(expected.item(), rel=1e-5)


def test_losses_that_are_not_finite_are_said(tmp_path: Path) -> None:
    mask = torch.zeros(1, 2, 2).long()
    batches = [
        {'image': x.expand(1, 3, 2, 2), 'mask': mask} for x in torch.tensor([1, math.nan, 0])
    ]
    with pytest.warns(S1S2Warning, match=r"1 steps of split 'val' had a loss that is not finite"):
        quiet_trainer(tmp_path).validate(passing(num_classes=3), loader(*batches), verbose=False)


def test_signature_accepts_what_torchgeo_accepts() -> None:
    theirs = inspect.signature(SemanticSegmentation.__init__).parameters
    ours = inspect.signature(S1S2SemanticSegmentation.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)


def test_balanced_weights_come_from_the_training_patches(root: Path, tmp_path: Path) -> None:
    task = small(class_weights='balanced')
    quiet_trainer(tmp_path, fast_dev_run=True).fit(task, data_of(root))
    # Half of the pixels are town and half are field, none is water; the sum is 1000.
    assert task.criterion.weight.tolist() == [500, 500, 0]


def test_a_fit_may_follow_a_test(root: Path, tmp_path: Path) -> None:
    """With what the test made, in inference mode."""
    task, data = small(), data_of(root)
    quiet_trainer(tmp_path, limit_test_batches=1).test(task, data, verbose=False)
    trainer = quiet_trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(task, data)
    assert math.isfinite(trainer.callback_metrics['train_loss'])


def test_numbers_of_numpy_come_back_from_a_checkpoint(root: Path, tmp_path: Path) -> None:
    """As np.logspace and compute_class_weight of scikit-learn give them."""
    trainer = quiet_trainer(tmp_path, fast_dev_run=True)
    trainer.fit(tiny(class_weights=np.array([1.0, 2.0, 3.0]), lr=np.float64(0.5)), data_of(root))
    trainer.save_checkpoint(tmp_path / 'x.ckpt')
    task = S1S2SemanticSegmentation.load_from_checkpoint(tmp_path / 'x.ckpt', map_location='cpu')
    assert (task.hparams['class_weights'], task.hparams['lr']) == ([1, 2, 3], 0.5)


def test_a_task_of_one_s_own_may_take_a_class_scheme() -> None:
    class Own(S1S2SemanticSegmentation):
        def __init__(self, scheme: ClassScheme, **options: Any) -> None:
            super().__init__(**options)

    assert Own(CLASSES, backbone='resnet18', num_classes=3).hparams['scheme'] == CLASSES


def test_balanced_weights_need_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'needs a data module that computes them.* give a list'):
        quiet_trainer(tmp_path).fit(passing(class_weights='balanced'), loader(batch_of(CONFUSION)))


@pytest.mark.parametrize('weights', ['balanced', None, [2.0, 1.0, 1.0]])
def test_a_balanced_checkpoint_serves_other_data_and_tasks(
    root: Path, tmp_path: Path, weights: Any
) -> None:
    """Whose loss has the weights of the checkpoint, if it has any."""
    trainer = quiet_trainer(tmp_path, fast_dev_run=True)
    trainer.fit(tiny(class_weights='balanced'), data_of(root))
    trainer.save_checkpoint(tmp_path / 'balanced.ckpt')
    task = tiny(class_weights=weights)
    quiet_trainer(tmp_path).test(
        task, loader(images()), ckpt_path=tmp_path / 'balanced.ckpt', verbose=False
    )
    assert getattr(task.criterion.weight, 'tolist', list)() == ([500, 500, 0] if weights else [])


WEIGHTS = r"class_weights=.*for loss='ce' and task='multiclass'"
RECOMPUTE = r'recompute_gates=True with .*, expected a backbone that reads'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_classes': None}, "task='multiclass' needs num_classes, at least 2, got None"),
        ({'num_classes': 1}, 'at least 2, got 1; one class .* is task='),
        ({'labels': ['a', 'b']}, '2 labels for num_classes=3'),
        ({'labels': ['a', 'b', 'a']}, 'name two classes alike'),
        ({'loss': 'crossentropy'}, "loss is 'crossentropy', expected one of ce, bce, focal"),
        ({'class_weights': [1.0, -1.0, 1.0]}, 'expected finite numbers from 0'),
        ({'class_weights': [1.0, math.nan, 1.0]}, 'expected finite numbers from 0'),
        ({'class_weights': [[1.0, 1.0, 1.0]] * 3}, 'expected finite numbers from 0'),
        ({'model': 'fcn', 'freeze_backbone': True, 'weights': True}, 'no freeze_backbone, weights'),
        ({'weights': 'imagenot'}, "weights is 'imagenot', expected 'imagenet', the path"),
        ({'loss': 'bce'}, "loss='bce' with task='multiclass': 'ce' is for"),
        ({'model': 'no_such_model'}, 'no_such_model'),
        ({'class_weights': [1.0, 2.0]}, 'class_weights has 2 weights for num_classes=3'),
        ({'class_weights': 'equal'}, WEIGHTS),
        ({'class_weights': 'balanced', 'task': 'binary'}, WEIGHTS),
        ({'class_weights': [1.0, 2.0, 3.0], 'loss': 'dice'}, WEIGHTS),
        (
            {'backbone': 'resnet18_attention_fullres_late'},
            "in this order .* '_late', .* '_fullres'",
        ),
        ({'backbone': 'tu-resnet18_convlstm'}, "'timm_' and the name of a timm model"),
        ({'recompute_gates': True, 'backbone': 'resnet18'}, RECOMPUTE),
        ({'recompute_gates': True, 'model': 'fcn'}, RECOMPUTE),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        small(**options)


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
    value = task.criterion(noisy, wide)[0]
    torch.testing.assert_close(value, task.criterion(logits, mask)[0])
    negative = passing(task=kind, loss=loss, ignore_index=-1, **numbers[kind])
    torch.testing.assert_close(negative.criterion(logits, mask), task.criterion(logits, mask))
    (gradient,) = torch.autograd.grad(value, noisy)
    assert gradient.isfinite().all()
    assert gradient[..., 0, :].abs().max() == 0
    assert gradient[..., 1:-1, 1:-1].abs().max() > 0


def test_focal_loss_by_hand() -> None:
    task = passing(task='multilabel', num_labels=3, loss='focal')
    logits, mask = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4).long()
    mask[..., 0] = 255
    # All pixels are as hard: the normalised loss is cross-entropy's over the number of pixels.
    assert task.criterion(logits, mask)[0] == pytest.approx(math.log(2) / 12)


def test_binary_cross_entropy_weighs_positives() -> None:
    weight = torch.tensor(3.0)
    task = passing(task='binary', loss='bce', pos_weight=weight, ignore_index=None)
    logits, mask = torch.randn(2, 6, 6), torch.randint(0, 2, (2, 6, 6))
    expected = F.binary_cross_entropy_with_logits(logits, mask.float(), pos_weight=weight)
    torch.testing.assert_close(task.criterion(logits, mask)[0], expected)


@pytest.mark.parametrize('options', [{}, {'class_weights': [1.0, 2.0, 4.0]}])
@pytest.mark.parametrize('precision', ['16-true', 'bf16-true', '64-true'])
def test_the_loss_of_a_pure_precision_is_that_of_its_logits(
    tmp_path: Path, options: dict[str, Any], precision: Any
) -> None:
    """In single precision at least: half precision cannot count as many pixels."""
    kind = {'16': torch.float16, 'bf16': torch.bfloat16, '64': torch.float64}[precision[:-5]]
    logits = torch.randn(1, 3, 300, 300).to(kind)
    mask = torch.randint(0, 3, (1, 300, 300))
    logged = quiet_trainer(tmp_path, precision=precision).validate(
        passing(num_classes=3, **options), loader({'image': logits, 'mask': mask}), verbose=False
    )[0]
    weight = torch.tensor(options.get('class_weights', [1.0] * 3))
    expected = F.cross_entropy(logits.float(), mask, weight)
    assert logged['val_loss'] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ('mask', 'found'),
    [
        (None, 'missing'),
        (torch.zeros(2, 1, 32, 32).long(), r'torch.int64 of shape \(2, 1, 32, 32\)'),
        (torch.zeros(2, 16, 16).long(), r'torch.int64 of shape \(2, 16, 16\)'),
        (torch.zeros(2, 32, 32), 'torch.float32'),
    ],
)
def test_a_mask_that_is_none_is_refused(mask: Tensor | None, found: str) -> None:
    batch = {'image': torch.randn(2, 3, 32, 32)} | ({} if mask is None else {'mask': mask})
    with pytest.raises(ValueError, match=f'mask of the batch is {found}.*whole numbers of shape'):
        passing(num_classes=3)._step('val', batch)


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
    batch = images(mask=torch.randint(0, 2, shape))
    trainer = quiet_trainer(tmp_path)
    trainer.fit(task, loader(batch), loader(batch))
    name = 'val_WeightedF1Score' if outputs == 14 else 'val_AverageF1Score'
    assert 0 <= trainer.callback_metrics[name] <= 1
    predicted = trainer.predict(task, loader(batch))
    assert predicted is not None
    assert predicted[0]['probabilities'].shape == (2, outputs, 32, 32)  # type: ignore[call-overload]


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """Names of the two upper levels of the weights and buffers that are not what they were."""
    now = module.state_dict()
    return {'.'.join(k.split('.')[:2]) for k in now if not torch.equal(now[k], before[k])}


FRONT = {'encoder.convlstm', 'encoder.inception'}
REST = {'decoder.blocks', 'segmentation_head.0'}


@pytest.mark.parametrize(
    ('options', 'learning'),
    [
        ({'freeze_backbone': True}, FRONT | REST),
        ({'freeze_backbone': True, 'backbone': 'resnet18'}, REST),
        ({'freeze_decoder': True}, {*FRONT, 'encoder.spatial', 'segmentation_head.0'}),
    ],
)
def test_what_is_frozen_stays_as_it_was(
    tmp_path: Path, options: dict[str, Any], learning: set[str]
) -> None:
    task = small(**options)
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    quiet_trainer(tmp_path, max_epochs=2).fit(task, loader(images()), loader(images()))
    assert changed(before, task.model) == learning


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
        ({'labels': ['Field', 'Town', 'Water']}, 'leave labels out'),
        ({'class_weights': [0.0, 0.0, 1.0]}, 'all classes that have a training pixel have the wei'),
    ],
)
def test_data_that_do_not_fit_are_refused_before_the_first_step(
    root: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    task = small(**options)
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path).fit(task, data_of(root))
    assert task.global_step == 0


def test_predictions_carry_their_place(root: Path, tmp_path: Path) -> None:
    predicted: Any = quiet_trainer(tmp_path).predict(small(), data_of(root))
    batch = predicted[0]
    torch.testing.assert_close(batch['probabilities'].sum(1), torch.ones(2, 32, 32))
    assert batch['crs'].tolist() == [32631, 32631]
    assert batch['index'].tolist() == [0, 1]
    # The second patch is 33 pixels of 10 m east of the first.
    assert (batch['transform'][1] - batch['transform'][0]).tolist() == [0, 0, 330, *[0] * 6]
    assert batch['valid'].all()


@pytest.mark.parametrize('name', ['recompute_gates', 'checkpoint'])
def test_gates_are_recomputed_under_both_names(name: str) -> None:
    old = pytest.warns(S1S2Warning, match='checkpoint is an old argument.*recompute_gates now')
    with old if name == 'checkpoint' else nullcontext():
        task = small(**{name: True})
    with pytest.warns(S1S2Warning, match='figures is an old argument.*Report'):
        small(figures=0)
    assert task.hparams['recompute_gates']
    assert not {'checkpoint', 'figures'} & set(task.hparams)
    assert all(layer.recompute_gates for layer in task.model.encoder.convlstm.values())


def test_sizes_of_the_decoder_are_arguments() -> None:
    task = small(model_kwargs={'decoder_channels': [64, 32, 16, 8, 4]})
    assert task.model.segmentation_head[0].weight.shape == (3, 4, 3, 3)


@pytest.mark.parametrize('weights', ['true', 'imagenet'])
def test_true_on_the_command_line_is_imagenet(
    monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    asked: dict[str, Any] = {}
    model = smp.Unet('resnet18', encoder_weights=None)
    monkeypatch.setattr(
        smp, 'create_model', lambda *_, **options: (asked.update(options), model)[1]
    )
    small(weights=weights, backbone='resnet18')
    assert asked['encoder_weights'] == 'imagenet'
    small(weights='false', backbone='resnet18')
    assert asked['encoder_weights'] is None


def of_command(path: Path | str | None) -> Trainer:
    """Trainer of a command with that ``--ckpt_path``."""
    parser = LightningArgumentParser()
    return Trainer(callbacks=[SaveConfigCallback(parser, Namespace(ckpt_path=path))])


@pytest.mark.parametrize('path', ['a.ckpt', 'last', None])
def test_only_the_file_of_a_command_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    """And neither 'last' nor what a search of learning rates or batch sizes saved."""
    monkeypatch.setattr('sys.argv', ['torchgeo', '--model.lr=1', '--data.root=x'])
    monkeypatch.chdir(tmp_path)
    Path('a.ckpt').touch()
    task = small()
    task.trainer = of_command(path)
    saved = {'state_dict': {}, 'hyper_parameters': {'_class_path': 'S1S2SemanticSegmentation'}}
    is_file = path == 'a.ckpt'
    with (
        pytest.warns(S1S2Warning, match='not used: --model.lr=1$')
        if is_file
        else warnings.catch_warnings(action='error')
    ):
        task.on_load_checkpoint(saved)


def test_a_checkpoint_whose_arguments_do_not_fit_the_data_is_named(
    root: Path, tmp_path: Path
) -> None:
    task, data, path = small(num_classes=5), data_of(root), tmp_path / 'five.ckpt'
    path.touch()
    data.setup('test')
    task.trainer = of_command(path)
    task.trainer.datamodule = data  # type: ignore[attr-defined]
    message = r'model of .*five\.ckpt \(whose .* num_classes=5, the data have 3 classes'
    with pytest.raises(ValueError, match=message):
        task.setup('test')


def said(run: Callable[[], Any], words: str) -> bool:
    """Whether something is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run()
    return any(words in str(w.message) for w in caught)


@pytest.mark.parametrize('stage', ['validate', 'test', 'predict'])
def test_weights_that_have_learned_nothing_are_said(tmp_path: Path, stage: str) -> None:
    """Whatever was named: what counts is whether weights were loaded, or learned."""
    data = loader(images())

    def is_said(task: S1S2SemanticSegmentation, **options: Any) -> bool:
        trainer = quiet_trainer(tmp_path / 'other', fast_dev_run='ckpt_path' not in options)
        run = getattr(trainer, stage)
        return said(lambda: run(task, data, **options), 'no checkpoint was loaded')

    assert is_said(tiny())
    assert is_said(tiny(), ckpt_path='last')
    learned = tiny()
    fit = quiet_trainer(tmp_path, max_epochs=1)
    assert not said(lambda: fit.fit(learned, data, data), 'no checkpoint was loaded')
    assert not is_said(learned)
    path = tmp_path / 'learned.ckpt'
    fit.save_checkpoint(path)
    assert not is_said(tiny(), ckpt_path=path)
    assert not is_said(S1S2SemanticSegmentation.load_from_checkpoint(path))
    by_hand = tiny()
    by_hand.model.load_state_dict(learned.model.state_dict())
    assert not is_said(by_hand)
    other = tiny()
    other.model = learned.model
    assert not is_said(other)


class Keeper(Callback):
    def on_predict_batch_end(self, *_: Any) -> None:
        """Keep something."""


class Looker(Callback):
    def on_test_batch_end(self, *_: Any) -> None:
        """See nothing of a prediction."""


class KeepingTask(S1S2SemanticSegmentation):
    def predict_step(self, *args: Any) -> Any:
        return super().predict_step(*args)


@pytest.mark.parametrize(
    ('callback', 'task', 'returned', 'expected'),
    [
        (Looker(), S1S2SemanticSegmentation, False, True),
        (Looker(), S1S2SemanticSegmentation, True, False),
        (TQDMProgressBar(), S1S2SemanticSegmentation, False, True),
        (Keeper(), S1S2SemanticSegmentation, False, False),
        (LambdaCallback(on_predict_batch_end=print), S1S2SemanticSegmentation, False, False),
        (BasePredictionWriter('epoch'), S1S2SemanticSegmentation, False, False),
        (Looker(), KeepingTask, False, False),
    ],
)
def test_predictions_that_nothing_keeps_are_said(
    tmp_path: Path,
    callback: Callback,
    task: type[S1S2SemanticSegmentation],
    returned: bool,
    expected: bool,
) -> None:
    predicting = quiet_trainer(tmp_path)
    predicting.callbacks = [callback]  # type: ignore[attr-defined]
    predicting.predict_loop.return_predictions = returned
    model = task('fcn', 'resnet18', num_classes=3, num_filters=1)
    model.trainer = predicting
    assert said(model.on_predict_start, 'nothing keeps the predictions') == expected


@pytest.mark.parametrize(('tile', 'expected'), [('32ULU', True), ('31UEQ', False)])
def test_ground_of_weights_is_handed_on(
    trained: Path, root: Path, tmp_path: Path, tile: str, expected: bool
) -> None:
    """They were trained on 32ULU."""
    task, data = small(weights=str(trained)), data_of(root, test=tile)
    trainer = quiet_trainer(tmp_path, limit_test_batches=1)
    words = "100.0% of the ground of split 'test'"
    assert said(lambda: trainer.test(task, data, verbose=False), words) == expected


def test_what_a_sensor_did_not_see_is_not_read() -> None:
    """Whatever the image holds there, such as noise that was added after the normalisation."""
    task, image = small().eval(), torch.randn(2, 4, 12, 32, 32)
    valid = torch.ones(2, 4, 2, dtype=torch.bool)
    valid[0, 1, 0] = valid[1, 2:] = False
    seen = valid.repeat_interleave(torch.tensor([10, 2]), 2)[..., None, None]
    noisy = {'image': image.where(seen, torch.randn_like(image)), 'valid': valid}
    expected = task(image.where(seen, 0)).softmax(1)
    torch.testing.assert_close(task.predict_step(noisy, 0)['probabilities'], expected)


def test_the_length_of_a_folded_series_is_refused() -> None:
    batch = {'image': torch.randn(2, 48, 32, 32), 'length': torch.tensor([3, 2])}
    with pytest.raises(ValueError, match=r'shape \(2, 48, 32, 32\), which does not tell slots'):
        small().predict_step(batch, 0)


@pytest.fixture(scope='module')
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the classes Town, Field and Water."""
    path = tmp_path_factory.mktemp('trained') / 'trained.ckpt'
    trainer = quiet_trainer(path.parent, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(small(), data_of(root))
    trainer.save_checkpoint(path)
    return path


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
    trained: Path, root: Path, tmp_path: Path, stage: str, classes: ClassScheme, message: str
) -> None:
    data = data_of(root, classes)
    loaded = S1S2SemanticSegmentation.load_from_checkpoint(trained)
    with pytest.raises(ValueError, match=message):
        getattr(quiet_trainer(tmp_path), stage)(loaded, data)
    with pytest.raises(ValueError, match=message):
        getattr(quiet_trainer(tmp_path, max_epochs=2), stage)(small(), data, ckpt_path=trained)


def test_classes_in_other_letters_are_the_same(trained: Path, root: Path, tmp_path: Path) -> None:
    data = data_of(root, scheme(0, 1, 2, names=('TOWN', 'field', 'Water')))
    loaded = S1S2SemanticSegmentation.load_from_checkpoint(trained)
    assert quiet_trainer(tmp_path).validate(loaded, data, verbose=False)


def test_a_head_of_other_classes_is_said(trained: Path, root: Path, tmp_path: Path) -> None:
    with pytest.warns(S1S2Warning, match='head .*0: Town there, Water here; 2: Water'):
        quiet_trainer(tmp_path, fast_dev_run=True).fit(
            small(weights=str(trained)), data_of(root, scheme(2, 1, 0))
        )
