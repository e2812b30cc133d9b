"""Trains and tests contestants on the same data and tabulates what they achieve.

    python -m benchmarks.accuracy --root data/benchmark --output outputs/accuracy

A finished run is not repeated, an interrupted one goes on from its last checkpoint.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassCohenKappa,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from benchmarks.recorder import FIT, PREDICTIONS
from torchgeo_s1s2.callbacks.report import confusion_figure, save_figure
from torchgeo_s1s2.datasets.catalog import LABELS
from torchgeo_s1s2.datasets.classes import NO_LABEL, ClassScheme, class_scheme
from torchgeo_s1s2.datasets.synthetic import MARKER, write_synthetic

CONF = Path(__file__).parent / 'conf'
BASE = CONF / 'base.yaml'
TARGET_F1 = 0.7
"""Validation F1 to which the training time is measured."""


@dataclass(frozen=True)
class Run:
    """One contestant with one seed.

    Attributes:
        config: Its configuration, laid over ``base.yaml``.
        seed: Seed of weights, order and augmentation.
        folder: Where everything of the run is kept.
        options: Options of ``torchgeo fit`` that are laid over its configuration.
    """

    config: Path
    seed: int
    folder: Path
    options: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """First line of the configuration, a comment."""
        return self.config.read_text().splitlines()[0].removeprefix('# ')

    def start(self, root: Path, epochs: int) -> None:
        """Run it, or what is left of it, in a process of its own.

        Raises:
            ValueError: If the folder holds a run with other settings.
            RuntimeError: If the process fails.
        """
        # A later option wins, so that a contestant may limit its epochs and no more.
        options = [f'--config={BASE}', f'--trainer.max_epochs={epochs}', f'--config={self.config}']
        options += [
            f'--seed_everything={self.seed}',
            f'--data.init_args.root={root}',
            *self.options,
        ]
        self._claim({'options': options, 'config': self.config.read_text()})
        if (self.folder / PREDICTIONS).exists():
            return
        command = [sys.executable, '-m', 'benchmarks.run', str(self.folder), *options]
        log = self.folder / 'run.log'
        with log.open('ab') as output:
            code = subprocess.run(command, cwd=CONF.parents[1], stdout=output, stderr=output)
        if code.returncode:
            raise RuntimeError(f'{self.config.name} with seed {self.seed} failed; see {log}')

    def _claim(self, settings: dict[str, Any]) -> None:
        path = self.folder / 'settings.json'
        if path.exists() and json.loads(path.read_text()) != settings:
            raise ValueError(
                f'{self.folder} holds a run with other settings; delete it or choose another output'
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1))

    def predictions(self) -> dict[str, NDArray[np.uint8]]:
        """``prediction`` and ``mask`` (N, H, W) of the test split."""
        with np.load(self.folder / PREDICTIONS) as content:
            return {name: content[name] for name in ('prediction', 'mask')}

    def result(self, scheme: ClassScheme) -> dict[str, Any]:
        """Scores of the test split and costs of the training."""
        fit = json.loads((self.folder / FIT).read_text())
        return {
            'contestant': self.config.stem,
            'title': self.title,
            'seed': self.seed,
            **scores(**self.predictions(), scheme=scheme),
            'seconds': fit['seconds'],
            'samples_per_second': fit['samples'] / fit['seconds'],
            'peak_memory_mb': fit['memory'] / (2**20 if sys.platform == 'darwin' else 2**10),
            'parameters': fit['parameters'],
            'seconds_to_target': seconds_to(fit['history'], TARGET_F1),
            'history': fit['history'],
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and write tables and figures."""
    args = _parser().parse_args(arguments)
    root, output = args.root.resolve(), args.output.resolve()
    data = prepare(root)
    configs = args.configs or sorted(p for p in CONF.glob('*.yaml') if p != BASE)
    runs = [
        Run(c.resolve(), s, output / 'runs' / c.stem / f'seed_{s}')
        for s in range(args.seeds)
        for c in configs
    ]
    for number, run in enumerate(runs, 1):
        print(f'{number}/{len(runs)} {run.title}, seed {run.seed}', flush=True)
        run.start(root, args.epochs)
    report(runs, output, data, args.epochs)


