"""What a GPU gives beside the CPU, and whether a step ever makes the host wait for it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
from conftest import learnt, quiet_trainer, read_raster, write_patch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from torchgeo_s1s2.callbacks import GeoTIFFWriter
from torchgeo_s1s2.datamodules import MultiSenGEDataModule
from torchgeo_s1s2.datasets import ClassScheme, LandCoverClass
from torchgeo_s1s2.models import ConvLSTM, ImageSeries, export_onnx, export_program
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
GPU = 'cuda'
# One of each kind: recurrent as in the paper, improved, attention of each kind.
BACKBONES = (
    'vgg11_convlstm_inception',
    'resnet18_convlstm_inception_stepnorm_fullres',
    'resnet18_attention_fullres',
    'utae_late',
)


def make(backbone: str, t: int = 3) -> tuple[Any, Any]:
    """A model in double precision, and two series with gaps, on the CPU."""
    torch.manual_seed(0)
    model = smp.Unet(backbone, encoder_weights=None, in_channels=12, classes=3)
    image = torch.randn(2, t, 12, 64, 64, dtype=torch.float64)
    valid = torch.rand(2, t, 2) > 0.3
    days = torch.randint(1, 366, (2, t, 2))
    return model.double(), ImageSeries(image, valid, days)


def moved(series: Any, dtype: torch.dtype = torch.float64) -> ImageSeries:
    image, valid, days = series
    return ImageSeries(image.to(GPU, dtype), valid.to(GPU), days.to(GPU))


def on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in values.items()}


@contextmanager
def no_waits() -> Iterator[None]:
    """Lets PyTorch raise where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('backbone', BACKBONES)
def test_a_gpu_learns_what_a_cpu_learns(backbone: str, recompute: bool) -> None:
    model, series = make(backbone)
    there = copy.deepcopy(model).to(GPU)
    there.encoder.set_recompute_gates(recompute)
    expected, actual = learnt(model, series), learnt(there, moved(series))
    torch.testing.assert_close(on_cpu(actual), expected, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        expected, actual = model.eval()(series), there.eval()(moved(series))
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-6, atol=1e-9)


def test_a_series_without_gaps_makes_no_host_wait_and_learns_the_same() -> None:
    torch.manual_seed(0)
    model, x = ConvLSTM(2, 4).double(), torch.randn(2, 3, 2, 16, 16, dtype=torch.float64)
    there, images = copy.deepcopy(model).to(GPU), x.to(GPU)
    with no_waits():
        loss = there(images).square().mean()
        loss.backward()
    there.zero_grad()
    there.load_state_dict(model.state_dict())
    actual = on_cpu(learnt(there, images))
    torch.testing.assert_close(actual, learnt(model, x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('backbone', BACKBONES)
def test_autocast_is_near_to_double(backbone: str, dtype: torch.dtype) -> None:
    model, series = make(backbone)
    expected = model.eval()(series)
    there, images = model.float().to(GPU), moved(series, torch.float32)
    with torch.no_grad(), torch.autocast(GPU, dtype):
        actual = there(images).double().cpu()
    assert (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('backbone', ['vgg11_convlstm_inception', 'utae'])
def test_compiled_for_a_gpu(backbone: str, training: bool) -> None:
    torch._dynamo.reset()
    model, series = make(backbone)
    there = model.to(GPU).train(training)
    traced, images = copy.deepcopy(there), moved(series)
    compiled = torch.compile(traced, fullgraph=True)
    expected, actual = learnt(there, images), learnt(traced, images, call=compiled)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('backbone', BACKBONES[:2])  # attention counts the dates that were seen
def test_a_training_step_makes_no_host_wait(tmp_path: Path, backbone: str) -> None:
    """Neither the model nor the loss, the metrics or the logging, once the first step is taken."""
    task = S1S2SemanticSegmentation(backbone=backbone, num_classes=3)
    step = task.training_step

    def checked(batch: Any, batch_idx: int) -> Tensor:
        with no_waits() if batch_idx else nullcontext():
            return step(batch, batch_idx)

    task.training_step = checked  # type: ignore[assignment, method-assign]
    _, series = make(backbone)
    mask = torch.randint(0, 3, (2, 64, 64))
    batch = {'image': series.image.float(), 'valid': series.valid, 'mask': mask}
    batches: Any = DataLoader([batch, batch], batch_size=None)  # type: ignore[arg-type]
    quiet_trainer(tmp_path, accelerator='gpu', devices=1).fit(task, batches)


@pytest.mark.parametrize('backbone', ['resnet18_convlstm_inception', 'utae'])
def test_an_exported_program_stays_on_the_gpu(backbone: str) -> None:
    model, series = make(backbone, t=5)
    there, image = model.to(GPU).eval(), series.image.to(GPU)
    with torch.no_grad():
        actual = export_program(there).module()(image)
        torch.testing.assert_close(actual, there(image), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('backbone', ['resnet18_convlstm_inception', 'utae'])
def test_an_onnx_file_is_that_of_a_gpu(tmp_path: Path, backbone: str) -> None:
    import onnxruntime

    model, series = make(backbone)
    export_onnx(model.float().to(GPU).eval(), tmp_path / 'model.onnx')
    image = series.image.float()
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    (logits,) = session.run(None, {'image': image.numpy()})
    with torch.no_grad():
        expected = model.cpu()(image)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_one_process_of_ddp_learns_what_the_model_alone_learns(
    tmp_path: Path, backbone: str
) -> None:
    model, series = make(backbone)
    there = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).to(GPU)
    dist.init_process_group('nccl', f'file://{tmp_path / "store"}', rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(there, device_ids=[0])
        actual = learnt(there, moved(series), call=wrapped)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(on_cpu(actual), learnt(model, series), rtol=1e-6, atol=1e-9)


def test_a_map_is_that_of_a_cpu(tmp_path: Path) -> None:
    """Fitted on the GPU, in mixed precision; mapped there and on the CPU."""
    for tile in ('32ULU', '31UEQ'):
        write_patch(tmp_path, tile, 0)
    splits = {'train': ['32ULU'], 'val': ['31UEQ'], 'test': ['31UEQ'], 'predict': ['31UEQ']}
    scheme = ClassScheme(
        (LandCoverClass('Town', (255, 0, 0), (2,)), LandCoverClass('Field', (0, 255, 0), (6,)))
    )
    data: Any = MultiSenGEDataModule(tmp_path, batch_size=1, classes=scheme, splits=splits)
    task = S1S2SemanticSegmentation(backbone='utae', num_classes=2)
    gpu: Any = {'accelerator': 'gpu', 'devices': 1}
    quiet_trainer(tmp_path, precision='bf16-mixed', max_epochs=3, **gpu).fit(task, data)
    maps = []
    for name, options in {'gpu': gpu, 'cpu': {}}.items():
        writer = GeoTIFFWriter(tmp_path / name, confidence=True)
        quiet_trainer(tmp_path, callbacks=[writer], **options).predict(task, data)
        maps.append([read_raster(path)[0] for path in sorted((tmp_path / name).rglob('*.tif'))])
    (classes, percent), (expected, certain) = maps
    assert (np.abs(percent.astype(int) - certain) <= 2).all()
    assert (classes == expected)[certain > 52].all()
