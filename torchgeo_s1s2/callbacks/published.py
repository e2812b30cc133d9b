"""Published results beside those of a test."""

from typing import Any, Literal

import pandas as pd
from lightning.pytorch import Callback, LightningModule, Trainer

# Wenger et al., Remote Sensing 2023, 15(1), 151, test tile 31UEQ: weighted F1 and Cohen's kappa.
PUBLISHED: dict[int, dict[str, tuple[float, float]]] = {
    6: {
        'ConvLSTM-S1': (0.9001, 0.3929),
        'ConvLSTM-S2': (0.8958, 0.4223),
        'ConvLSTM-S1S2': (0.8875, 0.3852),
        'ConvLSTM+Inception-S1S2': (0.9018, 0.4186),
    },
    10: {
        'ConvLSTM-S1': (0.8055, 0.6422),
        'ConvLSTM-S2': (0.8696, 0.7445),
        'ConvLSTM-S1S2': (0.8600, 0.7482),
        'ConvLSTM+Inception-S1S2': (0.8851, 0.7945),
    },
}
"""Published figures by number of classes and model, not measured here."""

_MODELS = {
    'unet, vgg16_convlstm_s1': 'ConvLSTM-S1',
    'unet, vgg16_convlstm_s2': 'ConvLSTM-S2',
    'unet, vgg16_convlstm': 'ConvLSTM-S1S2',
    'unet, vgg16_convlstm_inception': 'ConvLSTM+Inception-S1S2',
}

# Percent of overall accuracy (None where none is published) and mean IoU on PASTIS-R, over the five
# test folds. The PASTIS benchmark (https://github.com/VSainteuf/pastis-benchmark) lists all but
# Exchanger (Cai et al., https://arxiv.org/abs/2305.02086).
PUBLISHED_PASTIS: dict[str, tuple[float | None, float]] = {
    'U-Net+ConvLSTM, S2': (82.1, 57.8),
    'FPN+ConvLSTM, S2': (81.6, 57.1),
    '3D U-Net, S2': (81.3, 58.4),
    'U-TAE, S2': (83.2, 63.1),
    'TSViT, S2': (83.4, 65.4),
    'Exchanger+U-Net, S2': (None, 66.8),
    'U-TAE, S2+S1 early': (83.8, 65.9),
    'U-TAE, S2+S1 late': (84.2, 66.3),
}
"""Published figures of PASTIS-R, not measured here."""


class PublishedResults(Callback):
    """Prints after ``torchgeo test`` what others published, with the result beside it.

    Of MultiSenGE these are the figures of Wenger et al. 2023 for the test tile 31UEQ with 6 or 10
    classes (https://doi.org/10.3390/rs15010151), so the two compare only on that tile; of PASTIS
    those of its benchmark, over all five rotations of the folds.
    """

    def __init__(self, data: Literal['multisenge', 'pastis'] = 'multisenge') -> None:
        """Keep the settings.

        Args:
            data: Data set of the test.

        Raises:
            ValueError: If *data* is another one.
        """
        tables = {'multisenge': comparison, 'pastis': pastis_comparison}
        if data not in tables:
            raise ValueError(f'data is {data!r}, expected one of {", ".join(tables)}')
        self._table = tables[data]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table on the first process."""
        if trainer.is_global_zero:
            print(self._table(pl_module.hparams, trainer.callback_metrics))


def pastis_comparison(hparams: Any, metrics: Any) -> str:
    """Table of the published figures of PASTIS and of a test.

    Args:
        hparams: ``num_classes`` of the task, and its ``model`` and ``backbone`` if it has them.
        metrics: ``test_OverallAccuracy`` and ``test_AverageJaccardIndex``.

    Returns:
        Lines of text; the result stands in the last row.
    """
    names = 'test_OverallAccuracy', 'test_AverageJaccardIndex'
    if lacking := [name for name in names if name not in metrics]:
        return f'accuracy and mean IoU are published, and the task does not log {lacking}'
    if (classes := hparams.get('num_classes', 19)) != 19:
        return f'nothing is published for {classes} classes of PASTIS, only for all 19'
    published = {f'{model} (published)': values for model, values in PUBLISHED_PASTIS.items()}
    result = [100 * float(metrics[name]) for name in names]
    rows = published | {f'this test: {_name(hparams)}': result}
    return _table(rows, pd.Index(['accuracy %', 'mIoU %'], name='PASTIS'), 1)


def comparison(hparams: Any, metrics: Any) -> str:
    """Table of the published figures and of a test.

    Args:
        hparams: ``model``, ``backbone`` and ``num_classes`` of the task.
        metrics: ``test_WeightedF1Score`` and ``test_Kappa``.

    Returns:
        Lines of text; the result stands in the row of its model, or in one of its own.
    """
    classes = hparams.get('num_classes')
    published = PUBLISHED.get(classes)
    if published is None:
        return f'nothing is published for {classes} classes, only for 6 and 10'
    if 'test_WeightedF1Score' not in metrics:
        return 'weighted F1 and kappa are published, which the task S1S2SemanticSegmentation logs'
    ours = _MODELS.get(_name(hparams), _name(hparams))
    result = float(metrics['test_WeightedF1Score']), float(metrics['test_Kappa'])
    titles = ['published (31UEQ)', 'this test'], ['weighted F1', 'kappa']
    columns = pd.MultiIndex.from_product(titles, names=['', 'model'])
    unknown = None, None
    rows = {
        model: (*published.get(model, unknown), *(result if model == ours else unknown))
        for model in (*published, ours)
    }
    return _table(rows, columns, 4)


def _name(hparams: Any) -> str:
    return ', '.join(str(hparams[key]) for key in ('model', 'backbone') if key in hparams)


def _table(rows: dict[str, Any], columns: pd.Index, digits: int) -> str:
    frame = pd.DataFrame.from_dict(rows, 'index', columns=columns, dtype=float)
    return frame.to_string(float_format=f'{{:.{digits}f}}'.format, na_rep='-')
