"""Trains and tests contestants on the same data and tabulates what they achieve.

Each contestant gets the learning rate, out of the same few, with which it is best on validation.

    python -m benchmarks.accuracy --root data/benchmark --output outputs/accuracy
    python -m benchmarks.accuracy --data pastis --root data/pastis --output outputs/pastis
    python -m benchmarks.accuracy --robustness --root data/robustness --output outputs/robustness

With --data pastis the contestants are those of conf/pastis, on PASTIS-R or data in its layout.

A finished run is not repeated, an interrupted one goes on from its last checkpoint. One that was
made by other configurations, code or data than there are now is refused, or repeated with --again.

With --robustness, ConvLSTM+Inception and U-TAE are trained twice on synthetic data, without and
with dropout of dates and sensors, and all checkpoints map the test tile under changed conditions.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

import torchgeo_s1s2
from benchmarks import contestants, pastis, robustness
from benchmarks import run as training
from benchmarks.common import Row, count, existing, provenance, report, table
from benchmarks.run import FIT, PREDICTIONS
from benchmarks.scores import Numbers, confusions, interval, resampled, scores
from torchgeo_s1s2.datasets.catalog import FOLDERS, LABELS
from torchgeo_s1s2.datasets.classes import ClassScheme, class_scheme
from torchgeo_s1s2.datasets.pastis import METADATA, PASTIS_CLASSES
from torchgeo_s1s2.datasets.plot import draw_classes
from torchgeo_s1s2.datasets.synthetic import MARKER, write_synthetic
from torchgeo_s1s2.files import whole, write_json

CONF = Path(__file__).parent / 'conf'
BASE = CONF / 'base.yaml'
SETTINGS: dict[str, dict[str, Any]] = {
    'old': {},
    'small': {'context': True, 'patches': {'31UFQ': 24, '32ULU': 24, '31UFP': 24, '31UEQ': 200}},
    'large': {'context': True, 'patches': {'31UFQ': 96, '32ULU': 96, '31UFP': 32, '31UEQ': 200}},
    'wide': {
        'context': True,
        'size': 128,
        'patches': {'31UFQ': 12, '32ULU': 12, '31UFP': 12, '31UEQ': 100},
    },
}
"""Synthetic data: pixels that need their surroundings, and enough patches to test on."""
RATES = (3e-4, 1e-3, 3e-3)
_PLACES = {
    'multisenge': ('benchmark', 'accuracy'),
    'pastis': ('pastis', 'pastis'),
    'robustness': ('robustness', 'robustness'),
}
"""Folders of data and results, unless others are given."""
_LEGEND: dict[str, Any] = {'loc': 'outside lower center', 'ncols': 2, 'fontsize': 7}
_COLORS = [*map(tuple, plt.colormaps['tab20'](range(20)))]
TARGET_F1 = 0.7
"""Validation F1 to which the training time is measured."""


@dataclass(frozen=True)
class Run:
    """A contestant with a seed: configuration and options over ``base.yaml``, and its folder.

    With PASTIS ``more`` is laid over ``base.yaml`` first.
    """

    config: Path
    seed: int
    folder: Path
    options: tuple[str, ...] = ()
    rate: float | None = None
    more: tuple[Path, ...] = ()

    @property
    def title(self) -> str:
        """First line of the configuration, a comment."""
        return self.config.read_text().splitlines()[0].removeprefix('# ')

    def start(self, root: Path, epochs: int, again: bool = False) -> None:
        """Run it, or what is left of it, in a process of its own.

        A run that was made by something else is deleted and made again if that is wanted.

        Raises:
            ValueError: If the folder holds a run that was made by something else.
            RuntimeError: If the process fails.
        """
        # A later option wins, so that a contestant may limit its epochs and no more.
        options = [f'--config={path}' for path in (BASE, *self.more)]
        options += [f'--trainer.max_epochs={epochs}', f'--config={self.config}']
        options += [f'--seed_everything={self.seed}', *self._options]
        self._claim(self.made_of(root, epochs), again)
        if (self.folder / PREDICTIONS).exists():
            return
        command = [sys.executable, '-m', 'benchmarks.run', str(self.folder), *options]
        command.append(f'--data.init_args.root={root}')
        log = self.folder / 'run.log'
        with log.open('ab') as output:
            code = subprocess.run(command, cwd=CONF.parents[1], stdout=output, stderr=output)
        if code.returncode:
            raise RuntimeError(f'{self.config.name} with seed {self.seed} failed; see {log}')

    @property
    def _options(self) -> tuple[str, ...]:
        rate = () if self.rate is None else (f'--model.init_args.lr={self.rate:g}',)
        return *rate, *self.options

    def made_of(self, root: Path, epochs: int) -> dict[str, str]:
        """What the result follows from; configurations, code and data by their digests."""
        package = Path(torchgeo_s1s2.__file__).parent
        code = [*package.rglob('*.py'), Path(contestants.__file__), Path(training.__file__)]
        return {
            'base configuration': _digest([BASE, *self.more]),
            'configuration': _digest([self.config]),
            'options': ' '.join([f'{epochs} epochs, seed {self.seed}', *self._options]),
            'code': _digest(code),
            'data': data_digest(root),
        }

    def _claim(self, made_of: Mapping[str, str], again: bool) -> None:
        path = self.folder / 'settings.json'
        before = json.loads(path.read_text()).get('made_of', {}) if path.exists() else made_of
        changed = [name for name, value in made_of.items() if before.get(name) != value]
        if changed and not again:
            raise ValueError(
                f'{self.folder} holds a run that was made by other settings than there are now '
                f'({", ".join(changed)}); repeat it with --again, or choose another output'
            )
        if changed:
            shutil.rmtree(self.folder)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {'made_of': made_of, 'made': provenance()}, indent=1)

    def settings(self) -> dict[str, dict[str, str]]:
        """What the run was ``made_of``, and when and where it was ``made``."""
        content: dict[str, dict[str, str]] = json.loads((self.folder / 'settings.json').read_text())
        return content

    def predictions(self) -> dict[str, NDArray[Any]]:
        """``prediction`` and ``mask`` (N, H, W) of the test split, and number of ``classes``."""
        with np.load(self.folder / PREDICTIONS) as content:
            return dict(content)

    def fit(self) -> Row:
        """What was measured in training."""
        content: Row = json.loads((self.folder / FIT).read_text())
        return content

    @property
    def validated(self) -> float:
        """Best weighted F1 of the validation."""
        return max(epoch['f1'] for epoch in self.fit()['history'])

    def confusions(self) -> NDArray[np.int64]:
        """Confusion matrix of each test patch, (N, K, K)."""
        found = self.predictions()
        return confusions(found['prediction'], found['mask'], int(found['classes']))

    def result(self, scheme: ClassScheme, matrices: NDArray[np.int64]) -> Row:
        """Scores of the confusion matrices of the test patches, and costs of the training."""
        fit = self.fit()
        found = scores(matrices.sum(0))
        class_f1 = found.pop('class_f1').tolist()
        return {
            'contestant': self.config.stem,
            'title': self.title,
            'seed': self.seed,
            'rate': self.rate,
            'validated_f1': self.validated,
            **{name: float(value) for name, value in found.items()},
            'class_f1': dict(zip(scheme.names, class_f1, strict=True)),
            'seconds': fit['seconds'],
            'samples_per_second': fit['samples'] / fit['seconds'],
            'peak_memory_mb': fit['memory'] / (2**20 if sys.platform == 'darwin' else 2**10),
            'parameters': fit['parameters'],
            'gflop': fit['flop'] / 1e9,
            'seconds_to_target': seconds_to(fit['history'], TARGET_F1),
            'history': fit['history'],
            **self.settings(),
        }


def _digest(paths: Iterable[Path], content: Callable[[Path], bytes] = Path.read_bytes) -> str:
    """Of the names and contents of files."""
    digest = sha256()
    for path in sorted(paths):
        digest.update(repr((path.name, content(path))).encode())
    return digest.hexdigest()[:16]


def data_digest(root: Path) -> str:
    """Of the names, sizes and times of change of label files and rasters, or of arrays."""

    def stamp(path: Path) -> bytes:
        status = path.stat()
        return f'{status.st_size} {status.st_mtime_ns}'.encode()

    folders = [root / folder for folder in (LABELS, *FOLDERS)]
    files = [p for f in folders for p in f.rglob('*') if p.is_file()]
    return _digest([*files, *root.rglob('*.npy'), *root.rglob(METADATA)], stamp)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and write tables and figures."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.robustness and args.data == 'pastis':
        parser.error('--robustness is measured on synthetic data, not on those of PASTIS')
    if args.setting and (args.robustness or args.data == 'pastis'):
        parser.error('--setting is that of a comparison on synthetic data in the usual layout')
    names = [config.stem for config in args.configs or ()]
    if len({*names}) < len(names):
        parser.error(f'--configs has {", ".join(names)}; each name has one folder of results')
    kind = 'robustness' if args.robustness else args.data
    root, output = _PLACES[kind]
    args.root = (args.root or Path('data', root)).resolve()
    args.output = (args.output or Path('outputs', output)).resolve()
    (compare_conditions if args.robustness else compare_contestants)(args)


def compare_contestants(args: argparse.Namespace) -> None:
    """Train and test every contestant."""
    on_pastis = args.data == 'pastis'
    small = SETTINGS['small']
    data = prepare_pastis(args.root) if on_pastis else prepare(args.root, args.setting, **small)
    folder = CONF / 'pastis' if on_pastis else CONF
    configs = args.configs or sorted(p for p in folder.glob('*.yaml') if p.name != BASE.name)
    more = (folder / BASE.name,) if on_pastis else ()
    runs = [run for config in configs for run in _trained(config.resolve(), args, more)]
    about = {'data': data, 'epochs': args.epochs, 'learning rates tried': str(args.rates)}
    write_comparison(runs, args.output, about)


def _trained(config: Path, args: argparse.Namespace, more: tuple[Path, ...]) -> list[Run]:
    """Runs of a contestant: every learning rate with one seed, the best with the others."""

    def run(seed: int, rate: float) -> Run:
        folder = args.output / 'runs' / config.stem / f'lr_{rate:g}' / f'seed_{seed}'
        made = Run(config, seed, folder, rate=rate, more=more)
        print(f'{made.title}, learning rate {rate:g}, seed {seed}', flush=True)
        made.start(args.root, args.epochs, args.again)
        return made

    trials = {rate: run(0, rate) for rate in args.rates}
    best = max(trials, key=lambda rate: trials[rate].validated)
    return [trials[best], *(run(seed, best) for seed in range(1, args.seeds))]


def write_comparison(runs: Sequence[Run], output: Path, about: Mapping[str, Any]) -> None:
    """Write tables, raw results and figures of runs with the same test patches.

    That is ``table.md``, ``results.json``, ``results.csv``, ``maps.png``, ``curves.png`` and
    ``cost.png``.
    """
    expected = runs[0].predictions()
    classes = int(expected['classes'])
    scheme = PASTIS_CLASSES if classes == len(PASTIS_CLASSES) else class_scheme(classes)
    for run in runs:
        if not np.array_equal(run.predictions()['mask'], expected['mask']):
            raise ValueError(
                f'{run.folder} was tested on other patches than {runs[0].folder}; give all '
                'contestants the same data, split and series'
            )
    results, matrices = list[Row](), dict[str, list[NDArray[np.int64]]]()
    for run in runs:
        own = run.confusions()
        results.append(run.result(scheme, own))
        matrices.setdefault(run.title, []).append(own)
    text = tables(results, scheme, resampled(matrices))
    title = f'{about["data"]}: accuracy on the test split'
    report(output, title, {**about, **made(runs)}, results, text)
    flat = pd.DataFrame(results).drop(columns=['class_f1', 'history', 'made', 'made_of'])
    made_at = pd.DataFrame([r['made'] for r in results])[['date', 'hardware', 'commit']]
    with whole(output / 'results.csv') as path:
        flat.join(made_at).to_csv(path, index=False, float_format='%.5g')
    figures = {
        'maps': _maps([run for run in runs if run.seed == 0], scheme, about['data']),
        'curves': _curves(results),
        'cost': _costs(results),
    }
    for name, figure in figures.items():
        with whole(output / f'{name}.png') as path:
            figure.savefig(path)
        plt.close(figure)


def made(runs: Iterable[Run]) -> dict[str, str]:
    """When, where and of what runs were made, each value that occurs."""
    shared = 'base configuration', 'code', 'data'
    settings = [run.settings() for run in runs]
    found = [s['made'] | {f'{key} (digest)': s['made_of'][key] for key in shared} for s in settings]
    return {key: ', '.join(sorted({f[key] for f in found})) for key in found[0]}


def seconds_to(history: Sequence[dict[str, float]], target: float) -> float | None:
    """Training time to the first epoch whose validation F1 reaches a target, None if none does."""
    return next((epoch['seconds'] for epoch in history if epoch['f1'] >= target), None)


def tables(results: Sequence[Row], scheme: ClassScheme, draws: Mapping[str, Numbers]) -> str:
    """Markdown with mean and standard deviation over the seeds, and intervals over patches."""
    columns = {
        'F1': ('f1', 3),
        'macro F1': ('macro_f1', 3),
        'mean IoU': ('miou', 3),
        'kappa': ('kappa', 3),
        'training (s)': ('seconds', 0),
        f's to F1 {TARGET_F1}': ('seconds_to_target', 0),
        'samples/s': ('samples_per_second', 1),
        'peak memory (MB)': ('peak_memory_mb', 0),
        'GFLOP': ('gflop', 2),
        'parameters': ('parameters', 0),
        'learning rate': ('rate', 4),
    }
    flat = [{**r, **r['class_f1']} for r in results]
    classes = _over_seeds(flat, {name: (name, 2) for name in scheme.names})
    return (
        'F1 is weighted by the pixels of each class. GFLOP are those of mapping one patch.\n\n'
        f'{table(_over_seeds(results, columns))}\n\n'
        '## Intervals\n\n95 % of draws of test patches with replacement, the mean over seeds; '
        'differences are paired: both on the same patches.\n\n'
        f'{table(_intervals([row["contestant"] for row in _over_seeds(results, {})], draws))}\n\n'
        f'## F1 of each class\n\n{table(classes)}'
    )


def _intervals(titles: Sequence[str], draws: Mapping[str, Numbers]) -> list[Row]:
    """F1 of each contestant and how far the best is ahead; above 0 the difference holds."""
    best, rows = draws[titles[0]], []
    for title in titles:
        spans = interval(draws[title]), interval(best - draws[title])
        f1, ahead = ('{:.3f} to {:.3f}'.format(*span) for span in spans)
        rows.append({'contestant': title, 'F1': f1, 'the best is ahead by': ahead})
    return rows


def _over_seeds(results: Sequence[Row], columns: dict[str, tuple[str, int]]) -> list[Row]:
    """A row a contestant, the best first."""
    frame = pd.DataFrame(results)
    groups = frame.groupby('title', sort=False)
    rows = []
    for title in groups['f1'].mean().sort_values(ascending=False).index:
        group = groups.get_group(title)
        means = {name: _mean(group[key], digits) for name, (key, digits) in columns.items()}
        rows.append({'contestant': str(title), **means})
    return rows


def _mean(values: 'pd.Series[float]', digits: int) -> str:
    """Mean and standard deviation, a dash where a seed has no value."""
    numbers = values.astype(float)
    if numbers.isna().any():
        return '-'
    spread = f' ± {numbers.std():,.{digits}f}' if numbers.nunique() > 1 else ''
    return f'{numbers.mean():,.{digits}f}{spread}'


def _maps(runs: Sequence[Run], scheme: ClassScheme, data: str, patches: int = 4) -> Figure:
    """Truth and the map of each contestant, one column a patch."""
    truth = runs[0].predictions()['mask']
    rows = {'Truth': truth, **{run.title: run.predictions()['prediction'] for run in runs}}
    chosen = np.linspace(0, len(truth) - 1, min(patches, len(truth))).astype(int)
    size = 2 * len(chosen) + 2, 2 * len(rows) + 1
    figure, axes = plt.subplots(
        len(rows), len(chosen), figsize=size, squeeze=False, layout='constrained'
    )
    for (title, maps), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(title, rotation=0, ha='right', va='center', wrap=True, fontsize=8)
        for ax, patch in zip(line, chosen, strict=True):
            draw_classes(ax, maps[patch], scheme, '')
            ax.set(xticks=[], yticks=[])
    handles = [Patch(color=scheme.cmap(i), label=name) for i, name in enumerate(scheme.names)]
    figure.legend(handles=handles, **_LEGEND)
    figure.suptitle(f'{data}: maps of the test tile')
    return figure


def _curves(results: Sequence[Row]) -> Figure:
    """F1 of the validation over the epochs, the mean over the seeds."""
    figure, ax = plt.subplots(figsize=(9, 6.5), layout='constrained')
    ax.set_prop_cycle(color=_COLORS)
    for title, group in pd.DataFrame(results).groupby('title', sort=False):
        f1 = pd.DataFrame([[epoch['f1'] for epoch in h] for h in group['history']]).mean()
        ax.plot(f1.index + 1, f1, '.-' if len(f1) == 1 else '-', label=str(title))
    ax.set(xlabel='epoch', ylabel='weighted F1 of the validation')
    figure.legend(**_LEGEND)
    return figure


def _costs(results: Sequence[Row]) -> Figure:
    """F1 over the operations of a patch and over the time of the training."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 6.5), sharey=True, layout='constrained')
    titles = {'gflop': 'GFLOP to map a patch', 'seconds': 'training (s)'}
    for ax, (key, label) in zip(axes, titles.items(), strict=True):
        ax.set_prop_cycle(color=_COLORS)
        for title, group in pd.DataFrame(results).groupby('title', sort=False):
            # Trees have no operations; a point that is none keeps the colours of the others.
            x = group[key].mean() or float('nan')
            ax.plot(x, group['f1'].mean(), 'o', label=str(title))
        ax.set(xscale='log', xlabel=label)
    axes[0].set_ylabel('weighted F1 of the test')
    figure.legend(*axes[1].get_legend_handles_labels(), **_LEGEND)
    return figure


