"""Time and memory of starting, reading, training and mapping.

    OMP_NUM_THREADS=1 python -m benchmarks.data startup --labels labels.tar.xz
    OMP_NUM_THREADS=1 python -m benchmarks.data reading crops statistics training mapping

Memory is that of a process of its own, beyond what it has after its imports; files are in the cache
of the operating system. Scenes are synthetic patches, mirrored until they fill their size.
"""

import argparse
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rasterio
from lightning.pytorch import Callback, Trainer
from rasterio.transform import from_origin

from benchmarks.common import Row, alone, alternate, count, existing, measured, provenance, report
from torchgeo_s1s2.callbacks import SceneWriter
from torchgeo_s1s2.datamodules import MultiSenGEDataModule
from torchgeo_s1s2.datamodules.statistics import Statistics
from torchgeo_s1s2.datasets import SENSOR_BANDS, Catalog, MultiSenGE, copy_series
from torchgeo_s1s2.datasets.catalog import CACHE, GROUND_REFERENCE, KEYS, LABELS, reference_name
from torchgeo_s1s2.datasets.labels import write_label_files
from torchgeo_s1s2.datasets.rasters import GDAL_OPTIONS, Grid, crs_of
from torchgeo_s1s2.datasets.synthetic import write_synthetic
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation

Read = Callable[[int], object]
SCENE, VAL = '31UFQ', '31UFP'
SPLITS = {'train': [SCENE], 'val': [VAL]}
BASELINE = 'rasterio, GDAL_DISABLE_READDIR_ON_OPEN=EMPTY_DIR'


def startup(options: argparse.Namespace) -> Iterator[Row]:
    """Starts on stand-ins of the images that label files name, the fastest of each kind."""
    if options.labels is None:
        raise SystemExit("startup needs --labels, an archive of MultiSenGE's label files")
    with TemporaryDirectory() as name:
        images = write_stand_ins(options.labels, Path(name))
        for what, cached in {'first': False, 'later': True}.items():
            runs = [alone(start, Path(name), cached) for _ in range(options.rounds)]
            yield {'start': what, 'images': images, **min(runs, key=lambda run: run['seconds'])}


def start(root: Path, cached: bool) -> Row:
    if not cached:
        (root / CACHE).unlink(missing_ok=True)
    with measured() as found:
        dataset = MultiSenGE(root, 'all')
    return {'patches with the series': len(dataset), **found}


def write_stand_ins(archive: Path, root: Path) -> int:
    """Unpack label files and write what a start looks at; the number of images.

    That is an empty file for each image, and a label raster with a georeference for each patch.
    """
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter='data')
    for folder in (*KEYS, GROUND_REFERENCE):
        (root / folder).mkdir()
    images = 0
    for path in (root / LABELS).glob('*.json'):
        content = json.loads(path.read_text())
        for sensor, key in KEYS.items():
            names = {name for name in content[key].split(';') if name}
            images += len(names)
            for name in names:
                os.close(os.open(root / sensor / name, os.O_CREAT | os.O_WRONLY))
    for patch in Catalog(root, files=False, progress=False).patches.itertuples():
        _write_reference(root / GROUND_REFERENCE / reference_name(patch.name), patch)
    return images


def _write_reference(path: Path, patch: Any) -> None:
    """A sparse raster of 256 x 256 pixels; where its tile lies does not matter."""
    place = from_origin(400000 + 10 * patch.x, 5500000 - 10 * patch.y, 10, 10)
    where = vars(Grid(crs_of(patch.epsg), place, 256, 256))
    rasterio.open(path, 'w', 'GTiff', count=1, dtype='uint8', sparse_ok=True, **where).close()


def reading(options: argparse.Namespace) -> Iterator[Row]:
    """Four dates of each sensor and the labels of a patch, read in turns."""
    root, patches = options.root / 'patches', {SCENE: options.patches}
    write_synthetic(root, size=options.window, patches=patches, incomplete=0)
    dataset = MultiSenGE(root, 'all', classes=10)
    copied = MultiSenGE(copy_series(dataset, options.root / 'copy'), 'all', classes=10)
    calls = {
        name: partial(lambda read: [read(index) for index in range(len(dataset))], read)
        for name, read in readers(dataset, copied).items()
    }
    times = alternate(calls, options.rounds)
    for name, found in times.items():
        yield {
            'reader': name,
            'ms a patch': 1000 * found.median / len(dataset),
            'time, rasterio with the option = 1': found.median / times[BASELINE].median,
        }


def readers(dataset: MultiSenGE, copied: MultiSenGE) -> dict[str, Read]:
    """What is compared; each reads the patch of a number."""
    files = [[*chain(*dataset.files_of(i).values())] for i in range(len(dataset))]
    return {
        'rasterio': lambda index: read_plainly(files[index]),
        BASELINE: lambda index: read_plainly(files[index], **GDAL_OPTIONS),
        'MultiSenGE': lambda index: dataset[index],
        'MultiSenGE, uncompressed copy': lambda index: copied[index],
    }


def read_plainly(paths: Sequence[Path], **options: str) -> list[Any]:
    """Read rasters with rasterio and nothing else."""
    with rasterio.Env(**options):
        images = []
        for path in paths:
            with rasterio.open(path) as src:
                images.append(src.read())
    return images


def write_scene(folder: Path, size: int) -> Path:
    """Write a data set of one scene to train on and a patch of 256 pixels to validate on."""
    root, source = folder / str(size), folder / 'source'
    patches = {SCENE: 1, VAL: 1}
    write_synthetic(source, size=256, patches=patches, incomplete=0, progress=False)
    dataset = MultiSenGE(source, 'all')
    for index in range(len(dataset)):
        width = size if dataset.name(index).startswith(SCENE) else 256
        for path in chain(*dataset.files_of(index).values()):
            target = root / path.relative_to(source)
            if not target.exists():
                mirror(path, target, width)
    write_label_files(root, progress=False)
    return root


