"""How much a CPU computes, and how much of that a model gets."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
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


def gflop(call: Callable[[], object]) -> float:
    """Billions of operations of the convolutions and matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def shares(call: Callable[[], object], number: int = 5) -> dict[str, float]:
    """Operators in which most of the time of a call goes, with their shares of it."""
    with profile(activities=[ProfilerActivity.CPU]) as result:
        call()
    times = {event.key: event.self_cpu_time_total for event in result.key_averages()}
    largest = sorted(times, key=times.__getitem__, reverse=True)[:number]
    return {name: times[name] / sum(times.values()) for name in largest}
