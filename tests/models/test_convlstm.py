import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchgeo_s1s2.models import ConvLSTM

Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def convolve(x: Array, weight: Array, bias: Array) -> Array:
    """Zero-padded correlation of (B, C, H, W) with (O, C, K, K), one kernel offset at a time."""
    size = weight.shape[-1]
    pad = size // 2
    height, width = x.shape[-2:]
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    out = np.zeros((len(x), len(weight), height, width)) + bias[:, None, None]
    for row in range(size):
        for col in range(size):
            window = padded[:, :, row : row + height, col : col + width]
            out += np.einsum('bchw,oc->bohw', window, weight[:, :, row, col])
    return out


class Oracle:
    """The recurrence in NumPy, one slot after the other, with the skipping of slots spelt out."""

    def __init__(self, layer: ConvLSTM) -> None:
        self.p = {k: v.detach().double().numpy().copy() for k, v in layer.state_dict().items()}

    def normalize(self, h: Array, training: bool) -> Array:
        if training:
            count = h[:, 0].size
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3))
            running_mean, running_var = self.p['batchnorm.running_mean'], self.p[RUNNING_VAR]
            self.p['batchnorm.running_mean'] = 0.9 * running_mean + 0.1 * mean
            self.p[RUNNING_VAR] = 0.9 * running_var + 0.1 * var * count / (count - 1)
        else:
            mean, var = self.p['batchnorm.running_mean'], self.p[RUNNING_VAR]
        scaled = (h - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)
        gain, shift = self.p['batchnorm.weight'], self.p['batchnorm.bias']
        return scaled * gain[:, None, None] + shift[:, None, None]

    def __call__(self, x: Array, valid: NDArray[np.bool_], training: bool) -> Array:
        hidden = len(self.p['batchnorm.bias'])
        h = np.zeros((len(x), hidden, *x.shape[-2:]))
        c = h.copy()
        for t in range(x.shape[1]):
            rows = np.flatnonzero(valid[:, t])
            if rows.size == 0:
                continue
            joined = np.concatenate([x[rows, t], h[rows]], 1)
            gates = convolve(joined, self.p['conv.weight'], self.p['conv.bias'])
            i, f, g, o = np.split(gates, 4, 1)
            c[rows] = sigmoid(f) * c[rows] + sigmoid(i) * np.tanh(g)
            h[rows] = self.normalize(sigmoid(o) * np.tanh(c[rows]), training)
        return h


RUNNING_VAR = 'batchnorm.running_var'


def make_layer(bands: int = 2, hidden: int = 3) -> ConvLSTM:
    torch.manual_seed(0)
    layer = ConvLSTM(bands, hidden).double()
    for tensor in (layer.batchnorm.weight, layer.batchnorm.running_var):
        assert tensor is not None
        torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return layer


def make_series(b: int = 3, t: int = 4, c: int = 2, size: int = 6) -> Tensor:
    return torch.randn(b, t, c, size, size, dtype=torch.double)


def statistics(layer: ConvLSTM) -> list[Tensor]:
    return [buffer.clone() for buffer in layer.batchnorm.buffers()]


VALID = {
    'all': [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
    'gaps': [[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]],
    'one sample empty': [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]],
    'nothing': [[0] * 4] * 3,
}


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('case', VALID)
def test_recurrence_against_numpy(case: str, training: bool) -> None:
    layer, x, valid = make_layer().train(training), make_series(), torch.tensor(VALID[case]).bool()
    oracle = Oracle(layer)
    expected = oracle(x.numpy(), valid.numpy(), training)
    torch.testing.assert_close(layer(x, valid), torch.tensor(expected), rtol=0, atol=1e-12)
    for name in ('batchnorm.running_mean', RUNNING_VAR):
        actual = layer.state_dict()[name].numpy()
        np.testing.assert_allclose(actual, oracle.p[name], rtol=0, atol=1e-12)
    steps = valid.any(0).sum().item() if training else 0
    assert layer.state_dict()['batchnorm.num_batches_tracked'] == steps


def test_values_by_hand() -> None:
    """With zero weights every gate is 1/2: c = 0, h = 0, and the output is the shift."""
    layer = ConvLSTM(1, 1).eval()
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    layer.batchnorm.bias.data.fill_(0.25)
    assert layer(torch.ones(1, 2, 1, 3, 3)).eq(0.25).all()
    # Cell gate wide open: c = 0.5 * c + 0.5 * 1 = 0.5, then 0.75; h = 0.5 * tanh(c).
    bias = layer.state_dict()['conv.bias']
    bias[2] = 100
    layer.batchnorm.weight.data.fill_(1)
    layer.batchnorm.eps = 0
    expected = 0.25 + 0.5 * np.tanh(0.75)
    assert layer(torch.ones(1, 2, 1, 3, 3)).flatten().tolist() == pytest.approx([expected] * 9)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('places', [(0,), (4,), (2,), (0, 0, 3, 4, 4)])
def test_empty_slots_change_nothing(places: tuple[int, ...], training: bool) -> None:
    x = make_series()
    kept = [False] * len(places) + [True] * x.shape[1]
    longer, slots = x, [True] * x.shape[1]
    for place in sorted(places, reverse=True):
        gap = torch.full_like(x[:, :1], torch.nan)
        longer = torch.cat([longer[:, :place], gap, longer[:, place:]], 1)
        slots.insert(place, False)
    assert sorted(slots) == kept
    first, second = make_layer().train(training), make_layer().train(training)
    expected = first(x)
    actual = second(longer, torch.tensor([slots] * len(x)))
    tolerance = 1e-12 if training else 0  # masked sums round otherwise
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    for mine, other in zip(statistics(first), statistics(second), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('length', [0, 3])
def test_nothing_to_read_gives_the_zero_state(length: int) -> None:
    x = make_series(t=length)
    layer = make_layer()
    before = statistics(layer)
    assert layer(x, torch.zeros(3, length, dtype=torch.bool)).eq(0).all()
    assert all(a.equal(b) for a, b in zip(before, statistics(layer), strict=True))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('case', ['gaps', 'nothing'])
def test_compiled_equals_eager(case: str, training: bool) -> None:
    x, valid = make_series(), torch.tensor(VALID[case]).bool()
    x = x.where(valid[..., None, None, None], torch.nan).requires_grad_()
    eager, traced = make_layer().train(training), make_layer().train(training)
    compiled = torch.compile(traced, fullgraph=True, backend='aot_eager')
    expected, actual = eager(x, valid), compiled(x, valid)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for mine, other in zip(statistics(traced), statistics(eager), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    if case != 'nothing':
        grads, right = (
            torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
            for y, layer in ((actual, traced), (expected, eager))
        )
        torch.testing.assert_close(grads, right, rtol=1e-10, atol=1e-10)


def test_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r'kernel_size must be odd .* got 4'):
        ConvLSTM(2, kernel_size=4)
