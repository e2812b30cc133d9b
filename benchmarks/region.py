"""A region from a STAC API on loopback.

python -m benchmarks.region speed           # time and memory beside plain odc-stac and rasterio
python -m benchmarks.region map CHECKPOINT  # of the demo: conf/region.yaml, and a picture
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import odc.geo.geobox
import odc.stac
import pystac_client
import rasterio
import torchgeo.main
from rasterio.warp import transform_bounds

import torchgeo_s1s2
from benchmarks.common import Row, alone, existing, measured, provenance, report
from benchmarks.server import item, serve_files, serve_items, write_cog
from torchgeo_s1s2.datasets import SENSOR_BANDS, MultiSenGE, SentinelRegion, StacCollection
from torchgeo_s1s2.datasets.classes import class_scheme
from torchgeo_s1s2.datasets.plot import draw_classes
from torchgeo_s1s2.datasets.region import _PROFILE
from torchgeo_s1s2.datasets.synthetic import write_synthetic

S2 = StacCollection('sentinel-2-l2a', mask='SCL', offset=0)
S1 = StacCollection('sentinel-1-rtc', bands={'VV': 'vv', 'VH': 'vh'}, nodata=-32768)
CONF = Path(torchgeo_s1s2.__file__).parent / 'conf' / 'region.yaml'
SEASON = ['2020-01-01', '2020-12-31']


def publish(image: Path, folder: Path, url: str) -> dict[str, Any]:
    """Write an image of a data set in MultiSenGE's layout as COGs, and its STAC item."""
    _, date, kind, *_ = image.stem.split('_')
    with rasterio.open(image) as src:
        value, place, epsg = src.read(), src.transform, src.crs.to_epsg()
    names = SENSOR_BANDS['s2'] if kind == 'S2' else ('vv', 'vh')
    bands = dict(zip(names, value, strict=True))
    if kind == 'S2':
        bands['SCL'] = np.full(value.shape[1:], 4, np.uint8)
    for name, band in bands.items():
        write_cog(folder / image.stem / f'{name}.tif', band, place.c, place.f, epsg=epsg)
    day = f'{date[:4]}-{date[4:6]}-{date[6:8]}T10:30:00Z'
    collection = (S2 if kind == 'S2' else S1).collection
    assets = {name: {'href': f'{url}/{image.stem}/{name}.tif'} for name in bands}
    first = folder / image.stem / f'{names[0]}.tif'
    return item(image.stem, collection, day, assets, first)


def bounds_of(path: Path, margin: float) -> list[float]:
    """Degrees of a raster without a margin in metres."""
    with rasterio.open(path) as src:
        left, bottom, right, top = src.bounds
        inner = left + margin, bottom + margin, right - margin, top - margin
        return [*transform_bounds(src.crs, 'EPSG:4326', *inner)]


@contextmanager
def serve(images: Sequence[Path], folder: Path, margin: float) -> Iterator[dict[str, Any]]:
    """Serve images that lie alike; yields what a SentinelRegion of them without a margin takes."""
    with serve_files(folder / 'cogs') as files:
        items = [publish(image, folder / 'cogs', files.url) for image in images]
        with serve_items(items, folder) as api:
            known = {sensor: vars(c) for sensor, c in (('s2', S2), ('s1', S1))}
            place = {'region': bounds_of(images[0], margin), 'season': SEASON}
            yield place | {'source': api, 'collections': known}


def configuration(path: Path, **data: Any) -> str:
    """Write arguments of a data module as a configuration; the option that names it."""
    path.write_text(json.dumps({'data': {'init_args': data}}))
    return f'--config={path}'


def plain(api: str, region: SentinelRegion, root: Path) -> None:
    """The same pixels with odc-stac and rasterio alone, a date at a time."""
    grid = region.grid()
    box = odc.geo.geobox.GeoBox((grid.height, grid.width), grid.transform, grid.crs)
    found = pystac_client.Client.open(api).search(
        collections=[S2.collection], bbox=region.region, datetime='/'.join(SEASON)
    )
    bands = [*SENSOR_BANDS['s2']]
    chunks: Any = {'x': region.chunk, 'y': region.chunk}
    data = odc.stac.load(found.items(), bands=bands, geobox=box, chunks=chunks)
    profile = _PROFILE | vars(grid) | {'count': 10, 'predictor': 2}
    profile |= {'dtype': 'int16', 'nodata': -10000}
    for number in range(data.sizes['time']):
        with rasterio.open(root / f'{number}.tif', 'w', **profile) as dst:
            dst.write(data.isel(time=number).to_array().compute().values)