def report(runs: Sequence[Run], output: Path, data: str, epochs: int) -> None:
    """Write ``results.json``, ``table.md``, ``maps.png`` and a confusion matrix a contestant.

    Raises:
        ValueError: If the runs were not tested on the same patches.
    """
    with np.load(runs[0].folder / PREDICTIONS) as content:
        scheme = class_scheme(int(content['classes']))
    _check_same_test(runs)
    results = [run.result(scheme) for run in runs]
    about = {'data': data, 'epochs': epochs, **provenance()}
    content = json.dumps({'about': about, 'runs': results}, indent=1)
    (output / 'results.json').write_text(content)
    (output / 'table.md').write_text(table(results, about, scheme))
    print(table(results, about, scheme))
    first = [run for run in runs if run.seed == 0]
    save_figure(_maps(first, scheme, data), output / 'maps.png')
    for run in first:
        same = [r for r in runs if r.config == run.config]
        figure = _confusion(same, scheme, f'{data}: {run.title}')
        save_figure(figure, output / f'confusion_{run.config.stem}.png')


def scores(
    prediction: NDArray[np.uint8], mask: NDArray[np.uint8], scheme: ClassScheme
) -> dict[str, Any]:
    """Scores of predictions over the labelled pixels.

    Args:
        prediction: Class of each pixel.
        mask: True class, 255 where there is none; of the same shape.
        scheme: Class scheme.
    """
    options: Any = {'num_classes': len(scheme), 'ignore_index': NO_LABEL}
    metrics = MetricCollection(
        {
            'precision': MulticlassPrecision(average='weighted', **options),
            'recall': MulticlassRecall(average='weighted', **options),
            'f1': MulticlassF1Score(average='weighted', **options),
            'kappa': MulticlassCohenKappa(**options),
            'class_f1': MulticlassF1Score(average='none', **options),
        }
    )
    values = metrics(*(torch.from_numpy(a.astype(np.int64)) for a in (prediction, mask)))
    scalars = {name: value.tolist() for name, value in values.items()}
    return {**scalars, 'class_f1': dict(zip(scheme.names, scalars['class_f1'], strict=True))}


def seconds_to(history: Sequence[dict[str, float]], target: float) -> float | None:
    """Training time to the first epoch whose validation F1 reaches a target, None if none does."""
    return next((epoch['seconds'] for epoch in history if epoch['f1'] >= target), None)


def table(results: Sequence[dict[str, Any]], about: dict[str, Any], scheme: ClassScheme) -> str:
    """Markdown with mean and standard deviation over the seeds."""
    columns = {
        'F1': ('f1', 3),
        'precision': ('precision', 3),
        'recall': ('recall', 3),
        'kappa': ('kappa', 3),
        'training (s)': ('seconds', 0),
        f's to F1 {TARGET_F1}': ('seconds_to_target', 0),
        'samples/s': ('samples_per_second', 1),
        'peak memory (MB)': ('peak_memory_mb', 0),
        'parameters': ('parameters', 0),
    }
    whole = _contestants(results, columns)
    flat = [{**r, **r['class_f1']} for r in results]
    classes = _contestants(flat, {name: (name, 2) for name in scheme.names})
    return (
        f'# {about["data"]}: accuracy on the test tile\n\n{listed(about)}\n\n'
        'Precision, recall and F1 are weighted by the pixels of each class.\n\n'
        f'{whole}\n\n## F1 of each class\n\n{classes}\n'
    )


def markdown(rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> str:
    """Markdown of a table; its first row is the head, all columns but *texts* hold numbers."""
    head, *body = rows
    rule = ['---' if i in texts else '--:' for i in range(len(head))]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (head, rule, *body))


def _contestants(results: Sequence[dict[str, Any]], columns: dict[str, tuple[str, int]]) -> str:
    frame = pd.DataFrame(results)
    rows = [['contestant', *columns]]
    groups = frame.groupby('title', sort=False)
    for title in groups['f1'].mean().sort_values(ascending=False).index:
        group = groups.get_group(title)
        cells = [_cell(group[key], digits) for key, digits in columns.values()]
        rows.append([str(title), *cells])
    return markdown(rows)


