import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from torchgeo_s1s2.callbacks import GradualUnfreezing, Stage
from torchgeo_s1s2.errors import S1S2Warning
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation

STAGES = [
    Stage(0, ['segmentation_head']),
    Stage(1, ['decoder']),
    Stage(2, ['encoder'], lr_factor=0.1),
]


class Changes(Callback):
    """Notes after each epoch which parts changed, and the learning rates."""

    def __init__(self) -> None:
        self.parameters: list[set[str]] = []
        self.statistics: list[set[str]] = []
        self.rates: list[list[float]] = []
        self.before: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = self.state(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = self.state(pl_module)
        changed = {k for k in now if not now[k].equal(self.before[k])}
        is_statistic = ('running_mean', 'running_var', 'num_batches_tracked')
        statistics = {k for k in changed if k.endswith(is_statistic)}
        self.statistics.append({k.split('.')[0] for k in statistics})
        self.parameters.append({k.split('.')[0] for k in changed - statistics})
        self.rates.append([group['lr'] for group in trainer.optimizers[0].param_groups])
        self.before = now

    @staticmethod
    def state(pl_module: Any) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in pl_module.model.state_dict().items()}


def task_of(**options: Any) -> S1S2SemanticSegmentation:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {'in_channels': 12, 'num_classes': 3}
    return S1S2SemanticSegmentation(backbone='resnet18_convlstm_inception', **(defaults | options))


def fit(
    root: Path,
    task: S1S2SemanticSegmentation,
    *callbacks: Callback,
    epochs: int = 3,
    ckpt_path: Path | None = None,
) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    batch = {
        'image': torch.randn(2, 1, 12, 32, 32, generator=generator) + 1,
        'mask': torch.randint(0, 3, (2, 32, 32), generator=generator),
    }
    loader: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    keeps = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    options = {'max_epochs': epochs, 'num_sanity_val_steps': 0, 'enable_checkpointing': keeps}
    trainer = quiet_trainer(root, callbacks=list(callbacks), **options)
    trainer.fit(task, loader, loader, ckpt_path=ckpt_path)
    return trainer


def test_parts_learn_from_their_stage_on(tmp_path: Path) -> None:
    """Also those that start from the same values as others, such as batch norms."""
    task, changes = task_of(), Changes()
    trainer = fit(tmp_path, task, GradualUnfreezing(STAGES), changes)
    assert changes.parameters == [
        {'segmentation_head'},
        {'segmentation_head', 'decoder'},
        {'segmentation_head', 'decoder', 'encoder'},
    ]
    assert changes.statistics == [set(), {'decoder'}, {'decoder', 'encoder'}]
    assert changes.rates == [[1e-3], [1e-3, 1e-3], pytest.approx([1e-3, 1e-3, 1e-4])]
    groups = trainer.optimizers[0].param_groups
    optimized = [id(p) for group in groups for p in group['params']]
    assert sorted(optimized) == sorted(id(p) for p in task.model.parameters())


def test_a_frozen_batch_norm_normalises_with_its_statistics(tmp_path: Path) -> None:
    """In the first epoch the model computes in training what it computes in evaluation."""
    task = task_of()
    features: list[Tensor] = []
    hook = task.model.decoder.register_forward_hook(
        lambda _, __, out: features.append(out.detach())
    )
    fit(tmp_path, task, GradualUnfreezing(STAGES[:1]), epochs=1)
    hook.remove()
    training, validation = features
    torch.testing.assert_close(training, validation)


