from pathlib import Path

import lightning
import numpy as np
import pytest
from conftest import quiet_trainer, read_raster

from torchgeo_s1s2.callbacks import GeoTIFFWriter, Report
from torchgeo_s1s2.datamodules import MultiSenGEDataModule
from torchgeo_s1s2.datasets import MonthlySeries
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation


def test_one_real_patch_is_read_learnt_and_mapped(
    real_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One patch shows that the path works, not that the model generalises."""
    lightning.seed_everything(0)
    root = tmp_path / 'data'
    root.mkdir()
    for folder in ('labels', 'ground_reference', 's2', 's1'):
        (root / folder).symlink_to(real_sample / folder)
    datamodule = MultiSenGEDataModule(
        root,
        batch_size=1,
        series=MonthlySeries(year=2018),
        classes=10,
        splits={name: ['31UDS'] for name in ('train', 'val', 'test')},
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
    (land_cover,) = read_raster(tmp_path / 'maps' / '31UDS_10140_7032.tif')
    (labels,) = read_raster(root / 'ground_reference' / '31UDS_GR_10140_7032.tif')
    expected = np.select([labels == 2, labels == 6, labels == 9], [1, 5, 7], 255)
    known = expected != 255
    assert (land_cover[known] == expected[known] + 1).mean() > 0.8
    sample = datamodule.train_dataset[0]  # type: ignore[index]
    assert np.array_equal(sample['mask'], expected)
    assert sample['image'].shape == (4, 12, 64, 64)
    assert sample['image'].isfinite().float().mean() > 0.99
    s2, s1 = sample['acquisition_times'].T / 86400
    assert (s2.diff() >= 17).all()
    assert ((s2 - s1).abs() <= 2).all()
