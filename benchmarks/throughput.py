"""How much a CPU computes, how much of that a model gets, and the memory that it takes."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def seconds(call: Callable[[], object]) -> float:
    """Processor time of a call; what other processes do meanwhile does not count."""
    start = time.process_time()
    call()
    return time.process_time() - start


def in_bfloat16(model: nn.Module) -> nn.Module:
    """Put a model under autocast, as ``--trainer.precision bf16-mixed`` does.

    It then returns single precision.
    """
    run = torch.autocast('cpu', torch.bfloat16)(model.forward)
    model.forward = lambda *inputs: run(*inputs).float()
    return model


class Convolution(nn.Module):
    """One large 3 x 3 convolution of an image of its own, in channels-last layout."""

    def __init__(self, channels: int = 128, size: int = 128) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.register_buffer('image', torch.randn(1, channels, size, size), persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Ignore the input."""
        result: Tensor = self.conv(self.image)
        return result


def convolution_gflops(repeats: int = 5) -> float:
    """Billions of operations a second of a large convolution."""
    model = Convolution(size=256)
    with torch.no_grad():
        return gflops(model, repeats)


def gflops(call: Callable[[], object], repeats: int) -> float:
    """Billions of operations a second, from the median time."""
    return count_flops(call) / median(seconds(call) for _ in range(repeats)) / 1e9


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of a call, two for a multiplication and an addition.

    Only those of convolutions and matrix products; what is around them is not counted.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def process_memory(field: str) -> float:
    """Memory of this process in MiB: a field of Linux's /proc, such as VmRSS or VmHWM."""
    lines = Path('/proc/self/status').read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f'{field}:'))
    return int(line.split()[1]) / 1024


def shares(call: Callable[[], object], number: int = 5) -> dict[str, float]:
    """Operators in which most of the time of a call goes, with their shares of it."""
    with profile(activities=[ProfilerActivity.CPU]) as result:
        call()
    times = {event.key: event.self_cpu_time_total for event in result.key_averages()}
    largest = sorted(times, key=times.__getitem__, reverse=True)[:number]
    return {name: times[name] / sum(times.values()) for name in largest}
