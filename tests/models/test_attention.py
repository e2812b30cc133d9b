"""Temporal attention against a plain implementation that loops over pixels, dates and heads."""

import math
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from conftest import learnt
from numpy.typing import NDArray
from segmentation_models_pytorch.encoders import get_encoder
from torch import Tensor

from torchgeo_s1s2.models import ImageSeries, TemporalAttention, attention
from torchgeo_s1s2.models.attention import weigh

Array = NDArray[np.float64]


def layer_norm(x: Array, p: dict[str, Array], name: str) -> Array:
    scaled = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    return scaled * p[f'{name}.weight'] + p[f'{name}.bias']


def attend(layer: TemporalAttention, x: Array, seen: Array, days: Array) -> tuple[Array, Array]:
    """Series (T, C) of one pixel: its features (C,) and the weights (T, heads)."""
    p = {k: v.double().numpy() for k, v in layer.state_dict().items()}
    share = layer.width // layer.heads
    weights, values = np.zeros((len(x), layer.heads)), np.zeros((len(x), layer.width))
    for t in range(len(x)):
        place = [days[t] / 1000 ** (2 * i / share) for i in range(share // 2)]
        code = [math.sin(a) for a in place] + [math.cos(a) for a in place]
        embedded = p['embed.1.weight'] @ layer_norm(x[t], p, 'embed.0') + p['embed.1.bias']
        values[t] = embedded + np.tile(code, layer.heads)
        keys = (p['key.weight'] @ values[t] + p['key.bias']).reshape(p['query'].shape)
        for head in range(layer.heads):
            score = keys[head] @ p['query'][head] / math.sqrt(p['query'].shape[1])
            weights[t, head] = math.exp(score) if seen[t] else 0
    weights = weights / np.maximum(weights.sum(0), 1e-300)
    heads = values.reshape(len(x), layer.heads, share)
    out = (heads * weights[..., None]).sum(0).reshape(-1)
    out = layer_norm(p['out.0.weight'] @ out + p['out.0.bias'], p, 'out.1')
    return np.maximum(out, 0), weights


def test_attention_against_numpy() -> None:
    torch.manual_seed(0)
    layer = TemporalAttention(6, heads=2, key_channels=3, width=8).double()
    x = torch.randn(2, 3, 6, 2, 2).double()
    seen = torch.tensor([[True, False, True], [False, False, False]])
    days = torch.tensor([[3.0, 77.0, 250.0], [1.0, 2.0, 3.0]]).double()
    with torch.no_grad():
        features, weights = layer(x, seen, days)
    for b, i, j in np.ndindex(2, 2, 2):
        inputs = x[b, :, :, i, j].numpy(), seen[b].numpy(), days[b].numpy()
        expected = attend(layer, *inputs)
        np.testing.assert_allclose(features[b, :, i, j], expected[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(weights[b, :, :, i, j], expected[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.sum(1)[0], torch.ones(2, 2, 2).double())


@pytest.mark.parametrize(
    ('channels', 'head_of'), [(8, [0, 0, 1, 1, 2, 2, 3, 3]), (6, [0] * 3 + [2] * 3)]
)
def test_each_share_of_the_channels_has_its_head(channels: int, head_of: list[int]) -> None:
    """Six channels and four heads: two shares, of two heads each."""
    features, weights = torch.randn(1, 3, channels, 4, 4), torch.rand(1, 3, 4, 2, 2)
    actual = weigh(features, weights)
    for c, head in enumerate(head_of):
        mask = weights[0, :, head] if channels == 8 else weights[0, :, head : head + 2].mean(1)
        mask = F.interpolate(mask[None], (4, 4), mode='bilinear')[0]
        torch.testing.assert_close(actual[0, c], (features[0, :, c] * mask).sum(0))


@pytest.mark.parametrize('name', ['utae', 'resnet18_attention_late'])
@torch.no_grad()
def test_features_are_those_of_each_date_weighed(name: str) -> None:
    """Date by date, through the encoder's own parts; the second sample lacks a date."""
    encoder: Any = get_encoder(name, in_channels=12).eval()
    x = torch.randn(2, 3, 12, 32, 32)
    x[1, 1] = 0
    actual = encoder(x)
    for b, dates in enumerate([[0, 1, 2], [0, 2]]):
        levels: list[list[Tensor]] = []
        for group, start, stop in (
            [('series', 0, 12)] if name == 'utae' else [('s2', 0, 10), ('s1', 10, 12)]
        ):
            each = [encoder.spatial[group](x[b : b + 1, t, start:stop]) for t in dates]
            series = [torch.stack(level, 1) for level in zip(*each, strict=True)]
            seen, slots = torch.ones(1, len(dates)).bool(), torch.arange(len(dates)).float()[None]
            last, weights = encoder.attention[group](series[-1], seen, slots)
            levels.append([*(weigh(level, weights) for level in series[:-1]), last])
        expected = [torch.cat(level, 1) for level in zip(*levels, strict=True)]
        for mine, other in zip(actual, expected, strict=False):
            torch.testing.assert_close(mine[b : b + 1], other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('late', ['', '_late'])
@torch.no_grad()
def test_positions_are_days_of_the_year(late: str) -> None:
    """By acquisition times, by planes, and without either by the number of observations."""
    x = torch.randn(1, 3, 12, 32, 32)
    dates = np.array(['2020-07-01', '2020-01-01', '2020-12-31'], 'datetime64[s]').astype(int)
    days = torch.tensor([183.0, 1, 366])
    times = torch.tensor(dates)[None, :, None].expand(1, 3, 2)
    torch.manual_seed(0)
    encoder: Any = get_encoder(f'utae{late}', in_channels=12).eval()
    told = encoder(ImageSeries.from_batch({'image': x, 'acquisition_times': times}))
    assert not told[3].allclose(encoder(x)[3])
    seen: list[Tensor] = []
    for layer in encoder.attention.values():
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    encoder(x, None, days[None, :, None].expand(1, 3, 2))
    assert all(positions.equal(days[None]) for positions in seen)
    angle = 2 * math.pi * days / 365.25
    planes = torch.stack([angle.sin(), angle.cos()], 1)[None, ..., None, None].expand(
        1, 3, 2, 32, 32
    )
    with_planes: Any = get_encoder(f'utae{late}_doy', in_channels=16).eval()
    with_planes.load_state_dict(encoder.state_dict())
    image = torch.cat([x[:, :, :10], planes, x[:, :, 10:], planes], 2)
    for mine, other in zip(with_planes(image), told, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('name', ['utae', 'resnet18_attention_fullres'])
def test_a_few_dates_at_a_time_are_the_same(
    name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation, and in training where they are encoded again."""
    torch.manual_seed(0)
    model: Any = smp.Unet(name, encoder_weights=None, in_channels=12).double()
    x, results = torch.randn(2, 3, 12, 64, 32).double(), []
    x[0, 1] = 0
    for pixels in (2**18, 64 * 32):
        monkeypatch.setattr(attention, 'PIXELS', pixels)
        again: Any = smp.Unet(name, encoder_weights=None, in_channels=12).double()
        again.load_state_dict(model.state_dict())
        again.encoder.set_recompute_gates(recompute and pixels < 2**18)
        again.train(recompute)
        with torch.set_grad_enabled(recompute):
            results.append(learnt(again, x) if recompute else {'output': again(x)})
    torch.testing.assert_close(*results)


def test_a_series_goes_on_over_the_new_year() -> None:
    """Days are counted from the beginning of the year in which a series begins, seen slots only."""
    text = [
        ['2018-10-01T11:30', '2018-12-31T23:59', '2019-10-01T00:00'],
        ['2020-12-31T01:00', '', ''],
    ]
    stamps = [
        [np.datetime64(t or '1969-12-31T23:59:59', 's').astype(int) for t in row] for row in text
    ]
    times = torch.from_numpy(np.array(stamps))[:, :, None]
    found = ImageSeries.from_batch(
        {'image': torch.zeros(2, 3, 1, 2, 2), 'acquisition_times': times}
    )
    assert found.days is not None
    assert found.days[0, :, 0].tolist() == [274, 365, 365 + 274]
    assert found.days[1, 0, 0] == 366
