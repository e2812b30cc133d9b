"""What makes a CPU fast: strips of rows, and the layout of images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .norm import Affine, has_hooks

PIXELS = 4096
"""Size of a strip for each thread: the gates of 32 channels take 2 MiB and stay in the cache."""


def is_plain(conv: nn.Module) -> bool:
    """Whether a convolution is one that keeps the image size, and nothing hangs on its module."""
    return (
        type(conv) is nn.Conv2d
        and not has_hooks(conv)
        and not (conv._backward_hooks or conv._backward_pre_hooks)
        and 'forward' not in vars(conv)
        and conv.padding_mode == 'zeros'
        and conv.padding == tuple(size // 2 for size in conv.kernel_size)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
    )


def suits_strips(layer: Any, x: Tensor, affine: Affine | None) -> bool:
    """Whether :func:`read_in_strips` can take over from a ConvLSTM; see there.

    That is in evaluation mode, for an ordinary image on a CPU of which no derivative can be asked.
    """
    if torch.is_grad_enabled() or layer.training or not is_eager_on_cpu(x):
        return False
    norm = layer.batchnorm
    return (
        x.dtype in (torch.float32, torch.float64)
        and forward_ad._current_level < 0
        and is_plain(layer.conv)
        and (affine is not None or type(norm) is nn.Identity)
        and not has_hooks(norm)
    )


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether an operation is carried out at once, on values in the memory of the processor."""
    return (
        type(x) is Tensor
        and x.device.type == 'cpu'
        and not torch.compiler.is_compiling()
        and not is_transformed()
        # As is_grads_batched=True does; neither have dispatch modes a public question.
        and not torch._C._functorch.is_legacy_batchedtensor(x)
        and not is_in_torch_dispatch_mode()
    )


def is_transformed() -> bool:
    """Whether torch.func transforms what is computed; PyTorch has no public question."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def arrange(x: Tensor) -> Tensor:
    """Bring an image on a CPU into the layout in which convolutions are fastest there."""
    return x.contiguous(memory_format=torch.channels_last) if is_eager_on_cpu(x) else x


def read_in_strips(layer: Any, x: Tensor, valid: Tensor | None, affine: Affine | None) -> Tensor:
    """Read a time series as a ConvLSTM does in evaluation mode, a strip of rows at a time.

    The gates are four times as large as a state. In strips they stay in the processor's cache, in
    channels-last layout, in which convolutions are fastest. Slots that are not valid cost nothing.

    Args:
        layer: The ConvLSTM.
        x: Series of shape (B, T, C, H, W), in single or double precision.
        valid: Slots to read, booleans of shape (B, T); all of them if None.
        affine: What :func:`~torchgeo_s1s2.models.norm.affine_of_slots` says; None of no norm.

    Returns:
        Last hidden state of shape (B, hidden_channels, H, W).
    """
    every = [range(x.shape[1])] * len(x)
    slots = every if valid is None else [v.nonzero()[:, 0].tolist() for v in valid]
    scale, shift = affine or (x.new_ones(1, 1, 1, 1, 1), x.new_zeros(1, 1, 1, 1, 1))
    # Of half the hidden state, which is what a step computes.
    scale, shift = (a.expand(*x.shape[:2], -1, -1, -1) for a in (2 * scale, shift))
    channels, radius = x.shape[2], layer.conv.kernel_size[0] // 2
    height, width = x.shape[-2:]
    out, c = (_zeros(x, b, layer.hidden_channels, height, width) for b in (len(x), 1))
    # An image beside the hidden state, twice, for what is read and what is written.
    shape = 1, channels + layer.hidden_channels, height + 2 * radius, width
    read, write = _zeros(x, *shape), _zeros(x, *shape)
    inside = slice(radius, radius + height)
    for sample, seen in enumerate(slots):
        c.zero_()
        for number, t in enumerate(seen):
            read[:, :channels, inside] = x[sample, t]
            # The hidden state is still zero before the first image.
            images = read if number else read[:, :channels]
            now = scale[sample, t], shift[sample, t]
            _step(layer, images, write[:, channels:, inside], c, now)
            read, write = write, read
        if len(seen):
            out[sample] = read[0, channels:, inside]
    return out


def _zeros(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last).zero_()


def _step(layer: Any, images: Tensor, h: Tensor, c: Tensor, affine: Affine) -> None:
    """Write the normalised hidden state that follows images, and change the cell state."""
    weight, bias = _double_cell_gate(layer.conv, images.shape[1])
    height, width = c.shape[-2:]
    radius = weight.shape[-1] // 2
    for top in range(0, height, size := max(1, PIXELS * torch.get_num_threads() // width)):
        rows = slice(top, min(top + size, height))
        window = images[:, :, top : rows.stop + 2 * radius]
        gates = F.conv2d(window, weight, bias, padding=(0, radius)).to(c.dtype)
        i, f, g, o = gates.sigmoid_().chunk(4, dim=1)
        # tanh(x) = 2 sigmoid(2 x) - 1, which takes a fraction of the time of tanh on a CPU.
        cell, hidden = c[:, :, rows], h[:, :, rows]
        cell.mul_(f).addcmul_(i, g.sub_(0.5), value=2)
        torch.mul(o, (2 * cell).sigmoid_().sub_(0.5), out=o)
        torch.addcmul(affine[1], o, affine[0], out=hidden)


def _double_cell_gate(conv: Any, channels: int) -> tuple[Tensor, Tensor | None]:
    """Weight of some input channels, and bias, of which those of the cell gate are doubled."""
    factor = conv.weight.new_tensor([1, 1, 2, 1]).repeat_interleave(len(conv.weight) // 4)
    weight = conv.weight[:, :channels] * factor[:, None, None, None]
    return arrange(weight), None if conv.bias is None else conv.bias * factor
