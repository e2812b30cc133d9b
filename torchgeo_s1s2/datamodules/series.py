"""What the data modules of time series share: loaders, statistics and transforms."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import shapely
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from shapely import Polygon
from shapely.geometry.base import BaseGeometry
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.samplers import GriddedPatchSampler

from torchgeo_s1s2.datamodules.batches import EvenBatches, RandomCrops, pad_samples
from torchgeo_s1s2.datamodules.statistics import Statistics, warn_of_other_units
from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.datasets.series import Sample, SeriesDataset
from torchgeo_s1s2.datasets.time_series import check_at_least
from torchgeo_s1s2.errors import DataError, NoPatchesError, warn
from torchgeo_s1s2.transforms import AugmentSeries, DayOfYear, NormalizeSeries, SeriesDropout
from torchgeo_s1s2.transforms.series import count_observations

Size = int | tuple[int, int]


class _FollowEpochs(Callback):
    """Tells the training patches the epoch; Lightning has no such hook for data modules."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dataset: Any = trainer.datamodule.train_dataset  # type: ignore[attr-defined]
        dataset.epoch = trainer.current_epoch


def _next_epoch(trainer: Trainer) -> int:
    """Epoch of the next training batch, also of one that resumes from a checkpoint.

    Lightning lets worker processes begin before ``on_train_epoch_start``, and the checkpoint of a
    validation at an epoch's end does not count that epoch as processed yet.
    """
    loop: Any = trainer.fit_loop
    progress = loop.epoch_progress.current
    return progress.ready if loop.epoch_loop.batch_progress.is_last_batch else progress.processed


