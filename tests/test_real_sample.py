from pathlib import Path

import lightning
import numpy as np
import pytest
import rasterio
from conftest import quiet_trainer

from torchgeo_s1s2.callbacks import GeoTIFFWriter, Report
from torchgeo_s1s2.datamodules import MultiSenGEDataModule
from torchgeo_s1s2.datasets import MonthlySeries
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation


def test_one_real_patch_is_learnt_and_mapped(
    real_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One patch shows that the path works, not that the model generalises."""
    lightning.seed_everything(0)
    tile = '31UDS'
    root = tmp_path / 'data'
    root.mkdir()
    for folder in ('labels', 'ground_reference', 's2', 's1'):
        (root / folder).symlink_to(real_sample / folder)
    datamodule = MultiSenGEDataModule(
        root,
        batch_size=1,
        series=MonthlySeries(year=2018),
        classes=10,
        splits={'train': [tile], 'val': [tile], 'test': [tile]},
        augment=False,
    )
    task = S1S2SemanticSegmentation(
        backbone='utae',
        num_classes=10,
        in_channels=48,
        class_weights='balanced',
        patience=50,
    )
    callbacks = [GeoTIFFWriter(tmp_path / 'maps', confidence=True), Report()]
    trainer = quiet_trainer(tmp_path, max_epochs=30, callbacks=callbacks)
    trainer.fit(task, datamodule)
    assert trainer.callback_metrics['train_WeightedF1Score'] > 0.9
    assert 'WeightedF1Score' in capsys.readouterr().out
    trainer.predict(task, datamodule, return_predictions=False)
    with (
        rasterio.open(next((tmp_path / 'maps').glob('*10140_7032.tif'))) as mapped,
        rasterio.open(next((real_sample / 's2').iterdir())) as s2,
        rasterio.open(next((real_sample / 'ground_reference').iterdir())) as truth,
    ):
        assert mapped.transform == s2.transform
        assert mapped.crs == s2.crs
        assert mapped.shape == s2.shape
        labels = truth.read(1)
        known = np.isin(labels, (2, 6, 9))
        expected = np.select([labels == 2, labels == 6, labels == 9], [2, 6, 8])[known]
        assert (mapped.read(1)[known] == expected).mean() > 0.8
