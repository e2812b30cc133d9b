import torch
from conftest import learnt

from benchmarks.plain import PlainInception
from torchgeo_s1s2.models import Inception


def test_equals_the_plain_module() -> None:
    plain, layer = PlainInception(5), Inception(5)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 7, 9)
    torch.testing.assert_close(learnt(layer, x), learnt(plain, x.movedim(1, -1)))
