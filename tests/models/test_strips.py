"""Every way to compute the layers against the plain model, which shares no code with them."""

from functools import partial
from itertools import product

import pytest
import torch
from conftest import learnt
from torch import Tensor, nn

from benchmarks.model import held
from benchmarks.plain import PlainConvLSTM
from torchgeo_s1s2.models import ConvLSTM, strips
from torchgeo_s1s2.models.norm import affine_of_slots


@pytest.fixture(autouse=True)
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of these tests have several strips, the last one lower than the others."""
    monkeypatch.setattr(strips, 'PIXELS', 60 // torch.get_num_threads())


def make_series(b: int, t: int, c: int, *size: int) -> Tensor:
    return torch.randn(b, t, *size, c, dtype=torch.double)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], names: int) -> None:
    assert actual.keys() == expected.keys()
    assert len(actual) == names
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        message = f'{name} differs'
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-10 * scale, msg=message)


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(('b', 't'), product((1, 2), (1, 4)))
def test_learning(b: int, t: int, training: bool, recompute: bool) -> None:
    torch.manual_seed(0)
    plain = PlainConvLSTM(2).double().train(training)
    layer = ConvLSTM(2, recompute_gates=recompute).double().train(training)
    layer.load_state_dict(plain.state_dict())
    series = make_series(b, t, 2, 11, 13)
    assert_same(learnt(layer, series.movedim(-1, 2)), learnt(plain, series), names=1 + 3 + 4)


@pytest.mark.parametrize('kernel', [3, 5])
def test_strips(kernel: int) -> None:
    """Without gradients, and with gaps that differ from sample to sample."""
    torch.manual_seed(0)
    layer = ConvLSTM(2, 3, kernel).double().eval()
    nn.init.normal_(layer.get_buffer('batchnorm.running_mean'))
    x, valid = make_series(3, 4, 2, 11, 13).movedim(-1, 2), torch.tensor([[1, 1, 1, 1]] * 3).bool()
    valid[1, [0, 2]] = False
    valid[2] = False
    expected = layer(x, valid)
    assert expected.requires_grad
    with torch.no_grad():
        assert strips.suits_strips(layer, x, affine_of_slots(layer.batchnorm, x, valid))
        torch.testing.assert_close(layer(x, valid), expected.detach(), rtol=0, atol=1e-12)


def test_an_empty_slot_before_the_first_image_changes_no_bit() -> None:
    layer, x = ConvLSTM(2, 3).eval(), torch.randn(1, 3, 2, 11, 13)
    longer = torch.cat([torch.full_like(x[:, :1], torch.nan), x], 1)
    valid = torch.tensor([[False, True, True, True]])
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert layer(longer, valid).equal(layer(x))


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
    assert errors[0] < 2 * errors[1] < 1e-6  # one bit


@pytest.mark.parametrize('recompute', [False, True])
def test_mixed_precision_is_as_close_as_that_of_the_plain_model(recompute: bool) -> None:
    torch.manual_seed(0)
    plain = PlainConvLSTM(2)
    layer = ConvLSTM(2, recompute_gates=recompute)
    layer.load_state_dict(plain.state_dict())
    series = make_series(2, 5, 2, 33, 33)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = learnt(layer, series.float().movedim(-1, 2)), learnt(plain, series.float())
    layer.load_state_dict(plain.state_dict())
    exact = learnt(layer.double(), series.movedim(-1, 2))
    for name in exact.keys() - {'batchnorm.num_batches_tracked'}:
        value = exact[name]
        errors = [((results[name] - value).norm() / value.norm()).item() for results in mixed]
        assert errors[0] < max(1.5 * errors[1], 0.005), name


@pytest.mark.parametrize(
    ('dtype', 'compiled'),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
)
def test_recomputing_holds_less_than_half(dtype: torch.dtype, compiled: bool) -> None:
    x, valid = torch.randn(1, 4, 2, 32, 32, dtype=dtype), torch.ones(1, 4, dtype=torch.bool)
    kept = []
    for recompute in (False, True):
        layer = ConvLSTM(2, 8, recompute_gates=recompute).to(dtype)
        call = torch.compile(layer, backend='aot_eager') if compiled else layer
        kept.append(held(partial(call, x, valid), [x, *layer.parameters()]))
    assert kept[1] < 0.5 * kept[0]
