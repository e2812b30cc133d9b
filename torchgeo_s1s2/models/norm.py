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


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of the samples that count.

    In training mode it computes what nn.BatchNorm2d computes of these samples alone, with
    statistics in single precision or better. Its running statistics change in :func:`track` only,
    so that it can be computed again in the backward pass.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Moments | None]:
        """Normalise features.

        Args:
            x: Features of shape (B, C, H, W).
            mask: Samples that count, booleans of shape (B, 1, 1, 1); all of them if None.

        Returns:
            Features of shape (B, C, H, W), of which those of the other samples have no meaning, and
            the moments, None in evaluation mode.
        """
        if self.training or self.running_mean is None:
            return batch_norm(self, x, mask)
        return super().forward(x), None


def normalize(norm: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Moments | None]:
    """Call the norm of a layer: a :class:`MaskedBatchNorm2d`, or what was put in its place.

    Args:
        norm: The module. Of nn.SyncBatchNorm, into which Lightning converts each batch norm, the
            statistics are those of the samples of all processes that count.
        x: Features of shape (B, C, H, W).
        mask: Samples that count, booleans of shape (B, 1, 1, 1); all of them if None.

    Returns:
        Features and moments as from :class:`MaskedBatchNorm2d`.
    """
    if isinstance(norm, MaskedBatchNorm2d):
        return norm(x, mask)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training:
        return batch_norm(norm, x, mask)
    return norm(x), None


def batch_norm(norm: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Moments]:
    """Normalise features with the moments of the samples that count."""
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


def _total(norm: Any, x: Tensor) -> Tensor:
    """Sum over all processes, if their statistics are to be the same."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_initialized():
        return x
    return all_reduce(x, group=norm.process_group or dist.group.WORLD)


@torch.no_grad()
def track(norm: Any, moments: Moments) -> None:
    """Move the running statistics as nn.BatchNorm2d does, unless no sample counted.

    Args:
        norm: The module.
        moments: What its last call gave.
    """
    if norm.running_mean is None or not norm.training:
        return
    seen = moments.number > 0
    batches = norm.num_batches_tracked.add_(seen)
    # None stands for the plain average, as for SWA.
    momentum = 1 / batches.clamp(min=1) if norm.momentum is None else norm.momentum
    momentum = momentum * seen.to(moments.mean.dtype)
    unbiased = moments.var * moments.number / (moments.number - 1).clamp(min=1)
    for running, value in ((norm.running_mean, moments.mean), (norm.running_var, unbiased)):
        running.copy_(running.to(value.dtype).lerp(value, momentum))
