"""Time, memory and operations of models of series, beside what the processor can do.

    python -m benchmarks.model --output outputs/model

Every model runs in a process of its own; in a round each does one forward pass, or one training
step, after the other. Reported are medians over the rounds of processor time, divided by the number
of threads. The memory of a process is read from /proc, so this runs on Linux.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import batched, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from torch import Tensor, nn
from torchgeo.tasks import SpatioTemporalSegmentation

from benchmarks.accuracy import listed, markdown, provenance
from benchmarks.contestants import PixelLTAE
from benchmarks.plain import PlainFuseLSTM
from benchmarks.throughput import Convolution, count_flops, in_bfloat16, process_memory
from torchgeo_s1s2.callbacks.report import save_figure
from torchgeo_s1s2.models import register_encoders

register_encoders()
CHANNELS, CLASSES = 12, 10
PANELS = {
    'forward': 'forward (s)',
    'step': 'training step (s)',
    'step_peak': 'training (MiB)',
}
Cell = tuple[int, int]
Result = dict[str, Any]


class PlainSeries(nn.Module):
    """The plain model, fed with the image of both sensors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = PlainFuseLSTM(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Read (B, T, C, H, W), return logits (B, K, H, W)."""
        s2, s1 = x.movedim(2, -1).split([10, 2], dim=-1)
        logits: Tensor = self.model(s2, s1)
        return logits


class Stacked(nn.Module):
    """smp's U-Net with a ResNet-50 on the dates as channels of one image."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.model = smp.Unet(
            'resnet50', encoder_weights=None, in_channels=slots * CHANNELS, classes=CLASSES
        )

    def forward(self, x: Tensor) -> Tensor:
        """Read (B, T, C, H, W), return logits (B, K, H, W)."""
        logits: Tensor = self.model(x.flatten(1, 2))
        return logits


