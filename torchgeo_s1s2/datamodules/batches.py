"""Batches that distributed training and evaluation can count on."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DistributedSampler


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
                f'{self._samples} patches cannot be shared by {self._processes} processes; give '
                f'{self._samples} devices or fewer'
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
