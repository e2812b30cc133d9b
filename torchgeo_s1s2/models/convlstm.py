"""Convolutional LSTM with batch norm on the hidden state."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvLSTM(nn.Module):
    """Convolutional LSTM that returns the last, batch-normalised hidden state.

    One convolution of the input and the hidden state gives the input, forget, cell and output
    gates, in this order. The same batch norm is applied to the hidden state at every step, and the
    normalised state is what the next step sees; the cell state is kept as it is. Both states
    start from zero.

    A slot that is not valid leaves the states of its sample as they were, and in training its
    values do not enter the batch-norm statistics. A series with empty slots inserted anywhere
    therefore gives the same output as the series without them.

    Shi et al., "Convolutional LSTM Network", NeurIPS 2015, https://arxiv.org/abs/1506.04214, used
    as in Wenger et al., Remote Sensing 2023, https://doi.org/10.3390/rs15010151.
    """

    def __init__(self, in_channels: int, hidden_channels: int = 32, kernel_size: int = 3) -> None:
        """Initialize a new ConvLSTM instance.

        Args:
            in_channels: Number of channels of one time slot.
            hidden_channels: Number of channels of the hidden and the cell state.
            kernel_size: Odd width of the square convolution kernel, in pixels.

        Raises:
            ValueError: If *kernel_size* is even.
        """
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd to keep the image size, got {kernel_size}')
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.conv = nn.Conv2d(
            in_channels + hidden_channels,
            4 * hidden_channels,
            kernel_size,
            padding=kernel_size // 2,
        )
        self.batchnorm = nn.BatchNorm2d(hidden_channels)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Read a time series.

        Args:
            x: Series of shape (B, T, C, H, W); T may be 0.
            valid: Slots to read, booleans of shape (B, T); all of them if None.

        Returns:
            Last hidden state of shape (B, hidden_channels, H, W).
        """
        h = c = x.new_zeros(len(x), self.hidden_channels, *x.shape[-2:])
        started = False
        for t, seen in self._slots(x, valid):
            inputs = x[:, t] if seen is None else x[:, t].where(seen, 0)
            # The hidden state is still zero at the first step: its convolution can be left out.
            h_new, c_new = self._step(inputs, h if started else None, c)
            h_new = self._normalize(h_new, seen)
            h, c = (h_new, c_new) if seen is None else (h_new.where(seen, h), c_new.where(seen, c))
            started = True
        return h

    def _slots(self, x: Tensor, valid: Tensor | None) -> list[tuple[int, Tensor | None]]:
        """Slots to read, each with its mask of shape (B, 1, 1, 1), None if it is all True."""
        steps = range(x.shape[1])
        if valid is None:
            return [(t, None) for t in steps]
        masks = [valid[:, t, None, None, None] for t in steps]
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return list(enumerate(masks))
        columns = valid.T.tolist()
        return [(t, None if all(columns[t]) else masks[t]) for t in steps if any(columns[t])]

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the recurrence, without the batch norm."""
        if h is None:
            weight = self.conv.weight[:, : self.in_channels]
            gates = F.conv2d(x, weight, self.conv.bias, padding=self.conv.padding)
        else:
            gates = self.conv(torch.cat([x, h], dim=1))
        i, f, g, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def _normalize(self, h: Tensor, seen: Tensor | None) -> Tensor:
        """Batch norm, in training with the statistics of the samples that were seen."""
        if seen is None or not self.training:
            normalized: Tensor = self.batchnorm(h)
            return normalized
        return masked_batch_norm(h, seen, self.batchnorm)


def masked_batch_norm(x: Tensor, seen: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Batch norm in training mode whose statistics come from part of the samples.

    Args:
        x: Features of shape (B, C, H, W).
        seen: Samples to take statistics from, booleans of shape (B, 1, 1, 1).
        norm: Module with the weights and the running statistics, which are updated.

    Returns:
        Normalised features of shape (B, C, H, W).
    """
    weight = seen.to(norm.weight.dtype)
    count = weight.sum() * x.shape[-2] * x.shape[-1]
    mean = (x * weight).sum((0, 2, 3)) / count.clamp(min=1)
    centred = x - mean[:, None, None]
    var = (centred.square() * weight).sum((0, 2, 3)) / count.clamp(min=1)
    unbiased = var * count / (count - 1).clamp(min=1)
    momentum = (norm.momentum or 0.0) * (count > 0).to(count.dtype)
    with torch.no_grad():
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            if running is not None:
                running.lerp_(new.to(running.dtype), momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(count > 0)
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return centred * scale[:, None, None] + norm.bias[:, None, None]
