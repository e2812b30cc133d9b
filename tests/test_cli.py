import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from conftest import SHIPPED, run_script, torchgeo

from torchgeo_s1s2.errors import S1S2Warning

CONF = Path(__file__).parent / 'conf' / 'multisenge.yaml'
SCENE = CONF.with_name('scene.yaml')
CHECKPOINT = '--ckpt_path=outputs/best.ckpt'
SERIES = '--data.init_args.series=torchgeo_s1s2.datasets.MonthlySeries'
# A CSV logger clears its folder at the start of a run.
ELSEWHERE = '--trainer.logger.init_args.save_dir=predicted'


def command(folder: Path, subcommand: str, *options: str, conf: Path = CONF) -> None:
    torchgeo(folder, subcommand, f'--config={conf}', *options)


def logged(path: Path, prefix: str) -> dict[str, str]:
    """The last row of a metrics file that has metrics of that prefix, as written."""
    rows = [
        {k: v for k, v in row.items() if k.startswith(prefix) and v}
        for row in csv.DictReader(path.open())
    ]
    return [row for row in rows if row][-1]


@pytest.fixture(scope='module')
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data and the outputs of ``torchgeo fit``."""
    folder = tmp_path_factory.mktemp('cli')
    command(folder, 'fit')
    return folder


@pytest.fixture
def data(fitted: Path, tmp_path: Path) -> Path:
    """A copy of the data alone."""
    shutil.copytree(fitted / 'data', tmp_path / 'data')
    return tmp_path


def test_fit_leaves_checkpoint_metrics_and_pictures(fitted: Path) -> None:
    checkpoint = torch.load(fitted / 'outputs' / 'best.ckpt', weights_only=True)
    assert checkpoint['global_step'] == 2
    assert checkpoint['hyper_parameters']['labels'][0] == 'Dense Built-Up'
    metrics = logged(fitted / 'outputs' / 'metrics.csv', 'val_')
    # Loss, kappa, three weighted scores, TorchGeo's ten; of each class three and TorchGeo's five.
    assert len(metrics) == 1 + 1 + 3 + 10 + (3 + 5) * 10
    pictures = {path.name for path in (fitted / 'outputs' / 'figures').iterdir()}
    assert pictures == {'val_sample_0.png', 'val_confusion_matrix.png', 'curves.png'}


def test_test_writes_metrics_and_pictures_and_says_what_the_checkpoint_overrides(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (CHECKPOINT, '--trainer.logger.init_args.save_dir=tested')
    with pytest.warns(S1S2Warning, match=r'not used: --model.init_args.loss=dice$'):
        command(fitted, 'test', *options, '--model.init_args.loss=dice')
    metrics = logged(fitted / 'tested' / 'metrics.csv', 'test_')
    assert f'{float(metrics["test_WeightedF1Score"]):8.4f}' in capsys.readouterr().out
    assert (fitted / 'tested' / 'figures' / 'test_confusion_matrix.png').exists()


def test_a_checkpoint_of_four_dates_tests_three(fitted: Path) -> None:
    three = (
        '--trainer.logger.init_args.save_dir=three',
        SERIES,
        '--data.init_args.series.init_args.months=[7, 8, 9]',
    )
    command(fitted, 'test', CHECKPOINT, *three)
    metrics = logged(fitted / 'three' / 'metrics.csv', 'test_')
    assert 0 <= float(metrics['test_OverallAccuracy']) <= 1


def test_command_maps_each_patch_on_the_grid_of_its_images(fitted: Path) -> None:
    """The real command, in a process of its own."""
    program = Path(sys.executable).with_name('torchgeo')
    arguments = [str(program), 'predict', f'--config={CONF}', CHECKPOINT, ELSEWHERE]
    done = subprocess.run(arguments, cwd=fitted, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'maps written to outputs/maps: 2' in done.stdout
    check_maps(fitted)


def check_maps(folder: Path, tile: str = '31UEQ', count: int = 2) -> None:
    maps = sorted((folder / 'outputs' / 'maps').glob('*_[0-9]*.tif'))
    patches = sorted(p.stem for p in (folder / 'data' / 'labels').glob(f'{tile}_*.json'))
    assert len(patches) == count
    assert [path.stem for path in maps if 'confidence' not in path.stem] == patches
    for name in patches:
        tile, xy = name.split('_', 1)
        image = next((folder / 'data' / 's2').glob(f'{tile}_*_S2_{xy}.tif'))
        with rasterio.open(image) as s2, rasterio.open(maps[0].with_stem(name)) as land_cover:
            assert land_cover.transform == s2.transform
            assert land_cover.crs == s2.crs
            assert land_cover.shape == s2.shape
            assert set(np.unique(land_cover.read())) <= set(range(1, 11))


@pytest.mark.parametrize(
    ('subcommand', 'options', 'message'),
    [
        (
            'fit',
            ['--data.init_args.root=empty', '--data.init_args.source=null'],
            "folder 'labels'; .*",
        ),
        ('predict', ['--data.init_args.predict_split=tset'], "no split 'tset'; choose one of tra"),
        ('fit', ['--model.init_args.num_classes=14'], 'num_classes=14, the data have 10 classes'),
        ('fit', ['--lr_scheduler=StepLR', '--lr_scheduler.step_size=1'], 'give --optimizer, too'),
    ],
)
def test_bad_input_is_named_before_training(
    data: Path, subcommand: str, options: list[str], message: str
) -> None:
    (data / 'empty').mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command(data, subcommand, *options)
    assert not (data / 'outputs' / 'metrics.csv').exists()


PATCHES = '--data.init_args.source.init_args.patches={31UFQ: 3, 32ULU: 2, 31UFP: 3, 31UEQ: 2}'
PREDICT = '--data.init_args.predict_split=val'
TEST_SPLIT = '--data.init_args.splits={train: [31UFQ, 32ULU], val: [31UFP], test: [31UFP]}'
TWO = f"""
import json, os
from pathlib import Path
from lightning.pytorch import Callback
from torchgeo.main import main
from torchgeo_s1s2.datamodules import statistics
from torchgeo_s1s2.datasets import catalog

