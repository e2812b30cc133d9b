"""Data module for PASTIS-R."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchgeo_s1s2.datamodules.series import SeriesDataModule
from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.datasets.pastis import FOLDS, PASTISSeries
from torchgeo_s1s2.datasets.sensors import PASTIS_SENSORS
from torchgeo_s1s2.datasets.time_series import AllDates, DateRule


class PASTISSeriesDataModule(SeriesDataModule):
    """Patches of PASTIS-R by its official folds.

    See :class:`~torchgeo_s1s2.datamodules.SeriesDataModule` for what it does with them. TorchGeo's
    ``PASTISDataModule`` splits at random, divides Sentinel-2 by 255, and fails with kornia 0.9.
    """

    def __init__(
        self,
        root: str | Path = 'data',
        fold: int = 1,
        batch_size: int = 4,
        num_workers: int = 0,
        *,
        series: DateRule | None = None,
        classes: ClassScheme | None = None,
        sensors: Sequence[str] = tuple(PASTIS_SENSORS),
        bands: Sequence[str] | None = None,
        predict_split: str = 'test',
        unit: str | dict[str, str] | None = None,
        nodata: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the settings.

        Args:
            root: Folder of the data set, or the one above it.
            fold: Which of the five official rotations, 1..5: the first trains on the folds 1 to 3,
                validates on 4 and tests on 5, and each of the others goes on by one.
            batch_size: Number of patches in a batch.
            num_workers: Number of processes that read.
            series: Date rule; ``AllDates(max_length=61)`` unless given.
            classes: Class scheme; that of PASTIS without the void class unless given.
            sensors: Some of ``('s2', 's1a', 's1d')``.
            bands: Bands to read; all unless given.
            predict_split: Split that ``torchgeo predict`` maps, or ``'all'``.
            unit: What the values of the files are; see
                :class:`~torchgeo_s1s2.datasets.PASTISSeries`.
            nodata: Value without an observation, by sensor.
            **kwargs: The other arguments of :class:`~torchgeo_s1s2.datamodules.SeriesDataModule`.

        Raises:
            ValueError: If a number is out of range.
        """
        if fold not in FOLDS:
            raise ValueError(f'fold is {fold}; expected one of {FOLDS}')
        self.fold, first = int(fold), FOLDS.index(fold)
        turned = FOLDS[first:] + FOLDS[:first]
        self.folds: Mapping[str, Sequence[int]] = {
            'train': turned[:3],
            'val': turned[3:4],
            'test': turned[4:],
            'all': FOLDS,
        }
        if predict_split not in self.folds:
            raise ValueError(f'no split {predict_split!r}; choose one of {", ".join(self.folds)}')
        super().__init__(
            PASTISSeries,
            batch_size,
            num_workers,
            predict_split=predict_split,
            root=Path(root).expanduser(),
            series=series or AllDates(max_length=61),
            classes=classes,
            sensors=sensors,
            bands=bands,
            unit=unit,
            nodata=nodata,
            **kwargs,
        )

    def open_split(self, split: str) -> PASTISSeries:
        """Data set of a split; see :class:`~torchgeo_s1s2.datamodules.SeriesDataModule`."""
        return PASTISSeries(folds=self.folds[split], **self.kwargs)