def prepare(root: Path, setting: str | None, **options: Any) -> str:
    """Write the synthetic data of a *setting*, or of *options* where no data are; their name.

    Raises:
        ValueError: If there are other data than those of a *setting*.
    """
    if setting:
        write_synthetic(root, **SETTINGS[setting])
    elif (root / MARKER).exists():
        write_synthetic(root, **json.loads((root / MARKER).read_text()))
    elif not (root / LABELS).is_dir():
        write_synthetic(root, **options)
    return 'Synthetic data' if (root / MARKER).exists() else str(root)


def prepare_pastis(root: Path) -> str:
    """Write synthetic data in the layout of PASTIS-R where there are none; what to call them."""
    if not [*root.glob(METADATA), *root.glob(f'*/{METADATA}')]:
        if not (root / pastis.MARKER).exists() and any(root.rglob('*')):
            raise ValueError(f'{root} has no {METADATA}, and holds other files; give another root')
        pastis.write(root)
    return 'Synthetic PASTIS' if (root / pastis.MARKER).exists() else str(root)


def compare_conditions(args: argparse.Namespace) -> None:
    """Train without and with dropout, and map under every condition."""
    data = prepare(args.root, None, incomplete=0)
    if not (args.root / MARKER).exists():
        raise ValueError(f'{args.root} is not synthetic, so its seasons cannot be shifted')
    configs = args.configs or [CONF / f'{name}.yaml' for name in ('inception', 'utae')]
    runs = {
        name: Run(config.resolve(), 0, args.output / 'runs' / name, options)
        for config in configs
        for training, options in robustness.TRAININGS.items()
        for name in [f'{config.stem} {training}']
    }
    for name, run in runs.items():
        print(f'Training: {name}', flush=True)
        run.start(args.root, args.epochs, args.again)
    mappers = {
        name: robustness.Mapper(run.folder / 'checkpoints' / 'best.ckpt')
        for name, run in runs.items()
    }
    rows = [_row(condition, args.root, mappers) for condition in robustness.conditions()]
    about = {'epochs': args.epochs, 'dropout': robustness.DROPOUT, **made(runs.values())}
    title = f'{data}: robustness on the test tile'
    report(args.output, title, about, rows)


