"""The data module of PASTIS, and series that TorchGeo pads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import SHIPPED, run_script, write_pastis
from torch import Tensor
from torchgeo.datasets import PASTIS
from torchgeo.datasets.utils import pad_across_batches
from torchgeo.tasks import SemanticSegmentation

from torchgeo_s1s2.datamodules import PASTISSeriesDataModule
from torchgeo_s1s2.datasets import AllDates
from torchgeo_s1s2.errors import S1S2Warning
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation
from torchgeo_s1s2.transforms import NormalizeSeries


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pastis(tmp_path_factory.mktemp('pastis'))


@pytest.mark.parametrize(
    ('fold', 'train', 'val', 'test'),
    [(1, [1, 2, 3], [4], [5]), (2, [2, 3, 4], [5], [1]), (4, [1, 4, 5], [2], [3])],
)
def test_the_official_folds_and_their_rotations(
    root: Path, fold: int, train: list[int], val: list[int], test: list[int]
) -> None:
    """As in utae-paps, train_semantic.py."""
    datamodule = PASTISSeriesDataModule(root, fold, 1, series=AllDates(max_length=2))
    for split, folds in (('train', train), ('val', val), ('test', test), ('all', [1, 2, 3, 4, 5])):
        names = datamodule.open_split(split).index['name']
        assert names.tolist() == [str(9999 + number) for number in folds]


@pytest.mark.parametrize(
    ('options', 'message'),
    [({'fold': 6}, 'fold is 6; expected'), ({'predict_split': 'tset'}, "no split 'tset'; choose")],
)
def test_bad_arguments_are_named(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PASTISSeriesDataModule(root, **options)


def test_statistics_are_those_of_the_training_folds(root: Path) -> None:
    """Two dates of each of three patches; the columns are 0..31 and S1 is constant on a date."""
    series = AllDates(max_length=2, missing='keep')
    datamodule = PASTISSeriesDataModule(root, batch_size=1, series=series, augment=False)
    datamodule.setup('fit')
    assert datamodule.channels == {'s2': 10, 's1a': 3, 's1d': 3}
    found: Any = datamodule.statistics
    # The first and the last date: t is 0 and 2, 3 and 4 of folds 1, 2 and 3.
    last = np.array([2, 3, 4])
    level = np.mean([1000 + 0 * last, 1000 * (last + 1)])
    assert found.mean[0] == pytest.approx((level + 15.5) / 1e4, rel=1e-6)
    assert found.pixels == (62 * 3,) * 13 + (31 * 3,) * 6  # 32 rows of 19 classes, 31 columns
    batch = datamodule.on_after_batch_transfer(next(iter(datamodule.train_dataloader())), 0)
    channel = (batch['image'][0, 0, 0] * found.std[0] + found.mean[0]) * 1e4
    torch.testing.assert_close(channel[0], 1000 + torch.arange(32.0), atol=0.01, rtol=0)
    other = PASTISSeriesDataModule(root, 2, batch_size=1, series=series)
    other.setup('test')
    with pytest.warns(
        S1S2Warning, match=r'100.0% of the ground of .* is ground that the checkpoint was'
    ):
        other.load_state_dict(datamodule.state_dict())
    assert other.statistics == found


def task(backbone: str = 'resnet18_convlstm_inception_s2') -> S1S2SemanticSegmentation:
    torch.manual_seed(0)
    return S1S2SemanticSegmentation('unet', backbone, in_channels=40, num_classes=20)


def batches(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Series of 6 and 7 dates as TorchGeo pads them, to 7 and to 11 slots."""
    samples = [PASTIS(root.parent, folds=(fold,))[0] for fold in (4, 5)]
    return pad_across_batches(samples, 7), pad_across_batches(samples, 11)


