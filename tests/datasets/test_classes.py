from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from torchgeo_s1s2.datasets import NO_LABEL, SCHEMES, ClassScheme, LandCoverClass

LABELS = np.arange(17, dtype=np.uint8)


@pytest.mark.parametrize(
    ('classes', 'expected'),
    [
        (6, [255, 0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5, 5, 5, 255, 255]),
        (10, [255, 0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 8, 8, 9, 9, 255, 255]),
        (14, [255, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 255, 255]),
        (15, [255, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]),
    ],
)
def test_remap_follows_the_published_merging(classes: int, expected: list[int]) -> None:
    scheme = SCHEMES[classes]
    assert scheme.remap(LABELS).tolist() == expected
    assert len(scheme) == len(set(scheme.names)) == len(set(scheme.colors)) == classes
    assert scheme.ids == tuple(range(1, classes + 1))
    assert NO_LABEL not in scheme.ids


def test_labels_of_any_number() -> None:
    codes = (-32768, -1, 0, 262, 311, 65535)
    scheme = ClassScheme(tuple(LandCoverClass(str(n), (n % 9, 0, 0), (n,)) for n in codes))
    assert scheme.remap(np.array(codes)).tolist() == [0, 1, 2, 3, 4, 5]
    others = np.array([-(2**40), -32769, -2, 1, 6, 55, 65536, 2**40])
    assert (scheme.remap(others) == 255).all()


def test_own_scheme_merges_and_keeps_its_ids() -> None:
    town, field = ('town', '#9e0020', (1, 2)), ('field', (0, 255, 0), (40,))
    scheme = ClassScheme((LandCoverClass(*town), LandCoverClass(*field)), ids=(10, 20))
    assert scheme.remap(np.array([[1, 2], [40, 3]], np.uint8)).tolist() == [[0, 0], [1, 255]]
    assert scheme.ids == (10, 20)
    assert scheme.colors == ((158, 0, 32), (0, 255, 0))
    assert scheme.cmap(1) == (0, 1, 0, 1)


TOWN, FIELD = LandCoverClass('town', 'red', (1,)), LandCoverClass('field', 'green', (2,))


@pytest.mark.parametrize(
    ('classes', 'ids', 'message'),
    [
        ((TOWN, replace(FIELD, labels=(1,))), (), r'label \[1\] is of more than one class'),
        ((TOWN, replace(FIELD, name='town')), (), r"name \['town'\] is of more than one class"),
        ((TOWN, FIELD), (7, 7), r'id \[7\] is of more than one class'),
        ((TOWN, FIELD), (0, 1), r'the ids \(0, 1\); expected one whole number within 1..254'),
        ((TOWN, FIELD), (1, 255), r'2 classes have the ids \(1, 255\); expected'),
        ((TOWN, FIELD), (1,), r'2 classes have the ids \(1,\); expected .* for each'),
        *(
            (none, (), r'classes are .*; expected a list of at least one LandCoverClass')
            for none in ((), TOWN, {'town': [1]}, 10)
        ),
    ],
)
def test_contradictory_schemes_are_refused(
    classes: Any, ids: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ClassScheme(classes, ids)


@pytest.mark.parametrize('labels', [5, '12', (1.5,), (True,), (65536,), (-32769,), None])
def test_what_are_no_labels_is_refused(labels: Any) -> None:
    message = (
        "class 'town' has the labels .*; expected a list of whole numbers within -32768..65535"
    )
    with pytest.raises(ValueError, match=message):
        LandCoverClass('town', 'red', labels)


def test_numbers_of_numpy_are_numbers() -> None:
    town = LandCoverClass('town', np.array([1, 2, 3]), np.array([4, 5]))  # type: ignore[arg-type]
    assert town == LandCoverClass('town', (1, 2, 3), (4, 5))
    assert hash(town) == hash(LandCoverClass('town', [1, 2, 3], [4, 5]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    'color',
    ['9e0020', 'blurple', 'none', '#ff000080', (0, 0, 256), (0, 0), (0.5, 0.5, 0.5), 5, None],
)
def test_what_is_no_color_is_refused(color: Any) -> None:
    with pytest.raises(ValueError, match=r"'town' has the colour .*; expected red, green and"):
        LandCoverClass('town', color, (1,))
