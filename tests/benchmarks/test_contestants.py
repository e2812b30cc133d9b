from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchgeo.models import presto

from benchmarks.contestants import PixelPresto


def test_presto_reads_what_it_was_pretrained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PixelPresto(10, months=[7, 11], place=[48.5, 6.5])
    mean = torch.tensor([0.1] * 10 + [-12.0, -18.0])
    model.mean.copy_(mean)
    model.std.fill_(2.0)
    values = torch.tensor([0.02, 0.04, 0.1, 0.12, 0.2, 0.25, 0.3, 0.31, 0.22, 0.15, -10.0, -20.0])
    seen: dict[str, Any] = {}
    whole = model.encoder.forward

    def spy(x: Tensor, **inputs: Any) -> Any:
        seen.update(inputs, x=x)
        return whole(x, **inputs)

    monkeypatch.setattr(model.encoder, 'forward', spy)
    logits = model(((values - mean) / 2).expand(3, 2, 12))
    assert logits.shape == (3, 10)
    # VV, VH, Sentinel-2 as reflectance, four that are masked, and NDVI from B04 and B08.
    expected = [(-10 + 25) / 25, (-20 + 25) / 25, *values[:10], 0, 0, 0, 0, (0.3 - 0.1) / 0.4]
    torch.testing.assert_close(seen['x'][1, 1], torch.tensor(expected))
    assert seen['mask'][2, 0].tolist() == [0] * 12 + [1] * 4 + [0]
    assert seen['month'].tolist() == [[6, 10]] * 3
    assert seen['latlons'].tolist() == [[48.5, 6.5]] * 3
    assert seen['dynamic_world'].unique().tolist() == [9]


def test_presto_takes_a_file_of_weights(tmp_path: Path) -> None:
    original = presto()
    torch.save(original.state_dict(), tmp_path / 'presto.pth')
    model = PixelPresto(10, [7], [48.5, 6.5], weights=str(tmp_path / 'presto.pth'))
    for name, value in original.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