class SeriesDataModule(NonGeoDataModule):
    """Patches with time series, normalised and, in training, augmented.

    Patches are read by number, each on its own grid in its own UTM zone. However many processes
    there are, an epoch reads each patch once and in one of them, see
    :class:`~torchgeo_s1s2.datamodules.batches.EvenBatches`; what is kept on disk is made by the
    first process and read by the others. Patches of several sizes make a batch of the largest, in
    which the others are filled with what is missing.

    Each channel is normalised with the mean and standard deviation of the training patches, which
    are kept beside the data as ``statistics_*.json``, follow the files that made them, and travel
    in checkpoints. They are of the slots that the date rule chooses; of a rule that draws, those of
    the first epoch.

    A rule that draws, such as :class:`~torchgeo_s1s2.datasets.RandomDates`, sees other dates in
    every epoch of training, and always the same in evaluation.

    Attributes:
        classes: Class scheme of the masks.
        channels: Number of channels of each sensor: its bands, and two for the day of the year.
        series_length: Number of time slots T.
    """

    def __init__(
        self,
        dataset_class: type[SeriesDataset],
        batch_size: int,
        num_workers: int,
        patch_size: Size | None = None,
        predict_split: str = 'test',
        predict_patch_size: Size | None = None,
        predict_stride: Size | None = None,
        augment: bool = True,
        dropout: SeriesDropout | None = None,
        day_of_year: bool = False,
        statistics: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the settings.

        Args:
            dataset_class: Class of the data set.
            batch_size: Number of patches in a batch.
            num_workers: Number of processes that read.
            patch_size: Height and width of random crops in training, of which each patch gives as
                many in an epoch as lie side by side in it; whole patches unless given.
            predict_split: Split that is mapped by ``torchgeo predict``, or ``'all'``.
            predict_patch_size: Height and width of the windows that ``torchgeo predict`` reads
                scenes in, zone by zone, for :class:`~torchgeo_s1s2.callbacks.SceneWriter`; whole
                patches unless given.
            predict_stride: Rows and columns from one of these windows to the next. Unless given,
                windows overlap by about a quarter, and small scenes have smaller windows, so that
                at most 1.8 times the pixels are read.
            augment: Mirror and turn the training patches.
            dropout: Drop dates and sensors of the training patches at random.
            day_of_year: Append the day of the year to each sensor's bands, as two planes; see
                :class:`~torchgeo_s1s2.transforms.DayOfYear`.
            statistics: File whose mean and standard deviation to normalise with, in place of those
                beside the data; labels are counted all the same.
            **kwargs: Arguments of the data set.

        Raises:
            ValueError: If a number is out of range, or *dropout* is one.
        """
        if dropout is not None and not callable(dropout):
            raise ValueError(
                f'dropout is {dropout!r}, expected SeriesDropout(date=..., sensor=...)'
            )
        check_at_least('batch_size', batch_size, 1)
        check_at_least('num_workers', num_workers, 0)
        self.patch_size = _pair('patch_size', patch_size)
        self.predict_split = predict_split
        self.predict_patch_size = _pair('predict_patch_size', predict_patch_size)
        self.predict_stride = _pair('predict_stride', predict_stride)
        window = self.predict_patch_size or (0, 0)
        if any(s > n for s, n in zip(self.predict_stride or (0, 0), window, strict=True)):
            raise ValueError(
                f'predict_stride is {self.predict_stride}, predict_patch_size '
                f'{self.predict_patch_size}; make the stride the smaller one, or ground is left out'
            )
        self.predict_sampler: list[Any] | None = None
        self.statistics_path = Path(statistics).expanduser() if statistics else None
        self.statistics: Statistics | None = None
        self._trained_on: BaseGeometry = Polygon()
        self._prepared: Statistics | None = None
        self.mean, self.std = torch.tensor(0.0), torch.tensor(1.0)
        super().__init__(dataset_class, batch_size, num_workers, **kwargs)  # type: ignore[arg-type]
        self.collate_fn = pad_samples
        self.augment = AugmentSeries() if augment else None
        self.dropout = dropout
        self.day_of_year = DayOfYear() if day_of_year else None
        self._datasets: dict[str, SeriesDataset] = {}

    @abstractmethod
    def open_split(self, split: str) -> SeriesDataset:
        """Data set of a split.

        Raises:
            NoPatchesError: If the split has none.
        """

    @property
    def classes(self) -> ClassScheme:
        """Class scheme of the masks; known after ``setup``."""
        return self._any_dataset.classes

    @property
    def channels(self) -> dict[str, int]:
        """Number of channels of each sensor; known after ``setup``."""
        added = 2 if self.day_of_year else 0
        return {s: len(bands) + added for s, bands in self._any_dataset.bands.items()}

    @property
    def _band_counts(self) -> list[int]:
        return [len(bands) for bands in self._any_dataset.bands.values()]

    @property
    def series_length(self) -> int:
        """Number of time slots T."""
        return int(self.kwargs['series'].length)

    @property
    def class_weights(self) -> Tensor:
        """Inverse pixel frequencies in the training patches, (K,); known after ``setup``."""
        return self._known_statistics().class_weights

    def prepare_data(self) -> None:
        """Find the statistics of a training, so that all processes read them.

        Lightning calls this in the first process only, before the ``setup`` of all.
        """
        if self._trains and self._prepared is None:
            if self.trainer is not None:  # what is refused shall cost no statistics
                self._setup_train()
                self._dataset('val')
            self._prepared = self._find_statistics()

    def setup(self, stage: str) -> None:
        """Choose the patches of a stage, and read one to see that it can be read.

        Args:
            stage: ``'fit'``, ``'validate'``, ``'test'`` or ``'predict'``.

        Raises:
            DataError: If no patch has a full series, a raster is not what it must be, or no
                training pixel has a label.
            UnreadableError: If a raster cannot be read.
            ValueError: If there are fewer training samples than a batch holds.
        """
        if stage == 'fit':
            self.statistics = None  # of another run; a checkpoint brings its own after this
            self._setup_train()
        if stage in ('fit', 'validate'):
            self.val_dataset = self._dataset('val')
        if stage == 'test':
            self.test_dataset = self._dataset('test')
        if stage == 'predict':
            self._setup_predict()
        if stage == 'fit' or self.trainer is None:
            self._share_statistics()
        if stage == 'fit':
            self._check_labels()
            train = self._dataset('train')
            rank_zero_info(f'{train.title}: {train.report}')

    def train_dataloader(self) -> DataLoader[Sample]:
        """Loader of the training patches; it starts to read in the epoch that comes next."""
        loader: DataLoader[Sample] = super().train_dataloader()
        if self.trainer:
            self.train_dataset.epoch = _next_epoch(self.trainer)  # type: ignore[union-attr]
        return loader

    def predict_dataloader(self) -> Any:
        """Loader of the patches, or one of the windows of each UTM zone."""
        self._share_statistics()
        dataset: Any = self._valid_attribute('predict_dataset')
        if self.predict_sampler is None:
            return self._loader(dataset, batch_size=self.batch_size)
        return [
            self._loader(zone, batch_size=self.batch_size, sampler=sampler)
            for zone, sampler in zip(dataset, self.predict_sampler, strict=True)
        ]

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Sample]:
        # From pinned memory a GPU fetches a batch while it computes another.
        pinned = self.trainer is not None and self.trainer.strategy.root_device.type == 'cuda'
        options |= {'num_workers': self.num_workers, 'collate_fn': self.collate_fn}
        return DataLoader(dataset, pin_memory=pinned, **options)

    def _dataloader_factory(self, split: str) -> DataLoader[Sample]:
        """As TorchGeo's, with every patch in training too."""
        self._share_statistics()  # a checkpoint has brought its own by now, if there is one
        dataset: Any = self._valid_attribute(f'{split}_dataset')
        if split == 'train':
            dataset = self._train_samples
        overfit = getattr(self.trainer, 'overfit_batches', 0) > 0  # always the same batches
        shuffle = split == 'train' and not overfit
        sampler = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
        batches = EvenBatches(sampler, self.batch_size)
        return self._loader(dataset, batch_sampler=batches, persistent_workers=self.num_workers > 0)

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Normalise a batch, thin and augment it in training, and append the day of the year.

        For maps, ``valid_count`` (B, H, W) tells on how many dates a sensor saw each pixel.

        Args:
            batch: A batch as the data set gives it.
            dataloader_idx: Number of the loader.
        """
        self._known_statistics()
        training = self.trainer is not None and self.trainer.training
        if training and self.dropout:
            batch = self.dropout(batch, self._band_counts)
        if self.trainer is not None and self.trainer.predicting:
            batch['valid_count'] = count_observations(batch['image'], self._band_counts)
        batch = self.normalize.to(batch['image'].device)(batch, self._band_counts)
        if training and self.augment:
            batch = self.augment(batch)
        return self.day_of_year(batch, self._band_counts) if self.day_of_year else batch

    def plot(self, sample: Sample, **kwargs: Any) -> Any:
        """Plot a sample of any split; see :meth:`SeriesDataset.plot`."""
        return self._any_dataset.plot(self._bands_only(sample), **kwargs)

    def denormalize(self, sample: Sample) -> Sample:
        """Bring the image of a sample back to the units of the data set.

        Args:
            sample: A sample with a normalised ``image`` (T, C, H, W).

        Returns:
            The sample; the planes of the day of the year stay as they are.
        """
        image = sample['image']
        mean, std = (v.view(len(image), -1, 1, 1).to(image) for v in (self.mean, self.std))
        return {**sample, 'image': image * std + mean}

    def _bands_only(self, sample: Sample) -> Sample:
        """The sample without planes of the day of the year."""
        image = sample['image']
        if not self.day_of_year or image.shape[-3] == sum(self._band_counts):
            return sample
        parts = image.split(list(self.channels.values()), -3)
        return {**sample, 'image': torch.cat([part[..., :-2, :, :] for part in parts], -3)}

    def state_dict(self) -> dict[str, Any]:
        """The statistics, so that a checkpoint normalises as in its training, and its ground."""
        if self.statistics is None:
            return {}
        return vars(self.statistics) | {'ground': shapely.to_wkb(self._trained_on, hex=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Normalise with the statistics of a checkpoint, unless a file was given.

        Ground of its training that is evaluated is warned of.

        Args:
            state_dict: What ``state_dict`` gave.

        Raises:
            ValueError: If the checkpoint was trained on other bands.
        """
        self.add_trained_ground(state_dict.get('ground', ''))
        if state_dict and self.statistics_path is None:
            known = {f.name: state_dict[f.name] for f in fields(Statistics) if f.name in state_dict}
            statistics = Statistics(**known)
            if self._datasets:
                self._use(statistics)
            else:  # load_from_checkpoint: there are no bands to compare with before setup
                self._prepared = statistics

    def add_trained_ground(self, ground: str) -> None:
        """Keep what weights were trained on, and warn if it is evaluated.

        Args:
            ground: Well-known binary in hexadecimal, as ``state_dict`` gives it, or ``''``.
        """
        if not ground:
            return
        self._trained_on = self._trained_on.union(shapely.from_wkb(ground))  # a fit that goes on
        dataset: Any = self.test_dataset or self.val_dataset
        if dataset is None:
            return
        evaluated = _ground(dataset)
        share = evaluated.intersection(self._trained_on).area / evaluated.area
        if share > 0.01:  # less may be borders in another CRS
            warn(
                f'{share:.1%} of the ground of {dataset.title} is ground that the checkpoint was '
                'trained on, so scores tell little of other ground; give the splits of the training'
            )

    @property
    def _trains(self) -> bool:
        return self.trainer is None or self.trainer.state.fn == 'fit'

    def _splits_of_run(self) -> Sequence[str]:
        """Splits that the trainer reads, every split without one."""
        splits: dict[str | None, tuple[str, ...]] = {
            'fit': ('train', 'val'),
            'validate': ('val',),
            'test': ('test',),
            'predict': (self.predict_split,),
        }
        every = {split: None for stage in splits.values() for split in stage}
        return splits.get(self.trainer.state.fn if self.trainer else None, tuple(every))

    def _dataset(self, split: str) -> SeriesDataset:
        """Patches of a split, chosen once; of a rule that draws, with the first draw."""
        if split not in self._datasets:
            dataset = self.open_split(split)
            dataset.check()
            if not self._trains:
                warn_of_other_units(dataset)
            self._datasets[split] = dataset
        self._datasets[split].epoch = 0
        return self._datasets[split]

    def _setup_train(self) -> None:
        train = self._dataset('train')
        crops = RandomCrops(train, self.patch_size) if self.patch_size else None
        self.train_dataset, self._train_samples = train, crops or train
        self._trained_on = _ground(train)
        if len(self._train_samples) < self.batch_size:
            what = 'crops' if crops else 'patches'
            raise ValueError(
                f'batch_size is {self.batch_size}, but {train.title} has only '
                f'{len(self._train_samples)} {what} with a full series; make it '
                f'{len(self._train_samples)} or less'
            )
        callbacks = getattr(self.trainer, 'callbacks', None)
        if callbacks is not None and not any(isinstance(c, _FollowEpochs) for c in callbacks):
            callbacks.append(_FollowEpochs())

    def _setup_predict(self) -> None:
        dataset = self._dataset(self.predict_split)
        self.predict_dataset = dataset
        if self.predict_patch_size is None:
            return
        zones = dataset.zones()
        self.predict_dataset = zones  # type: ignore[assignment]
        self.predict_sampler = [self._gridded(zone, self.predict_patch_size) for zone in zones]

    def _gridded(self, zone: SeriesDataset, size: tuple[int, int]) -> GriddedPatchSampler:
        xmin, ymin, xmax, ymax = zone.index.total_bounds
        shape = round((ymax - ymin) / zone.res[1]), round((xmax - xmin) / zone.res[0])
        if self.predict_stride:
            # TorchGeo gives no window of a scene that is smaller by a stride or more.
            every = zip(shape, size, self.predict_stride, strict=True)
            pairs = [(n, n if n >= length else stride) for length, n, stride in every]
        else:
            pairs = [*map(spread, shape, size)]
        sizes, strides = zip(*pairs, strict=True)
        return GriddedPatchSampler(zone, size=sizes, stride=strides)

    @property
    def _any_dataset(self) -> SeriesDataset:
        names = ('train', 'val', 'test', 'predict')
        datasets: list[Any] = [getattr(self, f'{name}_dataset') for name in names]
        found: Any = next((d for d in datasets if d is not None), None)
        if found is None:
            raise RuntimeError('the data module has no data set yet; call setup(stage) first')
        return found[0] if isinstance(found, list) else found

    def _check_labels(self) -> None:
        """Warn of labels without a class and classes without a label; an error if none has one."""
        counts = dict(self._known_statistics().labels)
        title, classes = self._dataset('train').title, self.classes.classes
        claimed = {label for c in classes for label in c.labels}
        unclaimed = {v: n for v, n in sorted(counts.items()) if v not in claimed}
        total = max(sum(counts.values()), 1)
        values = ', '.join(f'{v} ({n / total:.1%})' for v, n in unclaimed.items())
        if not claimed & set(counts):
            raise DataError(
                f'no pixel of {title} has a label of a class: the label rasters hold '
                f'{values or "nothing"}, the classes claim {sorted(claimed)}. Give classes that '
                'claim them, or check ground_reference'
            )
        empty = [c.name for c in classes if not set(c.labels) & set(counts)]
        notes = [f'no class claims the labels {values}'] if set(unclaimed) - {0} else []
        notes += [f'no training pixel is of {", ".join(empty)}'] if empty else []
        if notes:
            warn(f'{title}: {"; ".join(notes)}')

    def _find_statistics(self) -> Statistics | None:
        """Statistics of the training patches, or else from a file given; None without either."""
        path = self.statistics_path
        given = Statistics.load(path) if path else None
        if given and not self._trains:
            return given
        try:
            return Statistics.beside(self._dataset('train'), self.num_workers, given)
        except NoPatchesError:
            if self._trains and not given:
                raise
            return given

    def _share_statistics(self) -> None:
        """Use statistics that the first process finds, unless a checkpoint brought some."""
        if self.statistics is not None:
            return
        first = self.trainer is None or self.trainer.is_global_zero
        found = self._prepared or self._find_statistics() if first else None
        self._prepared = None
        if self.trainer is not None:
            found = self.trainer.strategy.broadcast(found)
        if found is not None:
            self._use(found)

    def _use(self, statistics: Statistics) -> None:
        bands = tuple(band for names in self._any_dataset.bands.values() for band in names)
        if statistics.bands != bands:
            raise ValueError(
                f'the statistics are of bands {statistics.bands}, the data module reads {bands}; '
                'give the bands and sensors of the training'
            )
        self.statistics = statistics
        self.normalize = NormalizeSeries(statistics.mean, statistics.std)
        # TorchGeo denormalises images whose time is folded into the channels.
        self.mean = self._with_day(statistics.mean, 0.0).repeat(self.series_length)
        self.std = self._with_day(statistics.std, 1.0).repeat(self.series_length)

    def _with_day(self, values: Sequence[float], neutral: float) -> Tensor:
        """Values of the channels, with one that changes nothing for those without statistics."""
        added = [neutral] * 2 if self.day_of_year else []
        parts = torch.tensor(values).split(self._band_counts)
        return torch.cat([torch.cat([part, torch.tensor(added)]) for part in parts])

    def _known_statistics(self) -> Statistics:
        if self.statistics is None:
            raise DataError(
                f'{self._any_dataset.root} has no training patches to compute statistics from; '
                'give a checkpoint, or the file statistics_*.json of the training as statistics'
            )
        return self.statistics


def _ground(dataset: SeriesDataset) -> BaseGeometry:
    """Ground of all rows in a CRS that keeps areas everywhere."""
    return dataset.index.geometry.to_crs(6933).union_all()


def spread(length: int, size: int) -> tuple[int, int]:
    """Spread windows over a scene so that they read at most 1.8**0.5 times its pixels.

    They overlap as far as that allows, by a quarter where the scene is large and by an eighth at
    least, and are smaller by multiples of 32, the stride of the encoders, if that helps. They
    begin a multiple of 16 apart: the pooling of an encoder sees other shifts differently.

    Args:
        length: Pixels of the scene, along one side.
        size: Pixels of a window at most.

    Returns:
        Pixels of a window, and from one to the next.
    """
    step = min(16, math.ceil(size / 8))
    best = size // 8 - 1, size, size * 3 // 4  # overlap, window, stride
    for window in range(size, 0, -32) if size % 32 == 0 else (size,):
        count = int(1.8**0.5 * length / window)
        if window >= length:
            best = window, window, window
        elif count > 1:
            stride = step * math.ceil((length - window) / (step * (count - 1)))
            best = max(best, (window - stride, window, stride))
    return best[1:]


def _pair(name: str, size: Size | None) -> tuple[int, int] | None:
    """Height and width, which may be given as one number."""
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2:
        raise ValueError(f'{name} is {size}; give one number of pixels, or height and width')
    for number in pair:
        check_at_least(name, number, 1)
    return pair
