"""What reality does to a series: fewer or other dates, a missing sensor, gaps, another season."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchgeo.datasets import stack_samples

from torchgeo_s1s2.datasets import (
    SENSOR_BANDS,
    AllDates,
    DateRule,
    EvenlySpaced,
    MonthlySeries,
    MultiSenGE,
)
from torchgeo_s1s2.datasets.series import Sample
from torchgeo_s1s2.datasets.synthetic import MARKER, write_synthetic
from torchgeo_s1s2.datasets.time_series import Slot, Span, Times
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation
from torchgeo_s1s2.transforms import NormalizeSeries, SeriesDropout
from torchgeo_s1s2.transforms.series import keep_observations

CLASSES = 10
CHANNELS = [len(bands) for bands in SENSOR_BANDS.values()]
DROPOUT = {'date': 0.25, 'sensor': 0.2}
DRAWS = 5
"""How often each patch is mapped with other dates dropped at random."""
TRAININGS: dict[str, tuple[str, ...]] = {
    'plain': (),
    'dropout': (
        '--data.init_args.dropout=torchgeo_s1s2.transforms.SeriesDropout',
        *(f'--data.init_args.dropout.{name}={value}' for name, value in DROPOUT.items()),
    ),
}
"""Options of each training."""
SERIES = MonthlySeries()
"""Date rule of the training."""
DATES = 'number of dates'
GAPS = 'share of dates dropped at random'
LATE = 'days that the season is late'


@dataclass(frozen=True)
class FromJuly(AllDates):
    """Every acquisition since 1 July, when the series of the training begin."""

    def slots(self, times: Times, span: Span, draw: int) -> list[Slot]:
        july = times[0].astype('datetime64[Y]') + np.timedelta64(6, 'M')
        slots = super().slots(times[times >= july], (july, span[1]), draw)
        return [slot._replace(position=int(np.searchsorted(times, slot.time))) for slot in slots]


@dataclass(frozen=True)
class Condition:
    """What happens to the series of the test tile.

    Batches are changed as the data set gives them, the season comes some days later.
    """

    what: str
    label: str
    change: Callable[[Sample], Sample] = dict
    series: DateRule = SERIES
    delay: int = 0

    def batch(self, root: Path) -> Sample:
        """All test patches under this condition, which must be those of the other ones."""
        tile = read_tile(delayed(root, self.delay), self.series)
        if not torch.equal(tile['mask'], read_tile(root, SERIES)['mask']):
            raise ValueError(
                f'{self.what}, {self.label}: not the test patches of the other conditions; '
                f'let {root} be written anew, so that every patch has every series'
            )
        return self.change(tile)


def conditions() -> list[Condition]:
    """All conditions."""
    even = {f'{n} even': EvenlySpaced(n=n, missing='keep') for n in (4, 6, 8)}
    shares = (0.0, 0.25, 0.5, 0.75)
    return [
        *(Condition(DATES, f'{n} of 4', partial(keep_first, number=n)) for n in (1, 2, 3, 4)),
        Condition(DATES, 'from July', series=FromJuly(max_length=10)),
        *(Condition(DATES, label, series=rule) for label, rule in even.items()),
        Condition('sensors', 'both'),
        Condition('sensors', 'S2 only', partial(keep_sensor, sensor='s2')),
        Condition('sensors', 'S1 only', partial(keep_sensor, sensor='s1')),
        *(Condition(GAPS, f'{share:g}', partial(drop_dates, share=share)) for share in shares),
        *(Condition(LATE, f'{days}', delay=days) for days in range(-30, 31, 10)),
    ]


def keep_first(batch: Sample, number: int) -> Sample:
    """Leave a number of slots, from the first."""
    slot = torch.arange(batch['valid'].shape[1])
    return keep_observations(batch, slot[:, None] < number, CHANNELS)


def keep_sensor(batch: Sample, sensor: str) -> Sample:
    """Leave one sensor."""
    kept = torch.tensor([name == sensor for name in SENSOR_BANDS])
    return keep_observations(batch, kept, CHANNELS)


def drop_dates(batch: Sample, share: float) -> Sample:
    """Drop dates of each sensor at random, never all; each patch comes ``DRAWS`` times."""
    torch.manual_seed(0)
    keys = 'image', 'mask', 'valid', 'acquisition_times'
    repeated = {key: batch[key].repeat_interleave(DRAWS, 0) for key in keys}
    return SeriesDropout(date=share, sensor=0)(repeated, CHANNELS)


@cache
def read_tile(root: Path, series: DateRule) -> Sample:
    """All test patches as one batch, as the data set gives them."""
    dataset = MultiSenGE(root, 'test', series, CLASSES)
    return stack_samples([dataset[i] for i in range(len(dataset))])


def delayed(root: Path, days: int) -> Path:
    """Write the test tile of a year whose season comes later, and return its folder."""
    if not days:
        return root
    settings = json.loads((root / MARKER).read_text())
    tiles = {tile: settings['patches'][tile] for tile in MultiSenGE.splits['test']}
    return write_synthetic(
        root / f'delay_{days:+d}', **{**settings, 'patches': tiles, 'delay': days}
    )


class Mapper:
    """A checkpoint, which normalises as in its training."""

    def __init__(self, checkpoint: Path) -> None:
        statistics = torch.load(checkpoint, 'cpu', weights_only=False)['MultiSenGEDataModule']
        self.normalize = NormalizeSeries(statistics['mean'], statistics['std'])
        self.task = S1S2SemanticSegmentation.load_from_checkpoint(
            checkpoint, 'cpu', weights_only=False
        ).eval()

    @torch.inference_mode()
    def __call__(self, batch: Sample) -> Tensor:
        """Classes (B, H, W) of a batch as the data set gives it."""
        parts = self.normalize(batch, CHANNELS)['image'].split(4)
        return torch.cat([self.task(part).argmax(1) for part in parts])
