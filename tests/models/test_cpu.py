"""The layers in strips against the plain model, which shares no code with them."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchgeo_s1s2.models.cpu import GateInStrips

from benchmarks.plain import PlainConvLSTM, PlainFuseLSTM
from benchmarks.speed import MIB, held
from torchgeo_s1s2.models import ConvLSTM, FuseLSTM, cpu


@pytest.fixture(autouse=True)
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of these tests have several strips, the last one lower than the others."""
    monkeypatch.setattr(cpu, 'PIXELS', 60 // torch.get_num_threads())


def make_series(b: int, t: int, c: int, *size: int) -> Tensor:
    return torch.randn(b, t, *size, c, dtype=torch.double)


def run(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output, gradients and batch-norm statistics."""
    output = model(*inputs)
    # Weights that differ from pixel to pixel: batch norm has no gradient of a mere sum.
    scale = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    (output * scale).sum().backward()
    results = {'output': output.detach()} | dict(model.named_buffers())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results | {f'gradient of {name}': value for name, value in gradients.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], names: int) -> None:
    assert actual.keys() == expected.keys()
    assert len(actual) == names
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        message = f'{name} differs'
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-10 * scale, msg=message)


@pytest.mark.parametrize('checkpoint', [False, True])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(('b', 't'), product((1, 2), (1, 4, 7)))
def test_recurrence(b: int, t: int, training: bool, checkpoint: bool) -> None:
    torch.manual_seed(0)
    plain = PlainConvLSTM(2).double().train(training)
    layer = ConvLSTM(2, checkpoint=checkpoint).double().train(training)
    layer.load_state_dict(plain.state_dict())
    series = make_series(b, t, 2, 11, 13)
    assert_same(run(layer, series.movedim(-1, 2)), run(plain, series), names=1 + 3 + 4)


@pytest.mark.parametrize(
    ('b', 't', 'training', 'checkpoint'),
    [
        (1, 1, True, False),
        (2, 4, True, True),
        (1, 4, False, False),
        (1, 7, False, True),
    ],
)
def test_whole_model(
    b: int, t: int, training: bool, checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, 'PIXELS', 800 // torch.get_num_threads())  # strips of 25 rows
    plain = PlainFuseLSTM(3)
    model = FuseLSTM(3, freeze_encoder=False, checkpoint=checkpoint)
    model.load_state_dict(plain.state_dict())
    x_s2, x_s1 = make_series(b, t, 10, 64, 32), make_series(b, t, 2, 64, 32)
    inputs = x_s2, x_s1, torch.cat([x_s2[:, 0], x_s1[:, 0]], dim=-1)
    actual = run(model.double().train(training), *inputs)
    expected = run(WithSoftmax(plain).double().train(training), *inputs)
    expected = {name.replace('model.', ''): value for name, value in expected.items()}
    parameters, buffers = len(list(model.parameters())), len(list(model.buffers()))
    assert_same(actual, expected, names=1 + buffers + parameters)


class WithSoftmax(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        probabilities: Tensor = self.model(*inputs).softmax(1)
        return probabilities


@pytest.mark.parametrize('keep', [False, True])
@pytest.mark.parametrize('kernel', [3, 5])
@pytest.mark.parametrize('first', [False, True])
def test_gradients_are_those_of_finite_differences(first: bool, kernel: int, keep: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {'dtype': torch.double, 'requires_grad': True}
    x = torch.randn(1, 2, 9, 15, **options)  # strips of four rows
    h, c = (None if first else torch.randn(1, 1, 9, 15, **options) for _ in range(2))
    weight = torch.randn(4, 2 if first else 3, kernel, kernel, **options)
    bias = torch.randn(4, **options)
    inputs: Any = (x, h, c, weight, bias, keep)
    assert torch.autograd.gradcheck(GateInStrips.apply, inputs, fast_mode=True)


def test_same_as_on_other_devices() -> None:
    """In half precision and on other devices a step is one convolution of the whole image."""
    torch.manual_seed(0)
    layer = ConvLSTM(2, 3, kernel_size=5).double()
    x, h, c = (torch.randn(2, n, 11, 13, dtype=torch.double) for n in (2, 3, 3))
    for hidden, cell in ((h, c), (None, torch.zeros_like(c))):
        for actual, expected in zip(
            layer._gate_in_strips(x, hidden, cell), layer.gate(x, hidden, cell), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_only_asked_gradients() -> None:
    torch.manual_seed(0)
    layer = ConvLSTM(2, 3).double()
    series = torch.randn(1, 3, 2, 11, 13, dtype=torch.double, requires_grad=True)
    layer(series).square().sum().backward()
    expected, series.grad = series.grad, None
    layer.zero_grad()
    layer.conv.requires_grad_(False)
    layer(series).square().sum().backward()
    torch.testing.assert_close(series.grad, expected)
    assert layer.conv.weight.grad is None


def test_single_precision_is_as_close_as_that_of_the_plain_model() -> None:
    torch.manual_seed(0)
    plain = PlainConvLSTM(2).eval()
    layer = ConvLSTM(2).eval()
    layer.load_state_dict(plain.state_dict())
    series = 4 * make_series(1, 7, 2, 33, 33)
    with torch.no_grad():
        single = layer(series.float().movedim(-1, 2)), plain(series.float())
        exact = plain.double()(series)
    errors = [(x - exact).square().mean().sqrt().item() for x in single]
    assert errors[0] < 1.5 * errors[1] < 1e-6


@pytest.mark.parametrize('checkpoint', [False, True])
def test_mixed_precision_is_as_close_as_that_of_the_plain_model(checkpoint: bool) -> None:
    torch.manual_seed(0)
    plain = PlainConvLSTM(2)
    layer = ConvLSTM(2, checkpoint=checkpoint)
    layer.load_state_dict(plain.state_dict())
    series = make_series(2, 5, 2, 33, 33)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = run(layer, series.float().movedim(-1, 2)), run(plain, series.float())
    layer.load_state_dict(plain.state_dict())
    exact = run(layer.double(), series.movedim(-1, 2))
    for name in exact.keys() - {'batchnorm.num_batches_tracked'}:
        value = exact[name]
        errors = [((results[name] - value).norm() / value.norm()).item() for results in mixed]
        assert errors[0] < max(1.5 * errors[1], 0.004), name


def kept_gates() -> float:
    """Bytes that a forward pass of four dates keeps for the backward pass without checkpoint."""
    inputs = [torch.randn(1, 4, 2, 16, 16)]
    without, with_checkpoint = (held(ConvLSTM(2, checkpoint=c), inputs) for c in (False, True))
    return (without - with_checkpoint) * MIB


def test_checkpoint_holds_less() -> None:
    """The gates are 4 x 32 of the channels that are kept of a step."""
    assert kept_gates() == 4 * 128 * 16 * 16 * 4


def test_gates_take_half_the_memory_in_mixed_precision() -> None:
    with torch.autocast('cpu', torch.bfloat16):
        assert kept_gates() == 4 * 128 * 16 * 16 * 2


def test_autocast_leaves_double_precision() -> None:
    torch.manual_seed(0)
    plain, layer = PlainConvLSTM(2).double(), ConvLSTM(2).double()
    layer.load_state_dict(plain.state_dict())
    series = make_series(2, 4, 2, 11, 13)
    with torch.autocast('cpu', torch.bfloat16):
        actual = run(layer, series.movedim(-1, 2))
    assert_same(actual, run(plain, series), names=1 + 3 + 4)