def _cell(values: 'pd.Series[float]', digits: int) -> str:
    """Mean and standard deviation, a dash where a seed has no value."""
    numbers = values.astype(float)
    if numbers.isna().any():
        return '-'
    spread = f' ± {numbers.std():,.{digits}f}' if numbers.nunique() > 1 else ''
    return f'{numbers.mean():,.{digits}f}{spread}'


def _check_same_test(runs: Sequence[Run]) -> None:
    expected = runs[0].predictions()['mask']
    for run in runs:
        if not np.array_equal(run.predictions()['mask'], expected):
            raise ValueError(
                f'{run.folder} was tested on other patches than {runs[0].folder}; give all '
                'contestants the same data, split and series'
            )


def _maps(runs: Sequence[Run], scheme: ClassScheme, data: str, patches: int = 4) -> plt.Figure:
    """Truth and the map of each contestant, one column a patch."""
    truth = runs[0].predictions()['mask']
    rows = {'Truth': truth, **{run.title: run.predictions()['prediction'] for run in runs}}
    chosen = np.linspace(0, len(truth) - 1, min(patches, len(truth))).astype(int)
    figure, axes = plt.subplots(
        len(rows),
        len(chosen),
        figsize=(2 * len(chosen) + 2, 2 * len(rows) + 1),
        squeeze=False,
        layout='constrained',
    )
    for (title, maps), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(title, rotation=0, ha='right', va='center', wrap=True, fontsize=8)
        for ax, patch in zip(line, chosen, strict=True):
            shown = np.ma.masked_equal(maps[patch], NO_LABEL)
            ax.imshow(shown, scheme.cmap, vmin=-0.5, vmax=len(scheme) - 0.5, interpolation='none')
            ax.set(xticks=[], yticks=[])
    handles = [Patch(color=scheme.cmap(i), label=name) for i, name in enumerate(scheme.names)]
    figure.legend(handles=handles, loc='outside lower center', ncols=2, fontsize=7)
    figure.suptitle(f'{data}: maps of the test tile')
    return figure


def _confusion(runs: Sequence[Run], scheme: ClassScheme, title: str) -> plt.Figure:
    metric = MulticlassConfusionMatrix(len(scheme), ignore_index=NO_LABEL)
    for run in runs:
        pair = run.predictions()
        metric.update(*(torch.from_numpy(pair[k].astype(np.int64)) for k in ('prediction', 'mask')))
    figure = confusion_figure(metric.compute(), scheme.names)
    figure.suptitle(title)
    return figure


def prepare(root: Path, **options: Any) -> str:
    """Write the synthetic data set, or what is missing of it, where no real one is.

    Args:
        root: Folder of the data set.
        **options: Arguments of ``write_synthetic`` where there is none yet.

    Returns:
        What to call the data: synthetic, or their folder.
    """
    if (root / MARKER).exists():
        write_synthetic(root, **json.loads((root / MARKER).read_text()))
    elif not (root / LABELS).is_dir():
        write_synthetic(root, **options)
    return 'Synthetic data' if (root / MARKER).exists() else str(root)


def listed(about: Mapping[str, Any]) -> str:
    """Markdown list of facts."""
    return '\n'.join(f'- {name}: {value}' for name, value in about.items())


def provenance() -> dict[str, str]:
    """Date, hardware, commit and version of PyTorch of a measurement."""
    git = ['git', 'rev-parse', '--short', 'HEAD']
    commit = subprocess.run(git, cwd=CONF, capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(['git', 'status', '--porcelain'], cwd=CONF, capture_output=True).stdout
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    threads = torch.get_num_threads()
    return {
        'date': date.today().isoformat(),
        'hardware': f'{device}, {threads} of {os.cpu_count()} cores, {platform.system()}',
        'commit': (commit or 'unknown') + ' and changes' * bool(dirty),
        'torch': torch.__version__,
    }


def _processor() -> str:
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor() or platform.machine())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m benchmarks.accuracy')
    parser.add_argument('--root', type=Path, default=Path('data/benchmark'), help='data set')
    parser.add_argument('--output', type=Path, default=Path('outputs/accuracy'))
    parser.add_argument('--seeds', type=int, default=3, help='number of seeds')
    parser.add_argument('--epochs', type=int, default=14)
    parser.add_argument(
        '--configs', type=Path, nargs='+', help='configurations; all of benchmarks/conf otherwise'
    )
    return parser


if __name__ == '__main__':
    main()
