"""Peak memory and time of mapping whole scenes of different sizes (synthetic, random weights).

Memory shall depend on the window and not on the scene. Each scene is a synthetic patch, mirrored
until it fills the size, and is mapped by ``torchgeo predict`` in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import rasterio

from torchgeo_s1s2.datasets import MonthlySeries, MultiSenGE
from torchgeo_s1s2.datasets.synthetic import write_synthetic

TILE = '31UEQ'
CONFIG = """
trainer:
  accelerator: cpu
  logger: false
  default_root_dir: {root}
  callbacks:
    - class_path: torchgeo_s1s2.callbacks.SceneWriter
      init_args: {{output_dir: {root}/maps}}
model:
  class_path: torchgeo_s1s2.tasks.S1S2SemanticSegmentation
  init_args: {{backbone: {backbone}, in_channels: 48, num_classes: 10}}
data:
  class_path: torchgeo_s1s2.datamodules.MultiSenGEDataModule
  init_args:
    root: {root}
    classes: 10
    batch_size: 1
    predict_patch_size: {window}
    statistics: {root}/statistics.json
"""


def write_scene(source: Path, root: Path, size: int) -> None:
    """Mirror the series of the one patch of ``source`` until it fills ``size`` pixels."""
    dataset = MultiSenGE(source, split='test', series=MonthlySeries())
    label = json.loads(next((source / 'labels').iterdir()).read_text())
    reference = dataset.catalog.ground_reference(0)
    assert reference is not None
    paths = [reference]
    for sensor, slots in dataset.slots(0).items():
        chosen = [dataset.catalog.path(0, sensor, position) for (position,) in slots]
        label[f'corresponding_{sensor}'] = ';'.join(path.name for path in chosen)
        paths += chosen
    for path in paths:
        mirror(path, root / path.relative_to(source), size)
    (root / 'labels').mkdir()
    (root / 'labels' / f'{TILE}_0_0.json').write_text(json.dumps(label))


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


def write_statistics(path: Path) -> None:
    mean, std = [0.1] * 10 + [-10.0, -17.0], [0.1] * 10 + [3.0, 3.0]
    content = {'bands': MultiSenGE.all_bands, 'mean': mean, 'std': std, 'pixels': [1] * 10}
    path.write_text(json.dumps(content))


def map_scene(root: Path, size: int, options: argparse.Namespace) -> dict[str, float]:
    """Map a scene; return seconds and the peak memory of all processes so far in MiB."""
    config = root / 'scene.yaml'
    config.write_text(CONFIG.format(root=root, **vars(options)))
    begin = time.perf_counter()
    command = [Path(sys.executable).with_name('torchgeo'), 'predict', '--config', config]
    subprocess.run(list(map(str, command)), check=True)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {'size': size, 'seconds': round(seconds), 'peak_mib': round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--output', type=Path, default=Path('outputs/scene'))
    parser.add_argument(
        '--sizes', type=int, nargs='+', default=[1024, 2048, 4096], help='ascending'
    )
    parser.add_argument('--window', type=int, default=256)
    parser.add_argument('--backbone', default='resnet18_convlstm_inception')
    options = parser.parse_args()
    source = options.output / 'patch'
    write_synthetic(source, size=256, patches={TILE: 1}, incomplete=0)
    results = []
    for size in options.sizes:
        root = options.output.resolve() / str(size)
        if not (root / 'labels').exists():
            write_scene(source, root, size)
            write_statistics(root / 'statistics.json')
        results.append(map_scene(root, size, options))
        print(results[-1])
    print(json.dumps(results))


if __name__ == '__main__':
    main()
