"""One step of a ConvLSTM on a CPU, a few rows at a time."""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.grad import conv2d_weight

PIXELS = 4096
"""Size of a strip for each thread: the gates of 32 channels take 2 MiB and stay in the cache."""

Gradients = tuple[Tensor | None, ...]


def suits_strips(x: Tensor) -> bool:
    """Whether :class:`GateInStrips` takes over: on a CPU, in single or double precision.

    Args:
        x: Input of a step.
    """
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled('cpu')
    return x.device.type == 'cpu' and exact


class GateInStrips(torch.autograd.Function):
    """Next hidden and cell state, computed a strip of rows at a time.

    The gates are four times as large as a state. In strips they never leave the processor's cache,
    and the backward pass computes them again, so that it needs only the input and the states. They
    are in channels-last layout, in which convolutions are fastest.
    """

    @staticmethod
    def forward(
        x: Tensor, h: Tensor | None, c: Tensor | None, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute both states.

        Args:
            x: Slot of shape (B, C, H, W).
            h: Hidden state of shape (B, hidden_channels, H, W), None for zeros.
            c: Cell state of the same shape, None for zeros.
            weight: Weight of the convolution of x and, unless it is None, h.
            bias: Bias of the convolution.

        Returns:
            Hidden state, not yet normalised, and cell state.
        """
        shape = (len(x), len(weight) // 4, *x.shape[-2:])
        h_new = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        c_new = torch.empty_like(h_new)
        for strip in _strips(x, weight):
            i, f, g, o = _gates(strip.read(x, h), weight, bias)
            cell = torch.mul(i, g, out=c_new[strip.rows])
            if c is not None:
                cell.addcmul_(f, c[strip.rows])
            torch.mul(o, _tanh_(cell.clone()), out=h_new[strip.rows])
        return h_new, c_new

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs for the backward pass."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h_new: Tensor, grad_c_new: Tensor) -> Gradients:
        """Gradients of the inputs.

        Args:
            ctx: Context with the inputs.
            grad_h_new: Gradient of the hidden state.
            grad_c_new: Gradient of the cell state.
        """
        x, h, c, weight, bias = ctx.saved_tensors
        grads = [
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        ]
        grad_x, grad_h, grad_c, grad_weight, grad_bias = grads
        weight_x, weight_h = weight.tensor_split([x.shape[1]], dim=1)
        for strip in _strips(x, weight):
            joined = strip.read(x, h)
            gates = _gates(joined, weight, bias)
            grad, grad_cell = _gates_backward(
                gates, c if c is None else c[strip.rows], grad_h_new[strip.rows], grad_c_new[strip.rows]
            )
            if grad_c is not None:
                grad_c[strip.rows] = grad_cell
            if grad_weight is not None:
                grad_weight += conv2d_weight(joined, weight.shape, grad, padding=strip.padding)
            if grad_bias is not None:
                grad_bias += grad.sum((0, 2, 3))
            for total, part in ((grad_x, weight_x), (grad_h, weight_h)):
                if total is not None:
                    strip.add(total, F.conv_transpose2d(grad, part, padding=strip.padding))
        return tuple(grads)


class Strip(NamedTuple):
    """Rows of one sample, and the window around them that the convolution reads."""

    rows: tuple[slice, ...]
    window: tuple[slice, ...]
    above: int
    below: int
    padding: tuple[int, int]

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
        one, channels = slice(sample, sample + 1), slice(None)
        yield Strip(
            rows=(one, channels, slice(top, bottom)),
            window=(one, channels, slice(first, last)),
            above=first - (top - radius),
            below=bottom + radius - last,
            padding=(0, radius),
        )


def _gates(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Input, forget, cell and output gate."""
    gates = F.conv2d(x, weight, bias, padding=(0, weight.shape[-1] // 2))
    g = gates.chunk(4, dim=1)[2].mul_(2)
    gates.sigmoid_()
    g.mul_(2).sub_(1)
    return gates.chunk(4, dim=1)


def _tanh_(x: Tensor) -> Tensor:
    """Hyperbolic tangent in place as 2 sigmoid(2x) - 1, several times faster on a CPU."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


def _gates_backward(
    gates: tuple[Tensor, ...], c: Tensor | None, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what the gates are made of, and of the cell state before."""
    i, f, g, o = gates
    cell = i * g if c is None else torch.addcmul(i * g, f, c)
    tanh_cell = _tanh_(cell)
    grad = grad_h.new_empty(0)
    grad_cell = grad_c + _tanh_backward(grad_h * o, tanh_cell)
    grad = torch.cat(
        [
            _sigmoid_backward(grad_cell * g, i),
            torch.zeros_like(f) if c is None else _sigmoid_backward(grad_cell * c, f),
            _tanh_backward(grad_cell * i, g),
            _sigmoid_backward(grad_h * tanh_cell, o),
        ],
        dim=1,
    )
    return grad, grad_cell * f


def _sigmoid_backward(grad: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(grad, output)


def _tanh_backward(grad: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward(grad, output)
