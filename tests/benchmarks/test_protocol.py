from pathlib import Path

import pytest
from conftest import SHIPPED
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.optim import Adam
from torchgeo.datamodules import BaseDataModule
from torchgeo.tasks import BaseTask

from torchgeo_s1s2.datasets.synthetic import write_synthetic
from torchgeo_s1s2.models import AttentionEncoder, ConvLSTMInceptionEncoder, SeriesEncoder

SETTINGS = {'s1': (8, False), 's2': (40, False), 's1s2': (48, False), 'inception': (48, True)}


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patches = {'31UFQ': 2, '31UFP': 2, '31UEQ': 2}
    folder = tmp_path_factory.mktemp('data')
    return write_synthetic(folder, 32, patches, incomplete=0, progress=False)


def cli(arguments: list[str], run: bool) -> LightningCLI:
    """TorchGeo's command, and without running it what it would run."""
    return LightningCLI(
        BaseTask,
        BaseDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        run=run,
        args=arguments,
    )


def options(root: Path, classes: int, ablation: str) -> list[str]:
    names = 'multisenge', f'multisenge_{classes}', f'multisenge_{ablation}'
    small = ['--data.init_args.root', str(root), '--data.init_args.num_workers', '0']
    limits = ['--trainer.logger', 'false', '--trainer.accelerator', 'cpu']
    configs = [f'--config={SHIPPED / name}.yaml' for name in names]
    return [*configs, *small, '--data.init_args.batch_size', '2', *limits]


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models whose weights nobody looks at: the initial values of VGG16 take seconds."""
    for name in ('normal_', 'kaiming_normal_', 'kaiming_uniform_'):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


@pytest.mark.usefixtures('blank')
@pytest.mark.parametrize(
    ('classes', 'ablation'), [(6, 's1'), (10, 's2'), (14, 's1s2'), (10, 'inception')]
)
def test_the_configurations_follow_the_protocol(root: Path, classes: int, ablation: str) -> None:
    made = cli(options(root, classes, ablation), run=False)
    channels, inception = SETTINGS[ablation]
    assert made.model.hparams['in_channels'] == channels
    assert made.model.hparams['num_classes'] == classes
    assert made.model.hparams['class_weights'] == 'balanced'
    encoder = made.model.model.encoder
    assert (encoder.inception is not None) == inception
    learns = {n.split('.')[0] for n, p in encoder.named_parameters() if p.requires_grad}
    assert learns == {'convlstm', 'inception'} if inception else {'convlstm'}
    optimizer, schedule = made.model.configure_optimizers().values()
    assert type(optimizer) is Adam
    assert (optimizer.param_groups[0]['lr'], schedule['monitor']) == (1e-3, 'val_loss')
    assert (schedule['scheduler'].factor, schedule['scheduler'].patience) == (0.1, 5)
    callbacks = made.trainer.callbacks  # type: ignore[attr-defined]
    stopping = next(c for c in callbacks if isinstance(c, EarlyStopping))
    assert stopping.patience == 20
    made.datamodule.setup('test')
    sample = made.datamodule.test_dataset[0]
    assert sample['image'].shape == (4, channels // 4, 32, 32)
    months = sample['acquisition_times'][:, 0].numpy().astype('datetime64[s]')
    assert [int(str(day)[5:7]) for day in months] == [7, 8, 9, 11] or ablation == 's1'


@pytest.mark.usefixtures('blank')
@pytest.mark.parametrize(
    ('model', 'kind'), [('attention', AttentionEncoder), ('improved', ConvLSTMInceptionEncoder)]
)
def test_newer_models_lie_over_the_protocol(
    root: Path, model: str, kind: type[SeriesEncoder]
) -> None:
    made = cli(options(root, 10, model), run=False)
    encoder = made.model.model.encoder
    assert isinstance(encoder, kind)
    assert encoder.full_resolution
    assert all(p.requires_grad for p in encoder.parameters())
    assert list(encoder.sensors.values()) == [10, 2]


def test_a_run_of_the_protocol(root: Path, tmp_path: Path) -> None:
    limits = ['--trainer.max_epochs', '1', '--trainer.limit_train_batches', '1']
    limits += ['--trainer.limit_val_batches', '1', '--trainer.default_root_dir', str(tmp_path)]
    done = cli(['fit', *options(root, 6, 's1'), *limits], run=True)
    assert done.trainer.global_step == 1
    assert 0 < done.trainer.callback_metrics['val_loss'] < 100
    assert {p.name for p in tmp_path.rglob('*.ckpt')} == {'best.ckpt', 'last.ckpt'}
