"""Land-cover class schemes: names, colours and the merging of the labels on disk.

Source: Wenger et al., Remote Sensing 2023, 15(1), 151, https://doi.org/10.3390/rs15010151.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap, is_color_like, to_rgba

NO_LABEL = 255
"""Mask value of a pixel without a label."""

Color = tuple[int, int, int]


@dataclass(frozen=True)
class LandCoverClass:
    """One class of a scheme.

    Attributes:
        name: Name shown in legends and written into maps.
        color: Red, green and blue, each 0..255; may be given as Matplotlib spells it, such as
            ``'#1e64d2'``.
        labels: Values of the label raster that belong to the class, each -32768..65535.

    Raises:
        ValueError: If the colour is none or is transparent, or a label is no such number.
    """

    name: str
    color: Color | str
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the colour and the labels."""
        color = _whole_numbers(_rgb(self.color), 0, 255)
        labels = _whole_numbers(self.labels, -(2**15), 2**16 - 1)
        if color is None or len(color) != 3:
            raise ValueError(
                f'class {self.name!r} has the colour {self.color!r}; expected red, green and blue, '
                "each 0..255, or a string such as '#1e64d2'"
            )
        if labels is None:
            raise ValueError(
                f'class {self.name!r} has the labels {self.labels!r}; expected a list of whole '
                f'numbers within {-(2**15)}..{2**16 - 1}, such as [1, 2]'
            )
        object.__setattr__(self, 'color', color)
        object.__setattr__(self, 'labels', labels)


@dataclass(frozen=True)
class ClassScheme:
    """Classes in their order: index 0..K-1 in a mask, number 1..K in a map.

    Labels that no class claims count as unlabelled. A configuration of LightningCLI can spell a
    scheme out, for data of your own or another merging::

        classes:
          class_path: torchgeo_s1s2.datasets.ClassScheme
          init_args:
            ids: [10, 20]
            classes:
              - {name: Built-up, color: "#9e0020", labels: [1, 2, 3, 4, 5]}
              - {name: Forest, color: [20, 110, 45], labels: [11]}

    Attributes:
        classes: The K classes.
        ids: Number of each class in a map, each 1..254; ``index + 1`` unless given.

    Raises:
        ValueError: If the scheme is empty, a label, an id or a name is claimed twice, or an id is
            out of range.
    """

    classes: tuple[LandCoverClass, ...]
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Number the classes and check that nothing is claimed twice."""
        classes = tuple(self.classes) if isinstance(self.classes, Iterable) else ()
        if not classes or not all(isinstance(c, LandCoverClass) for c in classes):
            raise ValueError(
                f'classes are {self.classes!r}; expected a list of at least one '
                "LandCoverClass('Forest', 'forestgreen', [10, 11])"
            )
        ids = _whole_numbers(self.ids, 1, NO_LABEL - 1)
        if ids is None or len(ids) not in (0, len(classes)):
            raise ValueError(
                f'{len(classes)} classes have the ids {self.ids!r}; expected one whole number '
                f'within 1..{NO_LABEL - 1} for each'
            )
        object.__setattr__(self, 'classes', classes)
        object.__setattr__(self, 'ids', ids or tuple(range(1, len(classes) + 1)))
        labels = [label for c in classes for label in c.labels]
        claimed: dict[str, Sequence[Any]] = {'id': self.ids, 'label': labels, 'name': self.names}
        for what, values in claimed.items():
            if twice := sorted({v for v in values if values.count(v) > 1}):
                raise ValueError(f'{what} {twice} is of more than one class; keep each in one')

    def __len__(self) -> int:
        """Number of classes K."""
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in order."""
        return tuple(c.name for c in self.classes)

    @property
    def colors(self) -> tuple[Color, ...]:
        """Class colours in order."""
        return tuple(c.color for c in self.classes)  # type: ignore[misc]

    @property
    def cmap(self) -> ListedColormap:
        """Matplotlib colour map whose entry i is the colour of class i."""
        return ListedColormap(np.array(self.colors) / 255)

    def remap(self, labels: np.ndarray) -> np.ndarray:
        """Turn labels as they are on disk into class indices.

        Args:
            labels: Whole numbers of any shape, NaN for none.

        Returns:
            int64 array of the same shape with values 0..K-1, and 255 where there is no class.
        """
        claimed = {label: index for index, c in enumerate(self.classes) for label in c.labels}
        low, high = min(claimed, default=0) - 1, max(claimed, default=0) + 1
        table = np.full(high - low + 1, NO_LABEL)
        for label, index in claimed.items():
            table[label - low] = index
        known = np.where(np.isnan(labels), low, labels).astype(np.int64)
        return table.take(known - low, mode='clip')


