"""Real files of another source, read with arguments alone."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import quiet_trainer
from lightning.pytorch import seed_everything

from torchgeo_s1s2.callbacks import GeoTIFFWriter
from torchgeo_s1s2.datamodules import MultiSenGEDataModule
from torchgeo_s1s2.datasets import ClassScheme, EvenlySpaced, LandCoverClass, write_label_files
from torchgeo_s1s2.errors import DataError, ImplausibleValuesError, S1S2Warning
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation

BANDS = ['B01', 'B02', 'B03', 'B04', 'B05', 'B06', 'B07', 'B08', 'B8A', 'B09', 'B11', 'B12']
CROPS = LandCoverClass('Crops', 'gold', (5,))
CLASSES = ClassScheme((CROPS, LandCoverClass('Other', 'green', (2, 7, 8, 11))))


@pytest.fixture(scope='module')
def root(real_foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('foreign') / 'data'
    root.mkdir()
    for folder in ('s2', 's1', 'ground_reference'):
        shutil.copytree(real_foreign / folder, root / folder, copy_function=shutil.copyfile)
    assert write_label_files(root, progress=False) == 3
    return root


def datamodule(root: Path, **options: Any) -> MultiSenGEDataModule:
    return MultiSenGEDataModule(
        root,
        batch_size=1,
        series=EvenlySpaced(n=4),
        classes=CLASSES,
        splits={name: ['37PEL'] for name in ('train', 'val', 'test')},
        **options,
    )


pytestmark = pytest.mark.filterwarnings('ignore:.*tile 37PEL is in the splits')


def test_arguments_that_are_missing_are_asked_for(root: Path) -> None:
    with pytest.raises(DataError, match=r"37PEL_2023.*12 bands.*as in file_bands=\{'s2'"):
        datamodule(root).setup('fit')
    with pytest.raises(ImplausibleValuesError, match='offset=-1000'):
        datamodule(root, file_bands={'s2': BANDS}).setup('fit')


def test_a_foreign_source_is_trained_on_and_mapped(root: Path, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    data = datamodule(root, file_bands={'s2': BANDS}, offset=-1000)
    task = S1S2SemanticSegmentation(
        backbone='resnet18_convlstm_inception', num_classes=2, in_channels=48
    )
    trainer = quiet_trainer(tmp_path, callbacks=[GeoTIFFWriter(tmp_path / 'maps')])
    with pytest.warns(S1S2Warning, match='no training pixel is of Other'):
        trainer.fit(task, data)
    assert np.isfinite(float(trainer.callback_metrics['val_loss']))
    assert data.statistics is not None
    assert data.statistics.labels == ((5, 3 * 96 * 96),)
    stack = [rasterio.open(path).read([2, 9]) for path in sorted((root / 's2').iterdir())]
    expected = (np.mean(stack, (0, 2, 3)) - 1000) * 1e-4
    assert np.array(data.statistics.mean)[[0, 7]] == pytest.approx(expected, rel=1e-4)
    trainer.predict(task, data, return_predictions=False)
    for path in (root / 'ground_reference').iterdir():
        with (
            rasterio.open(path) as truth,
            rasterio.open(tmp_path / 'maps' / path.name.replace('_GR', '')) as mapped,
        ):
            assert (mapped.transform, mapped.crs) == (truth.transform, truth.crs)
            assert mapped.shape == (96, 96)
            assert set(np.unique(mapped.read(1))) <= {1, 2}
