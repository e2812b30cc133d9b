"""Batch norm over some of the samples of a batch."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class Moments(NamedTuple):
    """Mean and biased variance of each channel, and the number of values of a channel."""

    mean: Tensor
    var: Tensor
    number: Tensor


Affine = tuple[Tensor, Tensor]
"""What features are multiplied with, and what is added, of shape (..., C, 1, 1)."""


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of the samples that count.

    In training mode it computes what nn.BatchNorm2d computes of these samples alone, with
    statistics in single precision or better. Its running statistics change in :func:`track` only,
    so that it can be computed again in the backward pass.

    With *steps*, each step of a recurrence has running statistics of its own, as in Cooijmans et
    al., "Recurrent Batch Normalization", ICLR 2017, https://arxiv.org/abs/1603.09025. Steps that no
    training has reached take those of the last step that one has.
    """

    def __init__(self, num_features: int, steps: int = 0) -> None:
        """Initialize a new MaskedBatchNorm2d instance.

        Args:
            num_features: Number of channels.
            steps: Number of sets of running statistics; 0 for one set that all steps share.
        """
        super().__init__(num_features)
        if steps:
            for name, buffer in list(self.named_buffers()):
                self.register_buffer(name, buffer.repeat(steps, *[1] * buffer.ndim))

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, affine: Affine | None = None
    ) -> tuple[Tensor, Moments | None]:
        """Normalise features.

        Args:
            x: Features of shape (B, C, H, W).
            mask: Samples that count, booleans of shape (B, 1, 1, 1); all of them if None.
            affine: What :func:`affine_of_slots` says of the slot, which evaluation mode needs.

        Returns:
            Features of shape (B, C, H, W), of which those of the other samples have no meaning, and
            the moments, None in evaluation mode.
        """
        return batch_norm(self, x, mask) if affine is None else (_apply(affine, x), None)


def has_steps(norm: Any) -> bool:
    """Whether each step has running statistics of its own; nn.SyncBatchNorm keeps their shape."""
    running_mean = getattr(norm, 'running_mean', None)
    return running_mean is not None and running_mean.ndim == 2


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called with a module's forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def scale_and_shift(norm: Any, step: Tensor | None = None) -> Affine:
    """What a batch norm does in evaluation mode; at steps (...), from 0, if they have their own."""
    mean, var = norm.running_mean, norm.running_var
    if step is not None:
        last = (norm.num_batches_tracked > 0).sum() - 1
        index = step.minimum(last).clamp(min=0)
        mean, var = mean[index], var[index]
    precise = torch.promote_types(var.dtype, torch.float32)
    mean, scale = mean.to(precise), (var.to(precise) + norm.eps).rsqrt()
    scale = scale * norm.weight if norm.affine else scale
    shift = (norm.bias if norm.affine else 0) - mean * scale
    return scale[..., None, None], shift[..., None, None]


def affine_of_slots(norm: Any, x: Tensor, valid: Tensor | None) -> Affine | None:
    """What a batch norm does in evaluation mode at each slot, of shape (B or 1, T, C, 1, 1).

    It is known before a loop over the slots, whose graph cannot hold eps where numbers are dynamic.
    Of training mode and of modules of another kind it is None.
    """
    known = isinstance(norm, MaskedBatchNorm2d) or type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    if not known or norm.training or norm.running_mean is None:
        return None
    if not has_steps(norm):
        scale, shift = scale_and_shift(norm)
        return scale.expand(1, x.shape[1], -1, -1, -1), shift.expand(1, x.shape[1], -1, -1, -1)
    # The step is the number of valid slots before.
    seen = x.new_ones(x.shape[:2]) if valid is None else valid
    return scale_and_shift(norm, (seen.long().cumsum(1) - 1).clamp(min=0))


def _apply(affine: Affine, x: Tensor) -> Tensor:
    return torch.addcmul(affine[1], x, affine[0]).to(x.dtype)


