"""Semantic segmentation of Sentinel-1 and Sentinel-2 time series."""

import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import segmentation_models_pytorch as smp
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchgeo.tasks import SemanticSegmentation
from torchmetrics import MetricCollection
from torchvision.models import WeightsEnum

from torchgeo_s1s2.datamodules.series import SeriesDataModule
from torchgeo_s1s2.datasets.classes import NO_LABEL
from torchgeo_s1s2.datasets.series import Sample
from torchgeo_s1s2.errors import S1S2Warning
from torchgeo_s1s2.models import (
    ImageSeries,
    change_name,
    freeze,
    series_encoder,
    spatial_encoder,
)
from torchgeo_s1s2.models.registry import is_misspelt
from torchgeo_s1s2.tasks.losses import SegmentationLoss
from torchgeo_s1s2.tasks.metrics import SegmentationScores, is_labelled
from torchgeo_s1s2.tasks.weights import load_weights, trained_classes, trained_ground

_STAGES = ('train', 'val', 'test')


class S1S2SemanticSegmentation(SemanticSegmentation):
    """TorchGeo's semantic segmentation for series of Sentinel-1 and Sentinel-2.

    What it adds: all of smp's architectures; ``freeze_backbone`` that freezes the spatial encoder,
    its batch norm included, and never the layers that read the time; class weights computed from
    the training patches; weighted metrics and Cohen's kappa; and a check of data against model
    before the first step. The defaults are the protocol of Wenger et al., Remote Sensing 2023,
    15(1), 151, https://doi.org/10.3390/rs15010151.

    Logged for ``train``, ``val`` and ``test``: the loss and the scores of
    :class:`~torchgeo_s1s2.tasks.metrics.SegmentationScores`. A validation in which nothing counts
    has the loss NaN, which is never better than a number. A checkpoint keeps the names of the
    classes that it was trained on, and refuses data with others, or in another order.
    """

    ignore = ('weights', 'figures', 'checkpoint')

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
        recompute_gates: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        figures: int | None = None,
        checkpoint: bool | None = None,
    ) -> None:
        """Build the model, the loss and the metrics.

        Args:
            model: Architecture of smp (``'unet'``, ``'unetplusplus'``, ``'fpn'``, ...) or
                TorchGeo's ``'fcn'``.
            backbone: Name of an smp encoder, such as ``'vgg16_convlstm_inception'``.
            weights: As in TorchGeo: a weight enum or its name, True or ``'imagenet'``, None or
                False for random weights, or the path of a checkpoint, see
                :func:`~torchgeo_s1s2.tasks.weights.load_weights`.
            in_channels: Time slots times channels of a slot, T*C; of a backbone that reads series,
                T is free.
            task: ``'multiclass'``, ``'binary'`` or ``'multilabel'``.
            num_classes: Number of classes K of a multiclass task.
            num_labels: Number of labels of a multilabel task.
            labels: Names of the classes; those of the data set unless given.
            num_filters: Number of filters of ``'fcn'``.
            pos_weight: Weight of positive examples in ``'bce'``.
            loss: ``'ce'``, ``'bce'``, ``'jaccard'``, ``'focal'`` or ``'dice'``.
            class_weights: Weight of each class in ``'ce'``, or ``'balanced'`` for the inverse of
                the pixel frequencies in the training patches.
            ignore_index: Value of the mask that counts neither in the loss nor in the metrics; 255
                never does.
            lr: Learning rate of Adam.
            patience: Epochs without a lower validation loss before the rate drops to a tenth.
            freeze_backbone: Freeze the spatial encoder.
            freeze_decoder: Freeze the decoder, its batch norm included.
            recompute_gates: Compute again in the backward pass what is large in a backbone that
                reads series: the gates of its recurrent layers, or the features of each date. Less
                memory, more time, the same numbers.
            model_kwargs: More arguments of smp's architecture, such as ``decoder_channels``.
            backbone_kwargs: Options of a backbone that reads series, which its name can say, too,
                such as ``{norm: step, full_resolution: true}``; see
                :class:`~torchgeo_s1s2.models.Backbone`.
            figures: Not used any more; an argument of :class:`~torchgeo_s1s2.callbacks.Report`.
            checkpoint: Former name of *recompute_gates*.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If an argument has no such value, or nothing in a checkpoint fits.
        """
        if isinstance(weights, str):  # the command line gives true and false as text
            known = {'true': True, 'false': False, 'imagenet': True}
            weights = known.get(weights.lower(), weights)
        recompute_gates = bool(recompute_gates or checkpoint)
        self._classes: list[str] | None = None
        self._pretrained_classes: list[str] | None = None
        self._pretrained_ground = ''
        self._tally: dict[str, Tensor] = {}
        super().__init__(weights=weights)  # TorchGeo takes all arguments from this call's frame
        # PyTorch refuses checkpoints with numbers of NumPy.
        numbers: Any = np.generic, np.ndarray
        plain = apply_to_collection(
            dict(self.hparams), numbers, lambda value: value.tolist(), allow_frozen=True
        )
        self.hparams.update(plain)
        for name, value, remedy in (
            ('figures', figures, 'give it to the callback torchgeo_s1s2.callbacks.Report instead'),
            ('checkpoint', checkpoint, 'its name is recompute_gates now'),
        ):
            if value is not None:
                _warn(f'{name} is an old argument of the task: {remedy}')

    def configure_models(self) -> None:
        """Build the segmentation model, load its weights and freeze what is to be frozen."""
        if self.hparams['task'] != 'multiclass':
            self.hparams['num_classes'] = None  # TorchGeo gives the model that many outputs
        elif (classes := self.hparams['num_classes']) is None or classes < 2:
            raise ValueError(
                f"task='multiclass' needs num_classes, at least 2, got {classes}; one class "
                "against the rest is task='binary'"
            )
        if self.hparams['ignore_index'] is None:
            # 255, or what no class has.
            self.hparams['ignore_index'] = max(NO_LABEL, self.hparams['num_classes'] or 0)
        options = self.hparams['backbone_kwargs'] or {}
        if options or is_misspelt(self.hparams['backbone']):
            self.hparams['backbone'] = change_name(self.hparams['backbone'], **options)
        if self.hparams['model'] == 'fcn':
            options = {**self.hparams, 'weights': self.weights}
            names = 'freeze_backbone', 'freeze_decoder', 'model_kwargs', 'weights'
            if unused := [name for name in names if options[name]]:
                raise ValueError(f"model='fcn' has no {', '.join(unused)}; leave that out")
            super().configure_models()
        else:
            self._configure_smp()
        if self.hparams['recompute_gates']:
            encoder = series_encoder(self.model)
            if encoder is None:
                raise ValueError(
                    f"recompute_gates=True with model='{self.hparams['model']}' and "
                    f"backbone='{self.hparams['backbone']}', expected a backbone that reads "
                    "series, such as 'vgg16_convlstm_inception'"
                )
            encoder.set_recompute_gates(True)
        self.model.is_initial = True
        self.model.register_load_state_dict_post_hook(_loaded)
        if self.weights and self.weights is not True:
            checkpoint = load_weights(self.model, self.weights)
            self._pretrained_classes = trained_classes(checkpoint)
            self._pretrained_ground = trained_ground(checkpoint)

    def _configure_smp(self) -> None:
        self.model = smp.create_model(
            self.hparams['model'].replace('+', 'plus'),  # TorchGeo's deeplabv3+
            encoder_name=self.hparams['backbone'],
            encoder_weights='imagenet' if self.weights is True else None,
            in_channels=self.hparams['in_channels'],
            classes=self.hparams['num_classes'] or self.hparams['num_labels'] or 1,
            **(self.hparams['model_kwargs'] or {}),
        )
        if self.hparams['freeze_backbone']:
            freeze(spatial_encoder(self.model))
        if self.hparams['freeze_decoder']:
            freeze(self.model.decoder)

    def configure_metrics(self) -> None:
        """Set up the metrics; TorchGeo's own for binary and multilabel tasks."""
        if not self._is_multiclass:
            super().configure_metrics()
            return
        num_classes, ignore = self.hparams['num_classes'], self.hparams['ignore_index']
        labels = self.hparams['labels']
        if labels is not None and len(labels) != num_classes:
            raise ValueError(f'{len(labels)} labels for num_classes={num_classes}: {labels}')
        if labels is not None and len(set(labels)) < num_classes:
            raise ValueError(f'labels {labels} name two classes alike; give each a name of its own')
        metrics = MetricCollection([SegmentationScores(num_classes, ignore, labels)])
        for stage in _STAGES:
            setattr(self, f'{stage}_metrics', metrics.clone(prefix=f'{stage}_'))

    def configure_optimizers(self) -> Any:
        """Adam, and a tenth of the learning rate when the validation loss stays where it is.

        Raises:
            ValueError: If a command gives a scheduler alone, which Lightning leaves out.
        """
        if getattr(self._command, 'lr_scheduler', None):
            raise ValueError('lr_scheduler is used with optimizer only; give --optimizer, too')
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = Adam(parameters, lr=self.hparams['lr'])
        scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=self.hparams['patience'])
        return {
            'optimizer': optimizer,
            # Not every epoch need have a validation.
            'lr_scheduler': {'scheduler': scheduler, 'monitor': self.monitor, 'strict': False},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a scheduler; a validation in which nothing counted tells it nothing."""
        if metric is None or metric == metric:
            super().lr_scheduler_step(scheduler, metric)

    def setup(self, stage: str) -> None:
        """Check the data against the model, and take class names and weights from the data.

        Args:
            stage: ``'fit'``, ``'validate'``, ``'test'`` or ``'predict'``.

        Raises:
            ValueError: If the numbers of classes, channels or time slots or the names of the
                classes differ, or no training pixel has a label.
        """
        if stage == 'fit':
            self.model.is_initial = False
        data = self._data
        balanced = self.hparams['class_weights'] == 'balanced'
        if data is None:
            if balanced and stage == 'fit':
                raise ValueError(
                    "class_weights='balanced' needs a data module that computes them, such as "
                    'MultiSenGEDataModule; give a list of weights'
                )
            return
        self._check_data(data)
        data.add_trained_ground(self._pretrained_ground)
        if self._is_multiclass:
            self._take_names(list(data.classes.names), fit=stage == 'fit')
        if stage == 'fit':
            weights = data.class_weights  # an error without a labelled training pixel
            if balanced:
                self.criterion.weight = weights.to(self.device)
            elif (given := self.criterion.weight) is not None and not given[weights > 0].any():
                raise ValueError(
                    f'class_weights is {given.tolist()}: all classes that have a training pixel '
                    'have the weight 0, so nothing would be learned'
                )

    def on_fit_start(self) -> None:
        """See to it that a checkpoint in which other parts learned is refused."""
        for optimizer in self.trainer.optimizers:
            optimizer.register_load_state_dict_pre_hook(_check_learning)

    def on_validation_start(self) -> None:
        """Warn of weights that have learned nothing."""
        if getattr(self.model, 'is_initial', False):  # not one that was put in its place
            _warn(
                'no checkpoint was loaded: the weights, of decoder and head at least, are initial '
                'ones, which have learned nothing. Give the checkpoint of a training, as '
                '--ckpt_path of a command'
            )

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """Warn of weights that have learned nothing, and of predictions that nothing keeps."""
        self.on_validation_start()
        is_returned = self.trainer.predict_loop.return_predictions and self._command is None
        parts = self, *getattr(self.trainer, 'callbacks', ())
        if not is_returned and not any(map(_may_keep_predictions, parts)):
            _warn(
                'nothing keeps the predictions. To write maps, add to trainer.callbacks: '
                '{class_path: torchgeo_s1s2.callbacks.GeoTIFFWriter}, or SceneWriter for windows '
                'of scenes'
            )

    @property
    def _data(self) -> SeriesDataModule | None:
        """The data module, if it is one of this package."""
        datamodule = getattr(self._trainer, 'datamodule', None)
        return datamodule if isinstance(datamodule, SeriesDataModule) else None

    @property
    def _command(self) -> Any:
        """Arguments of a subcommand of the command line, None without one."""
        callbacks = getattr(self._trainer, 'callbacks', ())
        commands = (c.config for c in callbacks if isinstance(c, SaveConfigCallback))
        return next((c for c in commands if 'ckpt_path' in c), None)

    @property
    def _checkpoint(self) -> str:
        """File given as ``--ckpt_path``, of which a command takes the model's arguments, or ''."""
        path = str(getattr(self._command, 'ckpt_path', None) or '')
        return path if Path(path).is_file() else ''

    def _take_names(self, names: list[str], fit: bool) -> None:
        """Check the names of the data's classes, and name the metrics by them."""
        self._check_classes(names)
        labels = self.hparams['labels']
        if labels is None:
            self.hparams['labels'] = names
            self.configure_metrics()
        elif labels != names and sorted(labels) == sorted(names):
            raise ValueError(
                f'the data have the classes {names}, labels names them {labels}; leave labels out'
            )
        if not fit:
            return
        self._classes = names
        head = self._pretrained_classes
        if head and len(head) == len(names) and (differences := _differences(head, names)):
            _warn(
                f'the head that weights brought is of other classes than the data ({differences}): '
                'it has to learn them anew'
            )

    def _check_classes(self, names: list[str]) -> None:
        """The classes of a checkpoint have to be those of the data."""
        differences = _differences(self._classes or names, names)
        if differences:
            raise ValueError(
                'the checkpoint was trained on other classes than those of the data, or in another '
                f'order: {differences}. Give the data the class scheme of the checkpoint; to train '
                'on other classes, load the checkpoint as weights of the task'
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the names of the classes."""
        checkpoint['classes'] = self._classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the names of the classes, and say what the checkpoint overrides.

        Weights of the loss are those of the checkpoint if it has some and the task, too.

        Raises:
            ValueError: If the data have other classes than the checkpoint.
        """
        state, own = checkpoint['state_dict'], self.criterion.state_dict(prefix='criterion.')
        theirs = {name for name in state if name.startswith('criterion.')}
        if theirs != own.keys():
            checkpoint['state_dict'] = {k: v for k, v in state.items() if k not in theirs} | own
        self._classes = trained_classes(checkpoint)
        if self._data and self._is_multiclass:
            self._check_classes(list(self._data.classes.names))
        given = [argument for argument in sys.argv if argument.startswith('--model')]
        from_command = self._checkpoint and '_class_path' in checkpoint.get('hyper_parameters', {})
        if given and from_command:
            _warn(
                'the arguments of the model are those of the checkpoint (--ckpt_path); not used: '
                + ' '.join(given)
            )

    def configure_losses(self) -> None:
        """Set up the loss; ``'balanced'`` weights are filled in when the data are known."""
        names = 'loss', 'task', 'num_classes', 'ignore_index', 'class_weights', 'pos_weight'
        self.criterion: Any = SegmentationLoss(**{name: self.hparams[name] for name in names})

    def forward(self, x: Tensor | ImageSeries) -> Tensor:
        """Logits of a batch.

        Args:
            x: Series (B, T, C, H, W) or (B, T*C, H, W), for a backbone that reads series with what
                is known of its slots.

        Returns:
            Logits (B, K, H, W).
        """
        if series_encoder(self.model) is None:
            image = x.image if isinstance(x, ImageSeries) else x
            x = image.flatten(1, -3)
        logits: Tensor = self.model(x)
        return logits

    def training_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Loss of a training batch; see TorchGeo."""
        return self._step('train', batch)[0]

    def validation_step(  # type: ignore[override]
        self, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Loss and metrics of a validation batch.

        Returns:
            ``prediction`` (B, H, W), or (B, L, H, W) of L labels.
        """
        return {'prediction': self._predicted(self._step('val', batch)[1])}

    def test_step(  # type: ignore[override]
        self, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Loss and metrics of a test batch; see :meth:`validation_step`."""
        return {'prediction': self._predicted(self._step('test', batch)[1])}

    def predict_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Class probabilities with what is needed to put them on the map.

        Returns:
            ``probabilities`` (B, K, H, W), and of the batch ``bounds``, ``transform``, ``crs``,
            ``index`` and ``valid``, where they are there.
        """
        known = {k: batch[k] for k in ('crs', 'index', 'valid') if k in batch}
        series = {**batch, 'image': ImageSeries.from_batch(batch)}
        return super().predict_step(series, batch_idx) | known

    def on_train_epoch_end(self) -> None:
        """Log the metrics, unless a checkpoint is of the time after the last step."""
        if 'train' in self._tally:
            super().on_train_epoch_end()
            self._say_what_counted('train')

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        super().on_validation_epoch_end()
        self._say_what_counted('val')

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        super().on_test_epoch_end()
        self._say_what_counted('test')

    @property
    def _is_multiclass(self) -> bool:
        return bool(self.hparams['task'] == 'multiclass')

    def _predicted(self, logits: Tensor) -> Tensor:
        return logits.max(1).indices if self._is_multiclass else (logits > 0).long()

    def _step(self, stage: str, batch: Sample) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch, logged.

        Nothing here makes the host wait for its device, but for the forward pass of attention,
        which encodes the dates that were seen and no others.
        """
        logits = self(ImageSeries.from_batch(batch)).squeeze(1)
        given = _mask(batch, logits[:, 0].shape if self._is_multiclass else logits.shape)
        mask = self._known(given)
        getattr(self, f'{stage}_metrics').update(logits, mask)
        loss, weight = self.criterion(logits, mask)
        unknown = (mask != given) & (given != NO_LABEL)
        tally = torch.stack([weight, unknown.sum(), ~loss.isfinite()])
        self._tally[stage] = tally + self._tally.get(stage, 0)
        # The scheduler of every process has to see the same validation loss.
        self.log(
            f'{stage}_loss',
            loss,
            batch_size=weight,
            prog_bar=stage != 'train',  # a bar would fetch the loss of each step
            sync_dist=stage != 'train',
        )
        return loss, logits

    def _say_what_counted(self, stage: str) -> None:
        """Warn of losses that are no number, of values that are no class, and if none counted."""
        own = self._tally.pop(stage, torch.zeros(3, device=self.device))
        tally: Any = self.trainer.strategy.reduce(own, reduce_op='sum')
        weight, unknown, broken = tally.tolist()
        if broken:
            _warn(
                f'{broken:.0f} steps of split {stage!r} had a loss that is not finite, so the '
                'weights or the images are not: try a lower lr, and instead of precision 16-true, '
                'whose numbers end at 65,504 and at 6e-8, 16-mixed or bf16-mixed'
            )
        if unknown:
            _warn(
                f'{unknown:.0f} pixels of the {stage} masks hold values that are neither a class, '
                f'0..{self._values - 1}, nor ignore_index={self.hparams["ignore_index"]} nor '
                f'{NO_LABEL}; they do not count. Give model and data the same classes'
            )
        if weight or self.trainer.sanity_checking:
            return
        outcome = {
            'train': 'nothing is learned from it',
            'val': 'val_loss is NaN, which is never better than that of another epoch, so a '
            'checkpoint is kept for want of a better one only; EarlyStopping ends the run unless '
            'its check_finite is false',
            'test': 'test_loss is NaN, and all scores are 0',
        }
        _warn(
            f'no pixel of this epoch of split {stage!r} counts, since none has a label of a class '
            f'with a weight above 0: {outcome[stage]}. Check the labels and the class scheme'
        )

    def _known(self, mask: Tensor) -> Tensor:
        """The mask, with ignore_index wherever there is no label."""
        ignored = self.hparams['ignore_index']
        return mask.where(is_labelled(mask, self._values, ignored), ignored)

    @property
    def _values(self) -> int:
        """Number of values of a labelled pixel."""
        return int(self.hparams['num_classes']) if self._is_multiclass else 2

    def _check_data(self, data: SeriesDataModule) -> None:
        """The numbers of both sides; an encoder of series takes any number of slots."""
        classes, given = len(data.classes), dict(data.channels)
        model = 'the model'
        if self._checkpoint:
            model += f' of {self._checkpoint} (whose arguments replace those of the configuration)'
        if self._is_multiclass and self.hparams['num_classes'] != classes:
            raise ValueError(
                f'{model} has num_classes={self.hparams["num_classes"]}, the data have {classes} '
                'classes; give model and data the same number'
            )
        length, channels = data.series_length, sum(given.values())
        encoder, in_channels = series_encoder(self.model), self.hparams['in_channels']
        if encoder is None and in_channels != length * channels:
            raise ValueError(
                f'{model} has in_channels={in_channels}, the data give {length} time slots x '
                f'{channels} channels = {length * channels}; set in_channels to that'
            )
        if encoder is not None and list(encoder.sensors.items()) != list(given.items()):
            raise ValueError(
                f'{model} has the backbone {self.hparams["backbone"]!r}, which reads '
                f'{encoder.sensors} channels, the data give {given}; use the backbone for these '
                'sensors and bands'
            )


def _may_keep_predictions(part: Callback | LightningModule) -> bool:
    """Whether a part of a run writes predictions, or has a hook of its own that sees them."""
    names = 'predict_step', 'on_predict_batch_end', 'on_predict_epoch_end', 'on_predict_end'
    hooks = [getattr(part, name) for name in names if hasattr(part, name)]
    known = all(hook.__module__.startswith(('lightning.', __name__)) for hook in hooks)
    return isinstance(part, BasePredictionWriter) or not known


def _check_learning(optimizer: Optimizer, checkpoint: dict[str, Any]) -> None:
    """Check that as many parameters learn as in the checkpoint that a fit goes on with."""
    groups = checkpoint['param_groups'], optimizer.param_groups
    there, here = ([len(group['params']) for group in each] for each in groups)
    if there != here:
        raise ValueError(
            f'{there} tensors learned in the checkpoint, by groups of its optimizer, and {here} '
            'learn here. Give the callbacks of that training, such as GradualUnfreezing, and '
            'freeze what it froze; to train otherwise, load the checkpoint as weights of the task'
        )


def _loaded(model: Any, keys: Any) -> None:
    model.is_initial = False


def _mask(batch: Sample, expected: torch.Size) -> Tensor:
    """The mask of a batch, if it is one of whole numbers and of the expected shape."""
    mask = batch.get('mask')
    if mask is None or mask.shape != expected or mask.is_floating_point():
        found = 'missing' if mask is None else f'{mask.dtype} of shape {tuple(mask.shape)}'
        raise ValueError(
            f'the mask of the batch is {found}, expected whole numbers of shape {tuple(expected)}'
        )
    return mask.long()


def _differences(old: Sequence[str], new: Sequence[str]) -> str:
    """The first classes whose names differ; capitals do not matter."""
    pairs = enumerate(zip_longest(old, new, fillvalue='nothing'))
    found = [f'{k}: {a} there, {b} here' for k, (a, b) in pairs if a.casefold() != b.casefold()]
    return '; '.join(found[:3]) + (f' and {len(found) - 3} more' if len(found) > 3 else '')


def _warn(message: str) -> None:
    rank_zero_warn(message, category=S1S2Warning)
