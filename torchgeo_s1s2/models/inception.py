"""Multi-scale features of one date."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Inception(nn.Module):
    """Three parallel towers (3x3, 5x5 and pooling) whose features are concatenated.

    Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, https://arxiv.org/abs/1409.4842,
    used as in Wenger et al., Remote Sensing 2023, https://doi.org/10.3390/rs15010151.
    """

    def __init__(self, in_channels: int, tower_channels: int = 32) -> None:
        """Initialize a new Inception instance.

        Args:
            in_channels: Number of input channels.
            tower_channels: Number of output channels of each tower.
        """
        super().__init__()
        self.out_channels = 3 * tower_channels
        self.tower1_1 = nn.Conv2d(in_channels, tower_channels, 1)
        self.tower1_2 = nn.Conv2d(tower_channels, tower_channels, 3, padding=1)
        self.tower2_1 = nn.Conv2d(in_channels, tower_channels, 1)
        self.tower2_2 = nn.Conv2d(tower_channels, tower_channels, 5, padding=2)
        self.tower3_2 = nn.Conv2d(in_channels, tower_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features.

        Args:
            x: Image of shape (B, C, H, W).

        Returns:
            Features of shape (B, 3 * tower_channels, H, W).
        """
        tower1 = self.tower1_2(F.relu(self.tower1_1(x)))
        tower2 = self.tower2_2(F.relu(self.tower2_1(x)))
        tower3 = self.tower3_2(F.max_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([tower1, tower2, tower3], dim=1).relu_()
