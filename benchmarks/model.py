"""Speed and memory of our model beside the plain one, and beside other models.

    OMP_NUM_THREADS=1 python -m benchmarks.model --slots 4 32 --sizes 256

On a GPU if there is one. Random numbers for images. Times are medians of turns, which all models
take: a forward pass in evaluation mode, and a training step (cross-entropy, backward pass, Adam).
Memory is that of tensors, without weights and inputs (but with weights cast to bfloat16): what
autograd holds for the backward pass, and the most that a forward pass and a step have at once.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer
from torchgeo.tasks import SpatioTemporalSegmentation

from benchmarks.common import MIB, Row, alternate, count, processor_seconds, provenance, report
from benchmarks.contestants import PixelLTAE
from benchmarks.plain import PlainFuseLSTM
from torchgeo_s1s2.models import fuselstm_to_unet

CHANNELS, CLASSES = 12, 10
PLAIN = 'plain'


class Plain(PlainFuseLSTM):
    """The plain model, fed with the image (B, T, C, H, W) of both sensors."""

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(*image.movedim(2, -1).split([10, 2], dim=-1))


def ours(slots: int, recompute: bool = False) -> nn.Module:
    """Our model, with the weights of a plain one from the same seed."""
    model = other_backbone(slots, 'vgg16_convlstm_inception', recompute)
    torch.manual_seed(0)
    model[0].load_state_dict(fuselstm_to_unet(PlainFuseLSTM(CLASSES).state_dict()))
    return model


def unet_stacked(slots: int) -> nn.Module:
    """smp's U-Net with a ResNet-50 on the dates as channels of one image."""
    unet = smp.Unet('resnet50', encoder_weights=None, in_channels=slots * CHANNELS, classes=CLASSES)
    return nn.Sequential(nn.Flatten(1, 2), unet)


def other_backbone(slots: int, backbone: str = 'utae', recompute: bool = False) -> nn.Sequential:
    """Another backbone of ours with smp's U-Net."""
    channels: Any = {'in_channels': slots * CHANNELS, 'classes': CLASSES}
    model: Any = smp.Unet(backbone, encoder_weights=None, **channels)
    model.encoder.set_recompute_gates(recompute)
    return nn.Sequential(model)


def torchgeo_convlstm(slots: int) -> nn.Module:
    task = SpatioTemporalSegmentation(
        model='convlstm', in_channels=CHANNELS, num_classes=CLASSES, loss='ce'
    )
    return nn.Sequential(task.model)


@dataclass(frozen=True)
class Mode:
    """How a model is built for a number of slots, and whether it runs under autocast, compiled."""

    build: Callable[[int], nn.Module]
    bf16: bool = False
    compiled: bool = False


recomputed = partial(ours, recompute=True)
MODES: Mapping[str, Mode] = {
    PLAIN: Mode(lambda slots: Plain(CLASSES)),
    'ours': Mode(ours),
    'recomputed': Mode(recomputed),
    'bf16': Mode(ours, bf16=True),
    'bf16-recomputed': Mode(recomputed, bf16=True),
    'compiled': Mode(ours, compiled=True),
}
OTHERS: Mapping[str, Mode] = {
    'plain-bf16': Mode(lambda slots: Plain(CLASSES), bf16=True),
    'torchgeo-convlstm': Mode(torchgeo_convlstm),
    'unet-stacked': Mode(unet_stacked),
    'improved': Mode(partial(other_backbone, backbone='vgg16_convlstm_inception_stepnorm_fullres')),
    'utae': Mode(other_backbone),
    'utae-recomputed': Mode(partial(other_backbone, recompute=True)),
    'resnet18-attention': Mode(partial(other_backbone, backbone='resnet18_attention_fullres')),
    'pixel-ltae': Mode(lambda slots: PixelLTAE(CHANNELS, CLASSES, length=slots)),
}


