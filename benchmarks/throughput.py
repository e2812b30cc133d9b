"""How much a CPU computes, how much of that a model gets, and the memory that it takes."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def seconds(call: Callable[[], object]) -> float:
    """Processor time of a call; what other processes do meanwhile does not count."""
    start = time.process_time()
    call()
    return time.process_time() - start


def convolution_gflops(channels: int = 128, size: int = 256, repeats: int = 5) -> float:
    """Billions of operations a second of a large 3x3 convolution in channels-last layout."""
    image = torch.randn(1, channels, size, size).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        times = [seconds(lambda: F.conv2d(image, weight, padding=1)) for _ in range(repeats)]
    return 2 * 9 * channels**2 * size**2 / median(times) / 1e9


def count_flops(model: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of a forward pass, two for a multiplication and an addition.

    Only those of convolutions and matrix products; what is around them is not counted.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
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
