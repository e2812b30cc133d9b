"""Measures formats in which a packed copy could be kept, on synthetic data.

    uv run --with zarr python -m benchmarks.formats --root data/loading --output outputs/formats

The dates of the series and the labels of each patch are kept with the values of their rasters, and
read in turns in every format, with files in the cache of the operating system. Zarr is measured
where it is installed.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks.accuracy import listed, markdown, prepare, provenance
from benchmarks.loading import BASELINE, PATCHES, measure_reading, read_plainly, series_paths
from torchgeo_s1s2.datasets import MultiSenGE
from torchgeo_s1s2.datasets.catalog import GDAL_OPTIONS

Arrays = dict[str, NDArray[Any]]


class Format(NamedTuple):
    """How images (bands, H, W) by name are written to a folder and read again."""

    write: Callable[[Path, Arrays], None]
    read: Callable[[Path], Arrays]


def safetensors() -> Format:
    def read(folder: Path) -> Arrays:
        with safe_open(folder / 'patch.safetensors', 'np') as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    return Format(lambda folder, arrays: save_file(arrays, folder / 'patch.safetensors'), read)


def numpy() -> Format:
    def write(folder: Path, arrays: Arrays) -> None:
        for name, array in arrays.items():
            np.save(folder / name, array)

    return Format(write, lambda folder: {p.stem: np.load(p) for p in folder.iterdir()})


def geotiff(**profile: Any) -> Format:
    """A file a sensor, all of its dates stacked."""

    options = {'driver': 'GTiff', 'interleave': 'band', 'transform': Affine.scale(10, -10)}

    def write(folder: Path, arrays: Arrays) -> None:
        for name, array in arrays.items():
            shape = dict(zip(('count', 'height', 'width'), array.shape, strict=True))
            path, dtype = folder / f'{name}.tif', array.dtype
            with rasterio.open(path, 'w', dtype=dtype, **shape, **options, **profile) as dst:
                dst.write(array)

    def read(folder: Path) -> Arrays:
        paths = list(folder.iterdir())
        return {p.stem: a for p, a in zip(paths, read_plainly(paths, **GDAL_OPTIONS), strict=True)}

    return Format(write, read)


def zarr(compressed: bool) -> Format:
    """An array a sensor in one chunk."""
    from zarr import create_array, open_array
    from zarr.codecs import ZstdCodec

    codec = ZstdCodec() if compressed else None

    def write(folder: Path, arrays: Arrays) -> None:
        for name, array in arrays.items():
            create_array(folder / name, data=array, chunks=array.shape, compressors=codec)

    def read(folder: Path) -> Arrays:
        return {p.name: np.asarray(open_array(p, mode='r')[...]) for p in folder.iterdir()}

    return Format(write, read)


def formats() -> dict[str, Format]:
    """What is compared, by name."""
    made = {
        'safetensors': safetensors(),
        'NumPy .npy': numpy(),
        'GeoTIFF stacks, uncompressed': geotiff(),
        'GeoTIFF stacks, zstd': geotiff(compress='zstd'),
    }
    if find_spec('zarr') is None:
        return made
    return made | {'Zarr 3, uncompressed': zarr(False), 'Zarr 3, zstd': zarr(True)}


def read_rasters(by_sensor: Mapping[str, Sequence[Path]]) -> Arrays:
    """Rasters of a patch, stacked by sensor."""
    return {
        name: np.concatenate(read_plainly(paths, **GDAL_OPTIONS))
        for name, paths in by_sensor.items()
        if paths
    }


def write_all(dataset: MultiSenGE, patches: int, output: Path) -> dict[str, float]:
    """Write patches in every format, a folder each.

    Returns:
        MiB a patch by format, and by ``BASELINE`` those of the rasters.

    Raises:
        ValueError: If a format gives other values back.
    """
    sizes: dict[str, float] = {}
    compared = formats()
    for index in range(patches):
        by_sensor = series_paths(dataset, index)
        arrays = read_rasters(by_sensor)
        rasters = [path for paths in by_sensor.values() for path in paths]
        sizes[BASELINE] = sizes.get(BASELINE, 0) + _mib(rasters) / patches
        for name, form in compared.items():
            folder = output / name / str(index)
            folder.mkdir(parents=True, exist_ok=True)
            form.write(folder, arrays)
            again = form.read(folder)
            if any(not np.array_equal(again[key], array) for key, array in arrays.items()):
                raise ValueError(f'{name} does not give the values of patch {index} back')
            sizes[name] = sizes.get(name, 0) + _mib(folder.rglob('*')) / patches
    return sizes


def _mib(paths: Any) -> float:
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


def measure(
    dataset: MultiSenGE, patches: int, rounds: int, output: Path
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Time of reading with each format, as :func:`benchmarks.loading.measure_reading`, and MiB."""
    sizes = write_all(dataset, patches, output)
    readers = {name: _reader(form, output / name) for name, form in formats().items()}
    chosen = [series_paths(dataset, index) for index in range(patches)]
    readers[BASELINE] = lambda index: read_rasters(chosen[index])
    return measure_reading(readers, patches, rounds), sizes


def _reader(form: Format, folder: Path) -> Callable[[int], Arrays]:
    return lambda index: form.read(folder / str(index))


def table(reading: Sequence[dict[str, Any]], sizes: Mapping[str, float]) -> str:
    """Markdown with a row a format, the fastest first."""
    rows = [['format', 'ms', 'time, the rasters = 1', 'MiB a patch']]
    for r in sorted(reading, key=lambda r: r['cpu_ratio']):
        name = 'the rasters, LZW' if r['reader'] == BASELINE else r['reader']
        size = sizes[r['reader']]
        rows.append([name, f'{r["ms"]:.1f}', f'{r["cpu_ratio"]:.3f}', f'{size:.1f}'])
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ``table.md`` and ``results.json``."""
    args = _parser().parse_args(arguments)
    root, output = args.root.resolve(), args.output.resolve()
    data = prepare(root, size=args.size, patches=PATCHES, incomplete=0)
    dataset = MultiSenGE(root, classes=10)
    patches = min(args.patches, len(dataset))
    reading, sizes = measure(dataset, patches, args.rounds, output)
    about = {'data': data, 'patches': patches, **provenance()}
    text = f'# {data}: formats\n\n{listed(about)}\n\n{table(reading, sizes)}\n'
    (output / 'results.json').write_text(
        json.dumps({'about': about, 'reading': reading, 'mib': sizes}, indent=1)
    )
    (output / 'table.md').write_text(text)
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m benchmarks.formats')
    parser.add_argument('--root', type=Path, default=Path('data/loading'), help='data set')
    parser.add_argument('--output', type=Path, default=Path('outputs/formats'))
    parser.add_argument('--size', type=int, default=256, help='pixels of a synthetic patch')
    parser.add_argument('--patches', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=5, help='how often each patch is read')
    return parser


if __name__ == '__main__':
    main()
