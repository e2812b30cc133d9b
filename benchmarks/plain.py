"""ConvLSTM+Inception in the plainest way: the oracle of the tests, the baseline of the benchmarks.

It shares no code with the package and takes weights with the original's parameter names.
"""

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn


class PlainConvLSTM(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels + 32, 4 * 32, kernel_size=3, padding=1)
        self.batchnorm = nn.BatchNorm2d(32)

    def forward(self, series: Tensor) -> Tensor:
        """Read (B, T, H, W, C), return the last hidden state (B, 32, H, W)."""
        batch, dates, height, width, _ = series.shape
        hidden = series.new_zeros(batch, 32, height, width)
        cell = series.new_zeros(batch, 32, height, width)
        states = []
        for date in range(dates):
            image = series[:, date].permute(0, 3, 1, 2)
            gates = self.conv(torch.cat([image, hidden], dim=1))
            input_gate = torch.sigmoid(gates[:, 0:32])
            forget_gate = torch.sigmoid(gates[:, 32:64])
            candidate = torch.tanh(gates[:, 64:96])
            output_gate = torch.sigmoid(gates[:, 96:128])
            cell = forget_gate * cell + input_gate * candidate
            hidden = self.batchnorm(output_gate * torch.tanh(cell))
            states.append(hidden)
        return torch.stack(states, dim=1)[:, -1]


class PlainInception(nn.Module):
    def __init__(self, in_channels: int = 12) -> None:
        super().__init__()
        self.tower1_1 = nn.Conv2d(in_channels, 32, 1)
        self.tower1_2 = nn.Conv2d(32, 32, 3, padding=1)
        self.tower2_1 = nn.Conv2d(in_channels, 32, 1)
        self.tower2_2 = nn.Conv2d(32, 32, 5, padding=2)
        self.tower3_2 = nn.Conv2d(in_channels, 32, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Read (B, H, W, C), return (B, 96, H, W)."""
        image = image.permute(0, 3, 1, 2)
        small = self.tower1_2(torch.relu(self.tower1_1(image)))
        large = self.tower2_2(torch.relu(self.tower2_1(image)))
        pooled = self.tower3_2(torch.max_pool2d(image, 3, stride=1, padding=1))
        return torch.relu(torch.cat([small, large, pooled], dim=1))


class PlainFuseLSTM(nn.Module):
    """The whole model, without the softmax at its end."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.convLSTM_s2 = PlainConvLSTM(10)
        self.convLSTM_s1 = PlainConvLSTM(2)
        self.inception = PlainInception()
        self.unet = smp.Unet('vgg16', encoder_weights=None, in_channels=160, classes=num_classes)

    def forward(self, x_s2: Tensor, x_s1: Tensor, x_stack: Tensor | None = None) -> Tensor:
        """Read (B, T, H, W, C) of each sensor, return the logits; the stack is the first dates."""
        if x_stack is None:
            x_stack = torch.cat([x_s2[:, 0], x_s1[:, 0]], dim=-1)
        features = [self.convLSTM_s2(x_s2), self.convLSTM_s1(x_s1), self.inception(x_stack)]
        logits: Tensor = self.unet(torch.cat(features, dim=1))
        return logits
