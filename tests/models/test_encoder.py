import copy
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchgeo.models
from safetensors.torch import save_file
from segmentation_models_pytorch.encoders import get_encoder
from torch import Tensor, nn

from torchgeo_s1s2.models import (
    ImageSeries,
    SeriesEncoder,
    change_name,
    freeze,
    register_encoder,
    registry,
    series_encoder,
    spatial_encoder,
)
from torchgeo_s1s2.models.registry import spatial_encoders

DECODERS = {
    'unet': 'vgg11',
    'unetplusplus': 'mobilenet_v2',
    'fpn': 'tu-resnet18',
    'linknet': 'mobilenet_v2',
    'manet': 'resnet18',
    'pspnet': 'vgg11',
    'upernet': 'resnet18',
    'segformer': 'tu-resnet18',
}
SMALL = 'vgg11', 'resnet18', 'mobilenet_v2'
CONTRACT = (*SMALL, 'timm_resnet18', 'efficientnet-b0', 'mit_b0', 'densenet121')
DILATED = ('deeplabv3plus', 'pan')
NAMES = {spatial: register_encoder(spatial) for spatial in (*SMALL, 'tu-resnet18')}
IMPROVED = 'resnet18_convlstm_inception_stepnorm_fullres'
# One of each kind: recurrent, recurrent and improved, attention of each kind.
FRONTS = (NAMES['resnet18'], IMPROVED, 'resnet18_attention', 'vgg11_attention_late_fullres', 'utae')
LATE = 'resnet18_attention_late_fullres'
# The usual case, an encoder whose loader takes no options, one with several first convolutions.
LOADERS = ('resnet18', 'densenet121', 'mobileone_s0')


def make_series(b: int = 2, t: int = 3, c: int = 12, size: int = 32) -> Tensor:
    return torch.randn(b, t, c, size, size, generator=torch.Generator().manual_seed(1))


def build(name: str, channels: int = 12, **options: Any) -> Any:
    encoder = copy.deepcopy(initial(name, channels, **options))
    torch.manual_seed(0)
    return encoder


@lru_cache(8)  # initial values take longer than a copy
def initial(name: str, channels: int, **options: Any) -> SeriesEncoder:
    torch.manual_seed(0)
    encoder = get_encoder(name, in_channels=channels, **options)
    assert isinstance(encoder, SeriesEncoder)
    return encoder


def buffers(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in encoder.named_buffers()}


def front(encoder: SeriesEncoder) -> dict[str, Tensor]:
    return {n: p for n, p in encoder.named_parameters() if not n.startswith('spatial.')}


@pytest.mark.parametrize(
    ('decoder', 'name'),
    [*((d, NAMES[s]) for d, s in DECODERS.items()), *(('unet', f) for f in FRONTS)],
)
def test_decoders_learn_through_the_front(decoder: str, name: str) -> None:
    model = smp.create_model(decoder, name, None, in_channels=24, classes=5)
    output = model(make_series(t=2))
    assert output.shape == (2, 5, 32, 32)
    output.square().mean().backward()
    for name, parameter in front(model.encoder).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
@pytest.mark.parametrize(
    'name', [NAMES['resnet18'], IMPROVED, 'utae', 'resnet18_attention_fullres']
)
@pytest.mark.parametrize('decoder', [*DECODERS, 'deeplabv3', *DILATED])
def test_every_decoder_sees_full_resolution_where_the_name_says_so(decoder: str, name: str) -> None:
    model = smp.create_model(decoder, name, None, in_channels=12, classes=3).eval()
    size = 128 if decoder == 'pan' else 64  # its pyramid takes no less
    features = model.encoder(make_series(b=1, t=2, size=size))
    if decoder in DILATED:
        assert size / features[-1].shape[-1] == model.encoder.output_stride == 16

    def logits(finest: Tensor) -> Tensor:
        output: Tensor = model.segmentation_head(model.decoder([finest, *features[1:]]))
        return output

    plain = logits(0 * features[0])
    assert plain.shape == (1, 3, size, size)
    single = torch.zeros_like(features[0])
    single[..., 33, 32] = 10
    changed = (logits(single) - plain).abs().sum((0, 1)).nonzero()
    if name == NAMES['resnet18']:
        assert not len(changed)
    else:  # some pixels around the one that differs, and nothing else
        assert 1 <= len(changed) <= 25
        assert (changed - torch.tensor([33, 32])).abs().max() <= 2


