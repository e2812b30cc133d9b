"""Statistics of the training patches: of each channel, and how often each label occurs."""

import hashlib
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from torchgeo_s1s2.datasets.classes import NO_LABEL
from torchgeo_s1s2.datasets.multisenge import MultiSenGE
from torchgeo_s1s2.files import whole


@dataclass(frozen=True)
class Statistics:
    """Statistics of a data set over the slots that its date rule chooses.

    Attributes:
        bands: Names of the C channels.
        mean: Mean of each channel over all pixels with a value, in the units of the samples.
        std: Standard deviation of each channel over the same pixels.
        pixels: Number of pixels of each class 0..K-1.
    """

    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: tuple[int, ...]

    @classmethod
    def compute(cls, dataset: MultiSenGE, num_workers: int = 0, progress: bool = True) -> Self:
        """Read every patch of a data set once.

        Args:
            dataset: The training patches.
            num_workers: Number of processes that read.
            progress: Show a progress bar.

        Raises:
            ValueError: If a band has no value at all.
        """
        bands = tuple(band for names in dataset.bands.values() for band in names)
        count, total, squares = torch.zeros(3, len(bands), dtype=torch.float64)
        pixels = torch.zeros(NO_LABEL + 1, dtype=torch.int64)
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
        for sample in tqdm(loader, 'Computing statistics', disable=not progress, unit='patch'):
            values = sample['image'].transpose(0, 1).flatten(1).double()
            count += values.isfinite().sum(1)
            total += values.nansum(1)
            squares += values.square().nansum(1)
            pixels += torch.bincount(sample['mask'].flatten(), minlength=len(pixels))
        _check_seen(bands, count, dataset)
        mean = total / count
        std = (squares / count - mean**2).clamp(min=1e-12).sqrt()
        classes = pixels[: len(dataset.classes)]
        return cls(bands, tuple(mean.tolist()), tuple(std.tolist()), tuple(classes.tolist()))

    @classmethod
    def beside(cls, dataset: MultiSenGE, num_workers: int = 0) -> Self:
        """Statistics kept beside the data, computed if these settings have none yet.

        Args:
            dataset: The training patches.
            num_workers: Number of processes that read.

        Raises:
            ValueError: If the file that is there is malformed.
        """
        path = statistics_path(dataset)
        if path.is_file():
            return cls.load(path)
        statistics = cls.compute(dataset, num_workers)
        try:
            statistics.save(path)
        except OSError as error:
            warnings.warn(f'{path} cannot be written ({error}); it is computed anew', stacklevel=2)
        return statistics

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that ``save`` wrote.

        Raises:
            ValueError: If the file is malformed.
        """
        try:
            content = json.loads(Path(path).read_text())
            statistics = cls(
                tuple(map(str, content['bands'])),
                tuple(map(float, content['mean'])),
                tuple(map(float, content['std'])),
                tuple(map(int, content['pixels'])),
            )
            statistics._check()
            return statistics
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path} is not a file of statistics ({error!r}); delete it and it is computed anew'
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        with whole(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1))

    def _check(self) -> None:
        if not len(self.bands) == len(self.mean) == len(self.std):
            raise ValueError('bands, mean and std differ in length')
        if not all(std > 0 for std in self.std):
            raise ValueError('a standard deviation is not above 0')

    @property
    def class_weights(self) -> torch.Tensor:
        """Inverse pixel frequencies scaled to a sum of 1000, 0 for a class without a pixel.

        The scale is that of Wenger et al. 2023, https://doi.org/10.3390/rs15010151.

        Raises:
            ValueError: If no pixel has a label.
        """
        pixels = torch.tensor(self.pixels, dtype=torch.float64)
        if not pixels.any():
            raise ValueError(
                'no training pixel has a label, so there are no class weights; give class_weights, '
                'or check ground_reference and the class scheme'
            )
        inverse = torch.where(pixels > 0, 1 / pixels, 0.0)
        return (1000 * inverse / inverse.sum()).float()


def statistics_path(dataset: MultiSenGE) -> Path:
    """Where the statistics of a data set with its settings are kept."""
    names = [dataset.name(i) for i in range(len(dataset))]
    settings = [dataset.series, dataset.bands, dataset.raw, dataset.classes, names]
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
    return dataset.root / f'statistics_{key}.json'


def _check_seen(bands: tuple[str, ...], count: torch.Tensor, dataset: MultiSenGE) -> None:
    unseen = [band for band, n in zip(bands, count, strict=True) if not n]
    if unseen:
        raise ValueError(
            f'bands {unseen} have no value in the {len(dataset)} training patches of '
            f'{dataset.root}; leave them out with bands or sensors'
        )
