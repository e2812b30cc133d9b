"""TorchGeo's command line and tasks run on the data module and the backbone as they are."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
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
    """Keeps the trainer of each run, and the weights that it began with."""

    runs: ClassVar[list[Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer = trainer
        self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}
        self.runs.append(self)


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('synthetic')


def run(command: str, name: str, data: Path, folder: Path) -> Any:
    main(
        [
            command,
            f'--config={CONF / name}.yaml',
            f'--data.init_args.root={data}',
            f'--trainer.default_root_dir={folder}',
            '--trainer.logger=conftest.Board',
            f'--trainer.logger.init_args.root={folder}',
            f'--trainer.callbacks={__name__}.Recorder',
        ]
    )
    return Recorder.runs.pop()


@pytest.mark.parametrize('name', FRONT)
def test_fit(name: str, data: Path, tmp_path: Path) -> None:
    fit = run('fit', name, data, tmp_path)
    for loss in ('train_loss', 'val_loss'):
        # About log(10), the loss of a guess among ten classes.
        assert 1 < fit.trainer.callback_metrics[loss] < 5
    after = fit.trainer.lightning_module.state_dict()
    for prefix in FRONT[name]:
        weights = [k for k in after if k.startswith(prefix) and k.endswith('weight')]
        assert weights
        assert not any(after[k].equal(fit.before[k]) for k in weights)
    assert bool(fit.trainer.logger.figures) == (name == 'stock_unet')


@pytest.mark.parametrize('name', FRONT)
def test_validate_test_and_predict(name: str, data: Path, tmp_path: Path) -> None:
    for command, loss in (('validate', 'val_loss'), ('test', 'test_loss')):
        metrics = run(command, name, data, tmp_path).trainer.callback_metrics
        assert 1 < metrics[loss] < 5
    outputs = run('predict', name, data, tmp_path).trainer.predict_loop.predictions
    maps = torch.cat([o['probabilities'] if isinstance(o, dict) else o for o in outputs])
    assert maps.shape == (2, 10, 32, 32)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 32, 32))
