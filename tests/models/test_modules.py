"""What works on nn.Conv2d and nn.BatchNorm2d works on the modules of the recurrent layer."""

import contextlib
import copy
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import Waits, learnt
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.ao import quantization
from torch.nn.utils import parametrizations, prune

from torchgeo_s1s2.models import ConvLSTM
from torchgeo_s1s2.models.norm import MaskedBatchNorm2d, scale_and_shift, track

VALID = torch.tensor([[True, False, True], [True, True, False]])


def make(training: bool = True) -> tuple[ConvLSTM, Tensor]:
    torch.manual_seed(0)
    return ConvLSTM(2, 3).double().train(training), torch.randn(2, 3, 2, 6, 6).double()


@pytest.mark.parametrize('name', ['conv', 'batchnorm'])
def test_hooks_see_every_slot(name: str) -> None:
    for training in (False, True):
        layer, x = make(training)
        calls: list[Any] = []
        layer.get_submodule(name).register_forward_hook(lambda *a, calls=calls: calls.append(a))
        with torch.set_grad_enabled(training):
            layer(x, VALID)
        assert len(calls) == 3


@pytest.mark.parametrize('gradients', [False, True])
def test_an_adapter_of_the_convolution_counts(gradients: bool) -> None:
    layer, x = make(training=False)
    with torch.set_grad_enabled(gradients):
        before = layer(x)
        layer.add_module('conv', nn.Sequential(layer.conv, nn.Hardtanh(-0.1, 0.1)))
        assert not layer(x).allclose(before)


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize('gradients', [False, True])
def test_a_batch_norm_of_another_kind_counts(gradients: bool) -> None:
    """In evaluation; the last hidden state is what it gives."""
    layer, x = make(training=False)
    with torch.set_grad_enabled(gradients):
        before = layer(x[:, :1])
        layer.batchnorm = Doubled(3).double().eval()
        torch.testing.assert_close(layer(x[:, :1]), 2 * before)


def test_a_quantised_convolution_counts() -> None:
    """Within the eight bits of its numbers, with and without gradients."""
    layer, x = make(training=False)
    layer, x = layer.float(), x.float()
    expected = layer(x, VALID)
    layer.conv = quantization.QuantWrapper(layer.conv)  # type: ignore[assignment]
    layer.conv.qconfig = quantization.default_qconfig  # type: ignore[assignment]
    quantization.prepare(layer, inplace=True)
    layer(x, VALID)
    quantization.convert(layer, inplace=True)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            error = (layer(x, VALID) - expected).abs().max()
        assert 0 < error < 0.2 * expected.std()


@pytest.mark.parametrize('kind', ['prune', 'weight_norm'])
def test_what_changes_the_weight_trains(kind: str) -> None:
    layer, x = make()
    if kind == 'prune':
        prune.l1_unstructured(layer.conv, 'weight', 0.5)
    else:
        parametrizations.weight_norm(layer.conv)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append((layer(x, VALID) - 1).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]
    if kind == 'prune':
        layer(x)
        assert (layer.conv.weight == 0).sum() == round(layer.conv.weight.numel() / 2)


