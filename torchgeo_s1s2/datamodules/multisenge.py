"""Data module for MultiSenGE and data sets in its layout."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchgeo_s1s2.datamodules.series import SeriesDataModule
from torchgeo_s1s2.datasets.catalog import Catalog
from torchgeo_s1s2.datasets.classes import ClassScheme
from torchgeo_s1s2.datasets.ground import GroundSplits
from torchgeo_s1s2.datasets.multisenge import MultiSenGE, Splits
from torchgeo_s1s2.datasets.sensors import SENSORS
from torchgeo_s1s2.datasets.sources import Source, Wanted
from torchgeo_s1s2.datasets.time_series import DateRule, MonthlySeries, check_kind
from torchgeo_s1s2.errors import NoPatchesError


class MultiSenGEDataModule(SeriesDataModule):
    """Patches of MultiSenGE, or of data in its layout, by tile splits.

    See :class:`~torchgeo_s1s2.datamodules.SeriesDataModule` for what it does with them.
    """

    def __init__(
        self,
        root: str | Path = 'data',
        batch_size: int = 8,
        num_workers: int = 0,
        *,
        series: DateRule | None = None,
        classes: int | ClassScheme = 14,
        sensors: Sequence[str] = tuple(SENSORS),
        bands: Sequence[str] | None = None,
        splits: Splits | GroundSplits | None = None,
        source: Source | list[Source] | None = None,
        dataset_class: type[MultiSenGE] = MultiSenGE,
        unit: str | dict[str, str] | None = None,
        offset: float | dict[Any, float] | None = None,
        nodata: dict[str, float] | None = None,
        file_bands: dict[str, list[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the settings.

        Args:
            root: Folder of the data set.
            batch_size: Number of patches in a batch.
            num_workers: Number of processes that read.
            series: Date rule; the paper's ``MonthlySeries()`` unless given.
            classes: Number of classes, or a class scheme of your own.
            sensors: ``('s2', 's1')`` or one of them.
            bands: Bands to read; all unless given.
            splits: Tiles of each split, in place of the paper's, or a division of the ground:
                :class:`~torchgeo_s1s2.datasets.BlockSplits`,
                :class:`~torchgeo_s1s2.datasets.PolygonSplits`.
            source: What fills the root when a run begins, or several in their order:
                :class:`~torchgeo_s1s2.datasets.Synthetic`,
                :class:`~torchgeo_s1s2.datasets.Download`, :class:`~torchgeo_s1s2.datasets.Copy`.
            dataset_class: MultiSenGE or MultiSenNA.
            unit: What the values of the files are; this and the following as in
                :class:`~torchgeo_s1s2.datasets.MultiSenGE`.
            offset: What to add to the values of Sentinel-2 files.
            nodata: Value without an observation in files that do not say, by sensor.
            file_bands: Bands of files that do not name them, by sensor.
            **kwargs: The other arguments of :class:`~torchgeo_s1s2.datamodules.SeriesDataModule`.

        Raises:
            ValueError: If a number is out of range.
        """
        if unknown := {'download', 'checksum', 'catalog', 'split'} & {*kwargs}:
            raise ValueError(
                f'a data module has no {", ".join(sorted(unknown))}; to download, give source: '
                'Download(checksum=...), and tiles with splits'
            )
        self.root = Path(root).expanduser()
        self.sources = list(source or ()) if isinstance(source, list | tuple | None) else [source]
        for given in self.sources:
            check_kind('source', given, Source, 'Synthetic(), Download(), Copy(...) or a list')
        self._catalog: Catalog | None = None
        super().__init__(
            dataset_class,
            batch_size,
            num_workers,
            series=series or MonthlySeries(),
            classes=classes,
            sensors=sensors,
            bands=bands,
            splits=splits,
            unit=unit,
            offset=offset,
            nodata=nodata,
            file_bands=file_bands,
            **kwargs,
        )

    def prepare_data(self) -> None:
        """Fill the root, and find the catalogue and the statistics.

        Lightning calls this in the first process only, before the ``setup`` of all.
        """
        place = self.root
        for source in self.sources:
            source.fill(place, self._wanted())
            place = source.place(place)
        self._read_catalog()
        super().prepare_data()

    def open_split(self, split: str) -> MultiSenGE:
        """Data set of a split; see :class:`~torchgeo_s1s2.datamodules.SeriesDataModule`."""
        return self._open(self.place, split, self._read_catalog())

    @property
    def place(self) -> Path:
        """Folder that is read: the root, or where the sources have put what is in it."""
        place = self.root
        for source in self.sources:
            place = source.place(place)
        return place

    def _open(self, root: Path, split: str, catalog: Catalog) -> MultiSenGE:
        dataset_class: Any = self.dataset_class
        dataset: MultiSenGE = dataset_class(root=root, split=split, catalog=catalog, **self.kwargs)
        return dataset

    def _read_catalog(self) -> Catalog:
        if self._catalog is None:
            self._catalog = Catalog(self.place)
        return self._catalog

    def _wanted(self) -> Wanted:
        dataset_class: Any = self.dataset_class
        splits: Any = self.kwargs['splits'] or dataset_class.splits
        ground = isinstance(splits, GroundSplits)
        everything = ground or not splits or self.predict_split == 'all'
        tiles = None if everything else sorted({t for tiles in splits.values() for t in tiles})
        series, sensors = self.kwargs['series'], self.kwargs['sensors']
        return Wanted(dataset_class.url, tiles, series, sensors, self._opened)

    def _opened(self, root: Path) -> Iterator[MultiSenGE]:
        """Data sets of the splits that a run reads, and the training if it needs statistics."""
        catalog = Catalog(root)
        needed = ('train',) if self._trains or not self.statistics_path else ()
        for split in dict.fromkeys((*self._splits_of_run(), *needed)):
            with suppress(NoPatchesError):  # setup says so if the split is needed
                yield self._open(root, split, catalog)