@pytest.mark.parametrize('front', ['convlstm_inception', 'attention'])
@pytest.mark.parametrize('name', ['resnet18', 'tu-resnet18'])
def test_dilation_equals_that_of_the_spatial_encoder(name: str, front: str) -> None:
    encoder = build(f'{name.replace("tu-", "timm_")}_{front}', output_stride=8).eval()
    spatial, channels = encoder.spatial, 160
    if front == 'attention':
        spatial, channels = spatial['series'], 12
    alone = get_encoder(name, in_channels=channels, output_stride=8).eval()
    alone.load_state_dict(spatial.state_dict())
    x = torch.randn(1, channels, 64, 64)
    for mine, other in zip(spatial(x), alone(x), strict=True):
        assert mine.equal(other)


def test_what_cannot_be_dilated_says_so() -> None:
    with pytest.raises(ValueError, match='do not support dilated'):
        smp.PAN(NAMES['vgg11'], encoder_weights=None, in_channels=12)


def test_sizes_that_are_not_a_multiple_of_32() -> None:
    options: dict[str, Any] = {'encoder_weights': None, 'in_channels': 12, 'classes': 3}
    model = smp.FPN(NAMES['resnet18'], **options).eval()
    with pytest.raises(RuntimeError, match='divisible by 32'):
        model(make_series(size=40))
    shallow = smp.Unet(
        NAMES['resnet18'], encoder_depth=3, decoder_channels=(64, 32, 16), **options
    ).eval()
    assert shallow(make_series(size=40)).shape == (2, 3, 40, 40)
    features = build(NAMES['resnet18']).eval()(make_series(size=45))
    assert [f.shape[-1] for f in features] == [45, 23, 12, 6, 3, 2]


@pytest.mark.parametrize('name', FRONTS)
def test_flat_and_five_dimensional_series_are_the_same(name: str) -> None:
    encoder, x = build(name, 36).eval(), make_series()
    for mine, other in zip(encoder(x), encoder(x.flatten(1, 2)), strict=True):
        assert mine.equal(other)