def test_derivatives_of_every_kind() -> None:
    layer, x = make(training=False)
    x = x[:, :, :, :3, :3]
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x, VALID), (x,), fast_mode=True)
    tangent = torch.ones_like(x)
    value = x.detach()
    forward: Tensor = torch.func.jvp(lambda x: layer(x, VALID), (value,), (tangent,))[1]
    step = 1e-5 * tangent
    difference = (layer(value + step, VALID) - layer(value - step, VALID)) / 2e-5
    torch.testing.assert_close(forward, difference, rtol=1e-6, atol=1e-7)
    with torch.no_grad():  # as for an ensemble
        each = torch.vmap(lambda x: layer(x[None], VALID[:1])[0])(value)
        torch.testing.assert_close(each, layer(value, VALID[:1].expand(2, -1)))


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('name', ['resnet18_convlstm_inception_h4_t4', 'resnet18_attention_late'])
def test_gradients_that_functions_of_the_weights_have(name: str, recompute: bool) -> None:
    model = smp.encoders.get_encoder(name, in_channels=24, depth=1, weights=None).double().eval()
    x, seen = torch.randn(2, 2, 12, 8, 8).double(), VALID[:, :2, None].expand(-1, -1, 2)

    def outputs(weights: dict[str, Tensor], x: Tensor, seen: Tensor) -> Tensor:
        features = torch.func.functional_call(model, weights, (x, seen))[-1]
        return features.square().mean((1, 2, 3))

    def total(weights: dict[str, Tensor], x: Tensor, seen: Tensor) -> Tensor:
        return outputs(weights, x[None], seen[None]).sum()

    outputs({}, x, seen).sum().backward()
    used = {n: p for n, p in model.named_parameters() if p.grad is not None}
    leaves = {n: p.detach().clone().requires_grad_() for n, p in used.items()}
    with torch.no_grad():
        for parameter in used.values():
            parameter.zero_()
    model.set_recompute_gates(recompute)
    y, tensors = outputs(leaves, x, seen), [*leaves.values()]
    unit = torch.eye(2).double()
    several = torch.autograd.grad(y, tensors, unit, retain_graph=True, is_grads_batched=True)
    again = torch.autograd.grad(y.sum(), tensors)
    weights = {n: p.detach() for n, p in leaves.items()}
    each = torch.func.vmap(torch.func.grad(total), (None, 0, 0))(weights, x, seen)
    for name, two, one in zip(leaves, several, again, strict=True):
        for mine in (two.sum(0), one, each[name].sum(0)):
            torch.testing.assert_close(mine, used[name].grad)


def test_a_batch_norm_without_weights() -> None:
    norm, steps = MaskedBatchNorm2d(3, steps=2).eval(), torch.tensor([0, 1])
    expected = scale_and_shift(norm, steps)
    norm.affine, norm.weight, norm.bias = False, None, None  # type: ignore[assignment]
    torch.testing.assert_close(scale_and_shift(norm, steps), expected)


@pytest.mark.parametrize('momentum', [0.1, None])
def test_statistics_are_those_of_the_samples_that_saw_the_slot(momentum: float | None) -> None:
    layer, _ = make()
    norm, plain = layer.batchnorm, nn.BatchNorm2d(3, momentum=momentum).double()
    norm.momentum = momentum
    for rows in ([0, 2], [1], [], [0, 1, 2]):
        h = torch.randn(3, 3, 4, 5).double()
        mask = torch.zeros(3, 1, 1, 1, dtype=torch.bool)
        mask[rows] = True
        actual, moments = norm(h, mask)
        track(norm, moments)
        if rows:
            torch.testing.assert_close(actual[rows], plain(h[rows]))
        for mine, other in zip(norm.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(mine, other)


def test_statistics_of_many_values_in_half_precision() -> None:
    """131,072 values a channel, more than float16 can count."""
    layer, x = ConvLSTM(1, 1), torch.randn(2, 1, 1, 256, 256)
    exact, half = copy.deepcopy(layer), copy.deepcopy(layer).half()
    y = exact(x, torch.ones(2, 1, dtype=torch.bool))
    z = half(x.half(), torch.ones(2, 1, dtype=torch.bool))
    assert (z.float() - y).abs().max() < 0.02
    for mine, other in zip(half.batchnorm.buffers(), exact.batchnorm.buffers(), strict=True):
        torch.testing.assert_close(mine.to(other.dtype), other, rtol=0.01, atol=1e-3)


def test_what_every_sample_saw_is_read_without_masks() -> None:
    """A mode that may stand for another device keeps the masks; the numbers are the same."""
    found = []
    for mode in (contextlib.nullcontext(), Waits()):
        layer, x = make()
        x.requires_grad_()
        with mode:
            found.append({**learnt(layer, x, VALID | True), 'gradient of x': x.grad})
    torch.testing.assert_close(*found)
    x = x.detach()[:, :2, :, :3, :3].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x, VALID[:, :2] | True), (x,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(x, VALID[:, :2]).shape == (2, 3, 3, 3)


def test_torchscript_is_refused() -> None:
    layer, x = make(training=False)
    model = smp.Unet('utae', encoder_weights=None, in_channels=12)
    for module, inputs in ((layer, (x, VALID)), (model, (torch.randn(1, 2, 12, 32, 32),))):
        with pytest.raises(RuntimeError, match='export_onnx'):
            torch.jit.trace(module, inputs, check_trace=False)
        with pytest.raises(RuntimeError, match='export_onnx'):
            torch.jit.script(module)
