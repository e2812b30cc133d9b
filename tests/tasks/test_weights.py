import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torchgeo.models import ResNet18_Weights
from torchgeo.tasks import SemanticSegmentation

from torchgeo_s1s2.errors import S1S2Warning
from torchgeo_s1s2.models import unet_to_fuselstm
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation

VGG = 'vgg16_convlstm_inception'


def task_of(num_classes: int, **options: Any) -> S1S2SemanticSegmentation:
    backbone = options.pop('backbone', 'resnet18_convlstm_inception')
    return S1S2SemanticSegmentation(backbone=backbone, num_classes=num_classes, **options)


def checkpoint_of(task: SemanticSegmentation, path: Path) -> str:
    torch.save({'hyper_parameters': dict(task.hparams), 'state_dict': task.state_dict()}, path)
    return str(path)


def equal_parts(a: S1S2SemanticSegmentation, b: S1S2SemanticSegmentation) -> set[str]:
    """Parts of the models in which every weight is the same."""
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    parts = {name.split('.')[0] for name in ours}
    same = {k for k in ours if ours[k].shape == theirs[k].shape and ours[k].equal(theirs[k])}
    return {p for p in parts if all(k in same for k in ours if k.startswith(f'{p}.'))}


def test_another_number_of_classes_leaves_out_the_head_only(tmp_path: Path) -> None:
    """From 10 classes of one region to 15 of another."""
    source = task_of(10)
    path = checkpoint_of(source, tmp_path / 'region.ckpt')
    with pytest.warns(UserWarning, match='left out') as caught:
        target = task_of(15, weights=path)
    assert equal_parts(source, target) == {'encoder', 'decoder'}
    messages = [str(w.message) for w in caught if path in str(w.message)]
    assert len(messages) == 1
    expected = 'of another shape: segmentation_head.0.weight, segmentation_head.0.bias'
    assert messages[0].endswith(expected)
    total = len(source.model.state_dict())
    assert f'loaded {total - 2} of {total} tensors' in messages[0]


@pytest.mark.parametrize('kind', ['task', 'model', 'fuselstm'])
def test_the_same_number_of_classes_loads_the_head_too(tmp_path: Path, kind: str) -> None:
    """From the checkpoint of a task, and from state dicts of its model under both names."""
    source, path = task_of(10, backbone=VGG), tmp_path / 'weights.pt'
    state = source.model.state_dict()
    if kind == 'task':
        checkpoint_of(source, path)
    else:
        torch.save(state if kind == 'model' else unet_to_fuselstm(state), path)
    with warnings.catch_warnings(action='error'):
        target = task_of(10, backbone=VGG, weights=path, class_weights=[1.0] * 10)
    assert equal_parts(source, target) == {'encoder', 'decoder', 'segmentation_head'}


