"""What the benchmarks share: turns, memory, tables, and where they were measured."""

import os
import platform
import subprocess
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import torch
from torch.utils.benchmark import Measurement, Timer, timer

from torchgeo_s1s2.files import whole, write_json

MIB = 2**20
Row = dict[str, Any]


def count(text: str) -> int:
    """A number of things, as an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f'{text} is no whole number from 1 on')
    return int(text)


def existing(text: str) -> Path:
    """A file that is there, as an argument."""
    if not Path(text).is_file():
        raise ArgumentTypeError(f'there is no file {text}')
    return Path(text)


def processor_seconds() -> float:
    """Time of the processor a thread, which other work on the machine does not lengthen."""
    return time.process_time() / torch.get_num_threads()


def alternate(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = processor_seconds,
) -> dict[str, Measurement]:
    """Time calls in turns; in each, one call comes before those that count."""
    threads = torch.get_num_threads()
    timers = {
        name: Timer('call()', timer=clock, globals={'call': call}, num_threads=threads)
        for name, call in calls.items()
    }
    turns = [{name: t.blocked_autorange() for name, t in timers.items()} for _ in range(rounds)]
    return {name: Measurement.merge([turn[name] for turn in turns])[0] for name in timers}


@contextmanager
def measured(interval: float = 0.002) -> Iterator[Row]:
    """Seconds of a block, and resident memory of the process before it and added by it at most."""
    process, done = psutil.Process(), Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(interval):
            peak = max(peak, process.memory_info().rss)

    found: Row = {}
    thread = Thread(target=watch, daemon=True)
    thread.start()
    begin = timer()
    yield found
    found['seconds'] = timer() - begin
    done.set()
    thread.join()
    peak = max(peak, process.memory_info().rss)
    found |= {'before (MiB)': before / MIB, 'added at most (MiB)': (peak - before) / MIB}


def alone(function: Callable[..., Row], *arguments: Any) -> Row:
    """Result of a function in a new process, which has imported what its module does."""
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        return pool.submit(function, *arguments).result()


def table(rows: Sequence[Row]) -> str:
    """Markdown of rows that have the same columns, numbers to the right."""
    rule = ['---' if isinstance(value, str) else '--:' for value in rows[0].values()]
    lines = [list(rows[0]), rule, *([_cell(value) for value in row.values()] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3}f}'
    return value if isinstance(value, str) else f'{value:,}'


def report(
    folder: Path, title: str, about: Mapping[str, Any], rows: Sequence[Row], text: str = ''
) -> None:
    """Write rows, and what is known of all of them, as ``results.json`` and ``table.md``.

    The latter, which is printed too, has a table of the rows unless there is another *text*.
    """
    facts = '\n'.join(f'- {name}: {value}' for name, value in about.items())
    text = f'# {title}\n\n{facts}\n\n{text or table(rows)}\n'
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / 'results.json', {'about': about, 'results': rows}, indent=1)
    with whole(folder / 'table.md') as temporary:
        temporary.write_text(text)
    print(text, flush=True)


def provenance() -> dict[str, str]:
    """Date, hardware, commit and version of PyTorch of a measurement."""
    git = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    cores = f'{torch.get_num_threads()} of {os.cpu_count()} cores'
    return {
        'date': date.today().isoformat(),
        'hardware': f'{device}, {cores}, {platform.system()}',
        'commit': commit.strip() or 'unknown',
        'torch': torch.__version__,
    }


def _processor() -> str:
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor() or platform.machine())
