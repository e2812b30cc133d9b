import json
import os
import resource
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import geopandas as gpd
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import from_origin
from shapely import MultiPolygon, box
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgeo.main import main

import benchmarks.run
import torchgeo_s1s2
from benchmarks.pastis import save
from torchgeo_s1s2.datasets import ClassScheme, LandCoverClass, rasters
from torchgeo_s1s2.datasets.rasters import Grid

mpl.use('agg')
# Workers of pytest-xdist share the cores, and so do the commands that they start.
WORKERS = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
torch.set_num_threads(THREADS)
os.environ['OMP_NUM_THREADS'] = str(THREADS)

SHARED = Path(__file__).parents[2] / 'shared'
SHIPPED = Path(torchgeo_s1s2.__file__).parent / 'conf'
ORIGINS = {'31UEQ': (32631, 500000.0, 5500000.0), '32ULU': (32632, 300000.0, 5400000.0)}
S2_DATES = ('20200706', '20200805', '20200904', '20201108')
BANDS = ('descriptions', 'scales', 'offsets', 'colorinterp')
S1_DATES = ('20200704', '20200807', '20200904', '20201111')
COMMON: tuple[str, ...] = ('blue', 'green', 'red', 'rededge1', 'rededge2', 'rededge3')
COMMON += ('nir', 'nir08', 'swir16', 'swir22')
SCHEME = ClassScheme(
    (
        LandCoverClass('Town', (255, 0, 0), (1,)),
        LandCoverClass('Field & meadow', (0, 255, 0), (2,)),
        LandCoverClass('Water', (0, 0, 255), (3,)),
    ),
    ids=(1, 4, 7),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long tests of the command line: no process waits for them at the end."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


def write_raster(
    path: Path,
    data: NDArray[Any],
    epsg: int,
    left: float,
    top: float,
    res: float = 10,
    mask: NDArray[Any] | None = None,
    **options: Any,
) -> None:
    """A raster; options are of its profile, or what is set of its bands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = data.shape
    grid = Grid(CRS.from_epsg(epsg), from_origin(left, top, res, res), width, height)
    profile = {'driver': 'GTiff', 'count': count, 'dtype': data.dtype.name} | vars(grid)
    bands = {name: options.pop(name) for name in BANDS if name in options}
    tags = options.pop('tags', {})
    inside = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True)
    with inside, rasterio.open(path, 'w', **(profile | options)) as dst:
        for name, values in bands.items():
            setattr(dst, name, values)
        dst.update_tags(**tags)
        dst.write(data)
        if mask is not None:
            dst.write_mask(mask)


def read_raster(path: Path) -> NDArray[Any]:
    """Bands (C, H, W) as they are on disk."""
    with rasterio.open(path) as src:
        value: NDArray[Any] = src.read()
    return value


def write_label_file(
    root: Path,
    tile: str,
    x: int,
    y: int,
    s2: Sequence[str] = S2_DATES,
    s1: Sequence[str] = S1_DATES,
    labels: str = '2;6',
    **changes: str,
) -> Path:
    epsg = ORIGINS[tile][0]
    content = {
        'corresponding_s2': ';'.join(f'{tile}_{d}_S2_{x}_{y}.tif' for d in s2),
        'corresponding_s1': ';'.join(f'{tile}_{d}_S1_{x}_{y}.tif' for d in s1),
        'projection': CRS.from_epsg(epsg).to_wkt(version='WKT1_GDAL'),
        'labels': labels,
    } | changes
    path = root / 'labels' / f'{tile}_{x}_{y}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_patch(
    root: Path,
    tile: str,
    x: int = 0,
    y: int = 0,
    size: int = 32,
    s2: Mapping[str, NDArray[np.generic]] | None = None,
    s1: Mapping[str, NDArray[np.generic]] | None = None,
    labels: NDArray[np.generic] | None = None,
    **options: Mapping[str, Any],
) -> None:
    """A patch whose values a person can work out.

    S2 band b (0..9) of date t (0..3) is 1000 * t + 100 * b + column, S1 is 0.1 (VV) and 0.01 (VH),
    the left half is label 6 and the right half label 2. Options are of ``write_raster``, by folder.
    """
    epsg, left, top = ORIGINS[tile]
    column = np.arange(size)
    if s2 is None:
        first = np.zeros((size, 1), np.int16) + 100 * np.arange(10)[:, None, None] + column
        s2 = {date: (1000 * t + first).astype(np.int16) for t, date in enumerate(S2_DATES)}
    if s1 is None:
        power = np.stack([np.full((size, size), p, np.float32) for p in (0.1, 0.01)])
        s1 = dict.fromkeys(S1_DATES, power)
    if labels is None:
        labels = np.broadcast_to(np.where(column < size // 2, 6, 2), (size, size)).astype(np.uint8)
    place = epsg, left + 10 * x, top - 10 * y
    for sensor, images in (('s2', s2), ('s1', s1)):
        (root / sensor).mkdir(parents=True, exist_ok=True)
        for date, image in images.items():
            path = root / sensor / f'{tile}_{date}_{sensor.upper()}_{x}_{y}.tif'
            write_raster(path, image, *place, **options.get(f'{sensor}_options', {}))
    path = root / 'ground_reference' / f'{tile}_GR_{x}_{y}.tif'
    write_raster(path, labels[None], *place, **options.get('labels_options', {}))
    write_label_file(root, tile, x, y, tuple(s2), tuple(s1))


PASTIS_DAYS = {'S2': ('20181001', '10D'), 'S1A': ('20181002', '6D'), 'S1D': ('20181004', '7D')}
"""First acquisition of PASTIS, and the time to the next one."""


def write_pastis(
    root: Path,
    counts: Mapping[int, Sequence[int]] | None = None,
    size: int = 32,
    tile: str = 't30uxv',
) -> Path:
    """PASTIS-R as it is published, with values that a person can work out.

    Patch 10000 + i lies i * size pixels east of (600000, 5500000) in UTM 30, in fold i % 5 + 1.
    Date t of Sentinel-2 holds 1000 * (t + 1) + 100 * band + column, of Sentinel-1 VV - t dB, with
    VV of -10 (ascending) and -11 (descending) and VH 6 dB below. Rows are of the classes 0..18 in
    turn, and the last column is void.

    Args:
        root: Where the folder PASTIS-R comes.
        counts: Number of dates of S2, S1A and S1D by number of the patch.
        size: Height and width.
        tile: Name of the tile.
    """
    root = root / 'PASTIS-R'
    counts = counts or {i: (3 + i, 5 + i, 6 + i) for i in range(5)}
    rows, geometry = [], []
    for i, numbers in counts.items():
        dates: dict[str, Any] = {}
        for (sensor, (first, step)), count in zip(PASTIS_DAYS.items(), numbers, strict=True):
            days = pd.date_range(first, periods=count, freq=step).strftime('%Y%m%d')
            dates[f'dates-{sensor}'] = {str(t): int(day) for t, day in enumerate(days)}
            path = root / f'DATA_{sensor}' / f'{sensor}_{10000 + i}.npy'
            save(path, _values(sensor, count, size))
        target = np.zeros((3, size, size), np.uint8)
        target[0] = (np.arange(size) % 19)[:, None]
        target[0, :, -1] = 19
        save(root / 'ANNOTATIONS' / f'TARGET_{10000 + i}.npy', target)
        left, top = 600000 + 10 * size * i, 5500000
        geometry.append(MultiPolygon([box(left, top - 10 * size, left + 10 * size, top)]))
        rows.append({'ID_PATCH': 10000 + i, 'Fold': i % 5 + 1, 'TILE': tile, **dates})
    metadata = gpd.GeoDataFrame(rows, geometry=geometry, crs=32630).to_crs(2154)
    (root / 'metadata.geojson').write_text(metadata.to_json(drop_id=True))
    return root


def _values(sensor: str, count: int, size: int) -> NDArray[Any]:
    date = np.arange(count)[:, None, None, None]
    if sensor == 'S2':
        band, column = np.arange(10)[:, None, None], np.arange(size)
        return (1000 * (date + 1) + 100 * band + column).astype(np.int16).repeat(size, 2)
    vv = {'S1A': -10, 'S1D': -11}[sensor] - date
    bands = np.concatenate([vv, vv - 6, np.full_like(vv, 6)], 1).astype(np.float16)
    return bands.repeat(size, 2).repeat(size, 3)


def quiet_trainer(root: Path | None = None, **options: Any) -> Trainer:
    """A trainer for one epoch on the CPU, which writes and shows only what options ask for."""
    quiet = ('logger', 'enable_checkpointing', 'enable_progress_bar', 'enable_model_summary')
    defaults: dict[str, Any] = {'accelerator': 'cpu', 'log_every_n_steps': 1, 'max_epochs': 1}
    return Trainer(default_root_dir=root, **(defaults | dict.fromkeys(quiet, False) | options))


class Board(CSVLogger):
    """A logger that takes figures, as TensorBoard's does."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, name='', version='')
        self.figures: list[tuple[str, int]] = []

    @property
    def experiment(self) -> Any:
        writer = super().experiment
        writer.add_figure = lambda name, figure, global_step: self.figures.append(
            (name, global_step)
        )
        return writer


WAITING = 'nonzero', 'is_nonzero', '_local_scalar_dense', 'bincount', '_unique2', 'masked_select'


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU, as do copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split('.')[0]
        masks = (t for t in args[1] if t is not None) if name == 'index' else ()
        if name in WAITING or any(mask.dtype == torch.bool for mask in masks):
            self.found[name] += 1
        result = func(*args, **(kwargs or {}))
        tensors = (x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
        if len({x.device for x in tensors}) > 1:
            self.found['copy'] += 1
        return result


@contextmanager
def trainings(run: Callable[..., object] = benchmarks.run.run) -> Iterator[list[list[str]]]:
    """Let benchmarks train in this process, which saves the start of another; options of each."""
    real, options = subprocess.run, list[list[str]]()

    def here(command: list[str], **how: Any) -> Any:
        if 'benchmarks.run' not in command:
            return real(command, **how)
        options.append(command[3:])
        try:
            run(*command[3:])
        except OSError:
            return subprocess.CompletedProcess(command, 1)
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, 'run', here)
        yield options


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file become larger than some bytes, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def learnt(
    model: nn.Module, *inputs: Any, call: Callable[..., Tensor] | None = None
) -> dict[str, Tensor]:
    """Output, gradients and buffers after a training step without the optimizer."""
    output = (model if call is None else call)(*inputs)
    # Weights that differ from pixel to pixel: batch norm has no gradient of a mere sum.
    scale = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    (output * scale.view_as(output)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    results = {f'gradient of {name}': value for name, value in gradients.items()}
    return {'output': output.detach(), **results, **dict(model.named_buffers())}


def torchgeo(folder: Path, *arguments: str) -> None:
    """What the command ``torchgeo`` runs, in a folder."""
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['torchgeo', *arguments])
        main()


def run_script(folder: Path, script: str) -> str:
    """Run ``two.py``, which starts processes of its own, in a folder; what it printed."""
    (folder / 'two.py').write_text(script)
    done = subprocess.run(
        [sys.executable, 'two.py'],
        cwd=folder,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder: Path) -> list[dict[str, Any]]:
    """Rows that a benchmark has written."""
    return list(json.loads((folder / 'results.json').read_text())['results'])


def random_images(rng: np.random.Generator, size: int, most: int = 9000) -> dict[str, Any]:
    """Noise of both sensors, as arguments of ``write_patch``."""
    s2 = {d: rng.integers(1, most, (10, size, size)).astype(np.int16) for d in S2_DATES}
    s1 = {d: rng.uniform(0.01, 1, (2, size, size)).astype(np.float32) for d in S1_DATES}
    return {'s2': s2, 's1': s1}


@pytest.fixture
def two_zones(tmp_path: Path) -> Path:
    """Two neighbouring patches of 32 x 32 in zone 31 and one in zone 32."""
    root = tmp_path / 'data'
    for tile, x in (('31UEQ', 0), ('31UEQ', 33), ('32ULU', 0)):
        write_patch(root, tile, x)
    return root


@pytest.fixture
def windows_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Bands, height and width of each window that is read of a raster from now on."""
    shapes: list[tuple[int, ...]] = []
    real = rasters._values

    def values(*args: Any) -> Any:
        value = real(*args)
        shapes.append(value.shape)
        return value

    monkeypatch.setattr(rasters, '_values', values)
    return shapes


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f'{name} is not beside the project')
    return path


@pytest.fixture(scope='session')
def real_sample() -> Path:
    """One real patch in the layout of MultiSenGE."""
    return _shared('real_sample')


@pytest.fixture(scope='session')
def real_foreign() -> Path:
    """Three real places as another source gives them, without label files."""
    return _shared('real_foreign')


@pytest.fixture(scope='session')
def reference() -> Mapping[str, NDArray[Any]]:
    """Outputs of the original model for weights and inputs that a formula sets."""
    with np.load(_shared('reference') / 'original_outputs.npz') as file:
        return dict(file)


@pytest.fixture(scope='session')
def real_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root with the 8,157 real label files and nothing else."""
    root = tmp_path_factory.mktemp('multisenge')
    with tarfile.open(_shared('multisenge/labels.tar.xz')) as tar:
        tar.extractall(root, filter='data')
    return root
