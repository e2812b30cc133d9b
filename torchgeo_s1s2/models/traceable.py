"""The recurrence of a ConvLSTM without a branch on data, for torch.compile and torch.export."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchgeo_s1s2.models.convlstm import ConvLSTM

States = tuple[Tensor, Tensor]


def read_series(layer: 'ConvLSTM', x: Tensor, valid: Tensor | None) -> Tensor:
    """Read a time series as the layer does, every slot of every sample, and select by mask.

    Exported in evaluation mode, the number of slots T stays free: the loop becomes a scan.
    Compiled, or exported in training mode, it is unrolled.

    Args:
        layer: Layer whose weights are used.
        x: Series of shape (B, T, C, H, W).
        valid: Slots to read, booleans of shape (B, T); all of them if None.

    Returns:
        Last hidden state of shape (B, hidden_channels, H, W).
    """
    batch, steps, _, height, width = x.shape
    h = c = x.new_zeros(batch, layer.hidden_channels, height, width)
    if torch.compiler.is_exporting() and not layer.training:
        return _scan(layer, x, valid, h)
    for t in range(steps):
        rows = None if valid is None else valid[:, t]
        h, c = _step(layer, x[:, t], rows, (h, c), first=t == 0)
    return h


def _scan(layer: 'ConvLSTM', x: Tensor, valid: Tensor | None, zero: Tensor) -> Tensor:
    # A prototype in PyTorch, imported from where it lives, and only by who exports.
    from torch._higher_order_ops.scan import scan

    if valid is None:
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    def combine(states: States, slot: tuple[Tensor, Tensor]) -> tuple[States, list[Tensor]]:
        return _step(layer, slot[0], slot[1], states), []

    (h, _), _ = scan(combine, (zero, zero.clone()), (x.transpose(0, 1), valid.T))
    return h


def _step(
    layer: 'ConvLSTM', x: Tensor, rows: Tensor | None, states: States, first: bool = False
) -> States:
    """States after one slot, of the samples in *rows* (all if None); the others keep theirs."""
    h, c = states
    if rows is None:
        h_new, c_new = layer.gate(x, None if first else h, c)
        return layer.batchnorm(h_new), c_new
    mask = rows[:, None, None, None]
    # What an unread slot holds, NaN for instance, must not reach the gradient of the weights.
    h_new, c_new = layer.gate(x.where(mask, 0), None if first else h, c)
    if layer.training:
        h_new = masked_batch_norm(layer.batchnorm, h_new, mask)
    else:
        h_new = layer.batchnorm(h_new)
    return torch.where(mask, h_new, h), torch.where(mask, c_new, c)


def masked_batch_norm(layer: nn.BatchNorm2d, x: Tensor, mask: Tensor) -> Tensor:
    """Batch norm in training mode whose statistics are those of some samples of the batch.

    Running statistics change only if there is such a sample.

    Args:
        layer: Batch norm with running statistics and momentum.
        x: Features of shape (B, C, H, W).
        mask: Samples that count, booleans of shape (B, 1, 1, 1).

    Returns:
        Features of shape (B, C, H, W); those of the other samples have no meaning.
    """
    dims = (0, 2, 3)
    weight = mask.to(x.dtype)
    count = weight.sum() * (x.shape[2] * x.shape[3])
    total = count.clamp(min=1)
    mean = (x * weight).sum(dims, keepdim=True) / total
    centred = x - mean
    var = (centred.square() * weight).sum(dims, keepdim=True) / total
    _update(layer, mean.detach().flatten(), var.detach().flatten(), count)
    scale = layer.weight[:, None, None] * (var + layer.eps).rsqrt()
    return centred * scale + layer.bias[:, None, None]


def _update(layer: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Move the running statistics as nn.BatchNorm2d does, unless the count is 0."""
    seen = count > 0
    momentum = torch.where(seen, mean.new_tensor(layer.momentum), 0)
    unbiased = var * count / (count - 1).clamp(min=1)
    for name, value in (('running_mean', mean), ('running_var', unbiased)):
        running = layer.get_buffer(name)
        running.lerp_(value.to(running.dtype), momentum.to(running.dtype))
    layer.get_buffer('num_batches_tracked').add_(seen)
