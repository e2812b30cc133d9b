"""Two processes learn what one does, whatever each of them saw."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchgeo_s1s2.models import ConvLSTM

# Four samples, two for each process: the first process saw nothing in this batch, and no process
# saw the slot in the middle.
VALID = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1]]).bool()


def make_layer(synchronised: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    norm: Any = 'step' if synchronised else 'shared'
    layer: nn.Module = ConvLSTM(2, 3, recompute_gates=synchronised, norm=norm).double()
    if synchronised:  # as Lightning does for sync_batchnorm: true
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    return layer, torch.randn(4, 4, 2, 5, 6).double()


def learn(layer: nn.Module, x: Tensor, valid: Tensor) -> None:
    aim = torch.linspace(-1, 1, x[0, 0, 0].numel()).view_as(x[0, 0, 0]).double()
    # The mean over samples, whose gradient is that of DDP if the shares are even.
    ((layer(x, valid) - aim).square() * (2 + aim)).flatten(1).sum(1).mean().backward()


def results(layer: nn.Module) -> dict[str, Tensor]:
    gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return gradients | dict(layer.named_buffers())


def work(rank: int, port: int, synchronised: bool, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    layer, x = make_layer(synchronised)
    mine = slice(2 * rank, 2 * rank + 2)
    # DDP itself takes the converted layer on GPUs only.
    model = layer if synchronised else DistributedDataParallel(layer, broadcast_buffers=False)
    for _ in range(2):  # DDP finds what took no part at the next step
        model.zero_grad()
        learn(model, x[mine], VALID[mine])
    if synchronised:
        for parameter in layer.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
    torch.save(results(layer), folder / f'{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize('synchronised', [False, True])
def test_gradients_and_statistics(synchronised: bool, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, synchronised, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    expected = []
    for rows in [slice(4)] if synchronised else [slice(2), slice(2, 4)]:
        layer, x = make_layer(synchronised)
        for _ in range(2):
            layer.zero_grad()
            learn(layer, x[rows], VALID[rows])
        expected.append(results(layer))
    for name in expected[0].keys() - {'batchnorm.num_batches_tracked'}:
        right = [e[name] for e in expected] * (2 if synchronised else 1)
        if name in dict(layer.named_parameters()) and not synchronised:
            right = [torch.stack(right).mean(0)] * 2
        for mine, value in zip((first[name], second[name]), right, strict=True):
            torch.testing.assert_close(mine, value)
