from typing import Any

import numpy as np
import pytest
import torch
from conftest import learnt
from numpy.typing import NDArray
from torch import Tensor, nn

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
    """The recurrence in NumPy, one slot after the other, with the skipping of slots spelt out.

    With statistics a step, the samples are read one observation after the other instead.
    """

    def __init__(self, layer: ConvLSTM, norm: str = 'shared') -> None:
        self.p = {k: v.detach().double().numpy().copy() for k, v in layer.state_dict().items()}
        self.norm = norm

    def normalize(self, h: Array, training: bool, step: int) -> Array:
        if self.norm == 'none':
            return h
        place: tuple[int, ...] = (step,) if self.norm == 'step' else ()
        mean, var = self.p['batchnorm.running_mean'][place], self.p[RUNNING_VAR][place]
        if training:
            count = h[:, 0].size
            for running, value in ((mean, h.mean((0, 2, 3))), (var, h.var((0, 2, 3)))):
                scale = count / (count - 1) if running is var else 1
                running[:] = 0.9 * running + 0.1 * value * scale
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3))
        scaled = (h - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)
        gain, shift = self.p['batchnorm.weight'], self.p['batchnorm.bias']
        return scaled * gain[:, None, None] + shift[:, None, None]

    def __call__(self, x: Array, valid: NDArray[np.bool_], training: bool) -> Array:
        if self.norm == 'step':
            slots = [np.flatnonzero(v) for v in valid]
            valid = np.array([[t < len(s) for t in range(x.shape[1])] for s in slots])
            series = [
                np.concatenate([x[b, s], x[b, : x.shape[1] - len(s)]]) for b, s in enumerate(slots)
            ]
            x = np.stack(series)
        hidden = len(self.p['conv.bias']) // 4
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
            h[rows] = self.normalize(sigmoid(o) * np.tanh(c[rows]), training, t)
        return h


RUNNING_VAR = 'batchnorm.running_var'


def make_layer(bands: int = 2, hidden: int = 3, norm: Any = 'shared') -> ConvLSTM:
    """A layer of which five steps have been trained, if each has statistics."""
    torch.manual_seed(0)
    layer = ConvLSTM(bands, hidden, norm=norm).double()
    state = layer.state_dict()
    for name in ('batchnorm.weight', RUNNING_VAR) if norm != 'none' else ():
        torch.nn.init.uniform_(state[name], 0.5, 1.5)
    if norm == 'step':
        torch.nn.init.normal_(state['batchnorm.running_mean'], std=0.2)
        state['batchnorm.num_batches_tracked'][:5] = 1
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


@pytest.mark.parametrize('norm', ['shared', 'step', 'none'])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('case', VALID)
def test_recurrence_against_numpy(case: str, training: bool, norm: str) -> None:
    layer, x = make_layer(norm=norm).train(training), make_series()
    valid, before = torch.tensor(VALID[case]).bool(), layer.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    oracle = Oracle(layer, norm)
    expected = oracle(x.numpy(), valid.numpy(), training)
    torch.testing.assert_close(layer(x, valid), torch.tensor(expected), rtol=0, atol=1e-12)
    with torch.no_grad():  # in strips, in evaluation
        again = make_layer(norm=norm).train(training)(x, valid)
    torch.testing.assert_close(again, torch.tensor(expected), rtol=0, atol=1e-12)
    if norm == 'none':
        return
    for name in ('batchnorm.running_mean', RUNNING_VAR):
        actual = layer.state_dict()[name].numpy()
        np.testing.assert_allclose(actual, oracle.p[name], rtol=0, atol=1e-12)
    steps = valid.any(0).sum() if norm == 'shared' else valid.sum(1).max()
    name = 'batchnorm.num_batches_tracked'
    assert (layer.state_dict()[name] - before[name]).sum() == (steps if training else 0)


@pytest.mark.parametrize('gradients', [False, True])
def test_later_steps_take_the_statistics_of_the_last_one_trained(gradients: bool) -> None:
    layer = make_layer(norm='step').eval()
    state, x = layer.state_dict(), make_series(t=7)
    with torch.set_grad_enabled(gradients):
        actual = layer(x)
    for name in ('batchnorm.running_mean', RUNNING_VAR):
        state[name][5:] = state[name][4]
    state['batchnorm.num_batches_tracked'][:] = 1
    expected = Oracle(layer, 'step')(x.numpy(), np.ones((3, 7), bool), training=False)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=1e-12)


def test_statistics_that_all_steps_share_load_for_each_step() -> None:
    old, new, x = make_layer(), make_layer(norm='step'), make_series(t=7)
    nn.init.normal_(old.state_dict()['batchnorm.running_mean'])
    new.load_state_dict(old.state_dict())
    torch.testing.assert_close(new.eval()(x), old.eval()(x), rtol=0, atol=1e-12)
    new.train()(x[:, :2])
    state, mean = new.state_dict(), old.state_dict()['batchnorm.running_mean']
    assert state['batchnorm.running_mean'][2:].eq(mean).all()
    assert not state['batchnorm.running_mean'][1].allclose(mean)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('norm', ['shared', 'step'])
@pytest.mark.parametrize('places', [(0,), (4,), (2,), (0, 0, 3, 4, 4)])
def test_empty_slots_change_nothing(places: tuple[int, ...], training: bool, norm: str) -> None:
    x, slots = make_series(), [True] * 4
    for place in sorted(places, reverse=True):
        slots.insert(place, False)
    longer = torch.full((len(x), len(slots), *x.shape[2:]), torch.nan).double()
    longer[:, slots] = x
    first, second = (make_layer(norm=norm).train(training) for _ in range(2))
    expected, actual = learnt(first, x), learnt(second, longer, torch.tensor([slots] * len(x)))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if not training:  # masked sums round otherwise
        assert actual['output'].equal(expected['output'])


@pytest.mark.parametrize('length', [0, 3])
def test_nothing_to_read_gives_the_zero_state(length: int) -> None:
    x = make_series(t=length)
    layer = make_layer()
    before = statistics(layer)
    assert layer(x, torch.zeros(3, length, dtype=torch.bool)).eq(0).all()
    assert all(a.equal(b) for a, b in zip(before, statistics(layer), strict=True))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('norm', ['shared', 'step'])
@pytest.mark.parametrize('case', ['gaps', 'nothing'])
def test_compiled_equals_eager(case: str, training: bool, norm: str) -> None:
    valid, results = torch.tensor(VALID[case]).bool(), []
    series = make_series().where(valid[..., None, None, None], torch.nan)
    for backend in (None, 'aot_eager'):
        layer, x = make_layer(norm=norm).train(training), series.clone().requires_grad_()
        call = torch.compile(layer, fullgraph=True, backend=backend) if backend else layer
        results.append({**learnt(layer, x, valid, call=call), 'gradient of x': x.grad})
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_even_kernels_and_unknown_norms_are_refused() -> None:
    with pytest.raises(ValueError, match=r'kernel_size must be odd .* got 4'):
        ConvLSTM(2, kernel_size=4)
    with pytest.raises(ValueError, match=r"norm is 'layer', expected 'shared', 'step' or 'none'"):
        ConvLSTM(2, norm='layer')  # type: ignore[arg-type]
