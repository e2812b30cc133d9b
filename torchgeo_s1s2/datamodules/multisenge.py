"""Data module for MultiSenGE and data sets in its layout."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pyproj import CRS
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets import stack_samples
from torchgeo.samplers import GriddedPatchSampler

from torchgeo_s1s2.datamodules.batches import EvenBatches
from torchgeo_s1s2.datamodules.statistics import Statistics
from torchgeo_s1s2.datasets.catalog import SENSORS, Catalog
from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.datasets.download import SeasonDownload
from torchgeo_s1s2.datasets.multisenge import MultiSenGE, Sample, Splits
from torchgeo_s1s2.datasets.packed import pack
from torchgeo_s1s2.datasets.synthetic import write_synthetic
from torchgeo_s1s2.datasets.time_series import DateRule, MonthlySeries, check_at_least
from torchgeo_s1s2.errors import NoPatchesError
from torchgeo_s1s2.transforms import AugmentSeries, DayOfYear, NormalizeSeries, SeriesDropout
from torchgeo_s1s2.transforms.series import count_observations


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


class MultiSenGEDataModule(NonGeoDataModule):
    """Patches of MultiSenGE by tile splits, normalised and, in training, augmented.

    Patches are read by number, each on its own grid in its own UTM zone. However many processes
    there are, an epoch reads each patch once and in one of them, see
    :class:`~torchgeo_s1s2.datamodules.batches.EvenBatches`; what is kept on disk is made by the
    first process and read by the others.

    Each channel is normalised with the mean and standard deviation of the training patches, which
    are computed once and kept beside the data as ``statistics_*.json``, and travel in checkpoints.
    They are of the slots that the date rule chooses; of a rule that draws, those of the first
    epoch.

    With :class:`~torchgeo_s1s2.datasets.RandomDates` every epoch of training sees other dates,
    whatever the task; evaluation always sees the same.

    Attributes:
        classes: Class scheme of the masks.
        channels: Number of channels of each sensor: its bands, and two for the day of the year.
        series_length: Number of time slots T.
    """

    def __init__(
        self,
        root: str | Path = 'data',
        batch_size: int = 8,
        num_workers: int = 0,
        patch_size: int | tuple[int, int] | None = None,
        series: DateRule | None = None,
        classes: int | ClassScheme = 14,
        sensors: Sequence[str] = SENSORS,
        bands: Sequence[str] | None = None,
        splits: Splits | None = None,
        predict_split: str = 'test',
        predict_patch_size: int | tuple[int, int] | None = None,
        predict_stride: int | tuple[int, int] | None = None,
        augment: bool = True,
        dropout: SeriesDropout | None = None,
        day_of_year: bool = False,
        statistics: str | Path | None = None,
        synthetic: bool | Mapping[str, Any] = False,
        dataset_class: type[MultiSenGE] = MultiSenGE,
        download: bool = False,
        checksum: bool = False,
        packed: str | Path | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            root: Folder of the data set.
            batch_size: Number of patches in a batch.
            num_workers: Number of processes that read.
            patch_size: Height and width of random crops in training; whole patches unless given.
            series: Date rule; the paper's ``MonthlySeries()`` unless given.
            classes: Number of classes, or a class scheme of your own.
            sensors: ``('s2', 's1')`` or one of them.
            bands: Bands to read; all unless given.
            splits: Tiles of each split, in place of the paper's.
            predict_split: Split that is mapped by ``torchgeo predict``.
            predict_patch_size: Height and width of the windows that ``torchgeo predict`` reads
                scenes in, zone by zone, for :class:`~torchgeo_s1s2.callbacks.SceneWriter`; whole
                patches unless given.
            predict_stride: Rows and columns from one of these windows to the next. Unless given,
                windows overlap by about a quarter, and small scenes have smaller windows, so that
                at most 1.8 times the pixels are read; see :func:`spread`.
            augment: Mirror and turn the training patches.
            dropout: Drop dates and sensors of the training patches at random.
            day_of_year: Append the day of the year to each sensor's bands, as two planes; see
                :class:`~torchgeo_s1s2.transforms.DayOfYear`.
            statistics: File of statistics to normalise with, in place of those beside the data.
            synthetic: Write a synthetic data set to root unless it is there; a mapping holds
                arguments of :func:`~torchgeo_s1s2.datasets.synthetic.write_synthetic`.
            dataset_class: MultiSenGE or MultiSenNA.
            download: Download what the series and the sensors need in the tiles of all splits and
                root lacks; see :class:`~torchgeo_s1s2.datasets.SeasonDownload`.
            checksum: Compare the files with the checksums recorded when they were downloaded,
                which reads them all.
            packed: Folder of a copy of the chosen series that reads many times as fast as the
                rasters, on a fast disk if there is one. What a run needs of it is written when
                the run begins, unless it is there; see :func:`~torchgeo_s1s2.datasets.pack`.

        Raises:
            ValueError: If a number is out of range.
        """
        check_at_least('batch_size', batch_size, 1)
        check_at_least('num_workers', num_workers, 0)
        self.root = Path(root)
        self.predict_split = predict_split
        self.predict_patch_size = _pair(predict_patch_size) if predict_patch_size else None
        self.predict_stride = _pair(predict_stride) if predict_stride else None
        self.predict_sampler: list[Any] | None = None
        self.synthetic = synthetic
        self.download, self.checksum = download, checksum
        self.packed = packed
        self.statistics_path = statistics
        self.statistics: Statistics | None = None
        self.mean, self.std = torch.tensor(0.0), torch.tensor(1.0)
        super().__init__(
            dataset_class,  # type: ignore[arg-type]
            batch_size,
            num_workers,
            root=self.root,
            series=series or MonthlySeries(),
            classes=classes,
            sensors=sensors,
            bands=bands,
            splits=splits,
        )
        self.collate_fn = stack_samples
        self.augment = AugmentSeries(patch_size, turns=augment)
        self.dropout = dropout
        self.day_of_year = DayOfYear() if day_of_year else None
        self._catalog: Catalog | None = None
        self._datasets: dict[str, MultiSenGE] = {}
        self._found: Statistics | None = None

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
        """Get what is wanted and missing: data, the catalogue, the packed copy and the statistics.

        Lightning calls this in the first process only, before the ``setup`` of all.
        """
        self._obtain()
        if self.synthetic is not False:
            options = {} if self.synthetic is True else dict(self.synthetic)
            write_synthetic(self.root, **options)
        self._read_catalog()
        if self.packed is not None:
            self._pack(self.packed)
        self._find_statistics()

    def _obtain(self) -> None:
        """Download and verify as far as that is wanted."""
        splits = self.kwargs['splits'] or self.dataset_class.splits  # type: ignore[attr-defined]
        everything = not splits or self.predict_split == 'all'
        season = SeasonDownload(
            self.root,
            self.dataset_class.url,  # type: ignore[attr-defined]
            None if everything else sorted({tile for tiles in splits.values() for tile in tiles}),
            self.kwargs['series'],
            self.kwargs['sensors'],
        )
        if self.download:
            season.run()
        if self.checksum:
            season.verify()

    def setup(self, stage: str) -> None:
        """Choose the patches of a stage, and read one to see that it can be read.

        Args:
            stage: ``'fit'``, ``'validate'``, ``'test'`` or ``'predict'``.

        Raises:
            FileNotFoundError: If root lacks a folder.
            OSError: If a raster cannot be read.
            ValueError: If no patch has a full series, a raster differs from the others, or there
                are fewer training patches than a batch holds.
        """
        if stage == 'fit':
            self.train_dataset = self._dataset('train')
            self._check_batch_size()
            self._follow_epochs()
        if stage in ('fit', 'validate'):
            self.val_dataset = self._dataset('val')
        if stage == 'test':
            self.test_dataset = self._dataset('test')
        if stage == 'predict':
            self._setup_predict()
        self._use(self._share_statistics())

    def predict_dataloader(self) -> Any:
        """Loader of the patches, or one of the windows of each UTM zone."""
        if self.predict_sampler is None:
            return super().predict_dataloader()
        datasets: Any = self.predict_dataset
        return [
            DataLoader(
                dataset,
                batch_size=self.batch_size,
                sampler=sampler,
                num_workers=self.num_workers,
                collate_fn=self.collate_fn,
            )
            for dataset, sampler in zip(datasets, self.predict_sampler, strict=True)
        ]

    def _dataloader_factory(self, split: str) -> DataLoader[Sample]:
        """As TorchGeo's, with every patch in training too; prediction takes any sampler."""
        if split == 'predict':
            return super()._dataloader_factory(split)
        dataset: Any = self._valid_attribute(f'{split}_dataset', 'dataset')
        sampler = RandomSampler(dataset) if split == 'train' else SequentialSampler(dataset)
        return DataLoader(
            dataset,
            batch_sampler=EvenBatches(sampler, self.batch_size),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Loader of the training patches; it starts to read in the epoch that comes next."""
        if self.trainer:
            self.train_dataset.epoch = _next_epoch(self.trainer)  # type: ignore[union-attr]
        return super().train_dataloader()

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
        batch = self.normalize(batch)
        if training:
            batch = self.augment(batch)
        return self.day_of_year(batch, self._band_counts) if self.day_of_year else batch

    def plot(self, sample: Sample, **kwargs: Any) -> Any:
        """Plot a sample of any split; see :meth:`MultiSenGE.plot`."""
        return self._any_dataset.plot(self._bands_only(sample), **kwargs)

    def denormalize(self, sample: Sample) -> Sample:
        """Bring the image of a sample back to reflectance and dB.

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
        """The statistics, so that a checkpoint normalises as in its training."""
        return vars(self.statistics) if self.statistics else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Normalise with the statistics of a checkpoint, unless a file was given.

        Args:
            state_dict: What ``state_dict`` gave.

        Raises:
            ValueError: If the checkpoint was trained on other bands.
        """
        if state_dict and self.statistics_path is None:
            self._use(Statistics(**state_dict))

    def _follow_epochs(self) -> None:
        callbacks = getattr(self.trainer, 'callbacks', None)
        if callbacks is not None and not any(isinstance(c, _FollowEpochs) for c in callbacks):
            callbacks.append(_FollowEpochs())

    def _pack(self, folder: str | Path) -> None:
        """Write the packed copy of the splits that a run reads."""
        for split in self._splits_of_run():
            with suppress(NoPatchesError):  # setup says so if the split is needed
                pack(self._rasters(split), folder, self.num_workers)
                if split == 'train' and self.statistics_path is None:
                    self._found = Statistics.beside(self._dataset('train'), self.num_workers)

    def _splits_of_run(self) -> Iterable[str]:
        """Splits that the trainer reads, every split without one."""
        splits: dict[str | None, tuple[str, ...]] = {
            'fit': ('train', 'val'),
            'validate': ('val',),
            'test': ('test',),
            'predict': (self.predict_split,),
        }
        every = {split: None for stage in splits.values() for split in stage}
        return splits.get(self.trainer.state.fn if self.trainer else None, tuple(every))

    def _read_catalog(self) -> Catalog:
        if self._catalog is None:
            self._catalog = Catalog(self.root)
        return self._catalog

    def _dataset(self, split: str) -> MultiSenGE:
        """Patches of a split, chosen once."""
        if split not in self._datasets:
            self._datasets[split] = self._new_dataset(split)
        return self._datasets[split]

    def _rasters(self, split: str) -> MultiSenGE:
        """Patches of a split, read from their rasters."""
        if self.packed is None:
            return self._dataset(split)
        return self._new_dataset(split, packed=None)

    def _new_dataset(self, split: str, **changes: Any) -> MultiSenGE:
        dataset_class: Any = self.dataset_class
        where = {'catalog': self._read_catalog(), 'packed': self.packed}
        options = {'split': split, **where, **self.kwargs, **changes}
        dataset: MultiSenGE = dataset_class(**options)
        dataset.check()
        return dataset

    def _setup_predict(self) -> None:
        dataset = self._dataset(self.predict_split)
        self.predict_dataset = dataset
        if self.predict_patch_size is None:
            return
        zones = [
            self._new_dataset('zone', splits={'zone': tiles}, crs=CRS.from_epsg(epsg))
            for epsg, tiles in dataset.zones.items()
        ]
        self.predict_dataset = zones  # type: ignore[assignment]
        self.predict_sampler = [self._gridded(zone, self.predict_patch_size) for zone in zones]

    def _gridded(self, zone: MultiSenGE, size: tuple[int, int]) -> GriddedPatchSampler:
        if self.predict_stride:
            return GriddedPatchSampler(zone, size=size, stride=self.predict_stride)
        xmin, ymin, xmax, ymax = zone.index.total_bounds
        rows = spread(round((ymax - ymin) / zone.res[1]), size[0])
        cols = spread(round((xmax - xmin) / zone.res[0]), size[1])
        sizes, strides = zip(rows, cols, strict=True)
        return GriddedPatchSampler(zone, size=sizes, stride=strides)

    @property
    def _any_dataset(self) -> MultiSenGE:
        names = ('train', 'val', 'test', 'predict')
        datasets: list[Any] = [getattr(self, f'{name}_dataset') for name in names]
        found: Any = next((d for d in datasets if d is not None), None)
        if found is None:
            raise RuntimeError('the data module has no data set yet; call setup(stage) first')
        return found[0] if isinstance(found, list) else found

    def _check_batch_size(self) -> None:
        patches = len(self.train_dataset)  # type: ignore[arg-type]
        if patches < self.batch_size:
            raise ValueError(
                f'batch_size is {self.batch_size}, but split "train" of {self.root} has only '
                f'{patches} patches with a full series; make it {patches} or less'
            )

    def _find_statistics(self) -> Statistics | None:
        """Statistics from the file given or beside the data, None without training patches."""
        if self.statistics_path is not None:
            return Statistics.load(self.statistics_path)
        if self._found is None:
            try:
                dataset = self._rasters('train')
            except NoPatchesError:
                return None
            self._found = Statistics.beside(dataset, self.num_workers)
        return self._found

    def _share_statistics(self) -> Statistics | None:
        """Statistics that the first process finds, for all of them."""
        if self.trainer is None or self.trainer.world_size == 1:
            return self._find_statistics()
        found = self._find_statistics() if self.trainer.is_global_zero else None
        return self.trainer.strategy.broadcast(found)

    def _use(self, statistics: Statistics | None) -> None:
        if statistics is None:
            return
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
            raise ValueError(
                f'{self.root} has no training patches to compute statistics from; give a '
                'checkpoint, or the file statistics_*.json of the training as statistics'
            )
        return self.statistics


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


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
