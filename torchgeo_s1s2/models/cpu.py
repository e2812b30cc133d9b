"""What makes the layers fast on a CPU: strips of rows, and the layout of images."""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

PIXELS = 4096
"""Size of a strip for each thread: the gates of 32 channels take 2 MiB and stay in the cache."""


def suits_strips(x: Tensor) -> bool:
    """Whether :class:`GateInStrips` takes over: eagerly, on a CPU, states not in half precision.

    Args:
        x: Input of a step.

    Returns:
        True if it does.
    """
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return False
    return x.dtype in (torch.float32, torch.float64)


def arrange(x: Tensor) -> Tensor:
    """Bring an image on a CPU into the layout in which convolutions of all of it are fastest.

    Channels-last without gradients. Backward passes are as fast or faster in the usual layout.

    Args:
        x: Image of shape (B, C, H, W).

    Returns:
        The image, copied if need be.
    """
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return x
    learns = torch.is_grad_enabled()
    return x.contiguous(memory_format=torch.contiguous_format if learns else torch.channels_last)


class GateInStrips(torch.autograd.Function):
    """Next hidden and cell state, computed a strip of rows at a time.

    The gates are four times as large as a state. In strips they stay in the processor's cache, in
    channels-last layout, in which convolutions are fastest. The backward pass takes them as they
    were kept, or computes them again and needs only the input and the states. It cannot be
    differentiated itself.

    Under autocast the convolutions are in its precision, and so is what is kept for the backward
    pass; the states and sums are in that of the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        keep_gates: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute both states.

        Args:
            ctx: Context to keep what the backward pass needs.
            x: Slot of shape (B, C, H, W), in single or double precision.
            h: Hidden state of shape (B, hidden_channels, H, W), None for zeros.
            c: Cell state of the same shape, None for zeros.
            weight: Weight of the convolution of x and, unless it is None, h.
            bias: Bias of the convolution.
            keep_gates: Whether to keep the gates.

        Returns:
            Hidden state, not yet normalised, and cell state.
        """
        h_new, c_new = _empty(x, len(weight) // 4), _empty(x, len(weight) // 4)
        x, h, weight, bias = (_autocast(tensor) for tensor in (x, h, weight, bias))
        kept = _empty(x, len(weight)) if keep_gates else None
        for strip in _strips(x, weight):
            gates = _gates(strip.read(x, h), weight, bias, h_new.dtype)
            if kept is not None:
                kept[strip.rows] = gates
            i, f, g, o = gates.chunk(4, dim=1)
            cell = torch.mul(i, g, out=c_new[strip.rows])
            if c is not None:
                cell.addcmul_(f, c[strip.rows])
            torch.mul(o, _tanh_(cell.clone()), out=h_new[strip.rows])
        ctx.save_for_backward(x, h, c, weight, bias, kept)
        return h_new, c_new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h_new: Tensor, grad_c_new: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the inputs.

        Args:
            ctx: Context with what was kept.
            grad_h_new: Gradient of the hidden state.
            grad_c_new: Gradient of the cell state.

        Returns:
            Gradients, None where they are not needed.
        """
        *inputs, kept = ctx.saved_tensors
        x, h, c, weight, bias = inputs
        dtype = grad_h_new.dtype
        grads = [
            torch.zeros_like(tensor, dtype=dtype) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        grad_x, grad_h, grad_c, grad_weight, grad_bias = grads
        weight_x, weight_h = weight.tensor_split([x.shape[1]], dim=1)
        for strip in _strips(x, weight):
            joined, rows = strip.read(x, h), strip.rows
            gates = _gates(joined, weight, bias, dtype) if kept is None else kept[rows].to(dtype)
            cell = None if c is None else c[rows]
            grad, grad_cell = _gates_backward(gates, cell, grad_h_new[rows], grad_c_new[rows])
            if grad_c is not None:
                grad_c[rows] = grad_cell
            if grad_bias is not None:
                grad_bias += grad.sum((0, 2, 3))
            grad = grad.to(x.dtype)
            if grad_weight is not None:
                grad_weight += conv2d_weight(joined, weight.shape, grad, padding=_padding(weight))
            for total, part in ((grad_x, weight_x), (grad_h, weight_h)):
                if total is not None:
                    strip.add(total, F.conv_transpose2d(grad, part, padding=_padding(weight)))
        return *grads, None


class Strip(NamedTuple):
    """Rows of one sample, and the window of rows around them that the convolution reads."""

    rows: tuple[slice, ...]
    window: tuple[slice, ...]
    above: int
    below: int

    def read(self, *images: Tensor | None) -> Tensor:
        """Concatenate the windows of images, with zeros for what lies above and below them."""
        windows = [
            image[self.window].contiguous(memory_format=torch.channels_last)
            for image in images
            if image is not None
        ]
        return F.pad(torch.cat(windows, dim=1), (0, 0, self.above, self.below))

    def add(self, image: Tensor, window: Tensor) -> None:
        """Add a window to an image, without what lies above and below it."""
        image[self.window] += window[:, :, self.above : window.shape[2] - self.below]


def _strips(x: Tensor, weight: Tensor) -> Iterator[Strip]:
    radius = weight.shape[-1] // 2
    batch, _, height, width = x.shape
    size = max(1, PIXELS * torch.get_num_threads() // width)
    for sample, top in product(range(batch), range(0, height, size)):
        bottom = min(top + size, height)
        first, last = max(top - radius, 0), min(bottom + radius, height)
        rows, window = (
            (slice(sample, sample + 1), slice(None), slice(*span))
            for span in ((top, bottom), (first, last))
        )
        yield Strip(rows, window, first - (top - radius), bottom + radius - last)


def _padding(weight: Tensor) -> tuple[int, int]:
    """Padding of the columns; a strip comes with the rows around it."""
    return 0, weight.shape[-1] // 2


def _empty(x: Tensor, channels: int) -> Tensor:
    shape = (len(x), channels, *x.shape[-2:])
    return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)


def _autocast(x: Tensor | None) -> Any:
    """Cast as autocast casts what a convolution reads: not double precision."""
    if x is None or x.dtype == torch.double or not torch.is_autocast_enabled('cpu'):
        return x
    return x.to(torch.get_autocast_dtype('cpu'))


def _gates(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Input, forget, cell and output gate."""
    gates = F.conv2d(x, weight, bias, padding=_padding(weight)).to(dtype)
    g = gates.chunk(4, dim=1)[2]
    # tanh(g) = 2 sigmoid(2 g) - 1, which takes a fraction of the time of tanh on a CPU
    g.mul_(2)
    gates.sigmoid_()
    g.mul_(2).sub_(1)
    return gates


def _tanh_(x: Tensor) -> Tensor:
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


def _gates_backward(
    gates: Tensor, c: Tensor | None, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution's output and of the cell state before."""
    i, f, g, o = gates.chunk(4, dim=1)
    tanh_c = _tanh_(i * g if c is None else torch.addcmul(i * g, f, c))
    grad_c = grad_c + _tanh_backward(grad_h * o, tanh_c)
    grad_f = torch.zeros_like(f) if c is None else _sigmoid_backward(grad_c * c, f)
    grad_i, grad_o = _sigmoid_backward(grad_c * g, i), _sigmoid_backward(grad_h * tanh_c, o)
    grad = torch.cat([grad_i, grad_f, _tanh_backward(grad_c * i, g), grad_o], dim=1)
    return grad, grad_c * f


def _sigmoid_backward(grad: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(grad, output)


def _tanh_backward(grad: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward(grad, output)
