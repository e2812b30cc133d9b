"""Statistics of the training patches: of each channel, and how often each label occurs."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from torchgeo_s1s2.datamodules.plausible import Floor, check_values
from torchgeo_s1s2.datasets.catalog import GROUND_REFERENCE
from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.datasets.series import SeriesDataset
from torchgeo_s1s2.errors import DataError, ImplausibleValuesError, warn
from torchgeo_s1s2.files import stamps, write_json

WINDOW = 512
"""Height and width of the windows that patches are read in."""
_GLANCE = 128
Window = tuple[int, int, int, int, int]
"""Row of a data set, first row and column of pixels, height and width."""
_OF_IMAGES = 'bands', 'mean', 'std', 'made_of', 'replaced'
_MALFORMED = ValueError, KeyError, TypeError, AttributeError


@dataclass(frozen=True)
class Statistics:
    """Statistics of a data set over the slots that its date rule chooses.

    Attributes:
        bands: Names of the C channels.
        mean: Mean of each channel over all pixels with a value, in the units of the samples.
        std: Standard deviation of each channel over the same pixels.
        pixels: Number of pixels of each class 0..K-1.
        labels: Values of the label rasters, and the number of pixels of each.
    """

    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: tuple[int, ...]
    labels: tuple[tuple[int, int], ...] = ()

    @classmethod
    def compute(cls, dataset: SeriesDataset, num_workers: int = 0) -> Self:
        """Read every patch of a data set once, window by window.

        Args:
            dataset: The training patches.
            num_workers: Number of processes that read.

        Raises:
            DataError: If a band has no value at all.
            ImplausibleValuesError: If values are not in the units they are taken for.
        """
        content = _training_statistics(dataset, num_workers)
        content['labels'] = count_labels(dataset, num_workers)
        return cls._of(content, dataset.classes)

    @classmethod
    def _of(cls, content: Mapping[str, Any], classes: ClassScheme | None = None) -> Self:
        """Check what a file holds, and count labels by classes."""
        labels = tuple((int(value), int(n)) for value, n in content.get('labels', ()))
        pixels = content.get('pixels', ())
        if classes is not None and labels:
            counts = dict(labels)
            pixels = [sum(counts.get(v, 0) for v in c.labels) for c in classes.classes]
        elif classes is not None and len(pixels) != len(classes):
            pixels = ()  # of other classes
        mean, std = (tuple(map(float, content[key])) for key in ('mean', 'std'))
        bands = tuple(map(str, content['bands']))
        if not len(bands) == len(mean) == len(std):
            raise DataError('bands, mean and std differ in length')
        if not np.isfinite([*mean, *std]).all() or min(std) <= 0:
            raise DataError('a mean is not finite, or a standard deviation not finite and above 0')
        return cls(bands, mean, std, tuple(map(int, pixels)), labels)

    @classmethod
    def beside(
        cls, dataset: SeriesDataset, num_workers: int = 0, given: Self | None = None
    ) -> Self:
        """Statistics kept beside the data, computed where there are none of these files yet.

        Those of the images follow the images that the date rule chooses, their sizes and times of
        change, and how they are read; of a patch with an image that cannot be read, all images. The
        number of pixels of each label follows the label rasters. Another class scheme reads no file
        again. Those of samples that transforms of the data set have changed are not kept.

        Args:
            dataset: The training patches.
            num_workers: Number of processes that read.
            given: Mean and standard deviation to take in place of those of the images.
        """
        path = statistics_path(dataset)
        kept, files = _kept(path), [dataset.files_of(i) for i in range(len(dataset))]
        content = {key: kept[key] for key in _OF_IMAGES if key in kept}
        if given is None:
            made_of = _digest(p for row in files for s in dataset.sensors for p in row[s])
            known = kept.get('replaced', [])
            stale = kept.get('made_of') != made_of or known != _all_images(dataset, dict(known))
            if stale or dataset.transforms:
                content |= _training_statistics(dataset, num_workers) | {'made_of': made_of}
                content['replaced'] = _all_images(dataset, content['replaced'])
        labelled_by = _digest(p for row in files for p in row[GROUND_REFERENCE])
        content['labelled_by'] = labelled_by
        if kept.get('labelled_by') == labelled_by and 'labels' in kept:
            content['labels'] = kept['labels']
        else:
            content['labels'] = count_labels(dataset, num_workers)
        if content != kept and not dataset.transforms:
            try:
                write_json(path, content, indent=1)
            except OSError as error:
                warn(f'{path} cannot be written ({error}); it is computed anew')
        if given is not None:
            content |= {'bands': given.bands, 'mean': given.mean, 'std': given.std}
        return cls._of(content, dataset.classes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that ``save`` wrote, or that is kept beside the data.

        Args:
            path: The file.

        Raises:
            DataError: If the file is malformed.
        """
        try:
            return cls._of(json.loads(Path(path).read_text()))
        except _MALFORMED as error:
            raise DataError(
                f'{path} is not a file of statistics ({error!r}); delete it and it is computed anew'
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, vars(self), indent=1)

    @property
    def class_weights(self) -> Tensor:
        """Inverse pixel frequencies scaled to a sum of 1000, 0 for a class without a pixel.

        The scale is that of Wenger et al. 2023, https://doi.org/10.3390/rs15010151.

        Raises:
            DataError: If no pixel has a label.
        """
        pixels = torch.tensor(self.pixels, dtype=torch.float64)
        if not pixels.any():
            raise DataError(
                'no training pixel has a label, as far as the statistics tell, so there are no '
                'class weights; give class_weights, or check ground_reference and the class scheme'
            )
        inverse = torch.where(pixels > 0, 1 / pixels, 0.0)
        return (1000 * inverse / inverse.sum()).float()


