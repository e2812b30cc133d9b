import json
import re
import warnings
from itertools import batched
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import S2_DATES, Waits, quiet_trainer, random_images, read_raster, write_patch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader
from torchgeo.datamodules import BaseDataModule

from torchgeo_s1s2.datamodules import MultiSenGEDataModule, Statistics
from torchgeo_s1s2.datamodules.statistics import statistics_path
from torchgeo_s1s2.datasets import (
    Copy,
    MultiSenGE,
    MultiSenNA,
    RandomDates,
    Synthetic,
    rasters,
)
from torchgeo_s1s2.errors import S1S2Warning
from torchgeo_s1s2.transforms import SeriesDropout

SPLITS = {'train': ['31UEQ'], 'val': ['32ULU'], 'test': ['32ULU']}
SIZE = 12
KEYS = ('transform', 'crs', 'valid_count')


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training patches and two others, of noise with a hole in one date."""
    root, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for tile, x in (*(('31UEQ', 13 * i) for i in range(4)), ('32ULU', 0), ('32ULU', 13)):
        images = random_images(rng, SIZE)
        images['s2'][S2_DATES[1]][:, :3] = -10000
        labels = rng.integers(1, 15, (SIZE, SIZE)).astype(np.uint8)
        write_patch(root, tile, x, 0, SIZE, **images, labels=labels)
    return root


class Recorder(LightningModule):
    """Keeps the batches that reach the model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: dict[str, list[dict[str, Any]]] = {}

    def step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        stage: Any = self.trainer.state.stage
        self.batches.setdefault(stage.dataloader_prefix, []).append(batch)
        return self.weight * batch['image'].mean()

    training_step = validation_step = test_step = predict_step = step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> Trainer:
    return quiet_trainer(num_sanity_val_steps=0, **options)


def datamodule(root: Path, **options: Any) -> MultiSenGEDataModule:
    settings: dict[str, Any] = {'batch_size': 2, 'splits': SPLITS} | options
    return MultiSenGEDataModule(root, **settings)


def fit(root: Path, **options: Any) -> tuple[Recorder, MultiSenGEDataModule]:
    task, data = Recorder(), datamodule(root, **options)
    trainer().fit(task, data)
    return task, data


