"""Crops and batches that distributed training and evaluation can count on."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import BatchSampler, Dataset, DistributedSampler
from torchgeo.datasets import stack_samples

from torchgeo_s1s2.datasets.classes import NO_LABEL
from torchgeo_s1s2.datasets.series import Sample, SeriesDataset


class EvenBatches(BatchSampler):
    """Gives each sample to one process once an epoch, in as many batches in each process.

    The batches of all processes differ by one sample at most, so none is a small remainder, and
    none has one sample where two can be had: batch norm cannot train on a single value. PyTorch's
    ``DistributedSampler`` repeats samples until the processes have as many, which counts some twice
    in metrics, and dropping the last batch leaves samples out.

    Lightning puts a ``DistributedSampler`` in the place of ``sampler``: it says how many processes
    there are, and the seed of the order that they share.
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool = False) -> None:
        """Keep the settings.

        Args:
            sampler: Sampler of the whole data set, or a ``DistributedSampler``.
            batch_size: Most samples in a batch, unless that leaves a process without a batch, or
                with a batch of one although this is more than one. Then some batches have more: one
                more, where there are as many as four samples a process.
            drop_last: As in PyTorch's class; nothing is ever dropped.

        Raises:
            ValueError: If there are fewer samples than processes.
        """
        super().__init__(sampler, batch_size, drop_last)
        shared = sampler if isinstance(sampler, DistributedSampler) else None
        self._samples = len(sampler if shared is None else shared.dataset)  # type: ignore[arg-type]
        self._processes = 1 if shared is None else shared.num_replicas
        self._rank = 0 if shared is None else shared.rank
        if self._samples < self._processes:
            raise ValueError(
                f'{self._processes} processes cannot share the patches ({self._samples}); give no '
                'more devices than patches'
            )

    def __len__(self) -> int:
        """Number of batches of each process."""
        share, least = self._samples / self._processes, min(self.batch_size, 2)
        return max(1, min(math.ceil(share / self.batch_size), int(share / least)))

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of this process; those of one step lie side by side in the order."""
        batches = np.array_split(self._order(), len(self) * self._processes)
        for batch in batches[self._rank :: self._processes]:
            yield batch.tolist()

    def _order(self) -> list[int]:
        """Samples of all processes."""
        shared: Any = self.sampler
        if not isinstance(shared, DistributedSampler):
            return list(shared)
        whole: Any = DistributedSampler(shared.dataset, 1, 0, shared.shuffle, shared.seed)
        whole.set_epoch(shared.epoch)
        return list(whole)


class RandomCrops(Dataset[Sample]):
    """Random windows of the patches of a data set: as many of each as lie side by side in it.

    A window is read, not cut out of its patch. What a patch smaller than the window lacks is
    missing, and has no label.
    """

    def __init__(self, dataset: SeriesDataset, size: tuple[int, int]) -> None:
        """List the windows.

        Args:
            dataset: The patches.
            size: Height and width in pixels.

        Raises:
            ValueError: If every patch is smaller in one of the two.
        """
        self.dataset, self.size = dataset, size
        self.shapes = [dataset.shape(index) for index in range(len(dataset))]
        counts = [(height // size[0]) * (width // size[1]) for height, width in self.shapes]
        if not any(counts):
            height, width = (max(lengths) for lengths in zip(*self.shapes, strict=True))
            raise ValueError(
                f'patch_size is {size}, height and width, and no patch of {dataset.title}, or part '
                f'of one in its blocks or areas, has so many pixels: the highest has {height}, the '
                f'widest {width}. Make it smaller, or the blocks larger, or leave it out to train '
                'without crops'
            )
        self.rows = np.repeat(np.arange(len(counts)), np.maximum(counts, 1))

    def __len__(self) -> int:
        """Number of windows in an epoch."""
        return len(self.rows)

    def __getitem__(self, number: int) -> Sample:
        """Read a window at a place that PyTorch's generator draws."""
        index = int(self.rows[number])
        room = (max(n - size, 0) for n, size in zip(self.shapes[index], self.size, strict=True))
        top, left = (int(torch.randint(n + 1, ())) for n in room)
        return self.dataset.crop(index, top, left, *self.size)


def pad_samples(samples: Sequence[Sample]) -> Sample:
    """Stack samples, smaller ones filled below and to the right with what is missing.

    Args:
        samples: Samples of a data set of series.
    """
    height, width = (max(sample['image'].shape[i] for sample in samples) for i in (-2, -1))

    def fill(value: Tensor, empty: float) -> Tensor:
        return pad(value, (0, width - value.shape[-1], 0, height - value.shape[-2]), value=empty)

    return stack_samples(
        [
            {**s, 'image': fill(s['image'], torch.nan), 'mask': fill(s['mask'], NO_LABEL)}
            for s in samples
        ]
    )
