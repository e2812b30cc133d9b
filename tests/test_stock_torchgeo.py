"""TorchGeo's command line and tasks run on the data module and the backbone as they are."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from torch import Tensor
from torchgeo.main import main

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args", 'ignore:The number of training'
)
CONF = Path(__file__).parent / 'conf'
FRONT = {
    'stock_unet': ('model.encoder.convlstm.', 'model.encoder.inception.'),
    'stock_spatiotemporal': ('model.cell_list.0.',),
}


class Recorder(Callback):
    """Keeps what a run gave."""

    before: ClassVar[dict[str, Tensor]] = {}
    after: ClassVar[dict[str, Tensor]] = {}
    metrics: ClassVar[dict[str, float]] = {}
    predictions: ClassVar[list[Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after.update(pl_module.state_dict())

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.predictions.append(outputs)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.metrics.update({k: v.item() for k, v in trainer.callback_metrics.items()})


class FigureLogger(DummyLogger):
    """Takes figures, as TensorBoard does, so that the task draws them."""

    figures: ClassVar[list[Figure]] = []

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    @property
    def save_dir(self) -> str:
        return self.folder

    @property
    def experiment(self) -> Any:
        return self

    def add_figure(self, tag: str, figure: Figure, global_step: int) -> None:
        self.figures.append(figure)


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('synthetic')


@pytest.fixture(autouse=True)
def _forget() -> None:
    for kept in (Recorder.before, Recorder.after, Recorder.metrics):
        kept.clear()
    Recorder.predictions.clear()
    FigureLogger.figures.clear()


def run(command: str, name: str, data: Path, folder: Path) -> None:
    main(
        [
            command,
            f'--config={CONF / name}.yaml',
            f'--data.init_args.root={data}',
            f'--trainer.default_root_dir={folder}',
            f'--trainer.logger={__name__}.FigureLogger',
            f'--trainer.logger.init_args.folder={folder}',
            f'--trainer.callbacks={__name__}.Recorder',
        ]
    )


@pytest.mark.parametrize('name', FRONT)
def test_fit(name: str, data: Path, tmp_path: Path) -> None:
    run('fit', name, data, tmp_path)
    for loss in ('train_loss', 'val_loss'):
        # About log(10), the loss of a guess among ten classes.
        assert 1 < Recorder.metrics[loss] < 5
    for prefix in FRONT[name]:
        weights = [k for k in Recorder.before if k.startswith(prefix) and k.endswith('weight')]
        assert weights
        assert not any(Recorder.after[k].equal(Recorder.before[k]) for k in weights)
    assert bool(FigureLogger.figures) == (name == 'stock_unet')


@pytest.mark.parametrize('name', FRONT)
def test_validate_test_and_predict(name: str, data: Path, tmp_path: Path) -> None:
    run('validate', name, data, tmp_path)
    run('test', name, data, tmp_path)
    assert 1 < Recorder.metrics['val_loss'] < 5
    assert 1 < Recorder.metrics['test_loss'] < 5
    run('predict', name, data, tmp_path)
    outputs = Recorder.predictions
    maps = torch.cat([o['probabilities'] if isinstance(o, dict) else o for o in outputs])
    assert maps.shape == (2, 10, 32, 32)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 32, 32))