def share_with_steps(value: Tensor, own: Tensor) -> Tensor:
    """Running statistics of a checkpoint, in the shape of one's *own*.

    One set that all steps share is copied for each step. Only the first one then counts as trained,
    so that all of them keep to it until training goes on.
    """
    if own.ndim != value.ndim + 1 or own.shape[1:] != value.shape:
        return value
    if value.ndim == 0:
        return torch.zeros_like(own).index_fill(0, own.new_zeros(1), int(value))
    return value.expand(own.shape).clone()


def normalize(
    norm: Any, x: Tensor, mask: Tensor | None, affine: Affine | None
) -> tuple[Tensor, Moments | None]:
    """Call the norm of a layer as a :class:`MaskedBatchNorm2d`, whatever was put in its place.

    Of nn.SyncBatchNorm, into which Lightning converts each batch norm, the statistics are those of
    the samples of all processes that count.
    """
    if isinstance(norm, MaskedBatchNorm2d):
        return norm(x, mask, affine)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training:
        return batch_norm(norm, x, mask)
    return norm(x) if affine is None or has_hooks(norm) else _apply(affine, x), None


def batch_norm(norm: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Moments]:
    """Normalise features with the moments of the samples that count."""
    if mask is None and _suits_native(norm, x):
        y, mean, scale = torch.native_batch_norm(
            x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps
        )
        var = (scale.detach() ** -2 - norm.eps).clamp(min=0)
        return y, Moments(mean.detach(), var, mean.new_full((), x.numel() / x.shape[1]))
    weight = x.new_ones(len(x), 1) if mask is None else mask.flatten(1)
    weight = weight.to(torch.promote_types(x.dtype, torch.float32))
    means = x.mean((2, 3), dtype=weight.dtype)
    sums = _total(norm, torch.cat([(means * weight).sum(0), weight.sum(0)]))
    samples = sums[-1].clamp(min=1)
    mean = sums[:-1] / samples
    centred = x - mean[:, None, None]
    var = _total(norm, (centred.square().mean((2, 3)) * weight).sum(0)) / samples
    scale, shift = (var + norm.eps).rsqrt(), torch.zeros_like(mean)
    if norm.affine:
        scale, shift = scale * norm.weight, norm.bias.to(scale.dtype)
    y = torch.addcmul(shift[:, None, None], centred, scale[:, None, None]).to(x.dtype)
    count = sums[-1] * (x.shape[2] * x.shape[3])
    return y, Moments(mean.detach(), var.detach(), count.detach())


def _suits_native(norm: Any, x: Tensor) -> bool:
    """Whether PyTorch's own batch norm has statistics as precise, and of the same values."""
    return (
        x.dtype in (torch.float32, torch.float64)
        and (not norm.affine or norm.weight.dtype == x.dtype)
        and not isinstance(norm, nn.SyncBatchNorm)
        and x.numel() > 0
    )


def _total(norm: Any, x: Tensor) -> Tensor:
    """Sum over all processes, if their statistics are to be the same."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_initialized():
        return x
    return all_reduce(x, group=norm.process_group or dist.group.WORLD)


@torch.no_grad()
def track(norm: Any, moments: Moments, step: int = 0) -> None:
    """Move the running statistics as nn.BatchNorm2d does, unless no sample counted.

    Args:
        norm: The module.
        moments: What its last call gave.
        step: Step of the samples, from 0, if each step has running statistics of its own.
    """
    if norm.running_mean is None or not norm.training:
        return
    buffers = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if has_steps(norm):
        buffers = tuple(buffer[min(step, len(buffer) - 1)] for buffer in buffers)
    running_mean, running_var, batches = buffers
    seen = moments.number > 0
    batches.add_(seen)
    # None stands for the plain average, as for SWA.
    momentum = 1 / batches.clamp(min=1) if norm.momentum is None else norm.momentum
    momentum = momentum * seen.to(moments.mean.dtype)
    unbiased = moments.var * moments.number / (moments.number - 1).clamp(min=1)
    for running, value in ((running_mean, moments.mean), (running_var, unbiased)):
        running.copy_(running.to(value.dtype).lerp(value, momentum))
