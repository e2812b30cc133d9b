"""Time and memory until a data set can be read, and how they grow with the number of images.

    python -m benchmarks.startup --labels labels.tar.xz --output outputs/startup

Contestants start on the same synthetic data. With ``--labels``, an archive of MultiSenGE's label
files, stand-ins of all its images are written to a temporary folder too: empty files, and rasters
where a start opens one. Files are in the cache of the operating system throughout.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import rasterio
from rasterio.transform import from_origin
from torchgeo.datasets import RasterDataset

from benchmarks.accuracy import markdown, provenance
from benchmarks.throughput import process_memory
from torchgeo_s1s2.datasets import Catalog, MultiSenGE
from torchgeo_s1s2.datasets.catalog import CACHE, GROUND_REFERENCE, SENSORS
from torchgeo_s1s2.datasets.synthetic import write_synthetic

SIZES = (500, 1000, 2000, 4000)
"""Numbers of images, about."""

IMAGES_A_PATCH = 30
"""Images of a patch of the synthetic data, about."""


class Images(RasterDataset):
    """Every image as TorchGeo would find it."""

    filename_glob = '*.tif'
    filename_regex = r'.*_(?P<date>\d{8})_S[12]_'
    date_format = '%Y%m%d'


def catalog(root: Path) -> Any:
    return Catalog(root, progress=False)


def multisenge(root: Path) -> Any:
    return MultiSenGE(root, 'all')


def raster_dataset(root: Path) -> Any:
    return Images([root / sensor for sensor in SENSORS])


STARTS: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "TorchGeo's RasterDataset": (raster_dataset, False),
    'Catalog, first start': (catalog, False),
    'MultiSenGE, first start': (multisenge, False),
    'Catalog, later starts': (catalog, True),
    'MultiSenGE, later starts': (multisenge, True),
}
"""What starts, and whether the cached catalogue is there."""


def measure_start(
    folder: Path, sizes: Sequence[int] = SIZES, repeats: int = 3
) -> list[dict[str, Any]]:
    """Starts on synthetic data sets of different sizes.

    Args:
        folder: Where these data sets are, or are written.
        sizes: Numbers of images, about.
        repeats: Number of alternating runs.

    Returns:
        For each size and contestant ``contestant``, ``images`` and the least of the ``seconds``.
    """
    results = []
    for size in sizes:
        patches = {'31UEQ': size // IMAGES_A_PATCH}
        root = write_synthetic(folder / str(size), size=16, patches=patches, incomplete=0)
        images = sum(1 for sensor in SENSORS for _ in (root / sensor).iterdir())
        runs = [(name, _in_a_fork(name, root)) for _ in range(repeats) for name in STARTS]
        for name in STARTS:
            seconds = min(seconds for run, seconds in runs if run == name)
            results.append({'contestant': name, 'images': images, 'seconds': seconds})
    return results


def measure_full(archive: Path, repeats: int = 3) -> list[dict[str, Any]]:
    """Starts on stand-ins of a whole data set, each in a process of its own.

    Args:
        archive: Archive of the label files.
        repeats: Number of alternating runs.

    Returns:
        As ``measure_start``, with ``import_mib`` and ``peak_mib``, the memory of the process after
        its imports and at most.
    """
    with TemporaryDirectory() as name:
        root = Path(name)
        images = write_stand_ins(archive, root)
        starts = [start for start in STARTS if start != "TorchGeo's RasterDataset"]
        runs = [(start, _in_a_process(start, root)) for _ in range(repeats) for start in starts]
    results = []
    for start in starts:
        best = min((run for name, run in runs if name == start), key=lambda run: run['seconds'])
        results.append({'contestant': start, 'images': images, **best})
    return results


def write_stand_ins(archive: Path, root: Path) -> int:
    """Unpack label files and make an empty file of each raster that they name.

    The first and the last patch of each tile get a label raster with a georeference.

    Returns:
        Number of images.
    """
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter='data')
    for folder in (*SENSORS, GROUND_REFERENCE):
        (root / folder).mkdir()
    labels = Catalog(root, files=False, progress=False)
    for path in labels.acquisitions['path']:
        os.close(os.open(root / path, os.O_CREAT | os.O_WRONLY))
    for row in range(len(labels.patches)):
        reference = labels.ground_reference(row)
        assert reference is not None
        reference.touch()
    for _, tile in groupby(range(len(labels.patches)), lambda row: labels.patch(row).tile):
        rows = list(tile)
        for row in (rows[0], rows[-1]):
            _write_reference(labels, row)
    return len(labels.acquisitions)


def _write_reference(labels: Catalog, row: int) -> None:
    """A sparse raster of 256 x 256 pixels; where its tile lies does not matter."""
    patch = labels.patch(row)
    place = from_origin(400000 + 10 * patch.x, 5500000 - 10 * patch.y, 10, 10)
    profile = {'driver': 'GTiff', 'width': 256, 'height': 256, 'count': 1, 'dtype': 'uint8'}
    path = labels.ground_reference(row)
    with rasterio.open(
        path, 'w', crs=f'EPSG:{patch.epsg}', transform=place, sparse_ok=True, **profile
    ):
        pass


def _seconds(name: str, root: Path) -> float:
    start, cached = STARTS[name]
    if not cached:
        (root / CACHE).unlink(missing_ok=True)
    begin = time.perf_counter()
    start(root)
    return time.perf_counter() - begin


def _in_a_fork(name: str, root: Path) -> float:
    """Seconds in a process that has done nothing but import."""
    with get_context('fork').Pool(1) as pool:
        return pool.apply(_seconds, (name, root))


def _in_a_process(name: str, root: Path) -> dict[str, float]:
    """Seconds and memory of a new process."""
    command = [sys.executable, '-m', 'benchmarks.startup', '--one', name, str(root)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _one(name: str, root: Path) -> dict[str, float]:
    before = process_memory('VmRSS')
    seconds = _seconds(name, root)
    return {'seconds': seconds, 'import_mib': before, 'peak_mib': process_memory('VmHWM')}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown with a row a size and the ratio of TorchGeo's time to that of first starts."""
    seconds = pd.DataFrame(results).pivot(index='images', columns='contestant', values='seconds')
    columns = [name for name in STARTS if name in seconds]
    rows = [['images', *columns, 'RasterDataset / MultiSenGE, first and later']]
    for images, row in seconds.iterrows():
        cells = ['' if np.isnan(row[name]) else f'{row[name]:.2f} s' for name in columns]
        torchgeo = row.get("TorchGeo's RasterDataset", np.nan)
        ratios = [
            torchgeo / row[f'MultiSenGE, {which}'] for which in ('first start', 'later starts')
        ]
        ratio = '' if np.isnan(torchgeo) else ', '.join(f'{ratio:.1f}' for ratio in ratios)
        rows.append([f'{images:,}', *cells, ratio])
    return '\n'.join([markdown(rows), '', *_growth(seconds)])


