"""conf/region.yaml: from a place and a season to a map in one run."""

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from conftest import read_raster, torchgeo
from rasterio.windows import from_bounds
from shapely import box
from urllib3 import Retry

import torchgeo_s1s2
from torchgeo_s1s2.datasets import write_label_files
from torchgeo_s1s2.errors import DownloadError

for module in ('odc.stac', 'pystac_client', 'rustac'):
    pytest.importorskip(module, reason='the extra stac is not installed')

CONF = Path(torchgeo_s1s2.__file__).parent / 'conf' / 'region.yaml'
FIT = Path(__file__).parent / 'conf' / 'multisenge.yaml'
MODEL = ('--model.init_args.backbone=resnet18_convlstm_inception', '--trainer.accelerator=cpu')


def test_predict_downloads_maps_and_writes(tmp_path: Path) -> None:
    from benchmarks.region import configuration, serve

    size = '--data.init_args.source.init_args.size=128'
    torchgeo(tmp_path, 'fit', f'--config={FIT}', size)
    images = sorted(tmp_path.glob('data/s[12]/32ULU_*.tif'))
    patch = images[0].stem.split('_', 3)[-1]
    images = [image for image in images if image.stem.endswith(patch)]
    assert {image.parent.name for image in images} == {'s1', 's2'}
    options = [f'--config={CONF}', *MODEL, '--ckpt_path=outputs/best.ckpt']
    with serve(images, tmp_path, 120) as source:
        own = configuration(tmp_path / 'own.yaml', source={'init_args': source})
        torchgeo(tmp_path, 'predict', *options, own)
    # The same pixels cut out with rasterio alone, and mapped.
    direct = tmp_path / 'direct'
    for image in images:
        (direct / image.parent.name).mkdir(parents=True, exist_ok=True)
        day = image.stem.split('_')[1]
        own_path = next((tmp_path / 'data' / 'region' / image.parent.name).glob(f'*_{day}T*'), None)
        if own_path is None:  # the date rule does not want it
            continue
        with rasterio.open(own_path) as src, rasterio.open(image) as whole:
            window = from_bounds(*src.bounds, whole.transform).round_offsets().round_lengths()
            value = whole.read(window=window)
            profile = whole.profile | {'width': src.width, 'height': src.height}
            profile['transform'] = src.transform
            np.testing.assert_array_equal(src.read(), value)
        name = image.name.replace(patch, '0_0')
        with rasterio.open(direct / image.parent.name / name, 'w', **profile) as dst:
            dst.write(value)
    write_label_files(direct, progress=False)
    check_fit(tmp_path, source, images[0])
    plain = ['--data.init_args.source=null', '--data.init_args.root=direct']
    elsewhere = '--trainer.callbacks.init_args.output_dir=outputs/direct'
    torchgeo(tmp_path, 'predict', *options, *plain, elsewhere)
    ours, theirs = (sorted(tmp_path.glob(f'outputs/{n}/*.tif')) for n in ('region', 'direct'))
    assert ours
    assert [p.name for p in ours] == [p.name for p in theirs]
    for path, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(read_raster(path), read_raster(other))


def check_fit(folder: Path, source: dict[str, Any], image: Path) -> None:
    """Polygons make the region, which is there by now, a training set split by blocks of ground."""
    from benchmarks.region import configuration

    with rasterio.open(image) as src:
        left, bottom, right, top = src.bounds
        middle, crs = (left + right) / 2, src.crs
    halves = [box(left, bottom, middle, top), box(middle, bottom, right, top)]
    fields = gpd.GeoDataFrame({'crop': ['maize', 'wood']}, geometry=halves, crs=crs).to_crs(4326)
    fields.to_file(folder / 'fields.gpkg')
    labels: dict[str, Any] = {'file': str(folder / 'fields.gpkg'), 'attribute': 'crop'}
    labels |= {'classes': {'maize': 6, 'wood': 11}}
    datasets = 'torchgeo_s1s2.datasets'
    sources = [
        {'class_path': f'{datasets}.SentinelRegion', 'init_args': source},
        {'class_path': f'{datasets}.VectorLabels', 'init_args': labels},
    ]
    blocks = {'size': 640, 'shares': {'train': 0.5, 'val': 0.5}}
    splits = {'class_path': f'{datasets}.BlockSplits', 'init_args': blocks}
    own = configuration(
        folder / 'fit.yaml', source=sources, splits=splits, patch_size=32, batch_size=2
    )
    torchgeo(folder, 'fit', f'--config={CONF}', *MODEL, own, '--trainer.max_epochs=1')
    [reference] = (folder / 'data' / 'region' / 'ground_reference').glob('*.tif')
    with rasterio.open(reference) as src:
        half = round((middle - src.bounds.left) / 10)
        assert (read_raster(reference)[0, :, :half] == 6).all()
        assert (read_raster(reference)[0, :, half:] == 11).all()


def test_without_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Retry, 'get_backoff_time', lambda self: 0)
    for name in ('http_proxy', 'https_proxy', 'all_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
        monkeypatch.setenv(name.upper(), 'http://127.0.0.1:9')
    with pytest.raises(DownloadError) as error:
        torchgeo(tmp_path, 'predict', f'--config={CONF}', *MODEL)
    message = str(error.value)
    assert message.startswith('sentinel-2-l2a at https://planetarycomputer.microsoft.com/api/stac')
    assert 'Check the network' in message
    assert '\n' not in message
