"""Measures how soon a data set can be read and how fast, on synthetic data.

    python -m benchmarks.loading --root data/loading --output outputs/loading

Four dates of each sensor and the labels of a patch are read in turns by rasterio itself, by
MultiSenGE, from its packed copy, and by TorchGeo's RasterDataset. Then a DataLoader reads epochs
while memory and open files of all of its processes are counted. Then data sets of different sizes
are opened; see :mod:`benchmarks.startup`.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import rasterio
from torch.utils.data import ConcatDataset, DataLoader
from torchgeo.datasets import IntersectionDataset, RasterDataset, stack_samples

from benchmarks import startup
from benchmarks.accuracy import listed, markdown, prepare, provenance
from torchgeo_s1s2.callbacks.report import save_figure
from torchgeo_s1s2.datasets import MultiSenGE, pack
from torchgeo_s1s2.datasets.catalog import GDAL_OPTIONS

Reader = Callable[[int], object]

PATCHES = {'31UFQ': 40}
TARGETS = {
    'MultiSenGE': 1.1,
    'MultiSenGE, packed copy': 0.2,
}
"""Times that shall not be exceeded, rasterio's own with the GDAL option being 1."""

BASELINE = 'rasterio, GDAL_DISABLE_READDIR_ON_OPEN=EMPTY_DIR'


class Labels(RasterDataset):
    """Label rasters as TorchGeo reads them."""

    is_image = False


def series_paths(dataset: MultiSenGE, index: int) -> dict[str, list[Path]]:
    """Rasters of a patch that the date rule chooses, by sensor, and its label raster."""
    row = int(dataset._patches[index])
    slots = dataset.slots(index)
    paths = {
        sensor: [dataset.catalog.path(row, sensor, p) for slot in slots[sensor] for p in slot]
        for sensor in dataset.sensors
    }
    reference = dataset.catalog.ground_reference(row)
    return paths | {'ground_reference': [reference] if reference else []}


def all_paths(dataset: MultiSenGE) -> dict[str, list[Path]]:
    """All rasters by folder."""
    return {
        folder: sorted((dataset.root / folder).glob('*.tif'))
        for folder in (*dataset.sensors, 'ground_reference')
    }


def read_plainly(paths: Sequence[Path], **options: str) -> list[Any]:
    """Read rasters with rasterio and nothing else."""
    with rasterio.Env(**options):
        images = []
        for path in paths:
            with rasterio.open(path) as src:
                images.append(src.read())
    return images


def torchgeo_reader(dataset: MultiSenGE, paths: dict[str, list[Path]]) -> Reader:
    """Read all of the given rasters of a patch as TorchGeo does."""
    s2, s1 = (startup.Images(paths[sensor], time_series=True) for sensor in ('s2', 's1'))
    options: Any = {'spatial_only': True, 'collate_fn': tuple}
    images = IntersectionDataset(s2, s1, **options)
    both = IntersectionDataset(images, Labels(paths['ground_reference']), **options)
    bounds = dataset.index.geometry.bounds.to_numpy()

    def read(index: int) -> object:
        xmin, ymin, xmax, ymax = bounds[index]
        return both[xmin:xmax, ymin:ymax]

    return read


def readers(dataset: MultiSenGE, packed: MultiSenGE) -> dict[str, Reader]:
    """What is compared; each reads the patch of a number."""
    chosen = [series_paths(dataset, i) for i in range(len(dataset))]
    files = [[path for part in paths.values() for path in part] for paths in chosen]
    of_series = {key: [p for paths in chosen for p in paths[key]] for key in chosen[0]}
    return {
        'rasterio': lambda i: read_plainly(files[i]),
        BASELINE: lambda i: read_plainly(files[i], **GDAL_OPTIONS),
        'MultiSenGE': lambda i: dataset[i],
        'MultiSenGE, packed copy': lambda i: packed[i],
        'TorchGeo RasterDataset, the dates of the series': torchgeo_reader(dataset, of_series),
        'TorchGeo RasterDataset, all dates': torchgeo_reader(dataset, all_paths(dataset)),
    }


