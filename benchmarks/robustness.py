"""Measures how a checkpoint stands what reality does to a series, on synthetic data.

    python -m benchmarks.robustness --root data/robustness --output outputs/robustness

The ConvLSTM+Inception backbone is trained twice on the same data, without and with dropout of
dates and sensors. Both checkpoints then map the test tile with fewer or more dates, without a
sensor, with gaps, and in years whose season comes earlier or later. Nothing is trained again for
that. A finished training is not repeated, an interrupted one goes on from its last checkpoint.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torchgeo.datasets import stack_samples

from benchmarks.accuracy import CONF, Run, listed, markdown, prepare, provenance, scores
from torchgeo_s1s2.callbacks.report import save_figure
from torchgeo_s1s2.datasets import MonthlySeries, MultiSenGE
from torchgeo_s1s2.datasets.classes import class_scheme
from torchgeo_s1s2.datasets.multisenge import SENSOR_BANDS, Sample
from torchgeo_s1s2.datasets.synthetic import MARKER, write_synthetic
from torchgeo_s1s2.datasets.time_series import (
    AllDates,
    DateRule,
    EvenlySpaced,
    Slot,
    Span,
    Times,
)
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation
from torchgeo_s1s2.transforms import NormalizeSeries, SeriesDropout
from torchgeo_s1s2.transforms.series import keep_observations

CLASSES = 10
CHANNELS = [len(bands) for bands in SENSOR_BANDS.values()]
DROPOUT = {'date': 0.25, 'sensor': 0.2}
DRAWS = 5
"""How often each patch is mapped with other dates dropped at random."""

_OPTION = '--data.init_args.dropout'
TRAININGS: dict[str, tuple[str, ...]] = {
    'plain': (),
    'dropout': (
        f'{_OPTION}=torchgeo_s1s2.transforms.SeriesDropout',
        *(f'{_OPTION}.{name}={value}' for name, value in DROPOUT.items()),
    ),
}
"""Options of each training."""

SERIES = MonthlySeries()
"""Date rule of the training."""

DATES, SENSORS, GAPS, SHIFT = PANELS = (
    'number of dates',
    'sensors',
    'share of dates dropped at random',
    'days that the season is late',
)


@dataclass(frozen=True)
class FromJuly(AllDates):
    """Every acquisition since 1 July, when the series of the training begin."""

    def slots(self, times: Times, span: Span, draw: int) -> list[Slot]:
        july = times[0].astype('datetime64[Y]') + np.timedelta64(6, 'M')
        slots = super().slots(times[times >= july], (july, span[1]), draw)
        return [replace(slot, position=int(np.searchsorted(times, slot.time))) for slot in slots]


@dataclass(frozen=True)
class Condition:
    """What happens to the series of the test tile.

    Attributes:
        panel: One of ``PANELS``.
        label: Its place on the axis of the panel.
        change: What is done to a batch as the data set gives it.
        series: Date rule; that of the training unless given.
        delay: Days by which the season comes later.
    """

    panel: str
    label: str
    change: Callable[[Sample], Sample] = dict
    series: DateRule = SERIES
    delay: int = 0


def conditions() -> list[Condition]:
    """All conditions, those of a panel in the order of its axis."""
    even = {f'{n} even': EvenlySpaced(n=n, missing='keep') for n in (4, 6, 8)}
    sensors = {'S2 only': 's2', 'S1 only': 's1'}
    shares = (0.0, 0.25, 0.5, 0.75)
    return [
        *(Condition(DATES, f'{n} of 4', partial(keep_first, number=n)) for n in (1, 2, 3, 4)),
        Condition(DATES, 'from July', series=FromJuly(max_length=10)),
        *(Condition(DATES, label, series=rule) for label, rule in even.items()),
        Condition(SENSORS, 'both'),
        *(Condition(SENSORS, k, partial(keep_sensor, sensor=s)) for k, s in sensors.items()),
        *(Condition(GAPS, f'{share:g}', partial(drop_dates, share=share)) for share in shares),
        *(Condition(SHIFT, f'{days}', delay=days) for days in range(-30, 31, 10)),
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
        content = torch.load(checkpoint, 'cpu', weights_only=False)
        statistics = content['MultiSenGEDataModule']
        self.normalize = NormalizeSeries(statistics['mean'], statistics['std'])
        self.task = S1S2SemanticSegmentation.load_from_checkpoint(
            checkpoint, 'cpu', weights_only=False
        ).eval()

    @torch.inference_mode()
    def __call__(self, batch: Sample) -> Tensor:
        """Classes (B, H, W) of a batch as the data set gives it."""
        parts = self.normalize(batch, CHANNELS)['image'].split(4)
        return torch.cat([self.task(part).argmax(1) for part in parts])


def measure(condition: Condition, root: Path, mappers: dict[str, Mapper]) -> dict[str, Any]:
    """Weighted F1 and kappa of each checkpoint under a condition.

    Raises:
        ValueError: If its patches are not those of the other conditions.
    """
    tile = read_tile(delayed(root, condition.delay), condition.series)
    if not torch.equal(tile['mask'], read_tile(root, SERIES)['mask']):
        raise ValueError(
            f'{condition.panel}, {condition.label}: not the test patches of the other conditions; '
            f'let {root} be written anew, so that every patch has every series'
        )
    batch = condition.change(tile)
    result: dict[str, Any] = {'panel': condition.panel, 'condition': condition.label}
    for name, mapper in mappers.items():
        maps = [t.numpy().astype(np.uint8) for t in (mapper(batch), batch['mask'])]
        measured = scores(maps[0], maps[1], class_scheme(CLASSES))
        result[name] = {key: measured[key] for key in ('f1', 'kappa')}
    return result


def table(results: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """Markdown with a row for each condition."""
    columns = [(key, name) for key in ('f1', 'kappa') for name in TRAININGS]
    titles = {'f1': 'F1', 'kappa': 'kappa'}
    rows = [['what', 'condition', *(f'{titles[key]}, {name}' for key, name in columns)]]
    for r in results:
        rows.append([r['panel'], r['condition'], *(f'{r[name][key]:.3f}' for key, name in columns)])
    lines = markdown(rows, texts=(0, 1))
    return f'# Synthetic data: robustness on the test tile\n\n{listed(about)}\n\n{lines}\n'


def plot(results: Sequence[dict[str, Any]]) -> plt.Figure:
    """Weighted F1 of both checkpoints, one panel for each kind of condition."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey=True, layout='constrained')
    for panel, ax in zip(PANELS, axes.flat, strict=True):
        rows = [r for r in results if r['panel'] == panel]
        labels = [r['condition'].replace(' ', '\n') for r in rows]
        for name, line in zip(TRAININGS, ('o-', 's--'), strict=True):
            ax.plot(labels, [r[name]['f1'] for r in rows], line, label=f'training: {name}')
        ax.set(title=f'Synthetic data: {panel}', ylabel='weighted F1', ylim=(0, 1))
        ax.grid(alpha=0.3)
    axes.flat[0].legend(loc='lower left')
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and write ``table.md``, ``results.json`` and ``robustness.png``.

    Raises:
        ValueError: If root holds a data set that is not synthetic.
    """
    args = _parser().parse_args(arguments)
    root, output = args.root.resolve(), args.output.resolve()
    prepare(root, incomplete=0)
    if not (root / MARKER).exists():
        raise ValueError(f'{root} is not synthetic, so its seasons cannot be shifted')
    mappers = {}
    for name, options in TRAININGS.items():
        print(f'Training: {name}', flush=True)
        run = Run(CONF / 'inception.yaml', 0, output / 'runs' / name, options)
        run.start(root, args.epochs)
        mappers[name] = Mapper(run.folder / 'checkpoints' / 'best.ckpt')
    results = [measure(condition, root, mappers) for condition in conditions()]
    about = {'data': 'synthetic', 'epochs': args.epochs, 'dropout': DROPOUT, **provenance()}
    content = json.dumps({'about': about, 'conditions': results}, indent=1)
    (output / 'results.json').write_text(content)
    (output / 'table.md').write_text(table(results, about))
    print(table(results, about))
    save_figure(plot(results), output / 'robustness.png')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m benchmarks.robustness')
    parser.add_argument('--root', type=Path, default=Path('data/robustness'), help='data set')
    parser.add_argument('--output', type=Path, default=Path('outputs/robustness'))
    parser.add_argument('--epochs', type=int, default=14)
    return parser


if __name__ == '__main__':
    main()
