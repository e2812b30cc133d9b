from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from conftest import SCHEME, full_disk, quiet_trainer, read_raster
from lightning.pytorch import LightningModule
from rasterio.transform import Affine, from_origin
from rasterio.windows import Window
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchgeo.datasets import stack_samples

from torchgeo_s1s2.callbacks import GeoTIFFWriter
from torchgeo_s1s2.callbacks.geotiff import predicted_windows
from torchgeo_s1s2.callbacks.layers import OBSERVATIONS, classify, write_layers
from torchgeo_s1s2.datasets import ClassScheme
from torchgeo_s1s2.datasets.rasters import Grid, crs_of
from torchgeo_s1s2.errors import MapError, S1S2Warning
from torchgeo_s1s2.files import Workplace, whole
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation


class Patches(Dataset[dict[str, Any]]):
    """Patches side by side, the last in the next zone; patch i is wholly of class i."""

    classes: Any = SCHEME

    def __len__(self) -> int:
        return 3

    def name(self, index: int) -> str:
        return f'31UEQ_{index * 257}_0'

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.zeros(3, 64, 64)
        image[index] = np.log(8)  # softmax 0.8, 0.1, 0.1
        return {
            'image': image,
            'transform': torch.tensor(
                from_origin(500000 + 2570 * index, 5500000, 10, 10), dtype=torch.float64
            ),
            'crs': torch.tensor(32632 if index == 2 else 32631),
            'index': torch.tensor(index),
        }


