"""Time and memory of FuseLSTM against the plain implementation of the same function.

    OMP_NUM_THREADS=1 python -m benchmarks.speed --output outputs/speed.md

One sample of 256 by 256 pixels and one thread, random numbers, single precision, or autocast to
bfloat16. The models run in turns; times are medians of processor time. Memory is that of tensors:
what autograd keeps for the backward pass, inputs and parameters aside, and the most that a forward
pass has at once.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.accuracy import markdown, provenance
from benchmarks.plain import PlainFuseLSTM
from benchmarks.throughput import convolution_gflops, gflops, in_bfloat16, seconds, shares
from torchgeo_s1s2.models import FuseLSTM

Inputs = tuple[Tensor, Tensor, Tensor]
MIB = 2**20
PLAIN = 'plain'


class Ours(FuseLSTM):
    """FuseLSTM that returns logits, as the plain model does."""

    forward = FuseLSTM.logits


MODES: Mapping[str, Callable[[], nn.Module]] = {
    'ours': Ours,
    'checkpoint': partial(Ours, checkpoint=True),
    'bf16': lambda: in_bfloat16(Ours()),
    'bf16, checkpoint': lambda: in_bfloat16(Ours(checkpoint=True)),
}


def build(modes: Iterable[str] = MODES) -> dict[str, nn.Module]:
    """The plain model and modes of ours, with the same weights."""
    models = {PLAIN: PlainFuseLSTM()} | {mode: MODES[mode]() for mode in modes}
    for model in models.values():
        model.load_state_dict(models[PLAIN].state_dict())
    return models


def make_inputs(dates: int, size: int = 256) -> Inputs:
    x_s2, x_s1 = (torch.randn(1, dates, size, size, bands) for bands in (10, 2))
    return x_s2, x_s1, torch.cat([x_s2[:, 0], x_s1[:, 0]], dim=-1)


def predict(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    with torch.no_grad():
        model.eval()(*inputs)


def learn(model: nn.Module, inputs: Sequence[Tensor], frozen: bool) -> None:
    """One training step, without that of the optimizer."""
    model.train().requires_grad_()
    unet: Any = model.unet
    unet.encoder.requires_grad_(not frozen)
    model.zero_grad()
    model(*inputs).square().mean().backward()


def held(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """MiB that a forward pass keeps for the backward pass."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *model.parameters())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(*inputs)
    assert output.requires_grad
    return sum(sizes.values()) / MIB


def peak(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """MiB of the tensors that a forward pass without gradients has at once, inputs aside."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as result:
        predict(model, inputs)
    assert result.profiler is not None
    now = highest = 0
    for event in result.profiler.kineto_results.events():
        if event.name() == '[memory]':
            now += event.nbytes()
            highest = max(highest, now)
    return highest / MIB


def alternate(
    calls: Mapping[str, Callable[[], object]], measure: Callable[..., float], repeats: int
) -> dict[str, float]:
    """Median of each call, in turns; one round before asks for the memory and does not count."""
    for call in calls.values():
        call()
    values: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            values[name].append(measure(call))
    return {name: median(times) for name, times in values.items()}


def measure(dates: int, modes: Sequence[str], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds and MiB of every model, by what is measured."""
    models, inputs = build(modes), make_inputs(dates)

    def compare(
        function: Callable[..., Any], *options: object, time: bool = True
    ) -> dict[str, float]:
        calls = {name: partial(function, model, inputs, *options) for name, model in models.items()}
        if time:
            found = alternate(calls, seconds, repeats)
        else:
            found = {name: call() for name, call in calls.items()}
        print(f'T = {dates}, {function.__name__} {options}: {json.dumps(found)}', flush=True)
        return found

    return {
        'forward (s)': compare(predict),
        'training step, spatial encoder frozen (s)': compare(learn, True),
        'training step, all trained (s)': compare(learn, False),
        'tensors held for backward (MiB)': compare(held, time=False),
        'peak tensors of a forward (MiB)': compare(peak, time=False),
    }


def throughput(dates: int) -> dict[str, Any]:
    """How close both passes come to a large convolution, and where their time goes."""
    model, inputs = Ours(), make_inputs(dates)
    calls = {
        'forward pass': lambda: predict(model, inputs),
        'training step': lambda: learn(model, inputs, frozen=False),
    }
    for call in calls.values():
        call()
    return {
        'dates': dates,
        'convolution': convolution_gflops(),
        'rates': {name: gflops(call, repeats=3) for name, call in calls.items()},
        'shares': {name: shares(call) for name, call in calls.items()},
    }


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown table: the plain model, and how many times faster or what share of memory."""
    names, *_ = (values for measured in results.values() for values in measured.values())
    rows = [['T', 'what', *names]]
    for dates, measured in results.items():
        for what, values in measured.items():
            plain = values[PLAIN]
            cells = [_ratio(value, plain, what) for name, value in values.items() if name != PLAIN]
            rows.append([str(dates), what, f'{plain:.4g}', *cells])
    return markdown(rows, texts=(1,))


def _ratio(value: float, plain: float, what: str) -> str:
    ratio = f'{plain / value:.2f}x' if what.endswith('(s)') else f'{value / plain:.2f}'
    return f'{value:.4g} ({ratio})'


def report(results: dict[int, dict[str, dict[str, float]]], reached: dict[str, Any]) -> str:
    where = provenance()
    lines = [
        f'- {name}: {rate:.0f} GFLOP/s ({rate / reached["convolution"]:.0%}); its time: '
        + ', '.join(f'{kind} {share:.0%}' for kind, share in reached['shares'][name].items())
        for name, rate in reached['rates'].items()
    ]
    return (
        f'{where["date"]}, {where["hardware"]}, commit {where["commit"]}, '
        f'PyTorch {where["torch"]}\n\n{table(results)}\n\n'
        f'A large convolution does {reached["convolution"]:.0f} GFLOP/s here, and of it at '
        f'T = {reached["dates"]} the\n\n' + '\n'.join(lines) + '\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m benchmarks.speed')
    parser.add_argument('--output', type=Path, default=Path('outputs/speed.md'))
    parser.add_argument('--dates', type=int, nargs='+', default=[4, 32])
    parser.add_argument('--modes', nargs='+', default=list(MODES), choices=MODES)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    reached = throughput(4)
    results = {dates: measure(dates, args.modes, args.repeats) for dates in args.dates}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(report(results, reached))
    print(args.output.read_text())


if __name__ == '__main__':
    main()
