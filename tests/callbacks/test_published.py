import pytest

from torchgeo_s1s2.callbacks.published import PublishedResults, comparison, pastis_comparison


@pytest.mark.parametrize(
    ('model', 'backbone', 'row'),
    [
        ('unet', 'vgg16_convlstm_s2', 'ConvLSTM-S2 0.8696 0.7445 0.5000 0.2500'),
        ('unet', 'resnet18_convlstm', 'unet, resnet18_convlstm - - 0.5000 0.2500'),
        ('fpn', 'vgg16_convlstm', 'fpn, vgg16_convlstm - - 0.5000 0.2500'),
        ('unet', 'vgg16_convlstm_inception', 'ConvLSTM+Inception-S1S2 0.8851 0.7945 0.5000 0.2500'),
        ('unet', 'resnet18', 'unet, resnet18 - - 0.5000 0.2500'),
    ],
)
def test_result_stands_beside_what_is_published(model: str, backbone: str, row: str) -> None:
    hparams = {'model': model, 'backbone': backbone, 'num_classes': 10}
    text = comparison(hparams, {'test_WeightedF1Score': 0.5, 'test_Kappa': 0.25})
    rows = [' '.join(line.split()) for line in text.splitlines()]
    assert row in rows
    assert rows[2] == 'ConvLSTM-S1 0.8055 0.6422 - -'
    assert sum('0.5000' in r for r in rows) == 1


def test_what_cannot_be_compared_is_said() -> None:
    other = comparison({'backbone': 'x', 'num_classes': 14}, {})
    assert other == 'nothing is published for 14 classes, only for 6 and 10'
    hparams = {'backbone': 'resnet18', 'num_classes': 10}
    assert 'which the task S1S2SemanticSegmentation logs' in comparison(hparams, {'test_loss': 1})
    assert "does not log ['test_AverageJaccardIndex']" in pastis_comparison(
        hparams, {'test_OverallAccuracy': 0.5}
    )
    metrics = {'test_OverallAccuracy': 0.5, 'test_AverageJaccardIndex': 0.5}
    assert 'for 10 classes of PASTIS, only for all 19' in pastis_comparison(hparams, metrics)
    with pytest.raises(ValueError, match="data is 'pastiss', expected one of multisenge, pastis"):
        PublishedResults('pastiss')  # type: ignore[arg-type]


def test_the_figures_of_pastis_are_marked_as_published() -> None:
    """Those of the benchmark's page, as anybody can read them there."""
    hparams = {'model': 'unet', 'backbone': 'vgg16_convlstm_s2'}
    metrics = {'test_OverallAccuracy': 0.8134, 'test_AverageJaccardIndex': 0.5}
    rows = [' '.join(row.split()) for row in pastis_comparison(hparams, metrics).splitlines()]
    assert rows[0] == 'PASTIS accuracy % mIoU %'
    assert 'U-TAE, S2 (published) 83.2 63.1' in rows
    assert 'U-TAE, S2+S1 late (published) 84.2 66.3' in rows
    assert 'Exchanger+U-Net, S2 (published) - 66.8' in rows
    assert rows[-1] == 'this test: unet, vgg16_convlstm_s2 81.3 50.0'
    stock = pastis_comparison({'model': 'convlstm', 'num_classes': 19}, metrics)
    assert stock.splitlines()[-1].split()[:3] == ['this', 'test:', 'convlstm']
    assert sum('(published)' in row for row in rows) == len(rows) - 2