def _row(
    condition: robustness.Condition, root: Path, mappers: Mapping[str, robustness.Mapper]
) -> Row:
    """Weighted F1 and kappa of each checkpoint under a condition."""
    batch = condition.batch(root)
    mask, classes = batch['mask'].numpy(), len(class_scheme(robustness.CLASSES))
    found = {
        name: scores(confusions(mapper(batch).numpy(), mask, classes).sum(0))
        for name, mapper in mappers.items()
    }
    titles = {'F1': 'f1', 'kappa': 'kappa'}
    columns = {
        f'{t}, {name}': float(found[name][key]) for t, key in titles.items() for name in found
    }
    return {'what': condition.what, 'condition': condition.label, **columns}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m benchmarks.accuracy')
    parser.add_argument('--data', choices=['multisenge', 'pastis'], default='multisenge')
    parser.add_argument(
        '--root', type=Path, help='data set; data/benchmark or as above unless given'
    )
    parser.add_argument(
        '--setting', choices=SETTINGS, help='of synthetic data; small in a new root'
    )
    parser.add_argument('--output', type=Path, help='folder of results; as above unless given')
    parser.add_argument('--seeds', type=count, default=3, help='number of seeds')
    parser.add_argument('--rates', type=float, nargs='+', default=RATES, help='learning rates')
    parser.add_argument('--epochs', type=count, default=14)
    parser.add_argument('--configs', type=existing, nargs='+', help='all of their folder otherwise')
    parser.add_argument('--again', action='store_true', help='repeat what was made otherwise')
    parser.add_argument('--robustness', action='store_true', help='changed conditions instead')
    return parser


if __name__ == '__main__':
    main()