def test_training_patches_are_normalised_and_filled(root: Path) -> None:
    task, _ = fit(root, augment=False)
    images = torch.cat([batch['image'] for batch in task.batches['train']])
    assert images.shape == (4, 4, 12, SIZE, SIZE)
    hole = images[:, 1, :10, :3]
    assert not hole.any()
    s2 = images[:, :, :10].transpose(1, 2).flatten(2)
    seen = s2[s2 != 0].view(4, 10, -1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(seen.mean(1), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(1, correction=0), torch.ones(10), atol=1e-5, rtol=0)


def test_the_patches_of_a_split_are_chosen_once(root: Path, monkeypatch: Any) -> None:
    chosen: list[str] = []
    choose = MultiSenGE._choose
    monkeypatch.setattr(
        MultiSenGE,
        '_choose',
        lambda self, rows: chosen.append(self.split) or choose(self, rows),  # type: ignore[func-returns-value]
    )
    _, data = fit(root)
    trainer().test(Recorder(), data, verbose=False)
    assert sorted(chosen) == ['test', 'train', 'val']


def test_the_first_process_finds_the_statistics_for_all(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other, sent = datamodule(root), datamodule(root), list[Statistics | None]()
    for rank, data in enumerate((first, other)):

        def broadcast(value: Statistics | None) -> Statistics | None:
            sent.append(value)
            return sent[0]

        strategy, state = SimpleNamespace(broadcast=broadcast), SimpleNamespace(fn='fit')
        processes = {'world_size': 2, 'is_global_zero': rank == 0, 'strategy': strategy}
        data.trainer = SimpleNamespace(callbacks=[], state=state, **processes)  # type: ignore[assignment]
        data.setup('fit')
        monkeypatch.setattr(Statistics, 'beside', None)  # the others neither read nor compute
    assert sent == [first.statistics, None]
    assert other.statistics == first.statistics is not None


def test_a_gpu_waits_for_no_copy_of_the_statistics(root: Path) -> None:
    """Batches lie in pinned memory, and only the first takes the statistics to the device."""
    data = datamodule(root)
    data.setup('fit')
    batch = next(iter(data.train_dataloader()))
    batch = {name: torch.as_tensor(batch[name]).to('meta') for name in ('image', 'valid')}
    copies = []
    for _ in range(2):
        with Waits() as mode:
            data.on_after_batch_transfer(dict(batch), 0)
        copies.append(mode.found)
    assert copies == [{'copy': 2}, {}]
    for device in ('cpu', 'cuda'):
        strategy = SimpleNamespace(root_device=torch.device(device))
        data.trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
        assert data._loader([]).pin_memory == (device == 'cuda')


def test_crops_are_read_and_of_training_only(
    root: Path, windows_read: list[tuple[int, ...]]
) -> None:
    """Of 8 x 5 pixels two lie side by side in a patch of 12 x 12."""
    task, data = Recorder(), datamodule(root, patch_size=(8, 5))
    data.setup('fit')
    del windows_read[:]
    trainer().fit(task, data)
    assert [b['image'].shape for b in task.batches['train']] == [(2, 4, 12, 8, 5)] * 4
    assert {b['mask'].shape for b in task.batches['train']} == {(2, 8, 5)}
    index = torch.cat([b['index'] for b in task.batches['train']])
    assert sorted(index.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {b['image'].shape for b in task.batches['val']} == {(2, 4, 12, SIZE, SIZE)}
    assert windows_read.count((10, 8, 5)) == 8 * 4
    assert windows_read.count((10, SIZE, SIZE)) == 2 * 4  # of the two patches of the validation
    trainer().test(task, data, verbose=False)
    assert {b['mask'].shape for b in task.batches['test']} == {(2, SIZE, SIZE)}


def test_patches_of_several_sizes_make_batches(tmp_path: Path) -> None:
    for x, size in ((0, 8), (20, 16), (40, 12)):
        write_patch(tmp_path, '31UEQ', x, size=size)
    write_patch(tmp_path, '32ULU', size=8)
    task, _ = fit(tmp_path, batch_size=3, augment=False)
    (batch,) = task.batches['train']
    assert batch['image'].shape == (3, 4, 12, 16, 16)
    pixels = (batch['mask'] != 255).sum((1, 2)).tolist()
    assert dict(zip(batch['index'].tolist(), pixels, strict=True)) == {0: 64, 1: 256, 2: 144}
    small = batch['index'].tolist().index(0)
    assert not batch['image'][small, ..., 8:, :].any()  # missing is the mean, 0
    assert not batch['image'][small, ..., 8:].any()
    crops, _ = fit(tmp_path, batch_size=2, patch_size=10)
    index = torch.cat([b['index'] for b in crops.batches['train']])
    assert sorted(index.tolist()) == [0, 1, 2]
    for b in crops.batches['train']:
        assert b['image'].shape[1:] == (4, 12, 10, 10)
        for i, mask in zip(b['index'].tolist(), b['mask'], strict=True):
            assert (mask != 255).sum() == (64 if i == 0 else 100)


def test_evaluation_sees_patches_as_they_are(root: Path) -> None:
    task, data = fit(root)
    (batch,) = task.batches['val']
    for number in range(2):
        sample = data.val_dataset[number]  # type: ignore[index]
        assert torch.equal(batch['mask'][number], sample['mask'])
        back = data.denormalize({'image': batch['image'][number]})['image']
        seen = sample['image'].isfinite()
        torch.testing.assert_close(back[seen], sample['image'][seen], rtol=1e-4, atol=1e-5)


def test_predict_reads_the_split_that_is_asked_for(root: Path) -> None:
    task = Recorder()
    trainer().predict(task, datamodule(root, predict_split='train'), return_predictions=False)
    crs = torch.cat([batch['crs'] for batch in task.batches['predict']])
    assert crs.tolist() == [32631] * 4
    index = torch.cat([batch['index'] for batch in task.batches['predict']])
    assert index.tolist() == [0, 1, 2, 3]


def test_windows_cover_the_scenes_of_each_zone(root: Path) -> None:
    task = Recorder()
    data = datamodule(root, predict_split='all', splits=None, predict_patch_size=8)
    trainer().predict(task, data, return_predictions=False)
    # Four dates of two sensors, but S2 did not see three rows on one date; a pixel parts patches.
    rows, columns = np.mgrid[:SIZE, :51]
    expected = np.select([columns % 13 == 12, rows < 3], [0, 7], 8)
    zones = {32631: (500000, 5500000), 32632: (300000, 5400000)}
    around = {epsg: np.full((SIZE + 16, 51 + 16), -1) for epsg in zones}  # eight more on each side
    for batch in task.batches['predict']:
        for transform, crs, count in zip(*(batch[k] for k in KEYS), strict=True):
            left, top = zones[int(crs)]
            col, row = round(float(transform[2] - left) / 10), round(float(top - transform[5]) / 10)
            around[int(crs)][row + 8 : row + 16, col + 8 : col + 16] = count
    west, east = (seen[8:-8, 8:-8] for seen in around.values())
    np.testing.assert_array_equal(west, expected)
    np.testing.assert_array_equal(east[:, :25], expected[:, :25])


def test_a_scene_smaller_than_a_window_has_one(root: Path) -> None:
    windows = {'predict_patch_size': (8, 256), 'predict_stride': (8, 16)}
    data = datamodule(root, predict_split='all', **windows)
    data.setup('predict')
    assert data.predict_sampler
    assert [len(list(sampler)) for sampler in data.predict_sampler] == [2, 2]  # rows


def test_what_is_known_of_the_data(root: Path) -> None:
    assert datamodule(Path('~/data')).root == Path.home() / 'data'
    data = datamodule(root, classes=6, bands=['B08', 'VV', 'B04'])
    with pytest.raises(RuntimeError, match='call setup'):
        _ = data.channels
    data.setup('fit')
    assert data.channels == {'s2': 2, 's1': 1}
    assert data.series_length == 4
    assert data.classes.names[0] == 'Dense Built-Up'
    masks = torch.cat([data.train_dataset[i]['mask'].flatten() for i in range(4)])  # type: ignore[index]
    inverse = 1 / torch.bincount(masks, minlength=6)
    torch.testing.assert_close(data.class_weights, 1000 * inverse / inverse.sum())
    figure = data.plot(data.train_dataset[0])  # type: ignore[index]
    assert figure.axes[0].get_title() == 'S2 2020-07-06'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'batch_size': 5}, r"batch_size is 5, but split 'train' .* has only 4 patches.*make it 4"),
        ({'batch_size': 0}, 'batch_size is 0; it must be 1 or more'),
        ({'num_workers': -1}, 'num_workers is -1; it must be 0 or more'),
        ({'dropout': 0.1}, r'dropout is 0.1, expected SeriesDropout\(date'),
        ({'patch_size': 0}, 'patch_size is 0; it must be 1 or more'),
        ({'patch_size': 8.5}, 'patch_size is 8.5; it must be 1 or more, a whole number'),
        ({'patch_size': (8,)}, r'patch_size is \(8,\); give one number of pixels, or height and'),
        ({'predict_patch_size': 8, 'predict_stride': (8, 9)}, 'stride the smaller one, or ground'),
        ({'predict_patch_size': 8, 'predict_stride': 0}, 'predict_stride is 0; it must be 1'),
        ({'predict_stride': 8}, 'predict_patch_size None'),
        ({'predict_patch_size': (0, 8)}, 'predict_patch_size is 0; it must be 1 or more'),
        (
            {'patch_size': (8, 13)},
            r"size is \(8, 13\), .* no patch of split 'train'.*widest 12. Mak.*blocks larger",
        ),
        ({'splits': {'val': ['32ULU']}}, "no split 'train'; choose one of val, all"),
        ({'splits': SPLITS | {'val': ['31UFP']}}, "split 'val' has no patch"),
        ({'sensors': ['s3']}, 'no such sensor'),
        ({'source': 'synthetic'}, "source is 'synthetic'; expected Synthetic"),
        ({'download': True}, 'no download; to download, give source'),
        ({'checksum': True}, 'no checksum; to download, give source'),
        ({'split': 'train'}, 'no split; to download, give source'),
    ],
)
def test_bad_settings_are_refused_before_the_statistics(
    root: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Statistics, 'beside', None)  # would be another error
    with pytest.raises(ValueError, match=message):
        fit(root, **options)