def note(*line):
    rank = os.environ.get('LOCAL_RANK', '0')
    with Path(f'seen_{{rank}}.txt').open('a') as file:
        print(json.dumps(line), file=file)

def noted(name, function):
    return lambda *args, **options: (note(name), function(*args, **options))[1]

class Recorder(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        note('train', trainer.current_epoch, *batch['index'].tolist())

    def on_validation_batch_start(self, trainer, module, batch, *args):
        if not trainer.sanity_checking:
            note('val', trainer.current_epoch, *batch['index'].tolist())

    def on_test_batch_start(self, trainer, module, batch, *args):
        note('test', 0, *batch['index'].tolist())

    def on_predict_batch_start(self, trainer, module, batch, *args):
        if 'index' in batch:
            note('predict', 0, *batch['index'].tolist())

if __name__ == '__main__':
    statistics.count_labels = noted('statistics', statistics.count_labels)
    catalog._Builder.build = noted('catalog', catalog._Builder.build)
    common = ['--config={CONF}', '--trainer.devices=2', '--trainer.strategy=ddp',
              '--trainer.callbacks+=two.Recorder', '{PATCHES}']
    main(['fit', *common, '--trainer.max_epochs=2', '--seed_everything=3'])
    main(['test', *common, '{CHECKPOINT}', '{TEST_SPLIT}', '{ELSEWHERE}'])
    main(['predict', *common, '{CHECKPOINT}', '--trainer.logger=false', '{PREDICT}'])
    main(['predict', *common, '--config={SCENE}', '{CHECKPOINT}'])
"""


def test_two_processes_measure_and_map_as_one(tmp_path: Path) -> None:
    """Fit, test and predict with two processes, then validate and test with one."""
    printed = run_script(tmp_path, TWO)
    assert printed.count('val metrics') == 1
    assert re.search(r'maps written to .*: 3\n', printed)
    check_maps(tmp_path, '31UFP', 3)
    check_shares(tmp_path)
    test = '--trainer.logger.init_args.save_dir=one_tested'
    command(tmp_path, 'validate', CHECKPOINT, PATCHES, '--trainer.logger.init_args.save_dir=one')
    command(tmp_path, 'test', CHECKPOINT, PATCHES, TEST_SPLIT, test)
    check_metrics(tmp_path / 'predicted', tmp_path / 'one_tested', 'test_')
    check_metrics(tmp_path / 'outputs', tmp_path / 'one', 'val_')
    check_scene(tmp_path)


def check_shares(folder: Path) -> None:
    """Each patch once an epoch in two processes with as many steps; what is kept is made once."""
    seen = [
        [json.loads(line) for line in (folder / f'seen_{rank}.txt').read_text().splitlines()]
        for rank in range(2)
    ]
    for kept in ('catalog', 'statistics'):
        assert [sum(line[0] == kept for line in lines) for lines in seen] == [1, 0]
    patches = {('train', 0): 5, ('train', 1): 5, ('val', 0): 3, ('val', 1): 3, ('test', 0): 3}
    for (stage, epoch), count in patches.items():
        batches = [[batch for s, *batch in lines if s == stage] for lines in seen]
        steps = [[indices for e, *indices in share if e == epoch] for share in batches]
        assert len(steps[0]) == len(steps[1])
        assert sorted(i for share in steps for batch in share for i in batch) == [*range(count)]
    predicted = [i for lines in seen for s, *rest in lines if s == 'predict' for i in rest[1:]]
    assert sorted(predicted) == [0, 1, 2]


def check_metrics(folder: Path, other: Path, prefix: str) -> None:
    one, two = (logged(path / 'metrics.csv', prefix) for path in (folder, other))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert float(two[name]) == pytest.approx(float(value), abs=1e-6, rel=1e-5), name


def check_scene(folder: Path) -> None:
    """One process gives the scene that two have written."""
    scene = folder / 'outputs' / 'scene'
    two = scene.rename(folder / 'two')
    command(folder, 'predict', CHECKPOINT, PATCHES, f'--config={SCENE}')
    assert sorted(path.name for path in scene.iterdir()) == [
        '32631.tif',
        '32631.tif.aux.xml',
        '32631_confidence.tif',
        '32631_observations.tif',
    ]
    for path in scene.glob('*.tif'):
        with rasterio.open(path) as one, rasterio.open(two / path.name) as other:
            assert one.transform == other.transform
            assert (one.read() != other.read()).mean() < 0.001
    reference = next((folder / 'data' / 'ground_reference').glob('31UEQ_GR_0_0.tif'))
    with rasterio.open(scene / '32631_observations.tif') as seen, rasterio.open(reference) as patch:
        assert (seen.read(1)[:, :32] == 8).all()  # four dates of two sensors
        assert seen.transform == patch.transform
        assert seen.shape == (32, 65)  # two patches, one pixel apart


def test_demonstration_runs_and_is_carried_to_another_region(tmp_path: Path) -> None:
    tiny = (
        '--data.init_args.source.init_args.size=32',
        '--data.init_args.source.init_args.incomplete=0',
        '--data.init_args.source.init_args.patches={31UFQ: 4, 31UFP: 4, 31UEQ: 4}',
        '--trainer.max_epochs=1',
        '--trainer.enable_progress_bar=false',
    )
    command(tmp_path, 'fit', *tiny, conf=SHIPPED / 'demo.yaml')
    with pytest.warns(UserWarning, match=r'of another shape: segmentation_head.0.weight'):
        command(tmp_path, 'fit', *tiny, conf=SHIPPED / 'transfer.yaml')
    before, after = (weights(tmp_path / 'outputs' / name) for name in ('demo', 'transfer'))
    assert after['model.segmentation_head.0.bias'].shape == (15,)
    # One epoch trains the head alone.
    kept = {k for k in before if after[k].shape == before[k].shape and after[k].equal(before[k])}
    assert set(before) - kept == {
        'model.segmentation_head.0.weight',
        'model.segmentation_head.0.bias',
        'criterion.weight',
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / 'best.ckpt', weights_only=True)[
        'state_dict'
    ]
    return state
