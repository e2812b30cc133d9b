import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import formats
from benchmarks.loading import BASELINE
from torchgeo_s1s2.datasets.synthetic import write_synthetic

SIZE = 16


@pytest.fixture(scope='module')
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('formats')
    write_synthetic(folder / 'data', SIZE, {'31UFQ': 2}, incomplete=0, progress=False)
    arguments = ['--root', str(folder / 'data'), '--output', str(folder / 'out')]
    formats.main([*arguments, '--rounds', '2', '--patches', '2'])
    return folder / 'out'


@pytest.mark.parametrize('name', formats.formats())
def test_values_come_back(name: str, tmp_path: Path) -> None:
    arrays = {
        's2': np.arange(40 * SIZE * SIZE, dtype='int16').reshape(40, SIZE, SIZE),
        's1': np.linspace(0, 1, 8 * SIZE * SIZE, dtype='float32').reshape(8, SIZE, SIZE),
    }
    form = formats.formats()[name]
    form.write(tmp_path, arrays)
    again = form.read(tmp_path)
    assert set(again) == set(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(again[key], array, strict=True)


def test_every_format_is_measured(output: Path) -> None:
    content: dict[str, Any] = json.loads((output / 'results.json').read_text())
    names = {*formats.formats(), BASELINE}
    assert {r['reader'] for r in content['reading']} == set(content['mib']) == names
    # Four dates of 10 bands of 2 bytes and of 2 bands of 4, and labels of 1 byte, each pixel.
    least = (4 * (10 * 2 + 2 * 4) + 1) * SIZE * SIZE / 2**20
    assert least <= content['mib']['safetensors'] < 1.2 * least
    text = (output / 'table.md').read_text()
    assert text.startswith('# Synthetic data')
    assert text.count('\n| ') == len(names) + 2
    assert '| the rasters, LZW |' in text
    assert '| 1.000 |' in text


def test_a_format_that_alters_values_is_refused(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(folder: Path) -> dict[str, Any]:
        return {name: array + 1 for name, array in formats.numpy().read(folder).items()}

    wrong = formats.Format(formats.numpy().write, read)
    monkeypatch.setattr(formats, 'formats', lambda: {'wrong': wrong})
    dataset = formats.MultiSenGE(output.parent / 'data', classes=10)
    with pytest.raises(ValueError, match='wrong does not give the values of patch 0 back'):
        formats.write_all(dataset, 1, tmp_path)