def mirror(source: Path, target: Path, size: int) -> None:
    """Write a raster in strips of 256 rows whose pixels are those of a small one, mirrored."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(source) as src:
        image = src.read()
        profile = src.profile | {'width': size, 'height': size, 'tiled': True}
    index = np.pad(np.arange(image.shape[1]), (0, size - image.shape[1]), mode='symmetric')
    with rasterio.open(target, 'w', **profile | {'blockxsize': 256, 'blockysize': 256}) as dst:
        for row in range(0, size, 256):
            rows = index[row : row + 256]
            strip = image[:, rows[:, None], index]
            dst.write(strip, window=((row, row + len(rows)), (0, size)))


def read_crops(root: Path, options: argparse.Namespace, whole: bool) -> Row:
    """Read two crops of 64 x 64 pixels of a scene."""
    dataset = MultiSenGE(root, 'train', splits=SPLITS)
    dataset.check()
    middle = dataset.shape(0)[0] // 2
    with measured() as found:
        for top in (0, middle):
            dataset[0] if whole else dataset.crop(0, top, top, 64, 64)
    return found


def compute_statistics(root: Path, options: argparse.Namespace) -> Row:
    """Compute the statistics of a scene, window by window."""
    dataset = MultiSenGE(root, 'train', classes=10, splits=SPLITS)
    with measured() as found:
        Statistics.compute(dataset)
    return found


def fit(root: Path, options: argparse.Namespace) -> Row:
    """Compute the statistics, train with batches of two crops, and validate."""
    datamodule = _datamodule(root, batch_size=2, patch_size=options.window)
    trainer = _trainer(root, max_epochs=1, limit_train_batches=options.steps)
    with measured() as found:
        trainer.fit(_task(), datamodule)
    return {'steps': trainer.global_step, **found}


class Pixels(Callback):
    """Counts the pixels that are read."""

    read = 0

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        image = batch['image']
        self.read += len(image) * image.shape[-2] * image.shape[-1]


def predict(root: Path, options: argparse.Namespace) -> Row:
    """Map a scene in windows, with random weights."""
    bands = *SENSOR_BANDS['s2'], *SENSOR_BANDS['s1']
    mean, std = (0.1,) * 10 + (-10.0, -17.0), (0.1,) * 10 + (3.0, 3.0)
    given, pixels = root / 'given.json', Pixels()
    Statistics(bands, mean, std, pixels=(1,) * 10).save(given)
    windows: Any = {'predict_split': 'train', 'predict_patch_size': options.window}
    datamodule = _datamodule(root, batch_size=1, statistics=given, **windows)
    with TemporaryDirectory(dir=root) as folder:
        trainer = _trainer(root, callbacks=[SceneWriter(folder), pixels])
        with measured() as found:
            trainer.predict(_task(), datamodule, return_predictions=False)
    return {'pixels read / mapped': pixels.read / int(root.name) ** 2, **found}


def _datamodule(root: Path, **arguments: Any) -> MultiSenGEDataModule:
    return MultiSenGEDataModule(root, classes=10, splits=SPLITS, **arguments)


def _task() -> S1S2SemanticSegmentation:
    return S1S2SemanticSegmentation(
        backbone='resnet18_convlstm_inception', in_channels=48, num_classes=10
    )


def _trainer(root: Path, **arguments: Any) -> Trainer:
    quiet: Any = {'logger': False, 'enable_checkpointing': False, 'enable_progress_bar': False}
    return Trainer(default_root_dir=root, num_sanity_val_steps=0, **quiet, **arguments)


Measure = Callable[[Path, argparse.Namespace], Row]
SCENES: Mapping[str, Mapping[str, Measure]] = {
    'crops': {
        'two crops of 64 x 64, by window': partial(read_crops, whole=False),
        'two crops of 64 x 64, out of the whole scene': partial(read_crops, whole=True),
    },
    'statistics': {'statistics by windows': compute_statistics},
    'training': {'training on crops': fit},
    'mapping': {'mapping in windows': predict},
}


def on_scenes(measures: Mapping[str, Measure], options: argparse.Namespace) -> Iterator[Row]:
    """One scene, in a process of its own."""
    for size in options.sizes:
        root = write_scene(options.root, size)
        for what, measure in measures.items():
            yield {'what': what, 'scene': f'{size:,} x {size:,}', **alone(measure, root, options)}


COMMANDS: Mapping[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    'startup': startup,
    'reading': reading,
    **{name: partial(on_scenes, measures) for name, measures in SCENES.items()},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ``table.md`` and ``results.json`` of each command."""
    options = _parser().parse_args(arguments)
    options.root = options.root.resolve()
    for name in options.commands:
        rows = list(COMMANDS[name](options))
        report(options.output / name, f'Synthetic data: {name}', provenance(), rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m benchmarks.data')
    parser.add_argument('commands', nargs='+', choices=COMMANDS)
    parser.add_argument('--root', type=Path, default=Path('data/benchmarks'), help='synthetic data')
    parser.add_argument('--output', type=Path, default=Path('outputs/data'))
    parser.add_argument('--labels', type=existing, help="archive of MultiSenGE's label files")
    parser.add_argument('--rounds', type=count, default=3, help='turns of starting and reading')
    parser.add_argument('--patches', type=count, default=40, help='number of patches to read')
    parser.add_argument('--window', type=count, default=256, help='pixels of patches and windows')
    parser.add_argument('--sizes', type=count, nargs='+', default=[1024, 4096], help='of scenes')
    parser.add_argument('--steps', type=count, default=20, help='steps of the training')
    return parser


if __name__ == '__main__':
    main()
