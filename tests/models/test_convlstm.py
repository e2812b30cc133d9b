from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import learnt
from torch import Tensor, nn

from torchgeo_s1s2.models import ConvLSTM


class Oracle:
    """The recurrence one slot after the other, with the skipping of slots spelt out.

    With statistics a step, the samples are read one observation after the other instead.
    """

    def __init__(self, layer: ConvLSTM, norm: str = 'shared') -> None:
        self.p = {name: value.clone() for name, value in layer.state_dict().items()}
        self.norm = norm

    def normalize(self, h: Tensor, training: bool, step: int) -> Tensor:
        if self.norm == 'none':
            return h
        mean, var = self.p['batchnorm.running_mean'], self.p[RUNNING_VAR]
        if self.norm == 'step':
            mean, var = mean[step], var[step]
        gain, shift = self.p['batchnorm.weight'], self.p['batchnorm.bias']
        return F.batch_norm(h, mean, var, gain, shift, training)

    def __call__(self, x: Tensor, valid: Tensor, training: bool) -> Tensor:
        if self.norm == 'step':
            x = torch.stack([torch.cat([s[v], s[~v]]) for s, v in zip(x, valid, strict=True)])
            valid = torch.arange(x.shape[1]) < valid.sum(1, keepdim=True)
        weight, bias = self.p['conv.weight'], self.p['conv.bias']
        h = x.new_zeros(len(x), len(bias) // 4, *x.shape[-2:])
        c = h.clone()
        for t in range(x.shape[1]):
            rows = valid[:, t].nonzero()[:, 0]
            if len(rows):
                gates = F.conv2d(torch.cat([x[rows, t], h[rows]], 1), weight, bias, padding='same')
                i, f, g, o = gates.chunk(4, 1)
                c[rows] = f.sigmoid() * c[rows] + i.sigmoid() * g.tanh()
                h[rows] = self.normalize(o.sigmoid() * c[rows].tanh(), training, t)
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
def test_recurrence_slot_by_slot(case: str, training: bool, norm: str) -> None:
    layer, x = make_layer(norm=norm).train(training), make_series()
    valid, before = torch.tensor(VALID[case]).bool(), layer.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    oracle = Oracle(layer, norm)
    expected = oracle(x, valid, training)
    torch.testing.assert_close(layer(x, valid), expected, rtol=0, atol=1e-12)
    with torch.no_grad():  # in strips, in evaluation
        again = make_layer(norm=norm).train(training)(x, valid)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)
    if norm == 'none':
        return
    for name in ('batchnorm.running_mean', RUNNING_VAR):
        torch.testing.assert_close(layer.state_dict()[name], oracle.p[name], rtol=0, atol=1e-12)
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
    expected = Oracle(layer, 'step')(x, torch.ones(3, 7, dtype=torch.bool), training=False)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


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
