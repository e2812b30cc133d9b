from collections.abc import Mapping
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.plain import PlainFuseLSTM
from torchgeo_s1s2.models import FuseLSTM, fuselstm_to_unet, unet_to_fuselstm

# Case: batch, Sentinel-2 dates, Sentinel-1 dates, image size.
CASES = {'a': (2, 4, 4, 32), 'b': (1, 5, 3, 64)}

# Numbers of the original model in case a.
PIXEL = (1, slice(None), 20, 11)
EVAL_PIXEL = [
    *(0.092898577, 0.091532148, 0.094947822, 0.10175993, 0.10870223),
    *(0.11182725, 0.10915705, 0.1023623, 0.095333047, 0.091479704),
]
EVAL_CLASS_MEANS = [
    *(0.093096211, 0.091595942, 0.094896748, 0.10161706, 0.10850805),
    *(0.11164421, 0.1090506, 0.10237346, 0.095472761, 0.091744949),
]
CHANNELS = [0, 7, 15, 31]
STATISTICS = {
    'convLSTM_s2.batchnorm.running_mean': [0.016469371, -0.038325854, -0.054423675, -0.055726945],
    'convLSTM_s2.batchnorm.running_var': [0.61533964, 0.49830946, 0.49834058, 0.56081212],
    'convLSTM_s1.batchnorm.running_mean': [0.06502483, 0.0078989584, -0.017195215, -0.057796415],
    'convLSTM_s1.batchnorm.running_var': [0.77915186, 0.8215003, 0.79376751, 0.69130337],
}


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in -1..1 that depend on a name only."""
    n = np.arange(np.prod(shape, dtype=int))
    values = np.sin(n * 0.7390851332151607 + crc32(name.encode()) % 100003)
    return torch.from_numpy(values.reshape(shape))


def formula(name: str, like: Tensor) -> Tensor:
    """The weight for which the original's numbers were made."""
    if name.endswith('num_batches_tracked'):
        return torch.zeros_like(like)
    w = wave(name, tuple(like.shape))
    if name.endswith('running_var'):
        w = 1 + 0.25 * w
    elif like.ndim == 4:
        w = w * np.sqrt(6 / np.prod(like.shape[1:]))
    elif name.endswith('.weight'):
        w = 1 + 0.1 * w
    else:
        w = 0.1 * w
    return w.float()


def make_inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    b, dates_s2, dates_s1, size = CASES[case]
    return (
        wave('x_s2', (b, dates_s2, size, size, 10)).float(),
        wave('x_s1', (b, dates_s1, size, size, 2)).float(),
        wave('x_stack', (b, size, size, 12)).float(),
    )


@cache
def weights() -> dict[str, Tensor]:
    return {name: formula(name, value) for name, value in FuseLSTM().state_dict().items()}


def set_weights[M: nn.Module](model: M) -> M:
    model.load_state_dict(weights())
    return model


@pytest.fixture
def model() -> FuseLSTM:
    return set_weights(FuseLSTM()).eval()


def first_dates(x_s2: Tensor, x_s1: Tensor) -> Tensor:
    return torch.cat([x_s2[:, 0], x_s1[:, 0]], dim=-1)


def as_image(x_s2: Tensor, x_s1: Tensor) -> Tensor:
    """(B, T, 12, H, W) for the registered backbone."""
    return torch.cat([x_s2, x_s1], dim=-1).movedim(-1, 2)


def test_numbers_of_the_original(model: FuseLSTM) -> None:
    output = model(*make_inputs('a')).detach()
    assert output[PIXEL].tolist() == pytest.approx(EVAL_PIXEL, abs=1e-6)
    assert output.mean((0, 2, 3)).tolist() == pytest.approx(EVAL_CLASS_MEANS, abs=1e-6)
    model.train()(*make_inputs('a'))
    state = model.state_dict()
    for name, values in STATISTICS.items():
        assert state[name][CHANNELS].tolist() == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize('kind', [FuseLSTM, PlainFuseLSTM])