@pytest.mark.parametrize(
    'name',
    [
        *(f'{spatial}_convlstm_inception_s2x3_s1_h8_t4' for spatial in CONTRACT),
        *(f'{spatial}_attention_late_s2x3_s1' for spatial in CONTRACT),
        'utae_late_s2x3_s1',
        'utae_late_s2x64_s1',  # as many bands as features
    ],
)
@pytest.mark.parametrize('depth', [3, 5])
@torch.no_grad()
def test_contract_of_encoders(name: str, depth: int) -> None:
    """What smp's own tests ask of an encoder, for names that need not be listed."""
    shown = '_fullres' if depth == 3 and not name.startswith('utae') else ''
    bands = 66 if 'x64' in name else 5
    encoder = build(name + shown, 2 * bands, depth=depth).eval()
    assert 'late' in name or encoder.convlstm['s1'].hidden_channels == 8
    assert encoder._is_torch_exportable
    assert encoder._is_torch_compilable
    assert not encoder._is_torch_scriptable
    for height, width in ((64, 32), (64, 96)):
        features = encoder(make_series(1, 2, bands, 96)[..., :height, :width])
        assert [f.shape[1] for f in features] == encoder.out_channels
        scales = [height // f.shape[2] for f in features if f.shape[1]]
        assert scales == [width // f.shape[3] for f in features if f.shape[1]]
        assert scales[-1] == encoder.output_stride == 2**depth


@pytest.mark.parametrize(
    'name',
    [
        'resnet18_convlstm_inception_h4_t4',
        IMPROVED,
        'utae',
        register_encoder('mobilenet_v2'),
        register_encoder('tu-resnet18', front='attention'),
        register_encoder('efficientnet-b0'),
        register_encoder('mit_b0', front='attention'),
        register_encoder('densenet121'),
    ],
)
@torch.no_grad()
def test_round_trips(tmp_path: Path, name: str) -> None:
    """Through the hub's files, the compiler and the strict export, as smp's own tests do."""
    model = smp.Unet(name, 3, None, decoder_channels=(16, 8, 4), in_channels=12).eval()
    x, valid = make_series(), torch.ones(2, 3, 2, dtype=torch.bool)
    valid[0, 1, 0] = valid[1, 0] = False
    empty = emptied(x, valid)
    expected = model(empty)
    model.save_pretrained(tmp_path)
    assert smp.from_pretrained(tmp_path).eval()(empty).equal(expected)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    exported = torch.export.export(model, (empty,), strict=True).module()
    for actual in (compiled(ImageSeries(x, valid)), compiled(empty), exported(empty)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    wider = make_series(t=2, size=64)
    torch.testing.assert_close(compiled(wider), model(wider), rtol=0, atol=1e-5)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(
    ('suffix', 'sensors', 'inception'),
    [
        ('convlstm_inception', {'s2': 10, 's1': 2}, True),
        ('convlstm', {'s2': 10, 's1': 2}, False),
        ('convlstm_s1', {'s1': 2}, False),
        ('convlstm_s2', {'s2': 10}, False),
        ('convlstm_inception_doy', {'s2': 12, 's1': 4}, True),
    ],
)
def test_features_are_those_of_the_parts(
    suffix: str, sensors: dict[str, int], inception: bool, training: bool
) -> None:
    """A recurrent layer for each sensor, Inception on the first slot, and the spatial encoder."""
    channels = sum(sensors.values())
    encoder = build(f'resnet18_{suffix}', 3 * channels).double().train(training)
    assert encoder.sensors == sensors
    parts, x = copy.deepcopy(encoder), make_series(c=channels).double()
    series = dict(zip(sensors, x.split([*sensors.values()], 2), strict=True))
    front = [parts.convlstm[sensor](series[sensor]) for sensor in sensors]
    front += [parts.inception(x[:, 0])] if inception else []
    torch.testing.assert_close(encoder(x), parts.spatial(torch.cat(front, 1)))
    torch.testing.assert_close(buffers(encoder), buffers(parts))


@pytest.mark.parametrize('name', FRONTS)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('places', [(0,), (3,), (1, 1), (0, 2, 3)])
def test_empty_slots_change_nothing(name: str, places: tuple[int, ...], training: bool) -> None:
    x = make_series()
    longer = x
    for place in sorted(places, reverse=True):
        gap = torch.zeros_like(x[:, :1])
        longer = torch.cat([longer[:, :place], gap, longer[:, place:]], 1)
    first, second = build(name), build(name)
    expected = first.train(training)(x)
    actual = second.train(training)(longer)
    tolerance = 1e-5 if training else 0  # as rounding
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(buffers(second), buffers(first), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('name', [NAMES['resnet18'], IMPROVED, LATE, 'utae_late'])
def test_sensors_may_have_different_gaps(name: str) -> None:
    """A slot that only S2 saw, one that only S1 saw: as if each had its own shorter series."""
    encoder = build(name).eval()
    x = make_series(b=1, t=4)
    x[:, 0, 10:] = 0
    x[:, 1, :10] = 0
    x[:, 3] = 0
    s2, s1 = x[:, [0, 2], :10], x[:, [1, 2], 10:]
    expected = encoder(torch.cat([s2, s1], dim=2))
    for mine, other in zip(encoder(x), expected, strict=True):
        torch.testing.assert_close(mine, other)


def emptied(x: Tensor, valid: Tensor) -> Tensor:
    """A series with zeros where a sensor saw nothing."""
    return x.where(valid.repeat_interleave(torch.tensor([10, 2]), 2)[..., None, None], 0)


@pytest.mark.parametrize('name', FRONTS)
@torch.no_grad()
def test_what_is_said_of_slots_counts_before_zeros(name: str) -> None:
    """Slots that hold noise though nothing was seen, and zeros that were."""
    encoder = build(name).eval()

    def features(x: Any) -> Tensor:
        return torch.cat([level.flatten() for level in encoder(x)])

    x, valid = make_series(t=4), torch.ones(2, 4, 2, dtype=torch.bool)
    valid[0, 1, 0] = valid[1, 0] = valid[:, 3] = False
    empty = emptied(x, valid)
    told = valid.index_fill(1, torch.tensor([3]), True)  # without the padding
    batch = {'image': x, 'valid': told, 'length': torch.tensor([3, 3])}
    assert features(ImageSeries.from_batch(batch)).equal(features(empty))
    both = valid.all(2)
    assert features(ImageSeries(x, both)).equal(features(x.where(both[..., None, None, None], 0)))
    zeros = torch.zeros_like(x)
    assert not features(ImageSeries(zeros, valid)).equal(features(zeros))


@pytest.mark.parametrize('name', ['resnet18_convlstm_inception_doy', 'utae_doy', 'utae_late_doy'])
@torch.no_grad()
def test_the_day_of_the_year_does_not_make_a_slot_seen(name: str) -> None:
    encoder = build(name, 16).eval()
    x = make_series(t=3, c=16)
    x[:, 1, :10] = 0
    x[:, 1, 12:14] = 0  # the planes of both sensors stay
    for mine, other in zip(encoder(x), encoder(x[:, [0, 2]]), strict=True):
        assert mine.equal(other)


@pytest.mark.parametrize('shape', [(2, 3, 1), (2, 4), (2, 4, 2)])
def test_validity_and_days_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    given = {
        'valid': torch.ones(shape, dtype=torch.bool),
        'acquisition_times': torch.ones(shape).long(),
    }
    for key, value in given.items():
        name = key.replace('_', ' ')
        with pytest.raises(ValueError, match=rf'{name} ha\w+ shape .* = \(2, 3, 2\)'):
            build('utae')(ImageSeries.from_batch({'image': make_series(), key: value}))


def test_validity_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r'valid has type torch\.float32, expected booleans'):
        build(NAMES['resnet18'])(make_series(), torch.ones(2, 3))


@pytest.mark.parametrize('name', FRONTS)
def test_samples_of_a_batch_do_not_mix(name: str) -> None:
    encoder = build(name).eval()
    x = make_series(b=3)
    x[0, 0] = 0
    x[1, 1, :10] = 0
    x[2, :, 10:] = 0
    together = encoder(x)
    for i in range(3):
        for feature, alone in zip(together, encoder(x[i : i + 1]), strict=True):
            torch.testing.assert_close(feature[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', [NAMES['resnet18'], IMPROVED, LATE])
@pytest.mark.parametrize('absent', [slice(0, 10), slice(10, 12), slice(0, 12)])
def test_a_sensor_that_saw_nothing_gives_finite_features(absent: slice, name: str) -> None:
    encoder = build(name).train()
    part = encoder.spatial if name == LATE else encoder.convlstm
    before = buffers(part)
    x = make_series()
    x[:, :, absent] = 0
    features = encoder(x)
    sum(f.square().sum() for f in features).backward()
    assert all(f.isfinite().all() for f in features)
    unused = {n for n, p in encoder.named_parameters() if p.grad is None}
    assert not unused  # every process has the same graph
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
    for sensor, channels in (('s2', range(10)), ('s1', range(10, 12))):
        mean = f'{sensor}.{"bn1" if name == LATE else "batchnorm"}.running_mean'
        unseen = absent.start <= channels[0] and channels[-1] < absent.stop
        assert buffers(part)[mean].equal(before[mean]) == unseen


@pytest.mark.parametrize('name', FRONTS)
def test_gaps_under_autocast(name: str) -> None:
    encoder = build(name).train()
    x = make_series()
    x[0, 0] = 0
    x[1, 1, 10:] = 0
    with torch.autocast('cpu', torch.bfloat16):
        features = encoder(x)
        sum(f.square().mean() for f in features).backward()
    assert all(f.isfinite().all() for f in features)
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
    expected = build(name).train()(x)[0]
    assert (features[0] - expected).abs().mean() < 0.02


@pytest.mark.parametrize(
    'name', [NAMES['resnet18'], NAMES['tu-resnet18'], 'resnet18', 'resnet18_attention', LATE]
)
def test_freezing_keeps_weights_and_statistics_of_the_spatial_encoder(name: str) -> None:
    model = smp.FPN(name, encoder_weights=None, in_channels=12)
    frozen = 'encoder.' if series_encoder(model) is None else 'encoder.spatial.'
    freeze(spatial_encoder(model))
    model = copy.deepcopy(model).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = make_series(t=2) if frozen.endswith('spatial.') else make_series(t=1)[:, 0]
    model(x).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert changed == {k for k in before if not k.startswith(frozen)}
    freeze(spatial_encoder(model), frozen=False)
    assert all(p.requires_grad for p in model.parameters())
    model.train()(x)
    mean = next(k for k in before if k.startswith(frozen) and k.endswith('running_mean'))
    assert not model.state_dict()[mean].equal(before[mean])


@pytest.mark.parametrize('is_synchronised', [False, True])
def test_a_part_may_be_unfrozen_within_a_frozen_one(is_synchronised: bool) -> None:
    """Also if batch norms take the place of others after that, as for sync_batchnorm: true."""
    spatial: Any = spatial_encoder(smp.Unet('resnet18', encoder_weights=None, in_channels=12))
    freeze(spatial)
    freeze(spatial.layer4, frozen=False)
    if is_synchronised:
        spatial = nn.SyncBatchNorm.convert_sync_batchnorm(spatial)
    learning = {f'layer4.{name}' for name, _ in spatial.layer4.named_modules() if name}
    for mode, expected in ((True, learning | {'layer4'}), (False, set())):
        spatial.train(mode)
        assert {name for name, part in spatial.named_modules() if part.training} == expected


def test_other_models_of_smp_may_lack_parts() -> None:
    class Heads(smp.base.SegmentationModel):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.encoder = get_encoder(name, in_channels=12)
            self.segmentation_head = smp.base.SegmentationHead(16, 3)

    Heads('resnet18')
    with pytest.raises(TypeError, match='Heads has no decoder when it gets its head'):
        Heads(NAMES['resnet18'] + '_fullres')


def test_an_encoder_may_be_registered_after_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(KeyError):
        get_encoder('mine_convlstm', in_channels=12)
    monkeypatch.setitem(smp.encoders.encoders, 'mine', smp.encoders.encoders['resnet18'])
    assert get_encoder('mine_convlstm', in_channels=12).sensors == {'s2': 10, 's1': 2}


@pytest.mark.parametrize('spatial', LOADERS)
def test_spatial_weights_are_repeated_over_the_features_as_smp_does(spatial: str) -> None:
    alone = get_encoder(spatial)
    encoder = get_encoder(f'{spatial}_convlstm_inception', in_channels=12)
    weights = alone.state_dict()
    encoder.load_state_dict(weights)
    alone.set_in_channels(160, pretrained=True)
    assert list(weights) == list(alone.state_dict())
    actual = encoder.spatial.state_dict()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(actual[name], value, msg=name)


def test_imagenet_weights_come_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is replaced with a folder."""
    torch.manual_seed(3)
    original = get_encoder('resnet18')
    classifier = {'fc.weight': torch.zeros(1000, 512), 'fc.bias': torch.zeros(1000)}
    save_file(original.state_dict() | classifier, tmp_path / 'model.safetensors')
    asked = []

    def download(repo_id: str, filename: str, revision: str) -> str:
        asked.append(repo_id)
        return str(tmp_path / filename)

    monkeypatch.setattr(smp.encoders, 'hf_hub_download', download)
    model = smp.Unet('resnet18_convlstm_inception', encoder_weights='imagenet', in_channels=12)
    assert set(asked) == {'smp-hub/resnet18.imagenet'}
    name = 'layer4.1.conv2.weight'
    assert model.encoder.spatial.state_dict()[name].equal(original.state_dict()[name])


def test_weights_of_a_model_and_of_an_encoder_fit(tmp_path: Path) -> None:
    model = smp.Unet(NAMES['resnet18'], encoder_weights=None, in_channels=12, classes=7)
    torch.save(model.state_dict(), tmp_path / 'model.pt')
    weights = torch.load(tmp_path / 'model.pt', weights_only=True)
    expected = model.encoder.state_dict()
    for given in (weights, expected):
        encoder = build(NAMES['resnet18'])
        encoder.load_state_dict(given)
        assert all(value.equal(expected[name]) for name, value in encoder.state_dict().items())


OF_S2 = dict(enumerate([1, 2, 3, 4, 5, 6, 7, 8, 11, 12]))
TWELVE = ['B1', 'B2', 'B3', 'B4', 'B5', 'B6', 'B7', 'B8', 'B8a', 'B9', 'B11', 'B12']


@pytest.mark.parametrize(
    ('name', 'group', 'given', 'places'),
    [
        ('resnet18_attention', 'series', 13, OF_S2),
        ('resnet18_attention', 'series', 2, {10: 0, 11: 1}),
        ('resnet18_attention_late', 's2', 13, OF_S2),
        ('resnet18_attention_late', 's1', 2, {0: 0, 1: 1}),
        # Twelve of Sentinel-2 for twelve of both sensors, and three in another order.
        ('resnet18_attention', 'series', TWELVE, {**OF_S2, 8: 10, 9: 11}),
        ('resnet18_attention', 'series', ['B04', 'B03', 'B02'], {0: 2, 1: 1, 2: 0}),
    ],
)
def test_weights_of_images_are_taken_band_by_band(
    name: str, group: str, given: int | list[str], places: dict[int, int]
) -> None:
    """Of TorchGeo's 13 bands of Sentinel-2 and 2 of Sentinel-1, or of those with these names."""
    bands = given if isinstance(given, list) else []
    weights = get_encoder('resnet18', in_channels=len(bands) or given).state_dict()
    encoder = build(name)
    encoder.load_state_dict(weights, bands=bands)
    own = encoder.spatial[group].state_dict()
    assert own['layer4.1.conv2.weight'].equal(weights['layer4.1.conv2.weight'])
    expected = torch.zeros_like(own['conv1.weight'])
    expected[:, [*places]] = weights['conv1.weight'][:, [*places.values()]]
    assert own['conv1.weight'].equal(expected)


@pytest.mark.parametrize('name', FRONTS)
def test_some_weights_of_the_encoder_itself_are_loaded_if_not_strict(name: str) -> None:
    encoder = build(name)
    some = {n: p + 1 for n, p in encoder.state_dict().items() if not n.startswith('spatial.')}
    for prefix in ('', 'encoder.'):
        other = build(name)
        result = other.load_state_dict({prefix + n: v for n, v in some.items()}, strict=False)
        assert not result.unexpected_keys
        assert all(other.state_dict()[n].equal(value) for n, value in some.items())


def test_weights_of_another_spatial_encoder_or_sensor_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r'(?s)Unexpected key.* "layer1\.2\.conv1\.weight"'):
        build(NAMES['resnet18']).load_state_dict(get_encoder('resnet34').state_dict())
    s1 = get_encoder('resnet18', in_channels=2).state_dict()
    with pytest.raises(ValueError, match=r'no weight can be loaded: .* reads 10 s2'):
        build('resnet18_attention_s2', 10).load_state_dict(s1)
    rgb = get_encoder('resnet18').state_dict()
    with pytest.raises(ValueError, match=r'no weight can be loaded: .* reads 2 s1'):
        build('resnet18_attention_s1', 2).load_state_dict(rgb, bands=['B04', 'B03', 'B02'])


@pytest.mark.parametrize('spatial', [*LOADERS, 'mit_b0'])
def test_some_of_the_weights_are_loaded_if_not_strict(spatial: str) -> None:
    weights = get_encoder(spatial).state_dict()
    (name, value), *_ = reversed([item for item in weights.items() if item[1].ndim == 1])
    encoder = build(f'{spatial}_convlstm_inception')
    result = encoder.load_state_dict({name: value + 1, 'foreign': value}, strict=False)
    assert encoder.spatial.state_dict()[name].equal(value + 1)
    assert result.unexpected_keys == ['foreign']


def test_torchgeo_knows_the_names() -> None:
    assert 'vgg16_convlstm_inception' in torchgeo.models.list_models()
    model = torchgeo.models.get_model('resnet18_convlstm_inception_doy')
    assert model.sensors == {'s2': 12, 's1': 4}
    weights: Any = torchgeo.models.get_model_weights('vgg16_convlstm_inception')
    assert list(weights) == []
    model = torchgeo.models.get_model('resnet18_convlstm_s1').eval()
    assert model(make_series(c=2))[0].shape == (2, 32, 32, 32)
    with pytest.raises(ValueError, match='nothing is not a valid'):
        torchgeo.models.get_weight('nothing')


def test_few_names_are_listed_and_all_are_known() -> None:
    listed = [name for name in torchgeo.models.list_models() if '_convlstm' in name]
    assert {'vgg16_convlstm_inception', 'resnet18_convlstm_s1'} <= set(listed)
    listed = [n for n in torchgeo.models.list_models() if registry.parse_name(n)]
    assert {IMPROVED, 'resnet18_attention_fullres', 'utae', 'utae_late'} <= set(listed)
    assert len(listed) <= 60  # with those that other tests list
    for spatial in spatial_encoders():
        for end in ('_inception', '_inception_doy', '', '_s1', '_s2', '_inception_h64_t16'):
            assert f'{spatial}_convlstm{end}' in smp.encoders.encoders
        for end in ('', '_late', '_s2_fullres', '_fullres_doy'):
            assert f'{spatial}_attention{end}' in smp.encoders.encoders
    for wrong in (
        'resnet19_convlstm',
        'resnet18_convlstm_h32',
        'resnet18_convlstm_doy_inception',
        'resnet18_convlstm_late',
        'resnet18_attention_inception',
        'utae_fullres',
        'utae_convlstm',
    ):
        assert wrong not in smp.encoders.encoders
        with pytest.raises(KeyError, match=wrong):
            get_encoder(wrong)


def test_a_library_without_its_dictionary_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torchgeo.models.api, '_model')
    with pytest.raises(RuntimeError, match=r"torchgeo\.models\.api has no dictionary '_model'"):
        register_encoder('resnet18')


def test_names_say_what_was_chosen() -> None:
    assert register_encoder('vgg16') == 'vgg16_convlstm_inception'
    assert register_encoder('tu-resnet18', inception=False) == 'timm_resnet18_convlstm'
    # The order of the sensors is that of the channels, so another order is another name.
    other = register_encoder('vgg16', {'s1': 2, 's2': 10})
    assert other == 'vgg16_convlstm_inception_s1_s2'
    sensors = {'s2': 4, 's1': 2}
    name = register_encoder('resnet18', sensors, day_of_year=True)
    assert name == 'resnet18_convlstm_inception_s2x4_s1_doy'
    assert build(name, 10).sensors == {'s2': 6, 's1': 4}


def test_options_change_a_name() -> None:
    name = change_name('resnet18_convlstm_inception_s1', norm='none', hidden_channels=8)
    assert name == 'resnet18_convlstm_inception_s1_h8_nonorm'
    assert change_name(name, norm='step', full_resolution=True, hidden_channels=32) == (
        'resnet18_convlstm_inception_s1_stepnorm_fullres'
    )
    assert change_name('utae', late=True, day_of_year=True) == 'utae_late_doy'
    for wrong, options in (('resnet18', {}), ('utae', {'layers': 3})):
        with pytest.raises(ValueError, match='expected a backbone that reads series'):
            change_name(wrong, **options)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('resnet18_convlstm', {'late': True}, 'options are of the front'),
        ('resnet18_convlstm', {'norm': 'steps'}, "norm is 'shared', 'step' or 'none'"),
        ('resnet18_convlstm', {'full_resolution': 'yes'}, 'full_resolution are True or False'),
        ('resnet18_convlstm', {'hidden_channels': '64'}, 'sizes are whole numbers'),
        ('utae', {'inception': True}, "'utae' has no choice of inception"),
        ('utae', {'full_resolution': False}, "'utae' has no choice of full_resolution"),
    ],
)
def test_options_that_a_name_cannot_say_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        change_name(name, **options)


@pytest.mark.parametrize('name', ['resnet19', 'tu-resnet19', 'vgg16_convlstm', 'timm-skresnet18'])
def test_unknown_spatial_encoder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown spatial encoder '{name}'.*resnet18") as error:
        register_encoder(name)
    assert '_convlstm' not in str(error.value).split('expected')[1]


@pytest.mark.parametrize('sensors', [{}, {'s2': 0}, {'s2': '10'}, ['s2']])
def test_sensors_without_bands_are_refused(sensors: Any) -> None:
    with pytest.raises(ValueError, match='expected at least one with its band count'):
        register_encoder('resnet18', sensors)


@pytest.mark.parametrize('channels', [3, 50, 0])
def test_channels_that_do_not_fit_are_refused(channels: int) -> None:
    message = (
        rf'in_channels is {channels}, expected a multiple of 12 \(10 s2 \+ 2 s1\).*backbone_kwargs='
    )
    with pytest.raises(ValueError, match=message):
        build(NAMES['resnet18'], channels)


@pytest.mark.parametrize('shape', [(2, 13, 32, 32), (2, 3, 11, 32, 32), (2, 0, 12, 32, 32), (12,)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    encoder = build(NAMES['resnet18'])
    with pytest.raises(ValueError, match=r'image has shape .* expected \(B, T, 12, H, W\)'):
        encoder(torch.zeros(shape))


def test_timm_model_with_a_pretrained_tag() -> None:
    with warnings.catch_warnings(action='error', category=UserWarning):
        name = register_encoder('tu-resnet18.a1_in1k')
    assert timm.is_model('resnet18.a1_in1k')
    assert name == 'timm_resnet18.a1_in1k_convlstm_inception'
    assert build(name).out_channels == [160, 64, 64, 128, 256, 512]
