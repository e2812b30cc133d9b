"""Semantic segmentation of Sentinel-1 and Sentinel-2 time series."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import segmentation_models_pytorch as smp
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchgeo.datasets import unbind_samples
from torchgeo.tasks import SemanticSegmentation
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
from torchgeo_s1s2.tasks.weights import load_weights

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
        checkpoint: bool = False,
    ) -> None:
        """Build the model, the loss and the metrics.

        Args:
            model: Architecture of smp (``'unet'``, ``'unetplusplus'``, ``'fpn'``, ...) or
                TorchGeo's ``'fcn'``.
            backbone: Name of an smp encoder, such as ``'vgg16_convlstm_inception'``.
            weights: As in TorchGeo: a weight enum or its name, True for ImageNet, None or False for
                random weights, or the path of a checkpoint: of a backbone, or of a segmentation
                task, of which everything is loaded that fits by name and shape, so the head only
                with the same number of classes.
            in_channels: Time slots times channels of a slot, T*C. A backbone that reads series
                takes any T afterwards.
            task: ``'multiclass'``, ``'binary'`` or ``'multilabel'``.
            num_classes: Number of classes K of a multiclass task.
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
            freeze_decoder: Freeze the decoder, its batch norm included.
            figures: Number of validation or test samples to draw.
            checkpoint: Compute the gates of the recurrent layers again in the backward pass instead
                of keeping them: less memory, more time, the same numbers. For a backbone that
                reads series.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If an argument has no such value, or nothing in a checkpoint fits.
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
        if checkpoint:
            self._set_checkpoint()

    def configure_models(self) -> None:
        """Build the segmentation model, load its weights and freeze what is to be frozen."""
        if self.hparams['task'] != 'multiclass':
            self.hparams['num_classes'] = None  # TorchGeo gives the model that many outputs
        elif self.hparams['num_classes'] is None:
            raise ValueError("task='multiclass' needs num_classes")
        if self.hparams['model'] == 'fcn':
            super().configure_models()
            return
        self.model = smp.create_model(
            _ARCHITECTURES.get(self.hparams['model'], self.hparams['model']),
            encoder_name=self.hparams['backbone'],
            encoder_weights='imagenet' if self.weights is True else None,
            in_channels=self.hparams['in_channels'],
            classes=self.hparams['num_classes'] or self.hparams['num_labels'] or 1,
        )
        if self.weights and self.weights is not True:
            load_weights(self.model, self.weights)
        for module in self._frozen:
            module.requires_grad_(False).eval()  # Lightning keeps the mode it finds

    def _set_checkpoint(self) -> None:
        encoder = getattr(self.model, 'encoder', None)
        if not isinstance(encoder, ConvLSTMInceptionEncoder):
            raise ValueError(
                f"checkpoint=True with model='{self.hparams['model']}' and "
                f"backbone='{self.hparams['backbone']}', expected a backbone that reads series, "
                "such as 'vgg16_convlstm_inception'"
            )
        encoder.set_checkpoint()

    def configure_metrics(self) -> None:
        """Set up the metrics; TorchGeo's own for binary and multilabel tasks."""
        if not self._is_multiclass:
            super().configure_metrics()
            return
        num_classes, ignore = self.hparams['num_classes'], self.hparams['ignore_index']
        labels = self.hparams['labels']
        if labels is not None and len(labels) != num_classes:
            raise ValueError(f'{len(labels)} labels for num_classes={num_classes}: {labels}')
        metrics = _multiclass_metrics(num_classes, ignore, labels)
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
            # Not every epoch need have a validation.
            'lr_scheduler': {'scheduler': scheduler, 'monitor': self.monitor, 'strict': False},
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
        if self.hparams['labels'] is None and self._is_multiclass:
            self.hparams['labels'] = list(datamodule.classes.names)
            self.configure_metrics()
        if self.hparams['class_weights'] == 'balanced' and stage == 'fit':
            self.criterion.weight = datamodule.class_weights.to(self.device)

    def configure_losses(self) -> None:
        """Set up the loss; ``'balanced'`` weights are filled in when the data are known."""
        loss, weights = self.hparams['loss'], self.hparams['class_weights']
        if not isinstance(weights, str):
            super().configure_losses()
        elif weights != 'balanced' or loss != 'ce' or self.hparams['task'] != 'multiclass':
            raise ValueError(
                f'class_weights={weights!r} with loss={loss!r} and task={self.hparams["task"]!r}: '
                "the only such name is 'balanced', for loss='ce' and task='multiclass'"
            )
        else:
            ignore = self.hparams['ignore_index']
            self.criterion = nn.CrossEntropyLoss(
                weight=torch.ones(self.hparams['num_classes']),
                ignore_index=-1000 if ignore is None else ignore,
            )
        if loss == 'focal' and self.hparams['task'] == 'multilabel' and self._ignored >= 0:
            raise ValueError(
                f"loss='focal' with task='multilabel' cannot leave pixels out, but ignore_index is "
                f'{self._ignored}; give ignore_index=None, or another loss'
            )
        if loss == 'bce':
            # The mean is taken later, over the labelled pixels.
            self.criterion = nn.BCEWithLogitsLoss(
                pos_weight=self.hparams['pos_weight'], reduction='none'
            )

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what is frozen keeps its batch-norm statistics."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    @property
    def _frozen(self) -> list[nn.Module]:
        """What is frozen: of an encoder of series, not the layers that read the series."""
        if self.hparams['model'] == 'fcn':
            return []
        frozen: list[nn.Module] = []
        if self.hparams['freeze_backbone']:
            encoder = self.model.encoder
            is_series = isinstance(encoder, ConvLSTMInceptionEncoder)
            frozen.append(encoder.spatial if is_series else encoder)
        if self.hparams['freeze_decoder']:
            frozen.append(self.model.decoder)
        return frozen

    @property
    def _series_encoder(self) -> ConvLSTMInceptionEncoder | None:
        """The encoder, if it is one that reads series."""
        encoder = getattr(self.model, 'encoder', None)
        return encoder if isinstance(encoder, ConvLSTMInceptionEncoder) else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            x: Series (B, T, C, H, W) or (B, T*C, H, W).

        Returns:
            Logits (B, K, H, W).
        """
        if x.ndim == 5 and self._series_encoder is None:
            x = x.flatten(1, 2)
        logits: Tensor = self.model(x)
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
        self._forget()

    def on_test_epoch_start(self) -> None:
        """Forget the epoch before."""
        self._forget()

    def on_validation_epoch_end(self) -> None:
        """Log metrics and, to loggers that take them, figures."""
        super().on_validation_epoch_end()
        self._log_figures('val')

    def on_test_epoch_end(self) -> None:
        """Log metrics and, to loggers that take them, figures."""
        super().on_test_epoch_end()
        self._log_figures('test')

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

    @property
    def _is_multiclass(self) -> bool:
        return bool(self.hparams['task'] == 'multiclass')

    def _step(self, stage: str, batch: Sample) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch, logged."""
        mask = batch['mask']
        logits = self(batch['image']).squeeze(1)
        prediction = logits.argmax(1) if self._is_multiclass else logits
        getattr(self, f'{stage}_metrics').update(prediction, mask)
        loss = self._loss(logits, mask)
        # The scheduler of every process has to see the same validation loss.
        self.log(
            f'{stage}_loss',
            loss,
            batch_size=self._loss_weight(mask),  # type: ignore[arg-type]
            prog_bar=True,
            sync_dist=stage != 'train',
        )
        return loss, logits

    def _loss_weight(self, mask: Tensor) -> Tensor:
        """Weight of a batch in the loss of an epoch: what its own loss was divided by.

        So the loss does not depend on how the pixels come in batches and processes.
        """
        labels = mask[mask != self._ignored]
        weight = getattr(self.criterion, 'weight', None)
        total = torch.tensor(labels.numel()) if weight is None else weight[labels].sum()
        return total.to(mask.device, torch.float32).clamp(min=1e-6)

    def _loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Loss over the labelled pixels, 0 without any."""
        labelled = mask != self._ignored
        if not labelled.any():
            return 0 * logits.sum()
        if self.hparams['loss'] == 'bce':
            return self.criterion(logits, mask.float())[labelled].mean()
        if self.hparams['loss'] == 'jaccard':
            logits, mask = self._labelled_only(logits, mask, labelled)
        loss: Tensor = self.criterion(logits, mask)
        return loss

    def _labelled_only(
        self, logits: Tensor, mask: Tensor, labelled: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take unlabelled pixels out, for smp's Jaccard loss, which cannot."""
        if self._is_multiclass:
            return logits.movedim(1, 0)[:, labelled][None], mask[labelled][None]
        # Neither the intersection nor the union grows by a pixel of probability 0.
        return logits.where(labelled, -100.0), mask.where(labelled, 0)

    @property
    def _ignored(self) -> int:
        """Value of the mask without a label; -1, which no mask holds, if there is none."""
        ignore = self.hparams['ignore_index']
        return -1 if ignore is None else int(ignore)

    def _evaluate(self, stage: str, batch: Sample) -> None:
        _, logits = self._step(stage, batch)
        if not self._is_multiclass:
            return
        prediction = logits.argmax(1)
        self._confusion.update(prediction, batch['mask'])
        missing = self.hparams['figures'] - len(self._drawn)
        if missing > 0:
            drawn = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
            drawn['prediction'] = prediction
            samples = unbind_samples({k: v[:missing].cpu() for k, v in drawn.items()})
            self._drawn.extend(samples)

    def _forget(self) -> None:
        self._drawn.clear()
        if self._is_multiclass:
            self._confusion.reset()

    def _check_data(self, datamodule: MultiSenGEDataModule) -> None:
        classes, channels = len(datamodule.classes), sum(datamodule.channels.values())
        length, in_channels = datamodule.series_length, self.hparams['in_channels']
        if self._is_multiclass and self.hparams['num_classes'] != classes:
            raise ValueError(
                f'the model has num_classes={self.hparams["num_classes"]}, the data have {classes} '
                'classes; give model and data the same number'
            )
        if self._series_encoder is not None:
            self._check_sensors(self._series_encoder.sensors, datamodule.channels)
        elif in_channels != length * channels:
            raise ValueError(
                f'the model has in_channels={in_channels}, the data give {length} time slots x '
                f'{channels} channels = {length * channels}; set in_channels to that'
            )

    def _check_sensors(self, reads: dict[str, int], given: dict[str, int]) -> None:
        """An encoder of series splits channels by sensor; the number of slots is free."""
        if list(reads.items()) != list(given.items()):
            raise ValueError(
                f'backbone {self.hparams["backbone"]!r} reads {reads} channels, the data give '
                f'{given}; use the backbone for these sensors and bands'
            )

    def _figures(self) -> Iterator[tuple[str, Figure]]:
        """Drawn samples and the confusion matrix of the last evaluation."""
        datamodule = getattr(self.trainer, 'datamodule', None)
        if isinstance(datamodule, MultiSenGEDataModule):
            for number, sample in enumerate(self._drawn):
                yield f'sample_{number}', datamodule.plot(datamodule.denormalize(sample))
        if self._confusion.update_called:
            yield 'confusion_matrix', confusion_figure(self._confusion, self._labels)

    def _log_figures(self, stage: str) -> None:
        if not self._is_multiclass:
            return
        if self.trainer.sanity_checking:
            self._forget()
            return
        self._confusion.compute()  # every process takes part here, and the result is kept
        if not self.trainer.is_global_zero:
            return
        experiments = [getattr(logger, 'experiment', None) for logger in self.loggers]
        boards: list[Any] = [e for e in experiments if hasattr(e, 'add_figure')]
        for name, figure in self._figures() if boards else ():
            for board in boards:
                board.add_figure(f'{stage}_{name}', figure, global_step=self.global_step)

    def _report(self, stage: str) -> None:
        if not self._is_multiclass or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # asks every process
        if self.trainer.is_global_zero:
            files, metrics = self._files(stage, folder), self.trainer.callback_metrics
            when = ' of the last epoch' if self.trainer.state.fn == TrainerFn.FITTING else ''
            print(summary(stage, metrics, self._labels, folder, files, when))

    def _files(self, stage: str, folder: Path) -> list[Path]:
        """Write the figures; their paths, after that of the best checkpoint of a fit."""
        files = [
            save_figure(figure, folder / 'figures' / f'{stage}_{name}.png')
            for name, figure in self._figures()
        ]
        callback = self.trainer.checkpoint_callback
        if stage == 'val' and isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            files.insert(0, Path(callback.best_model_path))
        return files

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
    # A wrapper that shares the state of another metric warns that it was never updated.
    shared = ['WeightedPrecision', 'WeightedRecall', 'WeightedF1Score', 'AverageF1Score']
    groups = [shared, *([name] for name in metrics if name not in shared)]
    return MetricCollection(metrics, compute_groups=groups)
