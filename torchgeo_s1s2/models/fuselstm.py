"""Drop-in for the original ConvLSTM+Inception-S1S2 model: its interface and its weights."""

from collections.abc import Mapping

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from .convlstm import ConvLSTM
from .encoder import rename
from .inception import Inception
from .strips import arrange

# Prefixes of the original's parameters, and of the same ones in smp.Unet around the backbone.
PREFIXES = {
    'convLSTM_s2.': 'encoder.convlstm.s2.',
    'convLSTM_s1.': 'encoder.convlstm.s1.',
    'inception.': 'encoder.inception.',
    'unet.encoder.': 'encoder.spatial.',
    'unet.decoder.': 'decoder.',
    'unet.segmentation_head.': 'segmentation_head.',
}


class FuseLSTM(nn.Module):
    """ConvLSTM+Inception-S1S2 with the inputs, parameter names and output of the original.

    Wenger et al., Remote Sensing 2023, https://doi.org/10.3390/rs15010151.

    .. note::
       The output is a softmax. Train with :meth:`logits`: cross-entropy expects them.
    """

    def __init__(
        self,
        num_classes: int = 10,
        encoder_weights: str | None = None,
        freeze_encoder: bool = True,
        channels_last_output: bool = False,
        recompute_gates: bool = False,
    ) -> None:
        """Initialize a new FuseLSTM instance.

        Args:
            num_classes: Number of classes.
            encoder_weights: 'imagenet' to download weights of the VGG-16 encoder.
            freeze_encoder: Whether the VGG-16 encoder keeps its weights, as in the original. It has
                no batch norm, so nothing else in it could change.
            channels_last_output: Whether the classes are the last dimension of the output.
            recompute_gates: As in :class:`ConvLSTM`.
        """
        super().__init__()
        self.channels_last_output = channels_last_output
        self.convLSTM_s2 = ConvLSTM(10, recompute_gates=recompute_gates)
        self.convLSTM_s1 = ConvLSTM(2, recompute_gates=recompute_gates)
        self.inception = Inception(12)
        self.unet = smp.Unet(
            'vgg16', encoder_weights=encoder_weights, in_channels=160, classes=num_classes
        )
        self.unet.encoder.requires_grad_(not freeze_encoder)

    def forward(self, x_s2: Tensor, x_s1: Tensor, x_stack: Tensor) -> Tensor:
        """Compute the class probabilities.

        Args:
            x_s2: Sentinel-2 series of shape (B, T2, H, W, 10).
            x_s1: Sentinel-1 series of shape (B, T1, H, W, 2).
            x_stack: First Sentinel-2 and first Sentinel-1 date, of shape (B, H, W, 12).

        Returns:
            Probabilities of shape (B, num_classes, H, W), or (B, H, W, num_classes) with
            *channels_last_output*.

        Raises:
            ValueError: If an input does not have these dimensions.
        """
        probabilities = self.logits(x_s2, x_s1, x_stack).softmax(dim=1)
        return probabilities.movedim(1, -1) if self.channels_last_output else probabilities

    def logits(self, x_s2: Tensor, x_s1: Tensor, x_stack: Tensor) -> Tensor:
        """Compute the logits, of shape (B, num_classes, H, W), of the inputs of :meth:`forward`."""
        _check_shape('x_s2', x_s2, '(B, T2, H, W, 10)', 5, 10)
        _check_shape('x_s1', x_s1, '(B, T1, H, W, 2)', 5, 2)
        _check_shape('x_stack', x_stack, '(B, H, W, 12)', 4, 12)
        features = [
            self.convLSTM_s2(x_s2.movedim(-1, 2)),
            self.convLSTM_s1(x_s1.movedim(-1, 2)),
            self.inception(arrange(x_stack.movedim(-1, 1))),
        ]
        logits: Tensor = self.unet(torch.cat([arrange(feature) for feature in features], dim=1))
        return logits


def _check_shape(name: str, x: Tensor, expected: str, ndim: int, channels: int) -> None:
    if x.ndim != ndim or x.shape[-1] != channels:
        raise ValueError(f'{name} has shape {tuple(x.shape)}, expected {expected}')


def fuselstm_to_unet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of :class:`FuseLSTM` (and the original) for the registered backbone.

    Args:
        state_dict: Weights of a FuseLSTM.

    Returns:
        Weights of ``smp.Unet('vgg16_convlstm_inception', ...)``.

    Raises:
        ValueError: If a name is not one of a FuseLSTM.
    """
    return _rename_all(state_dict, PREFIXES)


def unet_to_fuselstm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of the registered backbone's U-Net for :class:`FuseLSTM`.

    Args:
        state_dict: Weights of ``smp.Unet('vgg16_convlstm_inception', ...)``.

    Returns:
        Weights of a FuseLSTM.

    Raises:
        ValueError: If a name is not one of such a U-Net.
    """
    return _rename_all(state_dict, {new: old for old, new in PREFIXES.items()})


def _rename_all(state_dict: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    unknown = [key for key in state_dict if not key.startswith(tuple(prefixes))]
    if unknown:
        raise ValueError(
            f"unexpected parameter '{unknown[0]}', expected names starting with "
            f'{", ".join(prefixes)}'
        )
    return rename(state_dict, prefixes)