@pytest.mark.parametrize('case', CASES)
def test_all_numbers_of_the_original(
    case: str, kind: type[nn.Module], reference: Mapping[str, NDArray[Any]]
) -> None:
    """Also for the plain model, on which other tests and the benchmarks rely.

    The original's outputs in training mode are left to the next test: the U-Net's centre block
    normalises few and nearly equal values, so that single precision decides about them.
    """
    model = set_weights(kind())
    assert list(model.state_dict()) == reference['keys'].tolist()
    inputs = make_inputs(case)
    with torch.no_grad():
        output = model.eval()(*inputs)
        model.train()(*inputs)
    output = output.softmax(1) if kind is PlainFuseLSTM else output
    np.testing.assert_allclose(output, reference[f'{case}_eval'], rtol=0, atol=1e-5)
    for sensor in ('s2', 's1'):
        for name in ('running_mean', 'running_var'):
            actual = model.state_dict()[f'convLSTM_{sensor}.batchnorm.{name}']
            expected = reference[f'{case}_convLSTM_{sensor}_{name}']
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_probabilities_are_a_softmax_of_the_logits_with_classes_last_on_request(
    model: FuseLSTM,
) -> None:
    inputs = make_inputs('b')
    exponentials = model.logits(*inputs).exp()
    expected = exponentials / exponentials.sum(1, keepdim=True)
    torch.testing.assert_close(model(*inputs), expected)
    other = set_weights(FuseLSTM(channels_last_output=True)).eval()
    assert other(*inputs).equal(model(*inputs).permute(0, 2, 3, 1))


def test_the_encoder_is_frozen_unless_told_otherwise() -> None:
    model = FuseLSTM()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith('unet.encoder.'), name
    other = FuseLSTM(freeze_encoder=False, recompute_gates=True)
    assert all(p.requires_grad for p in other.parameters())
    assert other.convLSTM_s2.recompute_gates
    assert other.convLSTM_s1.recompute_gates
    # Nothing else in the encoder can change: it has no batch norm.
    assert not list(model.unet.encoder.buffers())


@pytest.mark.parametrize('training', [False, True])
def test_registered_backbone_gives_the_same_logits(training: bool) -> None:
    model = set_weights(FuseLSTM()).double().train(training)
    unet = smp.Unet('vgg16_convlstm_inception', encoder_weights=None, in_channels=48, classes=10)
    unet.load_state_dict(fuselstm_to_unet(weights()))
    unet.double().train(training)
    x_s2, x_s1, _ = (x.double() for x in make_inputs('a'))
    with torch.no_grad():
        expected = model.logits(x_s2, x_s1, first_dates(x_s2, x_s1))
        actual = unet(as_image(x_s2, x_s1))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for name, value in fuselstm_to_unet(model.state_dict()).items():
        torch.testing.assert_close(unet.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_renaming_there_and_back_keeps_the_weights() -> None:
    back = unet_to_fuselstm(fuselstm_to_unet(weights()))
    assert list(back) == list(weights())
    assert all(value is weights()[name] for name, value in back.items())


def test_foreign_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'module\.conv\.bias'.* starting with convLSTM_s2\."):
        fuselstm_to_unet({'module.conv.bias': torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'convLSTM_s2\.x'.* starting with encoder\.convlstm\."):
        unet_to_fuselstm({'convLSTM_s2.x': torch.zeros(1)})


@pytest.mark.parametrize(
    ('name', 'axis', 'message'),
    [
        ('x_s2', 2, r'x_s2 has shape \(2, 4, 10, 32, 32\), expected \(B, T2, H, W, 10\)'),
        ('x_s1', 2, r'x_s1 has shape \(2, 4, 2, 32, 32\), expected \(B, T1, H, W, 2\)'),
        ('x_stack', 1, r'x_stack has shape \(2, 12, 32, 32\), expected \(B, H, W, 12\)'),
    ],
)
def test_channels_first_is_refused(model: FuseLSTM, name: str, axis: int, message: str) -> None:
    inputs = dict(zip(('x_s2', 'x_s1', 'x_stack'), make_inputs('a'), strict=True))
    inputs[name] = inputs[name].movedim(-1, axis)
    with pytest.raises(ValueError, match=message):
        model(**inputs)