def _rgb(color: Any) -> Any:
    """Red, green and blue, each 0..255, of an opaque colour of Matplotlib; others as they are."""
    if isinstance(color, str) and is_color_like(color):
        *rgb, alpha = to_rgba(color)
        return [round(255 * v) for v in rgb] if alpha == 1 else color
    return color


def _whole_numbers(values: Any, least: int, most: int) -> tuple[int, ...] | None:
    """Values, None if they are no list of whole numbers within a range."""
    if not isinstance(values, Iterable):
        return None
    listed = [*values]
    whole = all(isinstance(v, Integral) and not isinstance(v, bool) for v in listed)
    return tuple(map(int, listed)) if whole and all(least <= v <= most for v in listed) else None


_CLASSES_15 = (
    LandCoverClass('Dense Built-Up', (158, 0, 32), (1,)),
    LandCoverClass('Sparse Built-Up', (226, 88, 88), (2,)),
    LandCoverClass('Specialized Built-Up Areas', (178, 90, 196), (3,)),
    LandCoverClass('Specialized but Vegetative Areas', (240, 160, 220), (4,)),
    LandCoverClass('Large Scale Networks', (90, 90, 90), (5,)),
    LandCoverClass('Arable Lands', (255, 236, 150), (6,)),
    LandCoverClass('Vineyards', (232, 150, 30), (7,)),
    LandCoverClass('Orchards', (240, 196, 70), (8,)),
    LandCoverClass('Grasslands', (176, 218, 90), (9,)),
    LandCoverClass('Groves and Hedges', (110, 190, 110), (10,)),
    LandCoverClass('Forests', (20, 110, 45), (11,)),
    LandCoverClass('Open Spaces, Mineral', (200, 190, 175), (12,)),
    LandCoverClass('Wetlands', (150, 180, 220), (13,)),
    LandCoverClass('Water Surfaces', (30, 100, 210), (14,)),
    LandCoverClass('Beaches, Sand', (250, 240, 200), (15,)),
)


def _merge(name: str, *labels: int, color: int | None = None) -> LandCoverClass:
    """Merge original classes; the colour is that of ``color`` or of the first label."""
    shown = _CLASSES_15[(color or labels[0]) - 1]
    return LandCoverClass(name, shown.color, labels)


SCHEMES: dict[int, ClassScheme] = {
    6: ClassScheme((*_CLASSES_15[:5], _merge('Other', *range(6, 15), color=9))),
    10: ClassScheme(
        (
            *_CLASSES_15[:6],
            _merge('Vineyards and Orchards', 7, 8),
            _CLASSES_15[8],
            _merge('Forests and Semi-Natural Areas', 10, 11, 12, color=11),
            _merge('Water Surfaces and Wetlands', 13, 14, color=14),
        )
    ),
    14: ClassScheme(_CLASSES_15[:14]),
    15: ClassScheme(_CLASSES_15),
}


def class_scheme(
    classes: int | ClassScheme, schemes: Sequence[int] = (6, 10, 14, 15)
) -> ClassScheme:
    """Return a scheme by its number of classes.

    Args:
        classes: Number of classes, or a scheme of your own.
        schemes: Numbers that are allowed here.

    Raises:
        ValueError: If there is no such scheme.
    """
    if isinstance(classes, ClassScheme):
        return classes
    if classes not in schemes:
        raise ValueError(
            f'no scheme of {classes!r} classes; choose one of {tuple(schemes)} '
            'or give a ClassScheme'
        )
    return SCHEMES[classes]
