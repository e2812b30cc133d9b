from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import results
from torch import Tensor, nn

from benchmarks import model


def test_memory_by_hand() -> None:
    """A sigmoid keeps its output; a second one needs a second image, the input aside."""
    image = torch.zeros(256, 1024, requires_grad=True)  # 1 MiB
    for number in (1, 2):
        layers = nn.Sequential(*[nn.Sigmoid()] * number)

        def call(layers: nn.Module = layers) -> Tensor:
            result: Tensor = layers(image)
            return result

        assert model.held(call, [image]) == number
        with torch.no_grad():
            assert model.peak(call, 'cpu') == number


@cache
def job(name: str, slots: int, size: int) -> model.Job:
    return model.Job(model.MODES[name], slots, size, 'cpu')


@pytest.mark.parametrize(
    ('mode', 'error'),
    [('ours', 1e-4), ('recomputed', 1e-4), ('bf16', 0.2), ('bf16-recomputed', 0.2)],
)
def test_modes_compute_what_the_plain_model_does(mode: str, error: float) -> None:
    """In single precision to its rounding, in bfloat16 with its 8 bits of mantissa."""
    jobs = [job(name, 2, 32) for name in (model.PLAIN, mode)]
    with torch.no_grad():
        for each in jobs:
            each.model.eval()
            each.image = jobs[0].image
        plain, found = (each.logits() for each in jobs)
    assert found.dtype == torch.float32
    assert float((found - plain).abs().max() / plain.std()) < error


def test_recomputed_gates_are_not_held() -> None:
    jobs = [model.Job(model.MODES[name], 4, 64, 'cpu') for name in ('ours', 'recomputed')]
    ours, recomputed = (model.held(j.logits, [j.image, *j.model.parameters()]) for j in jobs)
    # The gates of four slots of two sensors, 4 x 32 channels of 64 x 64 pixels, 4 bytes each.
    assert ours - recomputed >= 4 * 2 * 4 * 32 * 64 * 64 * 4 / 2**20


@pytest.mark.parametrize('name', model.OTHERS)
def test_other_models_take_the_series(name: str) -> None:
    job = model.Job(model.OTHERS[name], 2, 32, 'cpu')
    job.model.eval()
    with torch.no_grad():
        assert job.logits().shape == (1, 10, 32, 32)


def test_ratios_are_times_as_fast_and_shares_of_the_memory() -> None:
    plain = {'forward (ms)': 30.0, 'held (MiB)': 400.0}
    found = model.beside({'forward (ms)': 20.0, 'held (MiB)': 100.0}, plain)
    assert found == {
        'forward (ms)': 20,
        'forward x plain': 1.5,
        'held (MiB)': 100,
        'held / plain': 0.25,
    }


def test_every_model_is_measured_in_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, 'MODES', {'plain': model.OTHERS['pixel-ltae']})
    options = ['--slots', '1', '2', '--sizes', '8', '--rounds', '2', '--device', 'cpu']
    model.main([*options, '--models', 'pixel-ltae', '--output', str(tmp_path)])
    rows = results(tmp_path)
    names = 'plain', 'pixel-ltae'
    assert [(r['T'], r['pixels'], r['model']) for r in rows] == [
        (t, 8, name) for t in (1, 2) for name in names
    ]
    for plain, other in zip(rows[::2], rows[1::2], strict=True):
        assert plain['forward x plain'] == plain['held / plain'] == 1
        assert other['held / plain'] == pytest.approx(1)
        assert 0 < plain['forward (ms)'] < plain['step (ms)']
