"""Two processes learn what one does, whatever each of them saw."""

import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchgeo_s1s2.models import ImageSeries
from torchgeo_s1s2.models.norm import batch_norm, track

# Four samples, two for each process: the first process saw nothing in this batch, and no process
# saw the slot in the middle.
VALID = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1]]).bool()
SMALL = 'timm_mobilenetv3_small_050'
# Whether batch norms are synchronised, and whether the processes lack different sensors.
CASES = {
    f'{SMALL}_convlstm_inception_h4_t4': (False, True),
    f'{SMALL}_convlstm_inception_h3_t4_stepnorm_fullres': (True, True),
    f'{SMALL}_attention': (False, False),
    f'{SMALL}_attention_late_fullres': (True, True),
    'utae_late': (False, True),
}


def make(name: str) -> tuple[nn.Module, ImageSeries]:
    torch.manual_seed(0)
    synchronised, different = CASES[name]
    options: Any = {'in_channels': 12, 'decoder_channels': (8,) * 5}
    model: Any = smp.Unet(name, encoder_weights=None, **options).double()
    model.encoder.set_recompute_gates(synchronised)
    if synchronised:  # as Lightning does for sync_batchnorm: true
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    valid = torch.stack([VALID, VALID.flip(0) if different else VALID], -1)
    size = 32 if name.startswith('utae') else 64
    return model, ImageSeries(torch.randn(4, 4, 12, size, size).double(), valid)


def learn(model: nn.Module, series: Any, rows: slice) -> dict[str, Tensor]:
    """Gradients and buffers after two steps without the optimizer."""
    for _ in range(2):  # DDP finds what took no part at the next step
        model.zero_grad()
        y = model(ImageSeries(*(x[rows] for x in series[:2])))
        aim = torch.linspace(-1, 1, y[0].numel()).view_as(y[0])
        # The mean over samples, whose gradient is that of DDP if the shares are even.
        ((y - aim).square() * (2 + aim)).flatten(1).mean(1).mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients | dict(model.named_buffers())


def on_processor(norm: Any, x: Tensor) -> Tensor:
    """nn.SyncBatchNorm, which PyTorch has for GPUs only."""
    y, moments = batch_norm(norm, x, None)
    track(norm, moments)
    return y


def work(before: int, port: int, folder: Path) -> None:
    """One of the two processes, started after *before* others."""
    nn.SyncBatchNorm.forward = on_processor  # type: ignore[assignment, method-assign]
    torch.set_num_threads(1)
    results, rank = {}, 1 - before
    dist.init_process_group(
        'gloo', f'tcp://127.0.0.1:{port}', timedelta(minutes=2), rank=rank, world_size=2
    )
    for name, (synchronised, _) in CASES.items():
        model, series = make(name)
        # DDP itself takes converted layers on GPUs only.
        wrapped = model if synchronised else DistributedDataParallel(model, broadcast_buffers=False)
        found = learn(wrapped, series, slice(2 * rank, 2 * rank + 2))
        for parameter in model.parameters() if synchronised else ():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        results[name] = {key.removeprefix('module.'): value for key, value in found.items()}
    torch.save(results, folder / f'{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Results of each process, by name of the backbone; this process is one of them."""
    folder = tmp_path_factory.mktemp('processes')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.SyncBatchNorm, 'forward', on_processor)
        other = mp.spawn(work, (port, folder), nprocs=1, join=False)
        threads = torch.get_num_threads()
        work(1, port, folder)
        other.join()
        yield [torch.load(folder / f'{rank}.pt') for rank in range(2)]
        torch.set_num_threads(threads)


@pytest.mark.parametrize('name', CASES)
def test_gradients_and_statistics(name: str, found: list[Any]) -> None:
    synchronised, _ = CASES[name]
    expected = []
    for rows in [slice(4)] if synchronised else [slice(2), slice(2, 4)]:
        model, series = make(name)
        expected.append(learn(model, series, rows))
    parameters = dict(model.named_parameters())
    assert parameters.keys() <= expected[0].keys()
    for key in expected[0]:
        if key.endswith('num_batches_tracked'):
            continue
        right = [e[key] for e in expected] * (2 if synchronised else 1)
        if key in parameters and not synchronised:
            right = [torch.stack(right).mean(0)] * 2
        for mine, value in zip([f[name][key] for f in found], right, strict=True):
            torch.testing.assert_close(mine, value)
