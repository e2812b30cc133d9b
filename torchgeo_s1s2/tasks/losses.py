"""Losses over the labelled pixels."""

from collections.abc import Sequence
from typing import Any, Literal

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NEVER = -100.0  # a logit whose probability is 0


class SegmentationLoss(nn.Module):
    """A loss over the labelled pixels of a batch, and their weight.

    Where that weighs the losses of batches, the loss of an epoch by cross-entropy does not depend
    on how the pixels come in batches and processes.

    Attributes:
        weight: Weight of each class in ``'ce'``, None for none; ones until those of the data are
            known if they are to be ``'balanced'``.
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        loss: Literal['ce', 'bce', 'jaccard', 'focal', 'dice'],
        task: Literal['binary', 'multiclass', 'multilabel'],
        num_classes: int | None,
        ignore_index: int,
        class_weights: Tensor | Sequence[float] | Literal['balanced'] | None = None,
        pos_weight: Tensor | None = None,
    ) -> None:
        """Choose the loss.

        Args:
            loss: Cross-entropy (``'ce'``, ``'bce'``) or one of smp's.
            task: ``'multiclass'``, ``'binary'`` or ``'multilabel'``.
            num_classes: Number of classes K of a multiclass task.
            ignore_index: Value of the mask that does not count.
            class_weights: Weight of each class in ``'ce'``, or ``'balanced'``.
            pos_weight: Weight of positive examples in ``'bce'``.

        Raises:
            ValueError: If the loss does not go with the task or the class weights.
        """
        super().__init__()
        self.is_multiclass = task == 'multiclass'
        named = isinstance(class_weights, str)
        weighs = loss == 'ce' and self.is_multiclass and (not named or class_weights == 'balanced')
        if class_weights is not None and not weighs:
            raise ValueError(
                f'class_weights={class_weights!r} with loss={loss!r} and task={task!r}: class '
                "weights, a list of numbers or 'balanced', are for loss='ce' and "
                "task='multiclass' only"
            )
        if (loss == 'ce') != self.is_multiclass and loss in ('ce', 'bce'):
            raise ValueError(
                f"loss={loss!r} with task={task!r}: 'ce' is for task='multiclass', 'bce' for others"
            )
        of_smp = {
            'focal': lambda: smp.losses.FocalLoss(task, normalized=True),
            'dice': lambda: smp.losses.DiceLoss(task, ignore_index=ignore_index),
            'jaccard': lambda: smp.losses.JaccardLoss(task),
        }
        if loss not in (known := ('ce', 'bce', *of_smp)):
            raise ValueError(f'loss is {loss!r}, expected one of {", ".join(known)}')
        self.loss, self.classes, self.ignore_index = loss, num_classes or 0, ignore_index
        self.of_smp: Any = of_smp[loss]() if loss in of_smp else None
        weight: Any = [1.0] * self.classes if named else class_weights
        self.register_buffer('weight', None if weight is None else _checked(weight, self.classes))
        self.register_buffer('pos_weight', pos_weight)

    def forward(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of a batch.

        Args:
            logits: Of shape (B, K, H, W); (B, H, W) of a binary task, (B, L, H, W) of L labels.
            mask: Classes (B, H, W), or 0 and 1 of the shape of the logits; *ignore_index* where
                there is no label.

        Returns:
            The loss, 0 where nothing counts, and the weight of the pixels that count.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.to(logits.dtype)  # its weights are of the trainer's precision
        labelled = mask != self.ignore_index
        weight = labelled.float()
        if self.weight is not None:
            weight = weight * self.weight[mask.where(labelled, 0)]
        weight = weight.sum()
        total = weight.where(weight > 0, 1)
        if self.loss == 'ce':
            summed = F.cross_entropy(
                logits, mask, self.weight, ignore_index=self.ignore_index, reduction='sum'
            )
            return summed / total, weight
        if self.loss == 'bce':
            target = mask.where(labelled, 0).to(logits.dtype)
            each = F.binary_cross_entropy_with_logits(
                logits, target, reduction='none', pos_weight=self.pos_weight
            )
            return each.where(labelled, 0).sum() / total, weight
        return self._of_smp(logits, mask, labelled, total), weight

    def _of_smp(self, logits: Tensor, mask: Tensor, labelled: Tensor, total: Tensor) -> Tensor:
        """A loss of smp, most of which know no pixels without a label."""
        several = self.is_multiclass
        factor: float | Tensor = 1.0
        if self.loss == 'jaccard' and several:
            # Unlabelled pixels are a class of their own, of which nothing is wrong.
            more = logits.detach().amax(1) + torch.where(labelled, _NEVER, -_NEVER)
            logits, classes = torch.cat([logits, more[:, None]], 1), self.classes
            mask = mask.where(labelled, classes)
            factor = (classes + 1) / (classes - (0 <= self.ignore_index < classes))
        elif self.loss != 'dice':
            # Unlabelled pixels are none of the classes with certainty, which adds nothing to sums.
            logits = logits.where(labelled[:, None] if several else labelled, _NEVER)
            mask = mask.where(labelled, -1 if several else 0)
        if self.loss == 'focal':
            factor = labelled.numel() / total
        value: Tensor = self.of_smp(logits, mask) * factor
        return value


def _checked(weights: Tensor | Sequence[float], classes: int) -> Tensor:
    weight = torch.as_tensor(weights, dtype=torch.float32)
    if len(weight) != classes:
        raise ValueError(f'class_weights has {len(weight)} weights for num_classes={classes}')
    if weight.ndim != 1 or not (weight.isfinite() & (weight >= 0)).all():
        raise ValueError(f'class_weights is {weights}, expected finite numbers from 0')
    return weight
