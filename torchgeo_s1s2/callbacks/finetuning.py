"""Fine-tuning in stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from torch import nn
from torch.optim import Optimizer

from torchgeo_s1s2.errors import warn
from torchgeo_s1s2.models import freeze


@dataclass(frozen=True)
class Stage:
    """Parts of a model that start to learn at an epoch.

    Attributes:
        epoch: First epoch, from 0, in which they learn.
        train: Names of the parts in the task's ``model``, such as ``'segmentation_head'``,
            ``'decoder'``, ``'encoder'`` or ``'encoder.convlstm'``.
        lr_factor: Their learning rate as a multiple of that of the first stage, above 0.
    """

    epoch: int
    train: Sequence[str]
    lr_factor: float = 1.0


class GradualUnfreezing(BaseFinetuning):
    """Freezes a model, and unfreezes its parts stage by stage.

    What is frozen keeps its weights and its batch-norm statistics, with which it normalises. In a
    configuration::

        class_path: torchgeo_s1s2.callbacks.GradualUnfreezing
        init_args:
          stages:
            - {epoch: 0, train: [segmentation_head]}
            - {epoch: 5, train: [decoder]}
            - {epoch: 10, train: [encoder], lr_factor: 0.1}

    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018,
    https://arxiv.org/abs/1801.06146.
    """

    def __init__(self, stages: list[Stage]) -> None:
        """Keep the stages.

        Args:
            stages: The stages, one of them from epoch 0.

        Raises:
            ValueError: If nothing would learn in epoch 0, or a stage has no such value.
        """
        super().__init__()
        self.stages = sorted(stages, key=lambda stage: stage.epoch)
        if not stages or self.stages[0].epoch != 0:
            raise ValueError(
                f'the first of the stages {self.stages} does not start at epoch 0; add what learns '
                'from the start, for instance {epoch: 0, train: [segmentation_head]}'
            )
        if self.stages[0].lr_factor != 1:
            raise ValueError(f'{self.stages[0]} is the first stage: give the task its rate as lr')
        for stage in stages:
            if not stage.train or isinstance(stage.train, str) or not stage.lr_factor > 0:
                raise ValueError(
                    f'{stage} needs a list of names in train, and an lr_factor above 0'
                )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze what is not of the first stage, before the optimizer is made.

        Raises:
            ValueError: If the model has no such part, the task freezes parts too, or stages follow
                in a distributed run.
        """
        if stage != 'fit':
            return
        if trainer.world_size > 1 and self.stages[-1].epoch > 0:
            raise ValueError(
                'GradualUnfreezing works with one device: distributed training averages the '
                'gradients of those parameters only that learn from the start. Give devices: 1'
            )
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
            raise ValueError(
                'GradualUnfreezing gives the optimizer parameters for which '
                'StochasticWeightAveraging has no rate; use one of the two, or WeightAveraging'
            )
        if 0 < (trainer.max_epochs or 0) <= self.stages[-1].epoch:
            end = f'the run ends after {trainer.max_epochs} epochs; give more, or leave it out'
            warn(f'{self.stages[-1]} never begins: {end}')
        self.load_state_dict({})  # of another fit; a checkpoint brings its own after this
        super().setup(trainer, pl_module, stage)

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze the model but for the parts of epoch 0."""
        for option in ('freeze_backbone', 'freeze_decoder'):
            if pl_module.hparams.get(option):
                raise ValueError(f'GradualUnfreezing decides what is frozen; leave {option} out')
        for stage in self.stages:
            self._parts(pl_module, stage)  # an unknown name shall not stop a run halfway
        self._unfreeze(pl_module, self.stages[:1])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what is frozen from an optimizer of all parameters, for the rates of its stage."""
        for group in (group for o in trainer.optimizers for group in o.param_groups):
            group['params'] = [p for p in group['params'] if p.requires_grad]
        super().on_fit_start(trainer, pl_module)  # of a run that goes on, the groups of that run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the stages of an epoch that goes on, which Lightning does not start again."""
        self.on_train_epoch_start(trainer, pl_module)

    def finetune_function(
        self, pl_module: LightningModule, epoch: int, optimizer: Optimizer
    ) -> None:
        """Unfreeze the parts of the stages that have begun.

        Args:
            pl_module: The task.
            epoch: The epoch that begins.
            optimizer: The optimizer, which gets the parameters it does not have yet.
        """
        begun = [stage for stage in self.stages if stage.epoch <= epoch]
        self._unfreeze(pl_module, begun)
        groups = optimizer.param_groups
        for stage, part in ((s, part) for s in begun for part in self._parts(pl_module, s)):
            # Lightning's unfreeze_and_add_param_group takes equal parameters for the same one.
            known = {id(p) for group in groups for p in group['params']}
            if new := [p for p in part.parameters() if id(p) not in known]:
                optimizer.add_param_group({'params': new, 'lr': groups[0]['lr'] * stage.lr_factor})

    def _unfreeze(self, pl_module: LightningModule, stages: Sequence[Stage]) -> None:
        """Let the parts of these stages learn, and freeze all others."""
        model: Any = pl_module.model
        model.requires_grad_(False)
        _freeze_but(model, {part for stage in stages for part in self._parts(pl_module, stage)})

    def _parts(self, pl_module: LightningModule, stage: Stage) -> list[nn.Module]:
        model: Any = pl_module.model
        try:
            return [model.get_submodule(name) for name in stage.train]
        except AttributeError as error:
            parts = ', '.join(part for part, _ in model.named_children())
            raise ValueError(
                f'{stage} names what the model does not have ({error}); name some of {parts}, or '
                'parts of theirs as in encoder.convlstm'
            ) from error


def _freeze_but(module: nn.Module, learning: set[nn.Module]) -> None:
    """Freeze a module but for those of its parts that learn."""
    if module in learning or learning.isdisjoint(module.modules()):
        freeze(module, module not in learning)
    else:
        for part in module.children():
            _freeze_but(part, learning)