class Job:
    """A model, and what it is fed with."""

    def __init__(self, mode: Mode, slots: int, size: int, device: str, batch: int = 1) -> None:
        torch.manual_seed(0)
        self.bf16 = mode.bf16
        self.model = mode.build(slots).to(device)
        if mode.compiled:
            self.model.compile()
        self.image = torch.randn(batch, slots, CHANNELS, size, size).to(device)
        self.mask = torch.randint(CLASSES, (batch, size, size)).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def logits(self) -> Tensor:
        with torch.autocast(self.image.device.type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = self.model(self.image)
        return logits.float()

    def forward(self) -> None:
        with torch.no_grad():
            self.logits()

    def step(self) -> None:
        F.cross_entropy(self.logits(), self.mask).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def held(call: Callable[[], Tensor], known: Sequence[Tensor]) -> float:
    """MiB of the tensors that autograd keeps of a call, known ones aside."""
    places = {tensor.untyped_storage().data_ptr() for tensor in known}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in places:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()  # kept, or its memory would be used twice
    assert output.requires_grad
    return sum(sizes.values()) / MIB


def peak(call: Callable[[], object], device: str) -> float:
    """MiB of the tensors that a call has at once, more than before it."""
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as result:
        call()
    assert result.profiler is not None
    now = highest = 0
    for event in result.profiler.kineto_results.events():
        if event.name() == '[memory]':
            now += event.nbytes()
            highest = max(highest, now)
    return highest / MIB


def measure(
    names: Iterable[str], slots: int, size: int, rounds: int, device: str, batch: int = 1
) -> dict[str, dict[str, float]]:
    """Measure models in turns, all of them in memory."""
    jobs = {name: Job({**MODES, **OTHERS}[name], slots, size, device, batch) for name in names}
    found: dict[str, dict[str, float]] = {name: {} for name in jobs}
    clock = processor_seconds if device == 'cpu' else timer
    for what in ('forward', 'step'):
        calls = {name: getattr(job, what) for name, job in jobs.items()}
        for job in jobs.values():
            job.model.train(what == 'step')
            job.step() if what == 'step' else job.forward()  # compiles, and makes Adam's states
        for name, times in alternate(calls, rounds, clock).items():
            found[name] |= {
                f'{what} (ms)': 1000 * times.median,
                f'{what} peak (MiB)': peak(calls[name], device),
            }
    for name, job in jobs.items():
        found[name]['held (MiB)'] = held(job.logits, [job.image, *job.model.parameters()])
    return found


def beside(values: Mapping[str, float], plain: Mapping[str, float]) -> dict[str, float]:
    """Each value and its ratio to that of the plain model: times as fast, share of the memory."""
    row = {}
    for name, value in values.items():
        fast = name.endswith('(ms)')
        row[name] = value
        row[f'{name.rpartition(" ")[0]} {"x" if fast else "/"} plain'] = (
            plain[name] / value if fast else value / plain[name]
        )
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ``table.md`` and ``results.json`` after each size."""
    args = _parser().parse_args(arguments)
    names = dict.fromkeys([PLAIN, *args.models, *(OTHERS if args.others else ())])
    rows: list[Row] = []
    for slots, size in product(args.slots, args.sizes):
        found = measure(names, slots, size, args.rounds, args.device, args.batch)
        for name, values in found.items():
            ratios = beside(values, found[PLAIN])
            rows.append({'T': slots, 'pixels': size, 'model': name, **ratios})
        about = {'device': args.device, 'turns': args.rounds, 'images a batch': args.batch}
        report(args.output, 'Speed and memory of models', {**provenance(), **about}, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser('python -m benchmarks.model', description=__doc__)
    parser.add_argument('--output', type=Path, default=Path('outputs/model'))
    parser.add_argument('--slots', type=count, nargs='+', default=[4], help='numbers of slots T')
    parser.add_argument('--sizes', type=count, nargs='+', default=[256], help='pixels')
    parser.add_argument('--batch', type=count, default=1, help='images a batch')
    parser.add_argument(
        '--models', nargs='*', default=[*MODES], choices=[*MODES, *OTHERS], help='beside plain'
    )
    parser.add_argument('--others', action='store_true', help='other models, too')
    parser.add_argument('--rounds', type=count, default=3, help='turns of each model')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--device', choices=['cpu', 'cuda'], default=device)
    return parser


if __name__ == '__main__':
    main()