def test_parts_of_a_frozen_part_learn_from_their_stage_on_and_are_evaluated(tmp_path: Path) -> None:
    modes = list[bool]()

    class Modes(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
            modes.extend(part.training for part in pl_module.model.modules())

    task = task_of()
    stages = [Stage(0, ['decoder', 'encoder.inception']), Stage(1, ['encoder.convlstm'])]
    before = {k: v.clone() for k, v in task.model.encoder.state_dict().items()}
    fit(tmp_path, task, GradualUnfreezing(stages), Modes(), epochs=2)
    assert modes
    assert not any(modes)
    after = task.model.encoder.state_dict()
    changed = {k.split('.')[0] for k in after if not after[k].equal(before[k])}
    assert changed == {'convlstm', 'inception'}


def test_an_optimizer_of_all_parameters_has_the_rates_of_the_stages(tmp_path: Path) -> None:
    """Such as that of --optimizer; Lightning gives it what is frozen, too."""
    task, changes = task_of(), Changes()
    task.configure_optimizers = lambda: SGD(task.parameters(), lr=0.01)  # type: ignore[method-assign]
    fit(tmp_path, task, GradualUnfreezing(STAGES), changes)
    assert changes.rates == [[0.01], [0.01, 0.01], pytest.approx([0.01, 0.01, 0.001])]


def test_the_rates_of_all_stages_drop_on_a_plateau(tmp_path: Path) -> None:
    task = task_of(patience=0, lr=1e-30)  # nothing is learnt, so the loss stays where it is
    changes = Changes()
    fit(tmp_path, task, GradualUnfreezing(STAGES[:2]), changes)
    assert changes.rates[1] == pytest.approx([1e-30, 1e-30])
    assert changes.rates[2] == pytest.approx([1e-31, 1e-31])


@pytest.mark.parametrize('every', [None, 1])
def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, every: int | None) -> None:
    """Also from a checkpoint of a step, after which Lightning does not start an epoch."""
    whole, unfreezing = task_of(), GradualUnfreezing(STAGES)
    fit(tmp_path, whole, unfreezing)
    checkpoint = ModelCheckpoint(
        tmp_path, filename='{epoch}', save_top_k=-1, every_n_train_steps=every
    )
    fit(tmp_path, task_of(), unfreezing, checkpoint, epochs=2)  # its second fit
    resumed, changes = task_of(), Changes()
    path = tmp_path / 'epoch=1.ckpt'
    fit(tmp_path, resumed, GradualUnfreezing(STAGES), changes, ckpt_path=path)
    assert changes.rates == [pytest.approx([1e-3, 1e-3, 1e-4])]
    for (name, a), b in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize('unfreezes', [True, False])
def test_a_checkpoint_in_which_other_parts_learned_is_refused(
    tmp_path: Path, unfreezes: bool
) -> None:
    """The head has a weight and a bias; that each part learns is one group."""
    every, head = len([*task_of().parameters()]), GradualUnfreezing(STAGES[:1])
    first, then = ([head], []) if unfreezes else ([], [head])
    checkpoint = ModelCheckpoint(tmp_path, filename='first')
    fit(tmp_path, task_of(), checkpoint, *first, epochs=1)
    here, there = ([every], [2]) if unfreezes else ([2], [every])
    message = f'{there} tensors learned in the checkpoint, by groups of its optimizer, and {here}'
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(tmp_path, task_of(), *then, epochs=2, ckpt_path=tmp_path / 'first.ckpt')


@pytest.mark.parametrize(
    ('stages', 'message'),
    [
        ([], 'does not start at epoch 0; add what learns from the start'),
        ([Stage(2, ['decoder'])], 'does not start at epoch 0'),
        ([Stage(0, [])], 'needs a list of names in train'),
        ([Stage(0, 'decoder')], 'needs a list of names in train'),
        ([Stage(0, ['decoder']), Stage(1, ['encoder'], 0)], 'an lr_factor above 0'),
        ([Stage(0, ['decoder']), Stage(1, ['encoder'], math.nan)], 'an lr_factor above 0'),
        ([Stage(0, ['decoder'], 0.5)], 'is the first stage: give the task its rate as lr'),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualUnfreezing(stages)


@pytest.mark.parametrize(
    ('stages', 'options', 'run', 'message'),
    [
        ([*STAGES, Stage(1, ['head'])], {}, {}, 'name some of encoder, decoder, segmentation_head'),
        (STAGES, {'freeze_backbone': True}, {}, 'leave freeze_backbone out'),
        (STAGES, {}, {'world_size': 2}, 'works with one device'),
        (STAGES, {}, {'callbacks': [StochasticWeightAveraging(0.1)]}, 'use one of the two'),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_it(
    stages: list[Stage], options: dict[str, Any], run: dict[str, Any], message: str
) -> None:
    trainer: Any = SimpleNamespace(**({'world_size': 1, 'max_epochs': 9, 'callbacks': []} | run))
    with pytest.raises(ValueError, match=message):
        GradualUnfreezing(stages).setup(trainer, task_of(**options), 'fit')


def test_a_stage_after_the_end_is_said(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    with pytest.warns(S1S2Warning, match='never begins: the run ends after 1 epochs'):
        GradualUnfreezing(STAGES).setup(trainer, task_of(), 'fit')


def test_evaluation_freezes_nothing() -> None:
    task = task_of()
    GradualUnfreezing(STAGES).setup(quiet_trainer(), task, 'test')
    assert all(p.requires_grad for p in task.parameters())