def measure_reading(
    contestants: Mapping[str, Reader], patches: int, rounds: int
) -> list[dict[str, Any]]:
    """Read every patch with each reader in turn.

    Args:
        contestants: Readers by name, ``BASELINE`` among them.
        patches: Number of patches.
        rounds: How often; one more comes before, so that the files are cached by the system.

    Returns:
        Of each reader the median milliseconds a patch, and how often the time of ``BASELINE`` it
        takes: the median over the turns, of wall clock time and of processor time.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range((rounds + 1) * patches):
        for name, read in contestants.items():
            start = time.perf_counter(), time.process_time()
            read(turn % patches)
            taken = time.perf_counter() - start[0], time.process_time() - start[1]
            if turn >= patches:
                times[name].append(taken)
    base = times[BASELINE]
    return [
        {
            'reader': name,
            'ms': 1000 * median(wall for wall, _ in taken),
            'ratio': median(wall / b for (wall, _), (b, _) in zip(taken, base, strict=True)),
            'cpu_ratio': median(cpu / b for (_, cpu), (_, b) in zip(taken, base, strict=True)),
        }
        for name, taken in times.items()
    ]


def measure_epoch(
    name: str, dataset: MultiSenGE, workers: int, passes: int, batch_size: int = 4
) -> dict[str, Any]:
    """Read an epoch of ``passes`` times all patches with a DataLoader.

    Returns:
        Samples a second; and over all processes the private memory in MiB a third of the way
        through and its peak after that, and the largest number of open files.
    """
    loader: DataLoader[Any] = DataLoader(
        ConcatDataset([dataset] * passes),
        batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=stack_samples,
    )
    used, start = [], time.perf_counter()
    for _ in loader:
        processes = [os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())]
        used.append([sum(map(count, processes)) for count in (private_memory, open_files)])
    seconds = time.perf_counter() - start
    memory, files = zip(*used[len(used) // 3 :], strict=True)
    return {
        'reader': name,
        'workers': workers,
        'samples_per_second': passes * len(dataset) / seconds,
        'memory_mib': memory[0],
        'peak_mib': max(memory),
        'files': max(files),
    }


def private_memory(pid: int) -> int:
    """Anonymous memory of a process in MiB, which leaves out mapped files; 0 if it has ended."""
    try:
        lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) // 1024 for line in lines if line.startswith('RssAnon'))


def open_files(pid: int) -> int:
    """Number of file handles of a process, 0 if it has ended."""
    try:
        return sum(1 for _ in Path(f'/proc/{pid}/fd').iterdir())
    except OSError:
        return 0


def table(
    reading: Sequence[dict[str, Any]], epochs: Sequence[dict[str, Any]], about: dict[str, Any]
) -> str:
    """Markdown with a row for each reader and one for each epoch."""
    first = [['reader', 'ms', 'time, rasterio with the option = 1', 'processor time']]
    for r in reading:
        first.append([r['reader'], f'{r["ms"]:.1f}', f'{r["ratio"]:.2f}', f'{r["cpu_ratio"]:.2f}'])
    second = [['reader', 'workers', 'samples/s', 'MiB at a third', 'peak MiB after', 'open files']]
    for e in epochs:
        cells = [e['reader'], e['workers'], f'{e["samples_per_second"]:.1f}']
        second.append([str(c) for c in (*cells, e['memory_mib'], e['peak_mib'], e['files'])])
    return (
        f'# {about["data"]}: reading a patch\n\n{listed(about)}\n\n{markdown(first)}\n\n'
        f'## Epochs of a DataLoader\n\n{markdown(second)}\n'
    )


def plot(reading: Sequence[dict[str, Any]], about: dict[str, Any]) -> plt.Figure:
    """Time of each reader relative to rasterio, and what it shall not exceed."""
    figure, ax = plt.subplots(figsize=(8, 3), layout='constrained')
    names = [r['reader'].replace(', ', ',\n') for r in reading]
    ax.barh(names, [r['ratio'] for r in reading], color='tab:blue')
    ax.margins(x=0.12)
    for place, r in enumerate(reading):
        target = TARGETS.get(r['reader'], 0)
        if target:
            ax.plot([target, target], [place - 0.45, place + 0.45], color='black')
        end = max(r['ratio'], target), place
        offset: Any = {'xytext': (6, 0), 'textcoords': 'offset points', 'va': 'center'}
        ax.annotate(f'{r["ratio"]:.2f}', end, **offset)
    ax.tick_params(labelsize=7)
    ax.invert_yaxis()
    ax.set(xlabel='time a patch, rasterio with the option = 1 (line: target)')
    ax.set_title(f'{about["data"]}: four dates of each sensor and labels, {about["date"]}')
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ``table.md``, ``results.json`` and ``loading.png``."""
    args = _parser().parse_args(arguments)
    root, output = args.root.resolve(), args.output.resolve()
    data = prepare(root, size=args.size, patches=PATCHES, incomplete=0)
    output.mkdir(parents=True, exist_ok=True)
    dataset = MultiSenGE(root, classes=10)
    folder = pack(dataset, output / 'packed', progress=False)
    packed = MultiSenGE(root, classes=10, catalog=dataset.catalog, packed=folder)
    epochs = [
        measure_epoch(name, data, workers, args.passes)
        for name, data in (('MultiSenGE', dataset), ('MultiSenGE, packed copy', packed))
        for workers in (0, 2)
    ]
    # TorchGeo keeps the files open that it has read, so its turn comes after the epochs.
    reading = measure_reading(readers(dataset, packed), len(dataset), args.rounds)
    counts = dataset.catalog.acquisitions['sensor'].value_counts() / len(dataset.catalog.patches)
    about = {
        'data': data,
        'patches': len(dataset),
        'dates a patch': ', '.join(f'{n:.1f} of {str(s).upper()}' for s, n in counts.items()),
        **provenance(),
    }
    starts = startup.measure_start(output / 'starts', args.starts)
    content = {'about': about, 'reading': reading, 'epochs': epochs, 'starts': starts}
    text = f'{table(reading, epochs, about)}\n## Starting\n\n{startup.table(starts)}\n'
    (output / 'results.json').write_text(json.dumps(content, indent=1))
    (output / 'table.md').write_text(text)
    print(text)
    save_figure(plot(reading, about), output / 'loading.png')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m benchmarks.loading')
    parser.add_argument('--root', type=Path, default=Path('data/loading'), help='data set')
    parser.add_argument('--output', type=Path, default=Path('outputs/loading'))
    parser.add_argument('--size', type=int, default=256, help='pixels of a synthetic patch')
    parser.add_argument('--rounds', type=int, default=3, help='how often each patch is read')
    parser.add_argument(
        '--starts', type=int, nargs='+', default=startup.SIZES, help='numbers of images to open'
    )
    parser.add_argument('--passes', type=int, default=5, help='how often an epoch reads it')
    return parser


if __name__ == '__main__':
    main()