def statistics_path(dataset: SeriesDataset) -> Path:
    """Where the statistics of a data set with its settings are kept."""
    index = dataset.index
    rows = [
        index['name'].tolist(),
        index.geometry.to_wkb().tolist(),
        index.index.astype(str).tolist(),
    ]
    settings = [dataset.series, dataset.readings, rows]
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
    return dataset.root / f'statistics_{key}.json'


class _Windows(Dataset[Any]):
    """Images or labels of windows of a data set, those of all of its rows unless given."""

    def __init__(
        self, dataset: SeriesDataset, windows: Sequence[Window] = (), labels: bool = False
    ) -> None:
        self.dataset, self.labels = dataset, labels
        self.windows = windows or [
            (index, top, left, min(WINDOW, height - top), min(WINDOW, width - left))
            for index in range(len(dataset))
            for height, width in [dataset.shape(index)]
            for top in range(0, height, WINDOW)
            for left in range(0, width, WINDOW)
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> Any:
        window = self.windows[number]
        if self.labels:
            return self.dataset.labels(*window)
        sample = self.dataset.crop(*window)
        return sample | {'replaced': [window[0]] if self.dataset.replaced(window[0]) else []}

    def read(self, title: str, num_workers: int) -> Iterable[Any]:
        """All of them, with a progress bar if they are many."""
        loader = DataLoader(self, batch_size=None, num_workers=num_workers)
        bar: Iterable[Any] = tqdm(loader, title, disable=len(self) < 100, unit='window')
        return bar


def warn_of_other_units(dataset: SeriesDataset) -> None:
    """Look at a window in the middle, where a checkpoint brings the statistics."""
    row = len(dataset) // 2
    height, width = dataset.shape(row)
    top, left = max(height - _GLANCE, 0) // 2, max(width - _GLANCE, 0) // 2
    window = row, top, left, min(height, _GLANCE), min(width, _GLANCE)
    try:
        _image_statistics(_Windows(dataset, [window]), num_workers=0)
    except ImplausibleValuesError as error:
        warn(f'{dataset.title}: {error}')
    except DataError:  # no value there
        return


def _training_statistics(dataset: SeriesDataset, num_workers: int) -> dict[str, Any]:
    """Those of all windows; bands that tell nothing are told."""
    content = _image_statistics(_Windows(dataset), num_workers)
    if uniform := content.pop('uniform'):
        warn(
            f'bands that hold one value in all of the training patches of {dataset.title}: '
            f'{", ".join(uniform)}. They tell nothing; leave them out with bands, or say with '
            'nodata that it is none'
        )
    return content


def _image_statistics(windows: _Windows, num_workers: int) -> dict[str, Any]:
    """Bands, mean and standard deviation; checked against what the sensors can measure.

    ``uniform`` are the bands of one value, ``replaced`` the rows that were read around an image
    that cannot be read.
    """
    dataset = windows.dataset
    bands = [band for names in dataset.bands.values() for band in names]
    sizes = [len(names) for names in dataset.bands.values()]
    count, total, squares = torch.zeros(3, len(bands), dtype=torch.float64)
    lowest = torch.full((len(bands),), torch.inf)
    highest, floors, replaced = -lowest, list[Floor](), set[int]()
    alike = Counter[float]()
    for sample in windows.read('Computing statistics', num_workers):
        image = sample['image']
        if image.shape[1] != len(bands):
            raise DataError(
                f'samples of {dataset.title} have {image.shape[1]} channels after transforms, and '
                f'the {len(bands)} bands {bands}; give transforms that keep them'
            )
        replaced.update(sample['replaced'])
        values = image.transpose(0, 1).flatten(1).double()
        count += values.isfinite().sum(1)
        total += values.nansum(1)
        squares += values.square().nansum(1)
        low = image.nan_to_num(torch.inf).amin((2, 3))
        high = image.nan_to_num(-torch.inf).amax((2, 3))
        lowest, highest = lowest.minimum(low.amin(0)), highest.maximum(high.amax(0))
        floors += _floors(dataset, sample['acquisition_times'], low, high)
        alike.update(_alike(dataset, sample['acquisition_times'], image))
    unseen = [band for band, n in zip(bands, count, strict=True) if not n]
    if unseen:
        raise DataError(
            f'bands {unseen} have no value in the {len(dataset)} training patches of '
            f'{dataset.title}; leave them out with bands or sensors'
        )
    mean = total / count
    uniform = lowest == highest
    std = (squares / count - mean**2).clamp(min=1e-12).sqrt()
    std[uniform] = 1  # or any other value elsewhere would be enormous
    parts = zip(*(x.split(sizes) for x in (mean, lowest, highest)), strict=True)
    means, span = {}, {}
    for sensor, (average, low, high) in zip(dataset.sensors, parts, strict=True):
        means[sensor] = average.tolist()
        span[sensor] = float(low.min()), float(high.max())
    shares = {value: n / int(count[0]) for value, n in alike.items()}
    check_values(dataset.readings, means, span, floors, shares)
    return {
        'bands': bands,
        'mean': mean.tolist(),
        'std': std.tolist(),
        'uniform': [band for band, same in zip(bands, uniform, strict=True) if same],
        'replaced': sorted(replaced),
    }


def _floors(dataset: SeriesDataset, times: Tensor, low: Tensor, high: Tensor) -> Iterator[Floor]:
    """Of each Sentinel-2 image that is not uniform."""
    if 's2' in dataset.sensors:
        column, channels = dataset.sensors.index('s2'), len(dataset.bands['s2'])
        lowest, highest = low[:, :channels].amin(1), high[:, :channels].amax(1)
        seen = (times[:, column] >= 0) & (highest - lowest > 0.05)
        yield from map(Floor, times[seen, column].tolist(), lowest[seen].tolist())


def _alike(dataset: SeriesDataset, times: Tensor, image: Tensor) -> dict[float, int]:
    """Values of files that no ground has in all bands of Sentinel-2, with their pixels."""
    if len(dataset.bands.get('s2', ())) < 2:
        return {}
    reading, series = dataset.readings['s2'], image[:, : len(dataset.bands['s2'])]
    low = series.amin(1)
    odd = (low == series.amax(1)) & ((low <= 0) | (low > 2))
    found = Counter[float]()
    for t in odd.flatten(1).any(1).nonzero().flatten().tolist():
        time = np.datetime64(int(times[t, dataset.sensors.index('s2')]), 's')
        values, pixels = low[t][odd[t]].unique(return_counts=True)
        for value, n in zip(values.tolist(), pixels.tolist(), strict=True):
            found[reading.stored_value(value, time)] += n
    return found


def count_labels(dataset: SeriesDataset, num_workers: int = 0) -> list[list[int]]:
    """Values of the label rasters and the number of pixels of each, no data left out.

    Args:
        dataset: The training patches.
        num_workers: Number of processes that read.
    """
    counts = Counter[int]()
    windows = _Windows(dataset, labels=True)
    for labels in windows.read('Counting labels', num_workers):
        values, pixels = labels[~labels.isnan()].long().unique(return_counts=True)
        counts.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
    return [list(item) for item in sorted(counts.items())]


def _kept(path: Path) -> dict[str, Any]:
    """What a file holds, nothing if it is missing or damaged."""
    with suppress(OSError, *_MALFORMED):
        content: dict[str, Any] = json.loads(path.read_text())
        if content.keys() & {*_OF_IMAGES}:
            Statistics._of(content)
        return content
    return {}


def _all_images(dataset: SeriesDataset, rows: Iterable[int]) -> list[list[Any]]:
    """Rows, each with a digest of all of its images, chosen or not."""
    files = ((row, dataset.files_of(row, every=True)) for row in rows)
    return [[row, _digest(p for s in dataset.sensors for p in own[s])] for row, own in files]


def _digest(paths: Iterable[Path]) -> str:
    """Of the names, sizes and times of modification and change of files."""
    digest = hashlib.sha256()
    for path, stamp in stamps(paths):
        digest.update(f'{path.name} {stamp}\n'.encode())
    return digest.hexdigest()