def _growth(seconds: pd.DataFrame) -> Iterator[str]:
    """What a thousand images more cost each contestant, by a straight line through its sizes."""
    for name in STARTS:
        known = seconds[name].dropna()
        if len(known) > 1:
            slope = np.polyfit(known.index.to_numpy(float), known.to_numpy(), 1)[0]
            yield f'- {name}: {1e6 * slope:.1f} ms for a thousand images more'


def memory_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown with the memory of each contestant on the whole data set."""
    rows = [['start', 'images', 'time', 'after imports (MiB)', 'at most (MiB)', 'added (MiB)']]
    for row in results:
        added = row['peak_mib'] - row['import_mib']
        memory = [f'{mib:.0f}' for mib in (row['import_mib'], row['peak_mib'], added)]
        rows.append([row['contestant'], f'{row["images"]:,}', f'{row["seconds"]:.2f} s', *memory])
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write ``startup.md`` and ``startup.json``."""
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m benchmarks.startup')
    parser.add_argument('--labels', type=Path, help="archive of MultiSenGE's label files")
    parser.add_argument('--output', type=Path, default=Path('outputs/startup'))
    parser.add_argument('--sizes', type=int, nargs='*', default=SIZES, help='numbers of images')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--one', nargs=2, metavar=('START', 'ROOT'), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        print(json.dumps(_one(args.one[0], Path(args.one[1]))))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    synthetic = measure_start(args.output / 'data', args.sizes, args.repeats)
    full = measure_full(args.labels, args.repeats) if args.labels else []
    about = provenance()
    content = {**about, 'synthetic': synthetic, 'full': full}
    (args.output / 'startup.json').write_text(json.dumps(content, indent=1))
    parts = [
        'Synthetic data, least of alternating runs. ' + ', '.join(about.values()) + '.',
        table(synthetic),
    ]
    if full:
        parts += ['Stand-ins of the images that the label files name.', memory_table(full)]
    (args.output / 'startup.md').write_text('\n\n'.join(parts) + '\n')
    print('\n\n'.join(parts))


if __name__ == '__main__':
    main()