@pytest.fixture(scope='module')
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Statistics]:
    """Checkpoint and statistics of a training on the patches of zone 31."""
    (task, data), path = fit(root), tmp_path_factory.mktemp('trained') / 'last.ckpt'
    task.trainer.save_checkpoint(path)
    assert data.statistics is not None
    return path, data.statistics


def test_statistics_travel_in_checkpoints(trained: tuple[Path, Statistics], tmp_path: Path) -> None:
    path, statistics = trained
    write_patch(tmp_path, '32ULU', size=SIZE)
    other = datamodule(tmp_path, splits={'test': ['32ULU']})
    with pytest.raises(ValueError, match='no training patches to compute statistics from'):
        trainer().test(Recorder(), other, verbose=False)
    fresh = Recorder()
    trainer().test(fresh, other, ckpt_path=path, verbose=False)
    assert other.statistics == statistics
    # Only what is tested was read: there are no training patches here.
    raw = other.test_dataset[0]['image']  # type: ignore[index]
    mean, std = (torch.tensor(v)[:, None, None] for v in (statistics.mean, statistics.std))
    torch.testing.assert_close(fresh.batches['test'][0]['image'][0], (raw - mean) / std)
    by_hand = MultiSenGEDataModule.load_from_checkpoint(
        path, weights_only=False, root=tmp_path, splits={'test': ['32ULU']}
    )
    by_hand.prepare_data()
    by_hand.setup('test')
    assert by_hand.statistics == statistics
    fewer = datamodule(tmp_path, splits={'test': ['32ULU']}, sensors=['s1'])
    with pytest.raises(ValueError, match=r"the data module reads \('VV', 'VH'\); give the bands"):
        trainer().test(Recorder(), fewer, ckpt_path=path, verbose=False)


