"""What makes mapping on a CPU fast: strips of rows, and the layout of images."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .norm import has_steps, statistics

PIXELS = 4096
"""Size of a strip for each thread: the gates of 32 channels take 2 MiB and stay in the cache."""


def is_plain(conv: nn.Module) -> bool:
    """Whether a convolution is one that keeps the image size, and nothing hangs on its module."""
    return (
        type(conv) is nn.Conv2d
        and not (conv._forward_hooks or conv._forward_pre_hooks)
        and not (conv._backward_hooks or conv._backward_pre_hooks)
        and 'forward' not in vars(conv)
        and conv.padding_mode == 'zeros'
        and conv.padding == tuple(size // 2 for size in conv.kernel_size)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
    )


def suits_strips(layer: Any, x: Tensor) -> bool:
    """Whether :func:`read_in_strips` can take over from a ConvLSTM.

    That is in evaluation mode, for an ordinary image on a CPU of which no derivative can be asked.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or layer.training:
        return False
    norm = layer.batchnorm
    return (
        type(x) is Tensor
        and x.device.type == 'cpu'
        and x.dtype in (torch.float32, torch.float64)
        and forward_ad._current_level < 0
        and not _in_functorch()
        and is_plain(layer.conv)
        and not (norm._forward_hooks or norm._forward_pre_hooks)
        and (type(norm) is nn.Identity or _normalises(norm))
    )


def _normalises(norm: nn.Module) -> bool:
    """Whether a module is a batch norm that uses its running statistics."""
    if not isinstance(norm, nn.BatchNorm2d):
        return False
    return not norm.training and norm.affine and norm.track_running_stats


def _in_functorch() -> bool:
    """Whether torch.func transforms what is computed; PyTorch has no public question for it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def arrange(x: Tensor) -> Tensor:
    """Bring an image on a CPU into the layout in which convolutions are fastest there.

    Args:
        x: Image of shape (B, C, H, W).

    Returns:
        The image, copied if need be.
    """
    if x.device.type != 'cpu' or torch.compiler.is_compiling() or _in_functorch():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def read_in_strips(layer: Any, x: Tensor, valid: Tensor | None) -> Tensor:
    """Read a time series as a ConvLSTM does in evaluation mode, a strip of rows at a time.

    The gates are four times as large as a state. In strips they stay in the processor's cache, in
    channels-last layout, in which convolutions are fastest. Slots that are not valid cost nothing.

    Args:
        layer: The ConvLSTM.
        x: Series of shape (B, T, C, H, W), in single or double precision.
        valid: Slots to read, booleans of shape (B, T); all of them if None.

    Returns:
        Last hidden state of shape (B, hidden_channels, H, W).
    """
    slots = [range(x.shape[1])] * len(x) if valid is None else [v.nonzero() for v in valid]
    out = _zeros(x, len(x), layer.hidden_channels)
    for sample, seen in enumerate(slots):
        h, c = None, _zeros(x, 1, layer.hidden_channels)
        for number, t in enumerate(seen):
            h = _step(layer, x[sample, int(t)][None], h, c, number)
        if h is not None:
            out[sample] = h[0]
    return out


def _zeros(x: Tensor, batch: int, channels: int) -> Tensor:
    shape = batch, channels, *x.shape[-2:]
    return x.new_zeros(shape).contiguous(memory_format=torch.channels_last)


def _scale_and_shift(norm: Any, number: int) -> tuple[Tensor, Tensor] | None:
    """What a batch norm does in evaluation at a step, from 0."""
    if type(norm) is nn.Identity:
        return None
    mean, var = norm.running_mean, norm.running_var
    if has_steps(norm):
        mean, var = statistics(norm, torch.tensor(number))
    scale = norm.weight * (var + norm.eps).rsqrt()
    return scale[:, None, None], (norm.bias - mean * scale)[:, None, None]


def _step(layer: Any, x: Tensor, h: Tensor | None, c: Tensor, number: int) -> Tensor:
    """Next normalised hidden state; the cell state is changed in place."""
    weight, affine = layer.conv.weight, _scale_and_shift(layer.batchnorm, number)
    # The hidden state is still zero before the first image.
    images, weight = ([x], weight[:, : x.shape[1]]) if h is None else ([x, h], weight)
    result, radius = torch.empty_like(c), weight.shape[-1] // 2
    for strip in _strips(x, radius):
        joined = strip.read(images)
        gates = F.conv2d(joined, weight, layer.conv.bias, padding=(0, radius)).to(c.dtype)
        i, f, g, o = gates.chunk(4, dim=1)
        # tanh(x) = 2 sigmoid(2 x) - 1, which takes a fraction of the time of tanh on a CPU.
        g.mul_(2)
        gates.sigmoid_()
        g.mul_(2).sub_(1)
        cell, hidden = c[strip.rows], result[strip.rows]
        cell.mul_(f).addcmul_(i, g)
        torch.mul(o, (2 * cell).sigmoid_().mul_(2).sub_(1), out=hidden)
        if affine is not None:
            torch.addcmul(affine[1], hidden, affine[0], out=hidden)
    return result


class _Strip(NamedTuple):
    """Rows of an image, and the window of rows around them that the convolution reads."""

    rows: tuple[slice, ...]
    window: tuple[slice, ...]
    above: int
    below: int

    def read(self, images: list[Tensor]) -> Tensor:
        """Concatenate the windows of images, with zeros for what lies above and below them."""
        windows = [image[self.window] for image in images]
        channels, (height, width) = [w.shape[1] for w in windows], windows[0].shape[2:]
        shape = 1, sum(channels), self.above + height + self.below, width
        joined = torch.empty(shape, dtype=images[0].dtype, memory_format=torch.channels_last)
        inside = slice(self.above, self.above + height)
        for part, window in zip(joined.split(channels, dim=1), windows, strict=True):
            part[:, :, inside] = window
        joined[:, :, : self.above] = 0
        joined[:, :, self.above + height :] = 0
        return joined


def _strips(x: Tensor, radius: int) -> Iterator[_Strip]:
    height, width = x.shape[-2:]
    size = max(1, PIXELS * torch.get_num_threads() // width)
    every = slice(None), slice(None)
    for top in range(0, height, size):
        bottom = min(top + size, height)
        first, last = max(top - radius, 0), min(bottom + radius, height)
        rows, window = (*every, slice(top, bottom)), (*every, slice(first, last))
        yield _Strip(rows, window, first - (top - radius), bottom + radius - last)