class Product(nn.Module):
    """One large matrix product: the ceiling of anything that a processor computes."""

    def __init__(self, size: int = 1024) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Ignore the series."""
        return self.weight @ self.weight


def ours(slots: int) -> nn.Module:
    model: nn.Module = smp.Unet(
        'vgg16_convlstm_inception',
        encoder_weights=None,
        in_channels=slots * CHANNELS,
        classes=CLASSES,
    )
    return model


def compiled(slots: int) -> nn.Module:
    model = ours(slots)
    model.compile(fullgraph=True)
    return model


def torchgeo_convlstm(slots: int) -> nn.Module:
    task = SpatioTemporalSegmentation(
        model='convlstm', in_channels=CHANNELS, num_classes=CLASSES, loss='ce'
    )
    model: nn.Module = task.model
    return model


COMPILED = 'Ours, compiled'
MODELS: Mapping[str, Callable[[int], nn.Module]] = {
    'Plain implementation': lambda slots: PlainSeries(),
    'Ours': ours,
    COMPILED: compiled,
    'Ours, bf16': lambda slots: in_bfloat16(ours(slots)),
    "TorchGeo's ConvLSTM": torchgeo_convlstm,
    'U-Net (ResNet-50) on stacked dates': Stacked,
    'L-TAE at each pixel': lambda slots: PixelLTAE(CHANNELS, CLASSES, length=slots),
}
PROBES: Mapping[str, Callable[[int], nn.Module]] = {
    'Matrix product': lambda slots: Product(),
    'Convolution': lambda slots: Convolution(),
}
BUILDERS = {**MODELS, **PROBES}
PLAIN, PROBE = next(iter(MODELS)), 'Convolution'


class Job:
    """What a process does: build a model, then run it when asked."""

    def __init__(self, name: str, cell: Cell) -> None:
        before = process_memory('VmRSS')
        slots, size = cell
        torch.manual_seed(0)
        self.build = partial(BUILDERS[name], slots)
        self.model = self.build()
        self.image = torch.randn(1, slots, CHANNELS, size, size)
        self.mask = torch.randint(CLASSES, (1, size, size))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.before = before

    def about(self) -> Result:
        # The compiler would hide the operations from the counter.
        plain = ours(len(self.image[0])) if self.build.func is compiled else self.model
        plain.eval()
        with torch.no_grad():
            flops = count_flops(lambda: plain(self.image))
        return {'parameters': sum(p.numel() for p in self.model.parameters()), 'flops': flops}

    def warm_up(self, kind: str) -> float:
        """First run of a kind, compilation included; memory is watched from its end."""
        self.model.train(kind == 'step')
        seconds = self.run(kind)
        self.run(kind)
        with suppress(OSError):
            Path('/proc/self/clear_refs').write_text('5')  # the peak is the present size
        return seconds

    def run(self, kind: str) -> float:
        """Processor time of a run, divided by the threads; other work does not count."""
        begin = time.process_time()
        if kind == 'forward':
            with torch.no_grad():
                self.model(self.image)
        else:
            loss = F.cross_entropy(self.model(self.image), self.mask)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return (time.process_time() - begin) / torch.get_num_threads()

    def peak(self) -> float:
        """Largest memory since the warm-up in MiB, without that of an empty process."""
        return process_memory('VmHWM') - self.before


def serve(connection: Connection, name: str, cell: Cell, threads: int) -> None:
    """Body of a process: do what is asked until None."""
    torch.set_num_threads(threads)
    job = Job(name, cell)
    for method, *arguments in iter(connection.recv, None):
        connection.send(getattr(job, method)(*arguments))


class Worker:
    """A process with one model."""

    def __init__(self, name: str, cell: Cell) -> None:
        self.name = name
        self.connection, other = _CONTEXT.Pipe()
        arguments = (other, name, cell, torch.get_num_threads())
        self.process = _CONTEXT.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        other.close()

    def ask(self, *request: Any) -> Any:
        """Have the process do something.

        Raises:
            RuntimeError: If the process has ended.
        """
        try:
            self.connection.send(request)
            return self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise RuntimeError(
                f"the process of '{self.name}' ended with code {self.process.exitcode}; see above, "
                'or, where memory was short (-9), keep fewer models in it with --at-once'
            ) from error

    def close(self) -> None:
        """Let the process end."""
        with suppress(ConnectionError):
            self.connection.send(None)
        self.process.join()


# Processes that are forked from one with everything imported start at once and alike.
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(['benchmarks.accuracy', 'benchmarks.contestants'])


def measure(cell: Cell, names: Sequence[str], rounds: int, deadline: float) -> list[Result]:
    """Measure models and probes side by side.

    Args:
        cell: Number of slots T, and height and width in pixels.
        names: Models.
        rounds: Number of rounds.
        deadline: Time of ``time.monotonic`` after which no round begins, but for the first.

    Returns:
        One result a model and probe.
    """
    results: dict[str, Result] = {}
    workers = {name: Worker(name, cell) for name in (*names, *PROBES)}
    try:
        for name, worker in workers.items():
            results[name] = {
                'model': name,
                'slots': cell[0],
                'size': cell[1],
                **worker.ask('about'),
            }
        kinds = {'forward': list(workers), 'step': list(names)}
        for share, (kind, asked) in zip((0.4, 1), kinds.items(), strict=True):
            chosen = {name: workers[name] for name in asked}
            until = time.monotonic() + share * (deadline - time.monotonic())
            for name, found in _rounds(chosen, kind, rounds, until).items():
                results[name] |= found
    finally:
        for worker in workers.values():
            worker.close()
    return list(results.values())


def _rounds(
    workers: Mapping[str, Worker], kind: str, rounds: int, deadline: float
) -> dict[str, Result]:
    first = {name: worker.ask('warm_up', kind) for name, worker in workers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for done in range(rounds):
        if done and time.monotonic() > deadline:
            break
        for name, worker in workers.items():
            seconds[name].append(worker.ask('run', kind))
    return {
        name: {
            f'{kind}_first': first[name],
            f'{kind}_seconds': values,
            kind: statistics.median(values),
            f'{kind}_peak': workers[name].ask('peak'),
        }
        for name, values in seconds.items()
    }


def cells(slots: Sequence[int], sizes: Sequence[int], full: bool) -> list[Cell]:
    """All sizes at the first number of slots, all numbers of slots at the first size; or all."""
    return [(t, s) for t in slots for s in sizes if full or t == slots[0] or s == sizes[0]]


def jobs(grid: Sequence[Cell], options: argparse.Namespace) -> list[tuple[Cell, list[str]]]:
    """Cells with the models to measure side by side, the plain one in every job of a cell."""
    made = []
    for cell in grid:
        names = [n for n in options.models if n != COMPILED or cell[0] <= options.compile_slots]
        plain = [PLAIN] * (PLAIN in names)
        others = batched([n for n in names if n != PLAIN], options.at_once)
        made += [(cell, [*plain, *batch]) for batch in others] or [(cell, plain)]
    return made


def table(results: Sequence[Result]) -> str:
    """Markdown with one row a model and cell."""
    columns = ['T', 'pixels', 'model', 'parameters', 'GFLOP', 'forward (ms)', 'x plain']
    columns += ['training step (ms)', 'x plain', 'forward (MiB)', 'training (MiB)']
    columns += ['GFLOP/s', 'of a convolution']
    rows = [_row(result, results) for result in _once(results)]
    return markdown([columns, *rows], texts=(2,))


def _row(result: Result, results: Sequence[Result]) -> list[str]:
    rate, plain = _rate(result), _beside(PLAIN, result, results)
    ratios = [f'{plain[k] / result[k]:.2f}' if plain else '-' for k in ('forward', 'step')]
    probe = _beside(PROBE, result, results)
    return [
        str(result['slots']),
        str(result['size']),
        result['model'],
        f'{result["parameters"]:,}',
        f'{result["flops"] / 1e9:,.1f}',
        f'{1000 * result["forward"]:,.0f}',
        ratios[0],
        f'{1000 * result["step"]:,.0f}',
        ratios[1],
        f'{result["forward_peak"]:,.0f}',
        f'{result["step_peak"]:,.0f}',
        f'{rate:.0f}',
        f'{rate / _rate(probe):.0%}' if probe else '-',
    ]


def _once(results: Iterable[Result]) -> list[Result]:
    """Results of models, of each the first in a cell."""
    found: dict[tuple[Any, ...], Result] = {}
    for r in results:
        if r['model'] in MODELS:
            found.setdefault((r['slots'], r['size'], r['model']), r)
    return list(found.values())


def _beside(name: str, result: Result, results: Iterable[Result]) -> Result | None:
    """The result of another model in the same job."""
    key = name, result['job']
    return next((r for r in results if (r['model'], r['job']) == key), None)


def _rate(result: Result) -> float:
    """GFLOP/s of the forward pass."""
    return float(result['flops'] / 1e9 / result['forward'])


def facts(results: Sequence[Result]) -> dict[str, str]:
    """What the processor reaches, and how many rounds there were."""
    reached = {
        name: statistics.median(_rate(r) for r in results if r['model'] == name) for name in PROBES
    }
    rounds = [
        len(r[f'{kind}_seconds']) for r in results for kind in ('forward', 'step') if kind in r
    ]
    return {
        'one matrix product of 1,024 x 1,024': f'{reached["Matrix product"]:.0f} GFLOP/s',
        'one convolution, 128 to 128 channels, 3 x 3, 128 x 128 pixels': (
            f'{reached[PROBE]:.0f} GFLOP/s'
        ),
        'rounds': f'{min(rounds)} to {max(rounds)}',
    }


def plot(results: Sequence[Result], title: str) -> plt.Figure:
    """Time and memory over the number of slots, a column for each size."""
    results = _once(results)
    sizes, slots = (sorted({r[key] for r in results}) for key in ('size', 'slots'))
    figure, axes = plt.subplots(
        len(PANELS),
        len(sizes),
        figsize=(3 * len(sizes), 7.5),
        sharex=True,
        sharey='row',
        squeeze=False,
        layout='constrained',
    )
    for (row, (key, label)), (column, size) in product(enumerate(PANELS.items()), enumerate(sizes)):
        axis = axes[row, column]
        for model in MODELS:
            chosen = [r for r in results if (r['model'], r['size']) == (model, size)]
            if chosen:
                x, y = zip(*sorted((r['slots'], r[key]) for r in chosen), strict=True)
                axis.plot(x, y, marker='o', markersize=3, linewidth=1, label=model)
        axis.set(xscale='log', yscale='log')
        axis.set_xticks(slots, slots)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter('{x:,g}')
        axis.minorticks_off()
        axis.label_outer()
        axes[row, 0].set_ylabel(label)
        axes[0, column].set_title(f'{size} x {size} pixels', fontsize=9)
        axes[-1, column].set_xlabel('slots T')
    figure.suptitle(title, fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    return figure


def report(results: Sequence[Result], seconds: float, output: Path) -> None:
    """Write ``results.json``, ``table.md`` and ``model.png``."""
    about = provenance() | facts(results) | {'running time': f'{seconds / 60:.0f} minutes'}
    output.mkdir(parents=True, exist_ok=True)
    (output / 'results.json').write_text(json.dumps({'about': about, 'results': results}, indent=1))
    text = f'# Speed and memory of models\n\n{listed(about)}\n\n{table(results)}\n'
    (output / 'table.md').write_text(text)
    title = f'{about["date"]}, {about["hardware"]}, commit {about["commit"]}'
    save_figure(plot(results, title), output / 'model.png')


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    begin = time.monotonic()
    planned = jobs(cells(options.slots, options.sizes, options.full), options)
    results: list[Result] = []
    for job, (cell, names) in enumerate(planned, start=1):
        deadline = begin + 60 * options.minutes * job / len(planned)
        results += [{'job': job} | r for r in measure(cell, names, options.rounds, deadline)]
        print(f'T = {cell[0]}, {cell[1]} pixels: {time.monotonic() - begin:.0f} s', flush=True)
        report(results, time.monotonic() - begin, options.output)
    print((options.output / 'table.md').read_text())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m benchmarks.model')
    parser.add_argument('--output', type=Path, default=Path('outputs/model'))
    parser.add_argument('--slots', type=int, nargs='+', default=[4, 8, 16, 32])
    parser.add_argument('--sizes', type=int, nargs='+', default=[64, 128, 256], help='pixels')
    parser.add_argument(
        '--full',
        action='store_true',
        help='every number of slots at every size, not only at the first',
    )
    parser.add_argument('--models', nargs='+', default=list(MODELS), choices=MODELS)
    parser.add_argument(
        '--at-once',
        type=int,
        default=len(MODELS),
        help='models in memory beside the plain one, which is measured with each group of them',
    )
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument(
        '--minutes', type=float, default=15, help='no round but the first begins after its share'
    )
    parser.add_argument(
        '--compile-slots', type=int, default=4, help='largest T to compile, which takes minutes'
    )
    return parser


if __name__ == '__main__':
    main()
