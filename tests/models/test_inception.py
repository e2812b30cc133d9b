import torch

from benchmarks.plain import PlainInception
from torchgeo_s1s2.models import Inception


def test_equals_the_plain_module() -> None:
    plain = PlainInception(5)
    layer = Inception(5)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 7, 9)
    torch.testing.assert_close(layer(x), plain(x.movedim(1, -1)))


def test_values_by_hand() -> None:
    """With all weights 1, each tower sums its window, and the last is the maximum around."""
    layer = Inception(1, tower_channels=1)
    for name, parameter in layer.named_parameters():
        torch.nn.init.constant_(parameter, float(name.endswith('weight')))
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 3
    image[0, 0, 0, 0] = -1
    small, large, largest = layer(image)[0].detach()
    # The first relu takes the -1 away, and borders are padded with zeros.
    assert small.tolist() == [[0, 0, 0, 0, 0], *[[0, 3, 3, 3, 0]] * 3, [0, 0, 0, 0, 0]]
    assert large.eq(3).all()
    assert largest.tolist() == [[0, 0, 0, 0, 0], *[[0, 3, 3, 3, 0]] * 3, [0, 0, 0, 0, 0]]


def test_number_of_output_channels() -> None:
    layer = Inception(3, tower_channels=4)
    assert layer(torch.zeros(1, 3, 4, 4)).shape == (1, layer.out_channels, 4, 4)