class Task(LightningModule):
    """Predicts, as a function of the probabilities says."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.give = give

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.give(batch['image'].softmax(1))


def mapping(probabilities: Tensor) -> dict[str, Any]:
    return {'probabilities': probabilities, 'transform': None}


def predict(
    root: Path, *callbacks: Any, dataset: Any = None, give: Any = mapping, **options: Any
) -> Any:
    loader: Any = DataLoader(dataset or Patches(), 2, collate_fn=stack_samples)
    if isinstance(dataset, dict):
        loader = {k: DataLoader(d, 2, collate_fn=stack_samples) for k, d in dataset.items()}
    return quiet_trainer(root, callbacks=list(callbacks), **options).predict(Task(give), loader)


def maps(root: Path) -> list[str]:
    """Names of the maps that a run has left."""
    return sorted(path.stem for path in (root / 'maps').glob('*.tif'))


def test_patches_are_written_on_their_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(tmp_path, GeoTIFFWriter(tmp_path / 'out', confidence=True)) is None
    names = ['31UEQ_0_0', '31UEQ_257_0', '31UEQ_514_0']
    files = sorted(f.name for f in (tmp_path / 'out').iterdir())
    ends = '.tif', '.tif.aux.xml', '_confidence.tif'
    assert files == sorted(f'{name}{end}' for name in names for end in ends)
    assert f'maps written to {tmp_path / "out"}: 3' in capsys.readouterr().out
    for i, (name, epsg, number) in enumerate(
        zip(names, (32631, 32631, 32632), (1, 4, 7), strict=True)
    ):
        with rasterio.open(tmp_path / 'out' / f'{name}.tif') as src:
            assert src.crs.to_epsg() == epsg
            assert src.transform == Affine(10, 0, 500000 + 2570 * i, 0, -10, 5500000)
            assert src.profile['compress'] == 'deflate'
            assert src.profile['tiled']
            assert src.nodata == 0
            np.testing.assert_array_equal(src.read(), np.full((1, 64, 64), number))
            colors, tags = src.colormap(1), src.tags(1)
        assert [colors[i] for i in (0, 1, 4, 7)] == [
            (0, 0, 0, 0),
            (255, 0, 0, 255),
            (0, 255, 0, 255),
            (0, 0, 255, 255),
        ]
        assert tags == {'CLASS_1': 'Town', 'CLASS_4': 'Field & meadow', 'CLASS_7': 'Water'}
        with rasterio.open(tmp_path / 'out' / f'{name}_confidence.tif') as src:
            assert src.nodata == 255
            assert src.units == ('%',)
            np.testing.assert_array_equal(src.read(), np.full((1, 64, 64), 80))


def test_gis_programs_find_the_names_of_the_classes(tmp_path: Path) -> None:
    """As GDAL reads them unless told not to look for files beside, as TorchGeo tells it."""
    predict(tmp_path, GeoTIFFWriter())
    vrt = tmp_path / 'names.vrt'
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN='FALSE'):
        rasterio.shutil.copy(tmp_path / 'maps' / '31UEQ_0_0.tif', vrt, driver='VRT')
    names = [e.text for e in ElementTree.parse(vrt).iter('Category')]
    assert names == ['No data', 'Town', None, None, 'Field & meadow', None, None, 'Water']


def test_the_folder_may_lie_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    predict(tmp_path / 'elsewhere', GeoTIFFWriter('~/maps'))
    assert len(maps(tmp_path)) == 3


def test_a_writer_may_serve_two_runs(tmp_path: Path) -> None:
    writer = GeoTIFFWriter()
    for name in ('one', 'two'):
        predict(tmp_path / name, writer)
        assert len(maps(tmp_path / name)) == 3


def test_statistics_of_the_raster_before_do_not_stay(tmp_path: Path) -> None:
    predict(tmp_path, GeoTIFFWriter(confidence=True))
    path = tmp_path / 'maps' / '31UEQ_0_0_confidence.tif'
    sidecar = path.with_name(f'{path.name}.aux.xml')
    sidecar.write_text('<PAMDataset/>')
    predict(tmp_path, GeoTIFFWriter(confidence=True))
    assert not sidecar.exists()


def test_a_confidence_of_an_earlier_run_is_told_apart(tmp_path: Path) -> None:
    predict(tmp_path, GeoTIFFWriter(confidence=True))
    with pytest.warns(S1S2Warning, match='3 files in .* earlier run .*31UEQ_0_0_confidence.tif'):
        predict(tmp_path, GeoTIFFWriter())


def test_numbers_of_subsets_are_those_of_the_data_set(tmp_path: Path) -> None:
    """Also where loaders have names."""
    parts = {'one': Subset(Patches(), [0]), 'other': Subset(Patches(), [2, 1])}
    predict(tmp_path, GeoTIFFWriter(), dataset=parts)
    assert maps(tmp_path) == ['31UEQ_0_0', '31UEQ_257_0', '31UEQ_514_0']


def test_tensor_of_a_stock_task_is_enough(tmp_path: Path) -> None:
    predict(tmp_path, GeoTIFFWriter(), give=lambda probabilities: probabilities)
    assert (read_raster(tmp_path / 'maps' / '31UEQ_257_0.tif') == 4).all()


def test_a_binary_task_maps_two_classes(tmp_path: Path) -> None:
    """Probabilities of the second class are 0.1, 0.8 and 0.1 in the three patches."""
    two = ClassScheme(SCHEME.classes[:2], ids=(1, 4))
    writer = GeoTIFFWriter(confidence=True, classes=two)
    predict(tmp_path, writer, give=lambda probabilities: probabilities[:, 1:2])
    for name, *values in (('0', 1, 90), ('257', 4, 80), ('514', 1, 90)):
        paths = [tmp_path / 'maps' / f'31UEQ_{name}_0{kind}.tif' for kind in ('', '_confidence')]
        assert [np.unique(read_raster(path)).tolist() for path in paths] == [[v] for v in values]


def test_without_a_number_the_place_is_the_name(tmp_path: Path) -> None:
    windows = [{k: v for k, v in Patches()[i].items() if k != 'index'} for i in range(3)]
    predict(tmp_path, GeoTIFFWriter(classes=SCHEME), dataset=windows)
    assert maps(tmp_path) == [
        f'{epsg}_{left}_5500000'
        for epsg, left in ((32631, 500000), (32631, 502570), (32632, 505140))
    ]


def test_unknown_classes_are_refused_before_the_first_step(tmp_path: Path) -> None:
    class Foreign(Patches):
        classes = ('Town', 'Field', 'Water')

    def never(probabilities: Tensor) -> Any:
        raise AssertionError

    with pytest.raises(ValueError, match='Foreign has no class scheme; give GeoTIFFWriter'):
        predict(tmp_path, GeoTIFFWriter(), dataset=Foreign(), give=never)
    predict(tmp_path, GeoTIFFWriter(classes=SCHEME), dataset=Foreign())
    assert len(maps(tmp_path)) == 3


def test_two_predictions_of_a_place_are_refused(tmp_path: Path) -> None:
    writer = GeoTIFFWriter()
    with pytest.raises(ValueError, match='two predictions are called 31UEQ_257_0'):
        predict(tmp_path, writer, dataset=Subset(Patches(), [1, 1]))
    predict(tmp_path, writer)


@pytest.mark.parametrize(
    ('classes', 'precision', 'message'),
    [
        (6, '32-true', 'the model predicts 3 classes, the maps shall have 6'),
        (None, 'bf16-true', 'bfloat16, too coarse'),
    ],
)
def test_what_makes_no_map_is_refused(
    tmp_path: Path, classes: int | None, precision: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        predict(tmp_path, GeoTIFFWriter(classes=classes), precision=precision)


@pytest.mark.parametrize(
    ('outputs', 'message'),
    [
        (torch.zeros(0), 'without transform, crs: predict_step must'),
        (torch.zeros(1, 2, 2), r'shape \(1, 2, 2\), expected \(B, K, H, W\)'),
        ([torch.zeros(1, 3, 2, 2)], 'without probabilities: predict_step must'),
        ({'probabilities': torch.zeros(1, 3, 2, 2), 'crs': torch.tensor([-1])}, 'no EPSG code'),
        (torch.full((1, 3, 2, 2), -4.0), r'lie in -4..-4, probabilities in 0..1; apply softmax'),
    ],
)
def test_other_predictions_are_refused(outputs: Any, message: str) -> None:
    batch = stack_samples([Patches()[0]]) if len(outputs) else torch.zeros(1)
    with pytest.raises(MapError, match=message):
        list(predicted_windows(outputs, batch))


def test_observations_come_per_pixel_or_per_slot() -> None:
    batch = stack_samples([Patches()[0], Patches()[1]])
    probabilities = torch.full((2, 3, 1, 2), 1 / 3)
    count = torch.tensor([[[0, 4]], [[2, 3]]])
    valid = torch.tensor([[[True, False], [True, True]], [[False, False], [False, False]]])
    for known, expected in (
        ({'valid_count': count}, count.tolist()),
        ({'valid': valid}, [[[3, 3]], [[0, 0]]]),
    ):
        windows: Any = predicted_windows({'probabilities': probabilities, **known}, batch)
        assert [window.observations.tolist() for window in windows] == expected


def test_classify_by_hand() -> None:
    inf = float('inf')
    probabilities = torch.tensor([[[0.2, 0.7, -inf, 0.5]], [[0.8, 0.3, 0.6, 0.5]]])
    number, percent = classify(probabilities, torch.tensor([[1, 2, 1, 0]]), (3, 14))
    assert number.tolist() == [[14, 3, 0, 0]]
    assert percent.tolist() == [[80, 70, 255, 255]]


def test_predictions_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    def lost(probabilities: Tensor) -> Tensor:
        probabilities[0, 1, 2, 3] = float('nan')
        return probabilities

    with pytest.warns(S1S2Warning, match='2 predictions are not finite'):
        predict(tmp_path, GeoTIFFWriter(), give=lost)
    (classes,) = read_raster(tmp_path / 'maps' / '31UEQ_0_0.tif')
    assert np.argwhere(classes == 0).tolist() == [[2, 3]]


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (64, 64), (250, 300), (513, 1030)])
def test_any_size_is_written_whole(tmp_path: Path, height: int, width: int) -> None:
    value = np.arange(height * width).reshape(height, width).astype(np.uint16)
    grid = Grid(crs_of(32631), from_origin(0, 0, 10, 10), width, height)
    write_layers(tmp_path, 'a b.c', [OBSERVATIONS], grid, [(Window(0, 0, width, height), [value])])
    np.testing.assert_array_equal(read_raster(tmp_path / 'a b.c_observations.tif')[0], value)


def noise(size: int) -> Any:
    probabilities = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return next(predicted_windows(probabilities, stack_samples([Patches()[0]])))


def test_failure_leaves_the_earlier_files_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    path.write_text('earlier')
    with pytest.raises(OSError, match='disk full'), whole(path) as temporary:  # noqa: PT012
        temporary.write_text('half')
        raise OSError('disk full')
    assert [f.name for f in tmp_path.iterdir()] == ['a.tif']
    assert path.read_text() == 'earlier'


def test_full_disk_leaves_no_map(tmp_path: Path) -> None:
    window = noise(600)
    with full_disk(300_000), pytest.raises(MapError, match='See whether the disk is full'):
        GeoTIFFWriter(tmp_path, confidence=True).write(window, SCHEME, Patches())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('damage', [b'', b'0' * 100])
def test_what_reads_otherwise_takes_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    """A disk that loses the end of a file, or a part of it, without a word."""
    copy = rasterio.shutil.copy

    def short(source: Any, target: Path, **options: Any) -> None:
        copy(source, target, **options)
        content = target.read_bytes()
        target.write_bytes(content[:-100] + damage)

    monkeypatch.setattr(rasterio.shutil, 'copy', short)
    with pytest.raises(MapError, match='31UEQ_0_0 cannot be written whole'):
        GeoTIFFWriter(tmp_path, confidence=True).write(
            replace(noise(64), index=0), SCHEME, Patches()
        )
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'maps').write_text('a file')
    with pytest.raises(MapError, match='Give output_dir a folder'):
        predict(tmp_path, GeoTIFFWriter())


def test_a_map_of_several_labels_a_pixel_is_refused(tmp_path: Path) -> None:
    task = S1S2SemanticSegmentation(
        'unet', 'resnet18', None, 3, task='multilabel', num_labels=2, loss='bce'
    )
    trainer = quiet_trainer(tmp_path, callbacks=[GeoTIFFWriter()])
    with pytest.raises(MapError, match='one class a pixel, and the task is multilabel'):
        trainer.predict(task, DataLoader(Patches()))


def test_only_files_of_dead_runs_are_removed(tmp_path: Path) -> None:
    (tmp_path / 'maps').mkdir()
    dead, living = Workplace.new(tmp_path / 'maps'), Workplace.new(tmp_path / 'maps')
    (dead.path / '.31UEQ_0_0.tif.abcd1234').mkdir()
    (dead.path / 'notes.txt').write_text('of the user')
    assert dead._lock
    dead._lock.close()
    with pytest.warns(S1S2Warning, match='1 other runs are at work'):
        predict(tmp_path, GeoTIFFWriter())
    hidden = {p.relative_to(tmp_path / 'maps') for p in (tmp_path / 'maps').glob('.*/*')}
    assert hidden == {Path(dead.path.name, 'notes.txt'), Path(living.path.name, 'lock')}
    living.remove()
    assert not living.path.exists()
