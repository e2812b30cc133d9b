"""Convolutional LSTM with batch norm on the hidden state."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.checkpoint import checkpoint

from .norm import (
    Affine,
    MaskedBatchNorm2d,
    Moments,
    affine_of_slots,
    has_steps,
    normalize,
    share_with_steps,
    track,
)
from .strips import (
    arrange,
    is_eager_on_cpu,
    is_plain,
    is_transformed,
    read_in_strips,
    suits_strips,
)

Norm = Literal['shared', 'step', 'none']
STEPS = 64
"""Number of steps with running statistics of their own; later ones take those of the last."""


class Unscripted(nn.Module):
    """A module that TorchScript cannot hold: of slots and gaps it keeps those of its example."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse, in the place where ``torch.jit.script`` asks."""
        raise RuntimeError(
            'torch.jit.trace would fix the number of slots and the gaps to those of its example, '
            'and torch.jit.script reads no series; use torchgeo_s1s2.models.export_program or '
            'export_onnx instead'
        )


class ConvLSTM(Unscripted):
    """Convolutional LSTM that returns the last, batch-normalised hidden state.

    One convolution of the input and the hidden state gives the input, forget, cell and output
    gates, in this order. The same batch norm is applied to the hidden state at every step, and the
    normalised state is what the next step sees; the cell state is kept as it is. Both states
    start from zero.

    The hidden state spreads differently at each step, which statistics that all steps share do not
    know in evaluation: *norm* says whether each step has its own. The step of a sample is the
    number of its slots that were valid so far, and a series without its other slots is what a batch
    with statistics of its own consists of in training.

    A slot that is not valid leaves the states of its sample as they were and is not part of the
    batch that the batch norm sees. A series with empty slots inserted anywhere therefore gives the
    same output as the series without them. Every slot takes part in the graph, whatever was seen:
    a step is the same on every process.

    Shi et al., "Convolutional LSTM Network", NeurIPS 2015, https://arxiv.org/abs/1506.04214, used
    as in Wenger et al., Remote Sensing 2023, https://doi.org/10.3390/rs15010151.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 32,
        kernel_size: int = 3,
        recompute_gates: bool = False,
        norm: Norm = 'shared',
    ) -> None:
        """Initialize a new ConvLSTM instance.

        Args:
            in_channels: Number of channels of one time slot.
            hidden_channels: Number of channels of the hidden and the cell state.
            kernel_size: Odd width of the square convolution kernel, in pixels.
            recompute_gates: Whether the backward pass computes the gates again, so that only the
                states are kept: less memory, more time, the same numbers.
            norm: Running statistics of the batch norm: one set that is ``'shared'`` by all steps,
                as in the original, or a set a ``'step'``; or no batch norm, ``'none'``. Weights
                with shared statistics load where each step has its own.

        Raises:
            ValueError: If *kernel_size* is even, or *norm* has another value.
        """
        super().__init__()
        if norm not in ('shared', 'step', 'none'):
            raise ValueError(f"norm is {norm!r}, expected 'shared', 'step' or 'none'")
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd to keep the image size, got {kernel_size}')
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.recompute_gates = recompute_gates
        self.conv = nn.Conv2d(
            in_channels + hidden_channels,
            4 * hidden_channels,
            kernel_size,
            padding=kernel_size // 2,
        )
        self.batchnorm: Any = nn.Identity()
        if norm != 'none':
            self.batchnorm = MaskedBatchNorm2d(hidden_channels, STEPS if norm == 'step' else 0)
        self.register_load_state_dict_pre_hook(_spread_statistics)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Read a time series.

        On a CPU, without gradients and in evaluation mode, an image is computed in strips. Exported
        or compiled in evaluation mode, T stays free.

        Args:
            x: Series of shape (B, T, C, H, W); T may be 0.
            valid: Slots to read, booleans of shape (B, T); all of them if None.

        Returns:
            Last hidden state of shape (B, hidden_channels, H, W).

        Raises:
            RuntimeError: If TorchScript traces the layer, which would fix T without a word.
        """
        if torch.jit.is_tracing():
            self.__prepare_scriptable__()
        affine = affine_of_slots(self.batchnorm, x, valid)
        if suits_strips(self, x, affine):
            return read_in_strips(self, x, valid, affine)
        if has_steps(self.batchnorm) and valid is not None and self.batchnorm.training:
            valid, x = seen_first(valid, x)
        size = x.shape[0], self.hidden_channels, *x.shape[-2:]
        zero = x.new_zeros(()).expand(size)
        # The gradients of PyTorch's loop are wrong.
        underivable = torch.compiler.is_exporting() or not torch.is_grad_enabled()
        if torch.compiler.is_compiling() and underivable and not self.training and x.shape[1]:
            return self._loop(x, valid, affine, zero)
        h, c = zero, zero
        for t in range(x.shape[1]):
            mask = None
            # Elsewhere than on a CPU, to look at the values would mean to wait for them.
            if valid is not None and not (is_eager_on_cpu(x) and valid[:, t].all()):
                mask = valid[:, t, None, None, None]
            # The hidden state is still zero: of a plain convolution that part can be left out. In
            # evaluation it is not, so that empty slots before the first image change no bit.
            first = t == 0 and self.training and is_plain(self.conv)
            now = affine and (affine[0][:, t], affine[1][:, t])
            slot = arrange(x[:, t]), mask, now, h, c, first
            if self.recompute_gates and torch.is_grad_enabled():
                h, c, moments = recomputed(self, self._next, *slot)
            else:
                h, c, moments = self._next(*slot)
            if moments is not None:
                track(self.batchnorm, moments, t)
        return h

    def _loop(self, x: Tensor, valid: Tensor | None, affine: Affine | None, zero: Tensor) -> Tensor:
        """The last hidden state, by a loop that a graph holds, so that T stays free."""
        # A prototype in PyTorch, imported from where it lives, and only by who needs it.
        from torch._higher_order_ops.while_loop import while_loop

        def body(t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            now = affine and (_slot(affine[0], t), _slot(affine[1], t))
            h, c, _ = self._next(_slot(x, t), mask if mask is None else _slot(mask, t), now, h, c)
            return t + 1, h, c

        mask = None if valid is None else valid[..., None, None, None]
        start = torch.zeros((), dtype=torch.long, device=x.device), zero.clone(), zero.clone()
        h: Tensor = while_loop(lambda t, h, c: t < x.shape[1], body, start)[1]
        return h

    def _next(
        self,
        x: Tensor,
        mask: Tensor | None,
        affine: Affine | None,
        h: Tensor,
        c: Tensor,
        first: bool = False,
    ) -> tuple[Tensor, Tensor, Moments | None]:
        """States after one slot of the samples in *mask* (all if None); the others keep theirs."""
        if mask is not None:
            # What an unread slot holds, NaN for instance, must not reach the weight's gradient.
            x = x.where(mask, 0)
        if first:
            weight = self.conv.weight[:, : self.in_channels]
            gates = F.conv2d(x, weight, self.conv.bias, padding=self.conv.padding)
        else:
            gates = self.conv(torch.cat([x, h], dim=1))
        i, f, g, o = gates.chunk(4, dim=1)
        c_new = f.sigmoid() * c + i.sigmoid() * arrange(g).tanh()
        h_new = o.sigmoid() * c_new.tanh()
        h_new, moments = normalize(self.batchnorm, h_new, mask, affine)
        if h_new.requires_grad and is_eager_on_cpu(h_new):
            h_new.register_hook(arrange)
        if mask is not None:
            h_new, c_new = torch.where(mask, h_new, h), torch.where(mask, c_new, c)
        return h_new, c_new, moments


def recomputed(module: nn.Module, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a part of a module so that the backward pass calls it again, with the same weights.

    Options are those of :func:`torch.utils.checkpoint.checkpoint`. Under torch.func, which has no
    checkpoints, it is called once.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False, **options)
    if is_transformed():
        return function(*args)
    # By then, torch.func.functional_call has given the module its own weights back.
    call = partial(_call_with, module, dict(module.named_parameters()), function)
    return checkpoint(call, *args, use_reentrant=False, **options)


def _call_with(
    module: nn.Module, weights: dict[str, Tensor], function: Callable[..., Any], *args: Any
) -> Any:
    with _reparametrize_module(module, weights):
        return function(*args)


def _slot(series: Tensor, t: Tensor) -> Tensor:
    """Slot t of a series (B, T, ...), in a way that graphs can hold."""
    return series.index_select(1, t[None])[:, 0]


def seen_first(valid: Tensor, *series: Tensor) -> tuple[Tensor, ...]:
    """Move the valid slots (B, T) of each sample to the front, and what series hold of them."""
    slots = torch.arange(valid.shape[1], device=valid.device)
    order = (slots + ~valid * len(slots)).argsort(1)
    rows = torch.arange(len(valid), device=valid.device)[:, None]
    return tuple(x[rows, order] for x in (valid, *series))


def _spread_statistics(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Statistics that all steps share fit a layer where each step has its own."""
    for name, own in layer.named_buffers():
        if prefix + name in state_dict:
            state_dict[prefix + name] = share_with_steps(state_dict[prefix + name], own)
