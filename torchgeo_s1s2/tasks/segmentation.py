"""Semantic segmentation of Sentinel-1 and Sentinel-2 time series."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import segmentation_models_pytorch as smp
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchgeo.datasets import unbind_samples
from torchgeo.models import get_weight
from torchgeo.tasks import SemanticSegmentation, utils
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCohenKappa,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.wrappers import ClasswiseWrapper
from torchvision.models import WeightsEnum

from torchgeo_s1s2.datamodules import MultiSenGEDataModule
from torchgeo_s1s2.datasets.classes import NO_LABEL
from torchgeo_s1s2.datasets.multisenge import Sample
from torchgeo_s1s2.models import ConvLSTMInceptionEncoder
from torchgeo_s1s2.tasks.report import confusion_figure, save_figure, summary

# TorchGeo's names of smp architectures that smp spells otherwise.
_ARCHITECTURES = {'deeplabv3+': 'deeplabv3plus'}
_STAGES = ('train', 'val', 'test')


class S1S2SemanticSegmentation(SemanticSegmentation):
    """TorchGeo's semantic segmentation for series of Sentinel-1 and Sentinel-2.

    What it adds: all of smp's architectures; ``freeze_backbone`` that freezes the spatial encoder,
    its batch norm included, and never the recurrent layers in front; class weights computed from
    the training patches; weighted metrics, Cohen's kappa and a confusion matrix; figures; and a
    check of data against model before the first step. The defaults are the protocol of Wenger et
    al., Remote Sensing 2023, 15(1), 151, https://doi.org/10.3390/rs15010151.

    Logged for ``train``, ``val`` and ``test``: the loss, ``OverallAccuracy``,
    ``Weighted{Precision,Recall,F1Score}``, ``AverageF1Score``, ``AverageJaccardIndex``, ``Kappa``
    and, for each class, ``{Precision,Recall,F1Score}_NAME``, all 0..1 (kappa -1..1).
    """

    def __init__(
        self,
        model: str = 'unet',
        backbone: str = 'vgg16_convlstm_inception',
        weights: WeightsEnum | str | bool | None = None,
        in_channels: int = 48,
        task: Literal['binary', 'multiclass', 'multilabel'] = 'multiclass',
        num_classes: int | None = 14,
        num_labels: int | None = None,
        labels: list[str] | None = None,
        num_filters: int = 3,
        pos_weight: Tensor | None = None,
        loss: Literal['ce', 'bce', 'jaccard', 'focal', 'dice'] = 'ce',
        class_weights: Tensor | Sequence[float] | Literal['balanced'] | None = None,
        ignore_index: int | None = NO_LABEL,
        lr: float = 1e-3,
        patience: int = 5,
        freeze_backbone: bool = False,
        freeze_decoder: bool = False,
        figures: int = 4,
    ) -> None:
        """Build the model, the loss and the metrics.

        Args:
            model: Architecture of smp (``'unet'``, ``'unetplusplus'``, ``'fpn'``, ...) or
                TorchGeo's ``'fcn'``.
            backbone: Name of an smp encoder, such as ``'vgg16_convlstm_inception'``.
            weights: As in TorchGeo: a weight enum or its name, True for ImageNet, a checkpoint's
                path, None or False for random weights.
            in_channels: Time slots times channels of a slot, T*C.
            task: ``'multiclass'``, ``'binary'`` or ``'multilabel'``.
            num_classes: Number of classes K.
            num_labels: Number of labels of a multilabel task.
            labels: Names of the classes; those of the data set unless given.
            num_filters: Number of filters of ``'fcn'``.
            pos_weight: Weight of positive examples in ``'bce'``.
            loss: ``'ce'``, ``'bce'``, ``'jaccard'``, ``'focal'`` or ``'dice'``.
            class_weights: Weight of each class in ``'ce'``, or ``'balanced'`` for the inverse of
                the pixel frequencies in the training patches.
            ignore_index: Value of the mask that counts neither in the loss nor in the metrics.
            lr: Learning rate of Adam.
            patience: Epochs without a lower validation loss before the rate drops to a tenth.
            freeze_backbone: Freeze the spatial encoder.
            freeze_decoder: Freeze the decoder.
            figures: Number of validation or test samples to draw.

        Raises:
            ValueError: If an argument has no such value.
        """
        super().__init__(
            model=model,  # type: ignore[arg-type]
            backbone=backbone,
            weights=weights,
            in_channels=in_channels,
            task=task,
            num_classes=num_classes,
            num_labels=num_labels,
            labels=labels,
            num_filters=num_filters,
            pos_weight=pos_weight,
            loss=loss,
            class_weights=class_weights,  # type: ignore[arg-type]
            ignore_index=ignore_index,
            lr=lr,
            patience=patience,
            freeze_backbone=freeze_backbone,
            freeze_decoder=freeze_decoder,
        )
        self._drawn: list[Sample] = []

    def configure_models(self) -> None:
        """Build the segmentation model, load its weights and freeze what is to be frozen."""
        if self.hparams['model'] == 'fcn':
            super().configure_models()
            return
        name = _ARCHITECTURES.get(self.hparams['model'], self.hparams['model'])
        self.model = smp.create_model(
            name,
            encoder_name=self.hparams['backbone'],
            encoder_weights='imagenet' if self.weights is True else None,
            in_channels=self.hparams['in_channels'],
            classes=self.hparams['num_classes'] or self.hparams['num_labels'] or 1,
        )
        if self.weights and self.weights is not True:
            self.model.encoder.load_state_dict(_encoder_weights(self.weights))
        if self.hparams['freeze_backbone']:
            self._spatial_encoder.requires_grad_(False)
        if self.hparams['freeze_decoder']:
            self.model.decoder.requires_grad_(False)

    def configure_metrics(self) -> None:
        """Set up the metrics; TorchGeo's own for binary and multilabel tasks."""
        if self.hparams['task'] != 'multiclass':
            super().configure_metrics()
            return
        num_classes, ignore = self.hparams['num_classes'], self.hparams['ignore_index']
        metrics = _multiclass_metrics(num_classes, ignore, self.hparams['labels'])
        for stage in _STAGES:
            setattr(self, f'{stage}_metrics', metrics.clone(prefix=f'{stage}_'))
        self._confusion = MulticlassConfusionMatrix(num_classes, ignore_index=ignore)

    def configure_optimizers(self) -> Any:
        """Adam, and a tenth of the learning rate when the validation loss stays where it is."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = Adam(parameters, lr=self.hparams['lr'])
        scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=self.hparams['patience'])
        return {
            'optimizer': optimizer,
            'lr_scheduler': {'scheduler': scheduler, 'monitor': self.monitor},
        }

    def setup(self, stage: str) -> None:
        """Check the data against the model, and take class names and weights from the data.

        Args:
            stage: ``'fit'``, ``'validate'``, ``'test'`` or ``'predict'``.

        Raises:
            ValueError: If the numbers of classes, channels or time slots differ.
        """
        datamodule = getattr(self.trainer, 'datamodule', None)
        if not isinstance(datamodule, MultiSenGEDataModule):
            if self.hparams['class_weights'] == 'balanced':
                raise ValueError(
                    "class_weights='balanced' needs a MultiSenGEDataModule; give a list of weights"
                )
            return
        self._check_data(datamodule)
        if self.hparams['labels'] is None and self.hparams['task'] == 'multiclass':
            self.hparams['labels'] = list(datamodule.classes.names)
            self.configure_metrics()
        if self.hparams['class_weights'] == 'balanced' and stage == 'fit':
            self.criterion.weight = datamodule.class_weights.to(self.device)

    def configure_losses(self) -> None:
        """Set up the loss; ``'balanced'`` weights are filled in when the data are known."""
        weights = self.hparams['class_weights']
        if weights != 'balanced':
            super().configure_losses()
            return
        if self.hparams['loss'] != 'ce':
            raise ValueError(
                f"class_weights='balanced' acts in the loss 'ce' only, not in "
                f'{self.hparams["loss"]!r}; leave class_weights out'
            )
        self.hparams['class_weights'] = [1.0] * self.hparams['num_classes']
        super().configure_losses()
        self.hparams['class_weights'] = weights

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen spatial encoder keeps its batch-norm statistics."""
        super().train(mode)
        if self.hparams['freeze_backbone'] and self.hparams['model'] != 'fcn':
            self._spatial_encoder.eval()
        return self

    @property
    def _spatial_encoder(self) -> nn.Module:
        """What ``freeze_backbone`` freezes: not the layers that read a series in front of it."""
        encoder: nn.Module = self.model.encoder
        return encoder.spatial if isinstance(encoder, ConvLSTMInceptionEncoder) else encoder

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            x: Series (B, T, C, H, W) or (B, T*C, H, W).

        Returns:
            Logits (B, K, H, W).
        """
        encoder = getattr(self.model, 'encoder', None)
        logits: Tensor = self.model(
            x if isinstance(encoder, ConvLSTMInceptionEncoder) else _fold(x)
        )
        return logits

    def training_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Loss of a training batch; see TorchGeo."""
        return self._step('train', batch)[0]

    def validation_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss, metrics and samples to draw of a validation batch."""
        self._evaluate('val', batch)

    def test_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss, metrics and samples to draw of a test batch."""
        self._evaluate('test', batch)

    def predict_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Class probabilities with what is needed to put them on the map.

        Returns:
            ``probabilities`` (B, K, H, W), and of the batch ``bounds``, ``transform``, ``crs``,
            ``index`` and ``valid``, where they are there.
        """
        prediction = super().predict_step(batch, batch_idx, dataloader_idx)
        return prediction | {k: batch[k] for k in ('crs', 'index', 'valid') if k in batch}

    def on_validation_epoch_start(self) -> None:
        """Forget the epoch before."""
        self._drawn.clear()
        self._confusion.reset()

    def on_test_epoch_start(self) -> None:
        """Forget the epoch before."""
        self.on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Log metrics and, to a logger that takes them, figures."""
        super().on_validation_epoch_end()
        self._log_figures()

    def on_test_epoch_end(self) -> None:
        """Log metrics and, to a logger that takes them, figures."""
        super().on_test_epoch_end()
        self._log_figures()

    def on_fit_end(self) -> None:
        """Draw the last validation, and say what the run achieved and where its files are."""
        self._report('val')

    def on_validation_end(self) -> None:
        """Do the same for ``torchgeo validate``."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._report('val')

    def on_test_end(self) -> None:
        """Do the same for ``torchgeo test``."""
        self._report('test')

    def _step(self, stage: str, batch: Sample) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch, logged."""
        mask = batch['mask']
        logits = self(batch['image']).squeeze(1)
        getattr(self, f'{stage}_metrics').update(logits, mask)
        loss = self._loss(logits, mask)
        self.log(f'{stage}_loss', loss, batch_size=len(mask), prog_bar=True)
        return loss, logits

    def _loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Loss over the labelled pixels, 0 without any."""
        ignore = self.hparams['ignore_index']
        if ignore is not None and (mask == ignore).all():
            return 0 * logits.sum()
        if self.hparams['loss'] == 'bce':
            mask = mask.float()
        if self.hparams['loss'] == 'jaccard' and self.hparams['task'] == 'multiclass':
            # smp's Jaccard loss cannot leave pixels out, so only the others are given to it.
            labelled = mask != ignore
            logits = logits.movedim(1, 0)[:, labelled][None]
            mask = mask[labelled][None]
        loss: Tensor = self.criterion(logits, mask)
        return loss

    def _evaluate(self, stage: str, batch: Sample) -> None:
        _, logits = self._step(stage, batch)
        if self.hparams['task'] != 'multiclass':
            return
        self._confusion.update(logits, batch['mask'])
        missing = self.hparams['figures'] - len(self._drawn)
        if missing > 0:
            drawn = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
            drawn['prediction'] = logits.argmax(1)
            samples = unbind_samples({k: v[:missing].cpu() for k, v in drawn.items()})
            self._drawn.extend(samples)

    def _check_data(self, datamodule: MultiSenGEDataModule) -> None:
        classes, channels = len(datamodule.classes), sum(datamodule.channels.values())
        length = datamodule.series_length
        if self.hparams['task'] == 'multiclass' and self.hparams['num_classes'] != classes:
            raise ValueError(
                f'the model has num_classes={self.hparams["num_classes"]}, the data have {classes} '
                'classes; give model and data the same number'
            )
        if self.hparams['in_channels'] != length * channels:
            raise ValueError(
                f'the model has in_channels={self.hparams["in_channels"]}, the data give '
                f'{length} time slots x {channels} channels = {length * channels}; set in_channels '
                'to that'
            )
        self._check_encoder(datamodule)

    def _check_encoder(self, datamodule: MultiSenGEDataModule) -> None:
        """A series encoder splits channels by sensor, so equal sums are not enough."""
        encoder = getattr(self.model, 'encoder', None)
        if isinstance(encoder, ConvLSTMInceptionEncoder) and encoder.sensors != datamodule.channels:
            raise ValueError(
                f'backbone {self.hparams["backbone"]!r} reads {encoder.sensors} channels, the data '
                f'give {datamodule.channels}; use the backbone for these sensors and bands'
            )

    def _figures(self) -> Iterator[tuple[str, Figure]]:
        """Drawn samples and the confusion matrix of the last evaluation."""
        datamodule = getattr(self.trainer, 'datamodule', None)
        for number, sample in enumerate(self._drawn):
            if isinstance(datamodule, MultiSenGEDataModule):
                yield f'sample_{number}', datamodule.plot(datamodule.denormalize(sample))
        if self._drawn:
            yield 'confusion_matrix', confusion_figure(self._confusion, self._labels)

    def _log_figures(self) -> None:
        if self.hparams['task'] != 'multiclass':
            return
        self._confusion.compute()  # every rank takes part here, and the result is kept
        experiment = getattr(self.logger, 'experiment', None)
        if hasattr(experiment, 'add_figure') and not self.trainer.sanity_checking:
            for name, figure in self._figures():
                experiment.add_figure(name, figure, global_step=self.global_step)  # type: ignore[union-attr]

    @rank_zero_only
    def _report(self, stage: str) -> None:
        if self.hparams['task'] != 'multiclass' or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        files = [
            save_figure(figure, folder / 'figures' / f'{stage}_{name}.png')
            for name, figure in self._figures()
        ]
        callback = self.trainer.checkpoint_callback
        if stage == 'val' and isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            files.insert(0, Path(callback.best_model_path))
        print(summary(stage, self.trainer.callback_metrics, self._labels, folder, files))

    @property
    def _labels(self) -> list[str]:
        return self.hparams['labels'] or [str(k) for k in range(self.hparams['num_classes'])]


def _multiclass_metrics(
    num_classes: int, ignore_index: int | None, labels: list[str] | None
) -> MetricCollection:
    options: dict[str, Any] = {'num_classes': num_classes, 'ignore_index': ignore_index}
    metrics: dict[str, Metric | MetricCollection] = {
        'OverallAccuracy': MulticlassAccuracy(average='micro', **options),
        'WeightedPrecision': MulticlassPrecision(average='weighted', **options),
        'WeightedRecall': MulticlassRecall(average='weighted', **options),
        'WeightedF1Score': MulticlassF1Score(average='weighted', **options),
        'AverageF1Score': MulticlassF1Score(average='macro', **options),
        'AverageJaccardIndex': MulticlassJaccardIndex(average='macro', **options),
        'Kappa': MulticlassCohenKappa(**options),
    }
    for metric in (MulticlassPrecision, MulticlassRecall, MulticlassF1Score):
        name = metric.__name__.removeprefix('Multiclass')
        each = metric(average='none', **options)
        metrics[name] = ClasswiseWrapper(each, labels=labels, prefix=f'{name}_')
    return MetricCollection(metrics)


def _encoder_weights(weights: WeightsEnum | str) -> dict[str, Tensor]:
    """State dict of a weight enum, its name, or the encoder in a task's checkpoint."""
    if isinstance(weights, str) and Path(weights).exists():
        return dict(utils.extract_backbone(weights)[1])
    enum = weights if isinstance(weights, WeightsEnum) else get_weight(weights)
    return dict(enum.get_state_dict(progress=True, check_hash=True, weights_only=True))


def _fold(x: Tensor) -> Tensor:
    """(B, T, C, H, W) to (B, T*C, H, W)."""
    return x.flatten(1, 2) if x.ndim == 5 else x
