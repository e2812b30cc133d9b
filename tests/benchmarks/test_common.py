import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import common


def test_calls_take_turns_and_the_median_counts() -> None:
    """Of a clock that only the calls move: 1, 2 and 9 seconds for one, always 4 for the other."""
    now, order = [0.0], list[str]()
    seconds = {'changing': iter([1, 1, 2, 2, 9, 9]), 'steady': iter([4] * 6)}

    def call(name: str) -> None:
        order.append(name)
        now[0] += next(seconds[name])

    calls = {name: partial(call, name) for name in seconds}
    found = common.alternate(calls, 3, lambda: now[0])
    assert [found[name].median for name in seconds] == pytest.approx([2, 4])
    assert order == ['changing', 'changing', 'steady', 'steady'] * 3


def fill_memory() -> dict[str, float]:
    with common.measured() as found:
        held = np.ones(2**25)  # 256 MiB, held until the block ends
    return found | {'held (MiB)': held.nbytes / 2**20, 'process': os.getpid()}


def test_memory_of_a_block_in_a_process_of_its_own() -> None:
    found = common.alone(fill_memory)
    assert found['held (MiB)'] == 256
    assert found['added at most (MiB)'] == pytest.approx(256, rel=0.1)
    assert found['before (MiB)'] > 50
    assert 0 < found['seconds'] < 60
    assert found['process'] != os.getpid()


def test_results_are_written_with_where_they_are_from(tmp_path: Path) -> None:
    rows = [{'what': 'a', 'n': 1200, 's': 0.12345}, {'what': 'b', 'n': 3, 's': 1234.5}]
    common.report(tmp_path, 'Title', common.provenance(), rows)
    lines = (tmp_path / 'table.md').read_text().splitlines()
    assert lines[0] == '# Title'
    head, rule, first, second = lines[-4:]
    assert head == '| what | n | s |'
    assert rule == '| --- | --: | --: |'
    assert first == '| a | 1,200 | 0.123 |'
    assert second == '| b | 3 | 1,234 |'
    content = json.loads((tmp_path / 'results.json').read_text())
    assert content['results'] == rows
    for fact in ('date', 'hardware', 'commit', 'torch'):
        assert f'- {fact}: {content["about"][fact]}' in lines
