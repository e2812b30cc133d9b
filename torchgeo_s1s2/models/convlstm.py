"""Convolutional LSTM with batch norm on the hidden state."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import GateInStrips, suits_strips
from .traceable import read_series


class ConvLSTM(nn.Module):
    """Convolutional LSTM that returns the last, batch-normalised hidden state.

    One convolution of the input and the hidden state gives the input, forget, cell and output
    gates, in this order. The same batch norm is applied to the hidden state at every step, and the
    normalised state is what the next step sees; the cell state is kept as it is. Both states
    start from zero.

    A slot that is not valid leaves the states of its sample as they were and is not part of the
    batch that the batch norm sees. A series with empty slots inserted anywhere therefore gives the
    same output as the series without them.

    Shi et al., "Convolutional LSTM Network", NeurIPS 2015, https://arxiv.org/abs/1506.04214, used
    as in Wenger et al., Remote Sensing 2023, https://doi.org/10.3390/rs15010151.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 32,
        kernel_size: int = 3,
        checkpoint: bool = False,
    ) -> None:
        """Initialize a new ConvLSTM instance.

        Args:
            in_channels: Number of channels of one time slot.
            hidden_channels: Number of channels of the hidden and the cell state.
            kernel_size: Odd width of the square convolution kernel, in pixels.
            checkpoint: Whether the gates are computed again in the backward pass instead of being
                kept, for less memory and more time.

        Raises:
            ValueError: If *kernel_size* is even.
        """
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd to keep the image size, got {kernel_size}')
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.checkpoint = checkpoint
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
        if torch.compiler.is_compiling():
            return read_series(self, x, valid)
        h = c = x.new_zeros(len(x), self.hidden_channels, *x.shape[-2:])
        started = False
        for t, rows in self._seen(x, valid):
            # The hidden state is still zero at the first step: its convolution can be left out.
            if rows is None:
                h, c = self._step(x[:, t], h if started else None, c)
            else:
                h_new, c_new = self._step(x[rows, t], h[rows] if started else None, c[rows])
                h, c = h.index_copy(0, rows, h_new), c.index_copy(0, rows, c_new)
            started = True
        return h

    @staticmethod
    def _seen(x: Tensor, valid: Tensor | None) -> Iterator[tuple[int, Tensor | None]]:
        """Slots that a sample saw, each with the rows of these samples, None if it is all."""
        batch, steps = x.shape[:2]
        columns = [[True] * batch] * steps if valid is None else valid.T.tolist()
        for t, column in enumerate(columns):
            rows = [row for row, seen in enumerate(column) if seen]
            if rows:
                yield t, None if len(rows) == batch else torch.tensor(rows, device=x.device)

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor]:
        """Next normalised hidden state and next cell state."""
        h, c = self._gate_in_strips(x, h, c) if suits_strips(x) else self.gate(x, h, c)
        return self.batchnorm(h), c

    def gate(self, x: Tensor, h: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor]:
        """Next hidden state, not yet normalised, and next cell state.

        Args:
            x: Slot of shape (B, C, H, W).
            h: Hidden state of shape (B, hidden_channels, H, W), None for zeros.
            c: Cell state of the same shape.

        Returns:
            Hidden and cell state.
        """
        if h is None:
            weight = self.conv.weight[:, : self.in_channels]
            gates = F.conv2d(x, weight, self.conv.bias, padding=self.conv.padding)
        else:
            gates = self.conv(torch.cat([x, h], dim=1))
        i, f, g, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def _gate_in_strips(self, x: Tensor, h: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = self.conv.weight, self.conv.bias
        keep = torch.is_grad_enabled() and not self.checkpoint
        if h is None:
            weight = weight[:, : self.in_channels]
            return GateInStrips.apply(x, None, None, weight, bias, keep)
        return GateInStrips.apply(x, h, c, weight, bias, keep)