@pytest.mark.parametrize(
    ('stage', 'splits', 'said'),
    [
        ('test', {'test': ['31UEQ', '32ULU']}, [r'6\d.\d%']),
        ('validate', {'val': ['31UEQ']}, ['100.0%']),
        ('test', {'test': ['32ULU']}, []),
        ('fit', {'train': ['32ULU'], 'val': ['31UEQ']}, ['100.0%']),
        ('fit', SPLITS, []),
    ],
)
def test_ground_of_the_training_that_is_evaluated_is_said(
    root: Path, trained: tuple[Path, Statistics], stage: str, splits: Any, said: list[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        getattr(trainer(), stage)(Recorder(), datamodule(root, splits=splits), ckpt_path=trained[0])
    found = [text for w in caught if 'trained on' in (text := str(w.message))]
    for pattern, text in zip(said, found, strict=True):
        assert re.match(f'{pattern} of the ground of split', text)


def test_a_checkpoint_spares_the_statistics(
    root: Path, trained: tuple[Path, Statistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in root.glob('statistics_*.json'):
        path.unlink()
    opened, real = list[str](), rasters.open_raster
    monkeypatch.setattr(rasters, 'open_raster', lambda *a: opened.append(a[0].name) or real(*a))  # type: ignore[func-returns-value]
    for stage in ('test', 'validate', 'predict'):
        other = datamodule(root, predict_split='val', predict_patch_size=8)
        getattr(trainer(), stage)(Recorder(), other, ckpt_path=trained[0])
        assert other.statistics == trained[1]
        assert opened
        assert not [name for name in opened if name.startswith('31UEQ')]
        assert not [*root.glob('statistics_*.json')]


@pytest.mark.parametrize('beside', [True, False])
def test_a_given_file_of_statistics_wins(root: Path, tmp_path: Path, beside: bool) -> None:
    """But it does not weigh the classes."""
    data = datamodule(root)
    data.setup('fit')
    assert data.statistics is not None
    path = tmp_path / 'mine.json'
    data.statistics.save(path)
    # One that is kept beside data, as the error says that asks for a file.
    kept = statistics_path(data.train_dataset) if beside else path  # type: ignore[arg-type]
    content = json.loads(kept.read_text())
    content |= {'mean': [7.5, *content['mean'][1:]], 'pixels': [9, 1], 'labels': [[1, 1]]}
    path.write_text(json.dumps(content))
    mine = datamodule(root, statistics=path)
    mine.prepare_data()
    mine.setup('test')
    assert mine.statistics is not None
    assert mine.statistics.mean == (7.5, *data.statistics.mean[1:])
    assert torch.equal(mine.class_weights, data.class_weights)
    mine.load_state_dict(data.state_dict())
    assert mine.statistics.mean[0] == 7.5


def test_no_labelled_training_pixel_is_an_error_before_training(tmp_path: Path) -> None:
    for tile in ('31UEQ', '32ULU'):
        write_patch(tmp_path, tile, size=8, labels=np.full((8, 8), 60, np.uint8))
    task = Recorder()
    message = (
        r'no pixel of split .train.* hold 60 \(100.0%\), the classes claim \[1, 2, 3.*Give classes'
    )
    with pytest.raises(ValueError, match=message):
        trainer().fit(task, datamodule(tmp_path, batch_size=1))
    assert not task.batches
    for path in (tmp_path / 'ground_reference').iterdir():
        path.unlink()
    with (
        pytest.raises(ValueError, match='the label rasters hold nothing'),
        pytest.warns(S1S2Warning, match='2 of ground_reference'),
    ):
        fit(tmp_path, batch_size=1)


def test_labels_without_a_class_and_classes_without_a_label_are_said(tmp_path: Path) -> None:
    """Of 64 pixels 8 have no class, 8 are 0, which stands for none, and 48 are arable."""
    labels = np.full((8, 8), 6, np.uint8)
    labels[0], labels[1] = 77, 0
    for tile in ('31UEQ', '32ULU'):
        write_patch(tmp_path, tile, size=8, labels=labels)
    with pytest.warns(S1S2Warning) as said:
        fit(tmp_path, batch_size=1, classes=6)
    (text,) = (str(w.message) for w in said if 'training pixel' in str(w.message))
    assert 'no class claims the labels 0 (12.5%), 77 (12.5%)' in text
    assert 'no training pixel is of Dense Built-Up, Sparse Built-Up, Specialized Built-Up' in text
    assert 'Other' not in text


def test_an_unreadable_raster_in_the_middle_of_an_epoch_names_itself(tmp_path: Path) -> None:
    for x in range(0, 36, 9):
        write_patch(tmp_path, '31UEQ', x, size=8)
    write_patch(tmp_path, '32ULU', size=8)
    data = datamodule(tmp_path, batch_size=1, num_workers=1)
    data.prepare_data()
    data.setup('fit')
    path = tmp_path / 's2' / f'31UEQ_{S2_DATES[3]}_S2_27_0.tif'
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(OSError, match=f'{path}.*Fetch the file again'):
        trainer().fit(Recorder(), data)


def test_another_data_set_in_the_same_layout(tmp_path: Path) -> None:
    write_patch(tmp_path, '31UEQ', size=8, labels=np.full((8, 8), 15, np.uint8))
    data = MultiSenGEDataModule(
        tmp_path, 1, classes=15, splits={'train': ['31UEQ'], 'val': ['31UEQ']},
        dataset_class=MultiSenNA,
    )  # fmt: skip
    data.setup('fit')
    assert data.class_weights.nonzero().tolist() == [[14]]


OWN_DATA = """
data:
  class_path: torchgeo_s1s2.datamodules.MultiSenGEDataModule
  init_args:
    root: {root}
    batch_size: 1
    classes: {classes}
    splits: {{train: [31UEQ], val: [32ULU]}}
    series: {{class_path: torchgeo_s1s2.datasets.EvenlySpaced, init_args: {{n: 3}}}}
    dropout: {{class_path: torchgeo_s1s2.transforms.SeriesDropout, init_args: {{sensor: 0.5}}}}
"""
OWN_CLASSES = """
      class_path: torchgeo_s1s2.datasets.ClassScheme
      init_args:
        ids: [10, 20, 30]
        classes:
          - {name: Town, color: "#9e0020", labels: [1, 2, 3, 4, 5]}
          - {name: Arable, color: [255, 236, 150], labels: [6]}
          - {name: Forest, color: forestgreen, labels: [10, 11]}"""


def parse(text: str) -> MultiSenGEDataModule:
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(BaseDataModule, 'data')
    data = parser.instantiate(parser.parse_string(text)).data
    assert isinstance(data, MultiSenGEDataModule)
    return data


def test_a_configuration_describes_data_of_ones_own(root: Path) -> None:
    data = parse(OWN_DATA.format(root=root, classes=OWN_CLASSES))
    data.setup('fit')
    assert data.classes.names == ('Town', 'Arable', 'Forest')
    assert data.classes.ids == (10, 20, 30)
    assert data.classes.colors == ((158, 0, 32), (255, 236, 150), (34, 139, 34))
    (labels,) = read_raster(root / 'ground_reference' / '31UEQ_GR_13_0.tif')
    expected = np.select([labels <= 5, labels == 6, np.isin(labels, (10, 11))], [0, 1, 2], 255)
    assert np.array_equal(data.train_dataset[1]['mask'], expected)  # type: ignore[index]
    assert [len(d) for d in (data.train_dataset, data.val_dataset)] == [4, 2]  # type: ignore[arg-type]
    assert data.series_length == 3
    assert len(data.class_weights) == 3
    assert data.dropout is not None
    assert (data.dropout.date, data.dropout.sensor) == (0.1, 0.5)


def test_day_of_year_comes_after_each_sensor(root: Path) -> None:
    (task, data), plain = fit(root, day_of_year=True), datamodule(root)
    assert data.channels == {'s2': 12, 's1': 4}
    assert data.mean.shape == data.std.shape == (4 * 16,)
    batch = task.batches['val'][0]
    assert batch['image'].shape == (2, 4, 16, SIZE, SIZE)
    days = torch.tensor([188, 218, 248, 313])  # 6 July, 5 August, 4 September, 8 November 2020
    sine = torch.sin(2 * torch.pi * days / 365.25)
    expected = sine[:, None, None].expand(4, SIZE, SIZE)
    torch.testing.assert_close(batch['image'][0, :, 10], expected)
    plain.setup('fit')
    sample = {'image': batch['image'][1], 'acquisition_times': batch['acquisition_times'][1]}
    back = data.denormalize(sample)
    torch.testing.assert_close(back['image'][:, 10], expected)
    raw = data.val_dataset[1]  # type: ignore[index]
    shown = [data.plot(s).axes[4].images[0].get_array() for s in (back, raw)]
    np.testing.assert_allclose(shown[0], shown[1], atol=1e-3)


def test_dropout_is_of_training_only(root: Path) -> None:
    task, _ = fit(root, dropout=SeriesDropout(date=1), day_of_year=True)
    for batch in task.batches['train']:
        assert (batch['valid'].flatten(1).sum(1) == 1).all()
        slots = torch.stack(
            [batch['image'][:, :, :12], batch['image'][:, :, 12:].repeat(1, 1, 3, 1, 1)]
        )
        # What is dropped is 0 in every plane, as the backbones expect of what nobody saw.
        assert torch.equal(slots.flatten(3).any(-1).permute(1, 2, 0), batch['valid'])
    assert task.batches['val'][0]['valid'].all()


class Starts(MultiSenGEDataModule):
    """Keeps the epoch in which worker processes would begin to read."""

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()
        self.start = self.train_dataset.epoch  # type: ignore[union-attr]
        return loader


Draws = list[dict[int, str]]


def draws(
    root: Path, workers: int = 0, ckpt_path: Path | None = None, **options: Any
) -> tuple[Draws, Draws, int]:
    """Sentinel-2 dates of each patch by epoch, of training and validation, and the first epoch."""
    task = Recorder()
    data = Starts(root, 1, workers, splits=SPLITS, series=RandomDates(n=2))
    trainer(**({'max_epochs': 4} | options)).fit(task, data, ckpt_path=ckpt_path)
    train, val = (
        [(int(b['index']), str(b['acquisition_times'][0, :, 0].tolist())) for b in task.batches[s]]
        for s in ('train', 'val')
    )
    return [*map(dict, batched(train, 4))], [*map(dict, batched(val, 2))], data.start


def test_random_dates_change_with_the_patch_the_epoch_and_nothing_else(root: Path) -> None:
    train, val, start = draws(root)
    assert [sorted(dates) for dates in train] == [[0, 1, 2, 3]] * 4
    assert len({str(sorted(dates.items())) for dates in train}) == 4
    assert len({date for dates in train for date in dates.values()}) > 4
    assert val == val[:1] * 4
    assert draws(root) == draws(root, workers=1) == (train, val, start)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('after_validation', [True, False])
def test_a_resumed_training_draws_as_if_it_had_not_stopped(
    root: Path, tmp_path: Path, workers: int, after_validation: bool
) -> None:
    saver = ModelCheckpoint(tmp_path, '{epoch}', save_on_train_epoch_end=not after_validation)
    draws(root, max_epochs=2, enable_checkpointing=True, callbacks=[saver])
    resumed, _, start = draws(root, workers, tmp_path / 'epoch=1.ckpt')
    complete, _, _ = draws(root)
    assert (resumed, start) == (complete[2:], 2)


def test_a_second_fit_follows_the_epochs_once(root: Path) -> None:
    data, runner = datamodule(root, series=RandomDates(n=2)), trainer()
    runner.fit(Recorder(), data)
    callbacks = [*runner.callbacks]  # type: ignore[attr-defined]
    runner.fit(Recorder(), data)
    assert runner.callbacks == callbacks  # type: ignore[attr-defined]


def test_what_is_not_of_training_has_the_first_draw(root: Path) -> None:
    data = datamodule(root, series=RandomDates(n=2), predict_split='train')
    found, seen = list[Statistics | None](), list[torch.Tensor]()
    for _ in range(2):
        trainer(max_epochs=2).fit(Recorder(), data)
        found.append(data.statistics)
        task = Recorder()
        trainer().predict(task, data)
        seen.append(torch.cat([batch['image'] for batch in task.batches['predict']]))
    assert found[0] == found[1]
    assert torch.equal(*seen)


def test_statistics_are_those_of_transformed_samples(root: Path) -> None:
    plain = datamodule(root)
    brighter = datamodule(root, transforms=lambda s: s | {'image': s['image'] + 0.25})
    for data in (plain, brighter, plain):
        data.setup('fit')
    assert plain.statistics is not None
    assert brighter.statistics is not None
    expected = [mean + 0.25 for mean in plain.statistics.mean]
    assert brighter.statistics.mean == pytest.approx(expected)
    twice = datamodule(root, transforms=lambda s: s | {'image': s['image'].repeat(1, 2, 1, 1)})
    with pytest.raises(ValueError, match='have 24 channels after transforms'):
        twice.setup('fit')


@pytest.mark.parametrize('stage', ['test', 'predict'])
def test_other_units_than_the_checkpoint_s_are_warned_of(root: Path, stage: str) -> None:
    data = datamodule(root, unit={'s2': 'reflectance'})
    own = datamodule(root)
    own.setup('fit')
    data.load_state_dict(own.state_dict())
    with pytest.warns(S1S2Warning, match=r"split 'test' .* hold reflectance x 10,000; give unit"):
        getattr(trainer(), stage)(Recorder(), data)


@pytest.mark.filterwarnings('error:bands that hold one value')
def test_a_glance_at_units_reads_a_small_window(
    tmp_path: Path, windows_read: list[tuple[int, ...]]
) -> None:
    for tile in ('31UEQ', '32ULU'):
        write_patch(tmp_path, tile, size=300)
    data = datamodule(tmp_path)
    data.trainer = trainer()
    data.trainer.state.fn = TrainerFn.PREDICTING
    data.setup('predict')
    assert max(height * width for _, height, width in windows_read) == 128 * 128


def test_a_fit_after_a_test_finds_statistics_of_its_own_data(root: Path) -> None:
    data = datamodule(root)
    data.setup('fit')
    own = data.statistics
    assert own is not None
    data.load_state_dict(vars(own) | {'mean': own.std, 'pixels': (1,) * len(own.pixels)})
    assert data.class_weights.unique().numel() == 1
    data.setup('fit')
    assert data.statistics == own


def images(batches: list[dict[str, Any]]) -> dict[int, torch.Tensor]:
    """Image of each patch by its number."""
    pairs = (zip(b['index'].tolist(), b['image'], strict=True) for b in batches)
    return dict(pair for batch in pairs for pair in batch)


def test_a_run_copies_what_it_reads(root: Path, tmp_path: Path) -> None:
    source = Copy(str(tmp_path / 'copy'))
    plain, _ = fit(root, augment=False)
    trainer().validate(Recorder(), datamodule(root, source=source), verbose=False)
    task, _ = fit(root, augment=False, source=source)
    assert sorted(path.name for path in (tmp_path / 'copy').iterdir() if path.is_dir()) == [
        'ground_reference', 'labels', 's1', 's2',
    ]  # fmt: skip
    assert len([*(tmp_path / 'copy' / 's2').iterdir()]) == 6 * 4
    for stage, patches in (('train', 4), ('val', 2)):
        copied, expected = (images(recorder.batches[stage]) for recorder in (task, plain))
        assert sorted(copied) == sorted(expected) == list(range(patches))
        assert all(torch.equal(copied[i], expected[i]) for i in expected)
    # Whatever reads the root now fails; other rules and bands are served as well.
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / 'copy').rglob('*.tif')}
    options = {'series': RandomDates(n=2), 'bands': ['B02', 'VV'], 'classes': 6, 'num_workers': 1}
    fit(root, source=source, **options)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    away = datamodule(tmp_path / 'copy', augment=False)
    trainer().validate(Recorder(), away, verbose=False)
    assert away.statistics is not None


SOURCES = """
data:
  class_path: torchgeo_s1s2.datamodules.MultiSenGEDataModule
  init_args:
    root: {root}/made
    batch_size: 1
    splits: {{train: [31UFQ], val: [31UEQ]}}
    source:
      - class_path: torchgeo_s1s2.datasets.Synthetic
        init_args: {{size: 16, patches: {{31UFQ: 1, 31UEQ: 1}}, incomplete: 0}}
      - class_path: torchgeo_s1s2.datasets.Copy
        init_args: {{folder: {root}/copy}}
"""


def test_a_configuration_names_what_fills_the_root(tmp_path: Path) -> None:
    data = parse(SOURCES.format(root=tmp_path))
    assert [type(source).__name__ for source in data.sources] == ['Synthetic', 'Copy']
    task = Recorder()
    trainer().fit(task, data)
    assert data.train_dataset.root == tmp_path / 'copy'  # type: ignore[union-attr]
    assert task.batches['train'][0]['image'].shape == (1, 4, 12, 16, 16)
    made, kept = ({p.name for p in (tmp_path / f).rglob('*S2*.tif')} for f in ('made', 'copy'))
    assert len(kept) == 2 * 4
    assert kept < made
    one = '    source: {class_path: torchgeo_s1s2.datasets.Synthetic, init_args: {size: 16}}'
    (source,) = parse(OWN_DATA.format(root=tmp_path, classes=6) + one).sources
    assert isinstance(source, Synthetic)
    assert source.kwargs['size'] == 16


READINGS = """
    unit: {{s1: db, s2: dn}}
    offset: {offset}
    nodata: {{s2: -9999}}
    file_bands: {{s1: [VH, VV]}}
"""


@pytest.mark.parametrize(
    ('offset', 'known'),
    [
        ('-1000', {'1700-01-01': -1000}),
        ('{2022-01-25: -1000}', {'2022-01-25': -1000}),
        ('{"2022-01-25": -1000, 2023-01-01: 0}', {'2022-01-25': -1000, '2023-01-01': 0}),
    ],
)
def test_a_configuration_says_how_files_are_read(
    root: Path, offset: str, known: dict[str, float]
) -> None:
    text = OWN_DATA.format(root=root, classes='6') + READINGS.format(offset=offset)
    kwargs = parse(text).kwargs
    assert kwargs['unit'] == {'s1': 'db', 's2': 'dn'}
    assert kwargs['nodata'] == {'s2': -9999}
    reading = MultiSenGE(root, 'all', **{k: v for k, v in kwargs.items() if k != 'splits'}).readings
    assert dict(reading['s2'].offsets) == known
    assert reading['s1'].file_bands == ('VH', 'VV')
