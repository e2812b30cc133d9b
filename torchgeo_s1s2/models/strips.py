"""What makes mapping on a CPU fast: strips of rows, and the layout of images."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

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


def nothing_differentiated(x: Tensor) -> bool:
    """Whether an image is an ordinary one on a CPU, of which no derivative can be asked."""
    return (
        type(x) is Tensor
        and x.device.type == 'cpu'
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def suits_strips(layer: Any, x: Tensor) -> bool:
    """Whether :func:`read_in_strips` can take over from a ConvLSTM."""
    norm = layer.batchnorm
    return (
        not torch.compiler.is_compiling()
        and nothing_differentiated(x)
        and x.dtype in (torch.float32, torch.float64)
        and is_plain(layer.conv)
        and isinstance(norm, nn.BatchNorm2d)
        and not (norm.training or norm._forward_hooks or norm._forward_pre_hooks)
        and norm.affine
        and norm.track_running_stats
    )


def arrange(x: Tensor) -> Tensor:
    """Bring an image into the layout in which convolutions on a CPU without gradients are fastest.

    Args:
        x: Image of shape (B, C, H, W).

    Returns:
        The image, copied if need be.
    """
    if torch.compiler.is_compiling() or not nothing_differentiated(x):
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
        for t in seen:
            h = _step(layer, x[sample, int(t)][None], h, c)
        if h is not None:
            out[sample] = h[0]
    return out


def _zeros(x: Tensor, batch: int, channels: int) -> Tensor:
    shape = batch, channels, *x.shape[-2:]
    return x.new_zeros(shape).contiguous(memory_format=torch.channels_last)


def _step(layer: Any, x: Tensor, h: Tensor | None, c: Tensor) -> Tensor:
    """Next normalised hidden state; the cell state is changed in place."""
    norm, images = layer.batchnorm, [x]
    weight = layer.conv.weight
    if h is None:  # still zero
        weight = weight[:, : x.shape[1]]
    else:
        images.append(h)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    result = torch.empty_like(c)
    for strip in _strips(x, weight.shape[-1] // 2):
        padding = 0, weight.shape[-1] // 2
        gates = F.conv2d(strip.read(images), weight, layer.conv.bias, padding=padding).to(c.dtype)
        i, f, g, o = gates.chunk(4, dim=1)
        _tanh_(g), i.sigmoid_(), f.sigmoid_(), o.sigmoid_()
        cell = c[strip.rows].mul_(f).addcmul_(i, g)
        hidden = _tanh_(cell.clone()).mul_(o)
        result[strip.rows] = hidden.mul_(scale[:, None, None]).add_(shift[:, None, None])
    return result


def _tanh_(x: Tensor) -> Tensor:
    """2 sigmoid(2 x) - 1, which takes a fraction of the time of tanh on a CPU."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class _Strip(NamedTuple):
    """Rows of an image, and the window of rows around them that the convolution reads."""

    rows: tuple[slice, ...]
    window: tuple[slice, ...]
    above: int
    below: int

    def read(self, images: list[Tensor]) -> Tensor:
        """Concatenate the windows of images, with zeros for what lies above and below them."""
        windows = [
            image[self.window].contiguous(memory_format=torch.channels_last) for image in images
        ]
        return F.pad(torch.cat(windows, dim=1), (0, 0, self.above, self.below))


def _strips(x: Tensor, radius: int) -> Iterator[_Strip]:
    height, width = x.shape[-2:]
    size = max(1, PIXELS * torch.get_num_threads() // width)
    every = slice(None), slice(None)
    for top in range(0, height, size):
        bottom = min(top + size, height)
        first, last = max(top - radius, 0), min(bottom + radius, height)
        rows, window = (*every, slice(top, bottom)), (*every, slice(first, last))
        yield _Strip(rows, window, first - (top - radius), bottom + radius - last)