def logits(model: Any, batch: dict[str, Any], train: bool) -> Tensor:
    """Of a step of a task."""
    model.train(train)
    torch.manual_seed(0)
    captured: list[Tensor] = []
    hook = model.model.register_forward_hook(lambda *args: captured.append(args[2]))
    with torch.no_grad():
        step = model.training_step if train else model.predict_step
        model.log, model.trainer = lambda *a, **k: None, None
        step(batch, 0)
    hook.remove()
    return captured[0]


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('normalized', [True, False])
def test_padding_changes_nothing(root: Path, train: bool, normalized: bool) -> None:
    """Normalised by our transform, which fills padding with 0, or as TorchGeo does, padding too."""
    short, long = batches(root)
    if normalized:
        normalize = NormalizeSeries([3000.0] * 10, [1000.0] * 10)
        short, long = normalize(short, [10]), normalize(long, [10])
        assert not long['image'][0, 6:].any()
    else:
        short, long = ({**b, 'image': (b['image'] - 3000) / 1000} for b in (short, long))
        assert (long['image'][0, 6:] == -3).all()
    for name in ('resnet18_convlstm_inception_s2', 'resnet18_convlstm_s2', 'utae_s2'):
        one, other = (logits(task(name), batch, train) for batch in (short, long))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_stock_task_knows_padding_by_its_zeros(root: Path) -> None:
    backbone = 'resnet18_convlstm_inception_s2'
    torch.manual_seed(0)
    model = SemanticSegmentation('unet', backbone, in_channels=40, num_classes=20).eval()
    with torch.no_grad():
        one, other = (model(b['image'].flatten(1, 2) / 1e4) for b in batches(root))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


BACKBONE = 'resnet18_convlstm_inception_s2_s1ax3_s1dx3_h4_t4'
SCRIPT = f"""
from torchgeo.main import main

if __name__ == '__main__':
    common = ['--config={SHIPPED / 'pastis.yaml'}', '--config={SHIPPED / 'pastis_s1s2.yaml'}',
              '--model.init_args.backbone={BACKBONE}',
              '--data.init_args.series.init_args.max_length=4', '--data.init_args.batch_size=2',
              '--data.init_args.num_workers=0', '--trainer.accelerator=cpu',
              '--trainer.devices=2', '--trainer.strategy=ddp', '--trainer.logger=false',
              '--trainer.enable_progress_bar=false', '--trainer.enable_model_summary=false']
    main(['fit', *common, '--trainer.max_epochs=1'])
    main(['fit', *common, '--trainer.max_epochs=2', '--ckpt_path=outputs/pastis/last.ckpt'])
    main(['test', *common, '--ckpt_path=outputs/pastis/best.ckpt'])
    main(['predict', *common, '--ckpt_path=outputs/pastis/best.ckpt'])
"""


def test_two_processes_train_resume_test_and_map(tmp_path: Path) -> None:
    """The shipped configurations on ten patches of the published layout."""
    write_pastis(tmp_path / 'data', {i: (3 + i % 3, 5 + i, 6 + i % 4) for i in range(10)})
    printed = run_script(tmp_path, SCRIPT)
    last = torch.load(tmp_path / 'outputs/pastis/last.ckpt', weights_only=False)
    # Six training patches in two processes, which are a step of three each.
    epochs = last['loops']['fit_loop']['epoch_progress']['total']['processed']
    assert (epochs, last['global_step']) == (2, 2)
    assert printed.count('U-TAE, S2+S1 late (published)') == 1
    assert printed.count(f'this test: unet, {BACKBONE}') == 1
    maps = sorted((tmp_path / 'outputs/pastis/maps').glob('1000?.tif'))
    assert [path.stem for path in maps] == ['10004', '10009']  # fold 5
    for path, number in zip(maps, (4, 9), strict=True):
        with rasterio.open(path) as land_cover:
            assert land_cover.crs.to_epsg() == 32630
            assert land_cover.transform[:6] == (10, 0, 600000 + 320 * number, 0, -10, 5500000)
            assert {*np.unique(land_cover.read())} <= {*range(1, 20)}
            assert land_cover.tags(1)['CLASS_1'] == 'Background'
