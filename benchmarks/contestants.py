"""Contestants that no package has as a task: trees and attention on pixels, and a single date."""

import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor, nn
from torchgeo.models import LTAE
from torchgeo.tasks import SpatioTemporalSegmentation

from torchgeo_s1s2.datasets import MonthlySeries
from torchgeo_s1s2.datasets.time_series import Slot, Span, Times


class PixelLTAE(nn.Module):
    """TorchGeo's temporal attention encoder (https://arxiv.org/abs/2007.00586) at each pixel."""

    def __init__(self, in_channels: int, num_classes: int, length: int, width: int = 64) -> None:
        super().__init__()
        heads: Any = {'n_head': 4, 'n_neurons': (width, width), 'd_model': width, 'dropout': 0.1}
        self.encoder = LTAE(in_channels, len_max_seq=length, **heads)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Read (B, T, C, H, W), return logits (B, K, H, W)."""
        return _maps(self.head(self.encoder(_pixels(x))), x)


class LTAESegmentation(SpatioTemporalSegmentation):
    """TorchGeo's task with L-TAE in it; ``length`` is the number of time slots."""

    def configure_models(self) -> None:
        self.model = PixelLTAE(
            self.hparams['in_channels'], self.hparams['num_classes'], **self.kwargs
        )


class TreesSegmentation(SpatioTemporalSegmentation):
    """Gradient-boosted trees on series, fitted to ``pixels`` of each patch in the first epoch."""

    def configure_models(self) -> None:
        # Lightning keeps no checkpoint before an optimizer has made a step.
        self.model = nn.ParameterList([torch.zeros(1)])
        self.trees = HistGradientBoostingClassifier(
            max_iter=100, l2_regularization=1, min_samples_leaf=50, random_state=0
        )
        self._drawn: list[tuple[np.ndarray, np.ndarray]] = []

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Read (B, T, C, H, W), return the logarithm of the probabilities (B, K, H, W)."""
        known = torch.from_numpy(self.trees.predict_proba(_series(x))).float()
        probabilities = torch.full((len(known), self.hparams['num_classes']), 1e-6)
        probabilities[:, self.trees.classes_] += known
        return _maps(probabilities.log().to(x.device), x)

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = _series(batch['image']), batch['mask'].flatten().cpu().numpy()
        chosen = torch.randperm(len(y))[: self.kwargs['pixels'] * len(batch['mask'])].numpy()
        chosen = chosen[y[chosen] < self.hparams['num_classes']]
        self._drawn.append((x[chosen], y[chosen]))
        if batch_idx == self.trainer.num_training_batches - 1:
            self.trees.fit(*map(np.concatenate, zip(*self._drawn, strict=True)))
        return 0 * self.model[0].sum()

    def on_train_epoch_end(self) -> None:
        """No metrics: nothing is predicted in training."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint['trees'] = pickle.dumps(self.trees)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trees = pickle.loads(checkpoint['trees'])


@dataclass(frozen=True)
class OneMonth(MonthlySeries):
    """One slot of a monthly series, of the patches that have the whole of it."""

    slot: int = 2

    @property
    def length(self) -> int:
        return 1

    def slots(self, times: Times, span: Span, draw: int) -> list[Slot]:
        return super().slots(times, span, draw)[self.slot : self.slot + 1]


def _pixels(x: Tensor) -> Tensor:
    """(B, T, C, H, W) to (B*H*W, T, C)."""
    return x.movedim((3, 4), (1, 2)).flatten(0, 2)


def _maps(values: Tensor, x: Tensor) -> Tensor:
    """(B*H*W, K) of the pixels of (B, T, C, H, W) to (B, K, H, W)."""
    return values.view(len(x), *x.shape[-2:], -1).movedim(-1, 1)


def _series(x: Tensor) -> np.ndarray:
    """(B, T, C, H, W) to (B*H*W, T*C)."""
    return _pixels(x).flatten(1).cpu().numpy()
