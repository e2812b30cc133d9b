from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import speed


def test_memory_by_hand() -> None:
    """A sigmoid keeps its output; a second one needs a second image, inputs aside."""
    image = torch.zeros(256, 1024, requires_grad=True)  # 1 MiB
    one, two = nn.Sequential(nn.Sigmoid()), nn.Sequential(nn.Sigmoid(), nn.Sigmoid())
    assert [speed.held(model, [image]) for model in (one, two)] == [1, 2]
    assert [speed.peak(model, (image,)) for model in (one, two)] == [1, 2]


def test_a_frozen_encoder_gets_no_gradient() -> None:
    model, inputs = speed.build()['ours'], speed.make_inputs(2, 64)
    for frozen in (True, False):
        speed.learn(model, inputs, frozen)
        encoder = model.get_submodule('unet.encoder')
        assert all((p.grad is None) is frozen for p in encoder.parameters())
        assert all(p.grad is not None for p in model.get_submodule('convLSTM_s2').parameters())


def test_models_compute_the_same() -> None:
    """In single precision to its rounding, in bfloat16 with its 8 bits of mantissa."""
    models, inputs = speed.build(), speed.make_inputs(2, 64)
    with torch.no_grad():
        plain, *others = (model.eval()(*inputs) for model in models.values())
    errors = [float((output - plain).abs().max() / plain.std()) for output in others]
    assert max(errors[:2]) < 1e-4
    assert min(errors[2:]) > 1e-4
    assert max(errors[2:]) < 0.2


def test_turns_alternate() -> None:
    order: list[str] = []
    calls: Any = {name: partial(order.append, name) for name in 'ab'}
    values = iter([1.0, 10, 3, 30, 2, 20])

    def measure(call: Callable[[], None]) -> float:
        call()
        return next(values)

    assert speed.alternate(calls, measure, 3) == {'a': 2, 'b': 20}
    assert order == list('abababab')


def test_report_holds_ratios_and_rates() -> None:
    results: dict[int, dict[str, dict[str, float]]] = {
        4: {
            'forward (s)': {'plain': 2.0, 'ours': 1.0, 'checkpoint': 1.25},
            'tensors held for backward (MiB)': {'plain': 200, 'ours': 150, 'checkpoint': 80},
        }
    }
    reached = {
        'dates': 4,
        'convolution': 100.0,
        'rates': {'forward pass': 84.0},
        'shares': {'forward pass': {'aten::convolution': 0.8}},
    }
    text = speed.report(results, reached)
    assert '| T | what | plain | ours | checkpoint |' in text
    assert '| 4 | forward (s) | 2 | 1 (2.00x) | 1.25 (1.60x) |' in text
    assert '| 4 | tensors held for backward (MiB) | 200 | 150 (0.75) | 80 (0.40) |' in text
    assert 'A large convolution does 100 GFLOP/s here, and of it at T = 4 the' in text
    assert '- forward pass: 84 GFLOP/s (84%); its time: aten::convolution 80%' in text