def measure(what: str, api: str, size: int, bounds: list[float], root: Path) -> Row:
    """Seconds and memory of one run."""
    region = SentinelRegion(bounds, SEASON, api, {'s2': S2}, clouds=[], num_workers=2, chunk=1024)
    with measured() as found:
        if what == 'plain':
            plain(api, region, root)
        else:
            region.write(root, ['s2'], progress=False)
    return {'what': what, 'size': size, **found}


def speed(sizes: tuple[int, ...] = (2048, 4096), rounds: int = 3, dates: int = 4) -> None:
    """Runs that take turns, each in a process of its own; a table of seconds and memory."""
    rng, rows = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as name, serve_files(Path(name)) as files:
        root, items, side = Path(name), [], max(sizes) + 8
        for date in range(dates):
            folder, assets = root / str(date), {}
            for band in (*SENSOR_BANDS['s2'], 'SCL'):
                smooth = rng.integers(1, 3000, (side // 8 + 1,) * 2).repeat(8, 0).repeat(8, 1)
                value = (smooth[:side, :side] + rng.integers(0, 64, (side, side))).astype('int16')
                write_cog(folder / f'{band}.tif', value, 399960, 5400000, nodata=0)
                assets[band] = {'href': f'{files.url}/{date}/{band}.tif'}
            day = f'2020-0{date + 5}-03T10:30:00Z'
            items.append(item(str(date), S2.collection, day, assets, folder / 'SCL.tif'))
        with serve_items(items, root) as api:
            for size in [*sizes] * rounds:
                place = (399980, 5400020 - 10 * size, 399940 + 10 * size, 5399980)
                bounds = [*transform_bounds('EPSG:32632', 'EPSG:4326', *place)]
                for what in ('ours', 'plain'):
                    with tempfile.TemporaryDirectory(dir=root) as out:
                        rows.append(alone(measure, what, api, size, bounds, Path(out)))
    report(Path('outputs/region_speed'), 'Synthetic data: a region', provenance(), rows)


def map_region(checkpoint: Path, output: Path = Path('outputs/region.png')) -> None:
    """Serve a synthetic patch, and map it by ``conf/region.yaml``."""
    options = [f'--config={CONF}', f'--ckpt_path={checkpoint.resolve()}']
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_synthetic(root / 'source', 256, {'31UEQ': 1}, incomplete=0, haze=0)
        with serve(sorted(root.glob('source/s[12]/*.tif')), root, 150) as source, chdir(root):
            options += [configuration(root / 'own.yaml', source={'init_args': source})]
            torchgeo.main.main(['predict', *options])
        with rasterio.open(root / 'outputs' / 'region' / '32631.tif') as src:
            colours, ids = src.colormap(1), src.read(1)
            with rasterio.open(next(root.glob('source/ground_reference/*.tif'))) as reference:
                corner = round((src.transform.c - reference.transform.c) / 10)
        sample = MultiSenGE(root / 'source', 'all', splits={})[0]
    rows = slice(corner, corner + len(ids)), slice(corner, corner + ids.shape[1])
    scheme = class_scheme(10)
    truth = scheme.remap(sample['mask'].numpy() + 1)[rows]
    days = sample['acquisition_times'][:, 0].numpy().astype('datetime64[s]').astype('datetime64[D]')
    panels = {str(days[t]): t for t in (0, 3)}
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout='constrained')
    for ax, (title, t) in zip(axes, panels.items(), strict=False):
        rgb = sample['image'][t, [2, 1, 0]].permute(1, 2, 0).numpy()[rows]
        ax.imshow((rgb * 3).clip(0, 1))
        ax.set_title(f'served, {title}')
    axes[2].imshow(np.array([colours[i] for i in range(256)], np.uint8)[ids])
    axes[2].set_title('the map (COG)')
    draw_classes(axes[3], truth, scheme, 'truth')
    for ax in axes:
        ax.axis('off')
    figure.suptitle('Synthetic data: a box in degrees and a season in, a map out')
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=70)
    print(f'Written: {output}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser('python -m benchmarks.region', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('speed')
    commands.add_parser('map').add_argument('checkpoint', type=existing)
    args = parser.parse_args()
    map_region(args.checkpoint) if args.command == 'map' else speed()
