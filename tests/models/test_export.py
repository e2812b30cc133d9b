"""What leaves eager PyTorch gives what eager PyTorch gives: compiled, exported, other formats."""

import copy
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import learnt
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchgeo.datasets import DependencyNotFoundError

from torchgeo_s1s2.models import ConvLSTM, FuseLSTM, export_onnx, export_program
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation

onnxruntime = pytest.importorskip('onnxruntime')

# B, T, H, W: the exported example, a single slot, more of everything.
SHAPES = [(2, 3, 64, 96), (1, 1, 64, 64), (3, 5, 96, 64)]


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    """PyTorch compiles a function eight times at most, those of other tests included."""
    torch.compiler.reset()


def build(backbone: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = smp.Unet(
        backbone, encoder_weights=None, in_channels=12, classes=5, **options
    )
    for name, buffer in model.named_buffers():  # as if it had learnt
        if name.endswith('running_mean'):
            nn.init.normal_(buffer, std=0.2)
    return model


def make_image(b: int = 2, t: int = 3, h: int = 32, w: int = 32) -> Tensor:
    """A series with gaps: slots that no sensor saw, or only one, and a sensor never seen."""
    image = torch.randn(b, t, 12, h, w, generator=torch.Generator().manual_seed(1))
    image[0, 0] = 0
    image[-1, -1, :10] = 0
    image[-1, :, 10:] = 0
    return image


IMPROVED = 'resnet18_convlstm_inception_stepnorm_fullres'
SMALL: Any = {'encoder_depth': 3, 'decoder_channels': (32, 16, 8)}  # of a stride of 8 pixels


@pytest.fixture(scope='module', params=['vgg11_convlstm_inception', 'utae_late'])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param, **SMALL).eval()


@pytest.fixture(
    scope='module', params=['resnet18_convlstm_inception', IMPROVED, 'resnet18_attention', 'utae']
)
def small(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return smp.Unet(request.param, encoder_weights=None, in_channels=12, **SMALL).eval()


@pytest.fixture(scope='module')
def program(small: nn.Module) -> ExportedProgram:
    return export_program(small)


@pytest.fixture(scope='module')
def onnx_file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('onnx') / 'new' / 'model.onnx'
    export_onnx(model, path)
    return path


@pytest.mark.parametrize('name', ['vgg11_convlstm_inception', IMPROVED, 'utae'])
def test_compiled_without_graph_breaks_in_training(name: str) -> None:
    image = make_image(h=64).double()
    eager = build(name, **(SMALL if name == 'utae' else {})).double().train()
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend='eager')
    expected, actual = learnt(eager, image), learnt(traced, image, call=compiled)
    assert {f'gradient of {name}' for name, _ in eager.named_parameters()} <= expected.keys()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-10)


def test_model_of_the_task_compiles_in_place() -> None:
    task = S1S2SemanticSegmentation(backbone='resnet18_convlstm_inception', num_classes=3).eval()
    image = make_image()
    expected = task(image)
    names = list(task.state_dict())
    task.model.compile(fullgraph=True, backend='eager')
    torch.testing.assert_close(task(image), expected, rtol=0, atol=1e-5)
    assert list(task.state_dict()) == names


@pytest.mark.parametrize('training', [False, True])
def test_shapes_without_values(small: nn.Module, training: bool) -> None:
    """On the device 'meta', where a model is laid out before its weights are loaded."""
    real = copy.deepcopy(small).train(training)
    empty = copy.deepcopy(real).to('meta')
    expected, actual = learnt(real, make_image()), learnt(empty, make_image().to('meta'))
    assert {n: x.shape for n, x in actual.items()} == {n: x.shape for n, x in expected.items()}


@pytest.mark.parametrize(('norm', 'dynamic'), [('shared', None), ('step', True)])
def test_compiled_to_kernels(norm: Any, dynamic: bool | None) -> None:
    """By inductor, what torch.compile does unless told otherwise; T is free."""
    layer = ConvLSTM(2, 4, norm=norm).eval()
    compiled = torch.compile(layer, dynamic=dynamic)
    with torch.no_grad():
        for t in (2, 3, 5):
            x, valid = torch.randn(2, t, 2, 16, 16), torch.rand(2, t) > 0.4
            torch.testing.assert_close(compiled(x, valid), layer(x, valid), rtol=0, atol=1e-5)


