from itertools import chain
from typing import Any

import pytest
from torch.utils.data import DistributedSampler, SequentialSampler

from torchgeo_s1s2.datamodules.batches import EvenBatches


def shares(
    samples: int, processes: int, batch_size: int, shuffle: bool = True, epoch: int = 0
) -> list[list[list[int]]]:
    """Batches of each process."""
    batches = []
    for rank in range(processes):
        sampler: Any = DistributedSampler(range(samples), processes, rank, shuffle, seed=7)  # type: ignore[arg-type]
        sampler.set_epoch(epoch)
        batches.append(EvenBatches(sampler, batch_size))
        assert len(list(batches[-1])) == len(batches[-1])
    return [list(batch) for batch in batches]


@pytest.mark.parametrize('shuffle', [True, False])
@pytest.mark.parametrize('batch_size', [1, 2, 3, 8])
@pytest.mark.parametrize('processes', [1, 2, 3, 4])
def test_each_sample_once_in_as_many_steps(processes: int, batch_size: int, shuffle: bool) -> None:
    for samples in range(processes, 30):
        batches = shares(samples, processes, batch_size, shuffle)
        assert len({len(share) for share in batches}) == 1
        flat = [batch for share in batches for batch in share]
        assert sorted(chain(*flat)) == list(range(samples))
        sizes = {len(batch) for batch in flat}
        assert min(sizes) >= (2 if batch_size > 1 and samples >= 2 * processes else 1)
        assert max(sizes) - min(sizes) <= 1
        if samples >= 4 * processes:
            assert max(sizes) <= batch_size + (batch_size < 3)


def test_steps_by_hand() -> None:
    # Seven in two processes of batches of three: not two steps, as one batch would be of one.
    assert shares(7, 2, 3, shuffle=False) == [[[0, 1, 2, 3]], [[4, 5, 6]]]
    # Eleven: two steps, the batches of the second have one less or as many.
    assert shares(11, 2, 3, shuffle=False) == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10]]]
    # Three single ones: one step, as the second would have work for one process only.
    assert shares(3, 2, 1, shuffle=False) == [[[0, 1]], [[2]]]
    # Nine in one process: no batch of one.
    assert list(EvenBatches(SequentialSampler(range(9)), 8)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    # A sampler of one's own is followed.
    assert list(EvenBatches([4, 3, 2, 1, 0], 2)) == [[4, 3, 2], [1, 0]]


def test_another_order_each_epoch_and_the_same_in_each_process() -> None:
    first, second = (sorted(chain(*shares(8, 2, 2, epoch=epoch)[0])) for epoch in (0, 1))
    assert first != second
    assert shares(8, 2, 2) == shares(8, 2, 2)


def test_fewer_samples_than_processes() -> None:
    with pytest.raises(ValueError, match=r'3 processes cannot share the patches \(2\); give no'):
        shares(2, 3, 1)
