"""Features at full resolution for the head of every smp model."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import SegmentationModel
from segmentation_models_pytorch.base.modules import Conv2dReLU
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

WIDTH = 32
"""Most channels that the head of such a model reads."""


class FullResolution(nn.Module):
    """Joins what a decoder gives with the features at full resolution, which decoders of smp drop.

    A 1 x 1 convolution reduces what the decoder gives to 32 channels, if it has more; they are
    enlarged to the size of the image, and a 3 x 3 convolution with batch norm reads them beside the
    features.
    """

    def __init__(self, decoder_channels: int, channels: int) -> None:
        """Initialize a new FullResolution instance.

        Args:
            decoder_channels: Number of channels that the decoder gives.
            channels: Number of channels of the features at full resolution.
        """
        super().__init__()
        self.out_channels = min(decoder_channels, WIDTH)
        self.reduce = (
            nn.Conv2d(decoder_channels, WIDTH, 1) if decoder_channels > WIDTH else nn.Identity()
        )
        self.join = Conv2dReLU(self.out_channels + channels, self.out_channels, 3, padding=1)

    def forward(self, decoded: Tensor, features: Tensor) -> Tensor:
        """Join.

        Args:
            decoded: What the decoder gives, of shape (B, decoder_channels, h, w).
            features: Features of shape (B, channels, H, W).

        Returns:
            Features of shape (B, out_channels, H, W).
        """
        x = self.reduce(decoded)
        if x.shape[-2:] != features.shape[-2:]:
            x = F.interpolate(x, features.shape[-2:], mode='bilinear')
        joined: Tensor = self.join(torch.cat([x, features], dim=1))
        return joined


@cache
def watch_models() -> None:
    """Build models of smp with :class:`FullResolution`, if their encoder says ``full_resolution``.

    smp has no place for that, so this uses PyTorch's hook for modules that become parts of others.
    """
    register_module_module_registration_hook(_on_part)


def _on_part(model: nn.Module, name: str, head: Any) -> None:
    """Give the first head of a model of smp the features at full resolution."""
    if name != 'segmentation_head' or not isinstance(model, SegmentationModel):
        return
    encoder, decoder = (getattr(model, part, None) for part in ('encoder', 'decoder'))
    if not getattr(encoder, 'full_resolution', False) or hasattr(decoder, 'full_resolution'):
        return
    if encoder is None or decoder is None:
        raise TypeError(
            f'{type(model).__name__} has no decoder when it gets its head, so that cannot see '
            'features at full resolution; set decoder first, or leave full_resolution out'
        )
    conv = head[0]
    join = FullResolution(conv.in_channels, encoder.out_channels[0])
    decoder.full_resolution = join
    decoder.register_forward_hook(_join)
    size, padding = conv.kernel_size, conv.padding
    head[0] = nn.Conv2d(join.out_channels, conv.out_channels, size, padding=padding)
    head[1] = nn.Identity()  # what enlarges the logits


def _join(decoder: Any, inputs: Sequence[Any], output: Tensor) -> Tensor:
    joined: Tensor = decoder.full_resolution(output, inputs[0][0])
    return joined