@pytest.mark.parametrize('shape', SHAPES)
@torch.no_grad()
def test_exported_program(
    small: nn.Module, program: ExportedProgram, shape: tuple[int, ...]
) -> None:
    image = make_image(*shape)
    torch.testing.assert_close(program.module()(image), small(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize('shape', [*SHAPES, (1, 2, 32, 32)])
@torch.no_grad()
def test_onnx_file(model: nn.Module, onnx_file: Path, shape: tuple[int, ...]) -> None:
    image = make_image(*shape)
    session = onnxruntime.InferenceSession(onnx_file)
    (actual,) = session.run(['logits'], {'image': image.numpy()})
    expected = model(image)
    assert expected.std() > 0.1  # far from what is allowed to differ
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=0, atol=1e-4)


def test_onnx_file_names_its_axes_and_stands_alone(onnx_file: Path) -> None:
    session = onnxruntime.InferenceSession(onnx_file)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert image.shape == ['batch', 'slots', 12, 'height', 'width']
    assert logits.shape == ['batch', 5, 'height', 'width']
    assert [path.name for path in onnx_file.parent.iterdir()] == ['model.onnx']


def test_export_in_training_mode_keeps_the_slots_fixed() -> None:
    torch.manual_seed(0)
    eager, traced = ConvLSTM(2, 3).double(), ConvLSTM(2, 3).double()
    traced.load_state_dict(eager.state_dict())
    x, valid = torch.randn(2, 3, 2, 8, 8).double(), torch.tensor([[True, False, True]] * 2)
    valid[0, 0] = False
    module = torch.export.export(traced, (x, valid)).module()
    torch.testing.assert_close(module(x, valid), eager(x, valid), rtol=0, atol=1e-12)
    buffers = dict(module.named_buffers())
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=1e-12)


@torch.no_grad()
def test_drop_in_exports_with_series_of_any_length() -> None:
    torch.manual_seed(0)
    model = FuseLSTM(4).eval()
    series = [torch.randn(1, 3, 32, 32, 10), torch.randn(1, 4, 32, 32, 2)]
    stack = torch.randn(1, 32, 32, 12)
    free: Any = ({1: Dim('slots_s2')}, {1: Dim('slots_s1')}, {})
    module = torch.export.export(model, (*series, stack), dynamic_shapes=free).module()
    fewer = (series[0][:, :1], series[1][:, :2], stack)
    torch.testing.assert_close(module(*fewer), model(*fewer), rtol=0, atol=1e-5)


def test_decoders_that_need_a_larger_image_and_that_cannot_be_converted(tmp_path: Path) -> None:
    name = 'resnet18_convlstm_inception_h4_t4'
    export_program(smp.PAN(name, encoder_weights=None, in_channels=12))
    model = smp.PSPNet(name, encoder_weights=None, in_channels=12)
    with pytest.raises(RuntimeError, match=r'cannot export PSPNet .* use another architecture'):
        export_onnx(model, tmp_path / 'x.onnx')


def test_other_models_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r'cannot export Unet, expected .* ConvLSTMInceptionEncoder'
    ):
        export_program(smp.Unet('resnet18', encoder_weights=None))
    task = S1S2SemanticSegmentation(backbone='resnet18_convlstm_inception', num_classes=3)
    with pytest.raises(TypeError, match=r'S1S2SemanticSegmentation.*task\.model'):
        export_program(task)


def test_missing_dependency_says_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(DependencyNotFoundError, match=r"pip install 'torchgeo-s1s2\[onnx\]'"):
        export_onnx(nn.Identity(), tmp_path / 'model.onnx')


@torch.no_grad()
def test_autocast_to_bfloat16_in_evaluation(model: nn.Module) -> None:
    """Bfloat16 has 8 bits, so an operation is off by up to 2^-9 = 0.2 %; they add up."""
    image = make_image()
    with torch.autocast('cpu', torch.bfloat16):
        output = model(image)
    assert output.dtype == torch.bfloat16
    expected = model(image)
    assert (output - expected).std() < 0.03 * expected.std()


@pytest.mark.parametrize('flat', [False, True])
@torch.no_grad()
def test_channels_last(flat: bool) -> None:
    image = make_image()
    plain = build('resnet18_convlstm_inception').eval()
    expected = plain(image)
    last = plain.to(memory_format=torch.channels_last)
    if flat:
        image = image.flatten(1, 2).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(image), expected, rtol=0, atol=1e-5)
