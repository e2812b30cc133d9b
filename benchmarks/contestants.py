"""Contestants that no package has as a task: trees and attention on pixels, and a single date."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor, nn
from torchgeo.models import LTAE, Presto_Weights, presto
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
        batch, height, width = len(x), *x.shape[-2:]
        logits: Tensor = self.head(self.encoder(_pixels(x)))
        return logits.view(batch, height, width, -1).movedim(-1, 1)


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
        batch, height, width = len(x), *x.shape[-2:]
        known = torch.from_numpy(self.trees.predict_proba(_series(x))).float()
        probabilities = torch.full((len(known), self.hparams['num_classes']), 1e-6)
        probabilities[:, self.trees.classes_] += known
        return probabilities.log().view(batch, height, width, -1).movedim(-1, 1).to(x.device)

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


class PixelPresto(nn.Module):
    """TorchGeo's Presto encoder (Tseng et al. 2023) at each pixel, and a linear head.

    It reads Sentinel-1, Sentinel-2 and NDVI, scaled as in its pretraining; weather, elevation and
    Dynamic World, which it could read too, are masked. https://arxiv.org/abs/2304.14065
    """

    mean: Tensor
    std: Tensor
    months: Tensor
    place: Tensor

    def __init__(
        self,
        num_classes: int,
        months: Sequence[int],
        place: Sequence[float],
        weights: str | None = None,
    ) -> None:
        """Build it for the months 1..12 of the slots and a place (latitude, longitude).

        Weights are ``PRESTO``, which TorchGeo downloads, or a file of them; random if None.
        """
        super().__init__()
        download = Presto_Weights.__members__.get(weights or '')
        model = presto(download)
        if weights and download is None:
            model.load_state_dict(torch.load(weights, map_location='cpu', weights_only=True))
        self.encoder = model.encoder
        self.head = nn.Linear(self.encoder.embedding_size, num_classes)
        self.register_buffer('months', torch.tensor(months) - 1)
        self.register_buffer('place', torch.tensor(place))
        # Of the normalised channels, to undo it.
        self.register_buffer('mean', torch.zeros(12))
        self.register_buffer('std', torch.ones(12))

    def forward(self, series: Tensor) -> Tensor:
        """Read pixels (N, T, C), return logits (N, K)."""
        number, length, _ = series.shape
        s2, s1 = (series * self.std + self.mean).split([10, 2], dim=-1)
        red, infrared = s2[..., 2:3], s2[..., 6:7]
        ndvi = (infrared - red) / (infrared + red).clamp(min=1e-6)
        masked = s2.new_zeros(number, length, 4)
        x = torch.cat([(s1 + 25) / 25, s2, masked, ndvi], dim=-1)
        mask = torch.zeros_like(x)
        mask[..., 12:16] = 1
        tokens, _, _ = self.encoder(
            x,
            dynamic_world=torch.full((number, length), 9, device=x.device),
            latlons=self.place.expand(number, 2),
            mask=mask,
            month=self.months.expand(number, length),
        )
        logits: Tensor = self.head(tokens.mean(1))
        return logits


class PrestoSegmentation(SpatioTemporalSegmentation):
    """TorchGeo's task with Presto in it.

    ``pixels`` of each training patch are drawn at each step, and every ``every``-th row and column
    is validated, since attention at each pixel costs much; all pixels are tested.
    """

    def configure_models(self) -> None:
        self.pixels, self.every = self.kwargs.pop('pixels'), self.kwargs.pop('every')
        self.model = PixelPresto(self.hparams['num_classes'], **self.kwargs)

    def setup(self, stage: str) -> None:
        statistics = self.trainer.datamodule.statistics  # type: ignore[attr-defined]
        model: Any = self.model
        model.mean.copy_(torch.tensor(statistics.mean))
        model.std.copy_(torch.tensor(statistics.std))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Read (B, T, C, H, W), return logits (B, K, H, W)."""
        batch, height, width = len(x), *x.shape[-2:]
        logits = torch.cat([self.model(part) for part in _pixels(x).split(4096)])
        return logits.view(batch, height, width, -1).movedim(-1, 1)

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = _pixels(batch['image']), batch['mask'].flatten()
        chosen = torch.randperm(len(y), device=y.device)[: self.pixels * len(batch['mask'])]
        loss: Tensor = self.criterion(self.model(x[chosen]), y[chosen])
        self.log('train_loss', loss, batch_size=len(batch['mask']))
        return loss

    def on_train_epoch_end(self) -> None:
        """No metrics: few pixels are predicted in training."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        for key in ('image', 'mask'):
            batch[key] = batch[key][..., :: self.every, :: self.every]
        super().validation_step(batch, batch_idx, dataloader_idx)


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


def _series(x: Tensor) -> np.ndarray:
    """(B, T, C, H, W) to (B*H*W, T*C)."""
    return _pixels(x).flatten(1).cpu().numpy()