@pytest.mark.parametrize('kind', ['model', 'backbone'])
@pytest.mark.parametrize('ours', ['resnet18', 'resnet18_convlstm_inception', 'resnet18_attention'])
def test_backbone_checkpoints_of_torchgeo_are_loaded(tmp_path: Path, kind: str, ours: str) -> None:
    """As its classification and its self-supervised tasks write them."""
    resnet = torchvision.models.resnet18()
    prefix = {'model': 'model.', 'backbone': 'model.backbone.model.'}[kind]
    checkpoint = {
        'hyper_parameters': {kind: 'resnet18'},
        'state_dict': {prefix + k: v for k, v in resnet.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / 'backbone.ckpt')
    with pytest.warns(UserWarning, match='fc.weight'):
        task = task_of(3, backbone=ours, in_channels=12, weights=str(tmp_path / 'backbone.ckpt'))
    spatial = task.model.encoder
    if ours != 'resnet18':
        spatial = spatial.spatial if 'convlstm' in ours else spatial.spatial.series
    assert spatial.layer3[1].conv2.weight.equal(resnet.layer3[1].conv2.weight)
    # The first convolution reads RGB there, and another number of channels here.
    assert spatial.conv1.weight.shape[1] != 3


def test_the_paper_s_checkpoint_serves_the_improved_model(tmp_path: Path) -> None:
    source = task_of(3)
    mean = source.model.encoder.convlstm.s1.batchnorm.running_mean.normal_()
    path, options = checkpoint_of(source, tmp_path / 'old.ckpt'), {'norm': 'step'}
    assert equal_parts(source, task_of(3, weights=path, backbone_kwargs=None)) == {
        'encoder',
        'decoder',
        'segmentation_head',
    }
    target = task_of(3, weights=path, backbone_kwargs=options)
    assert target.hparams['backbone'] == 'resnet18_convlstm_inception_stepnorm'
    assert target.model.encoder.convlstm.s1.batchnorm.running_mean.eq(mean).all()
    x = torch.randn(1, 2, 12, 32, 32)
    torch.testing.assert_close(target.eval()(x), source.eval()(x), rtol=0, atol=1e-5)


def test_weight_enums_and_their_names_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    resnet = torchvision.models.resnet18()
    resnet.conv1 = torch.nn.Conv2d(13, 64, 7, 2, 3, bias=False)
    enum = ResNet18_Weights.SENTINEL2_ALL_MOCO
    monkeypatch.setattr(type(enum), 'get_state_dict', lambda *_, **__: resnet.state_dict())
    for weights in (enum, str(enum)):
        task = task_of(3, backbone='resnet18', in_channels=13, weights=weights)
        assert task.model.encoder.conv1.weight.equal(resnet.conv1.weight)
        with pytest.warns(S1S2Warning, match='of decoder and head at least, are initial ones'):
            task.on_test_start()


@pytest.mark.parametrize(
    ('name', 'count', 'place', 'scale'),
    [('SENTINEL2_RGB_MOCO', 3, 2, 1), ('LANDSAT_TM_TOA_MOCO', 7, 0, 7 / 12)],
)
def test_bands_of_an_enum_go_to_those_of_the_series(
    name: str, count: int, place: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our B02 is the third of red, green, blue; Landsat's are repeated, as smp does."""
    resnet = torchvision.models.resnet18()
    resnet.conv1 = torch.nn.Conv2d(count, 64, 7, 2, 3, bias=False)
    monkeypatch.setattr(ResNet18_Weights, 'get_state_dict', lambda *_, **__: resnet.state_dict())
    task = task_of(3, backbone='resnet18_attention', weights=getattr(ResNet18_Weights, name))
    kernel = task.model.encoder.spatial['series'].conv1.weight
    torch.testing.assert_close(kernel[:, 0], scale * resnet.conv1.weight[:, place])


@pytest.mark.parametrize('weights', [None, False])
def test_no_weights_are_random(weights: Any) -> None:
    assert not equal_parts(task_of(3, weights=weights), task_of(3)) - {'segmentation_head'}


def test_nothing_fitting_is_an_error(tmp_path: Path) -> None:
    other = task_of(3, backbone='mobilenet_v2_convlstm_s1', in_channels=2, model='linknet')
    path = checkpoint_of(other, tmp_path / 'other.ckpt')
    with pytest.raises(ValueError, match=r'other.ckpt: no weight fits .* same model and backbone'):
        task_of(2, backbone='resnet18', weights=path)


@pytest.mark.parametrize(
    ('name', 'error', 'message'),
    [
        ('x.pt', ValueError, r'x.pt is neither .* it holds a'),
        (
            'list.pt',
            ValueError,
            r'list.pt holds no weights by name \(list\); give the checkpoint of',
        ),
        ('numpy.pt', ValueError, r'holds numpy.*scalar, which PyTorch does not load for safety'),
        ('notes.txt', ValueError, r'notes.txt holds no weights by name \(KeyError'),
        ('.', ValueError, r'holds no weights by name \(IsADirectoryError'),
        ('gone.ckpt', FileNotFoundError, r'no checkpoint .*gone.ckpt; correct the path in weights'),
    ],
)
def test_files_of_something_else_and_missing_ones_are_named(
    tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    torch.save({'a': torch.zeros(1)}, tmp_path / 'x.pt')
    torch.save([torch.zeros(1)], tmp_path / 'list.pt')
    torch.save({'a': np.float64(1)}, tmp_path / 'numpy.pt')
    (tmp_path / 'notes.txt').write_text('hello')
    with pytest.raises(error, match=message):
        task_of(2, weights=tmp_path / name)
