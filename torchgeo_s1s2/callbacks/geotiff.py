"""Predictions as georeferenced rasters."""

import signal
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from affine import Affine
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rasterio.windows import Window
from torch import Tensor
from torch.utils.data import Subset

from torchgeo_s1s2.callbacks.layers import (
    CONFIDENCE,
    check_replaceable,
    classify,
    map_layers,
    write_layers,
)
from torchgeo_s1s2.datasets.classes import ClassScheme, class_scheme
from torchgeo_s1s2.datasets.rasters import Grid, crs_of
from torchgeo_s1s2.errors import MapError, warn
from torchgeo_s1s2.files import Workplace


@dataclass(frozen=True)
class PredictedWindow:
    """Class probabilities of one window and where it lies.

    Attributes:
        probabilities: (K, H, W), 0..1; not finite where unknown.
        grid: Its pixels, in a CRS that has an EPSG code.
        observations: Number of valid observations (H, W), None if not known.
        index: Number of the patch in the data set, None if it is not a patch.
    """

    probabilities: Tensor
    grid: Grid
    observations: Tensor | None = None
    index: int | None = None


def predicted_windows(outputs: Any, batch: Any) -> Iterator[PredictedWindow]:
    """Windows of a batch.

    Args:
        outputs: What ``predict_step`` returned: a mapping with ``probabilities`` (B, K, H, W), or
            that tensor alone; (B, 1, H, W) of a binary task are those of the second class.
            ``transform`` (B, 9), ``crs`` (B,) and, if there, ``index`` (B,) and ``valid_count``
            (B, H, W) or ``valid`` (B, ...) come from it or else from the batch.
        batch: What the data loader gave.

    Yields:
        One window after the other.

    Raises:
        MapError: If the probabilities or the georeference are missing or of another form.
    """
    known = {k: v for k, v in batch.items() if v is not None} if isinstance(batch, Mapping) else {}
    if isinstance(outputs, Tensor):
        outputs = {'probabilities': outputs}
    if isinstance(outputs, Mapping):
        known |= {k: v for k, v in outputs.items() if v is not None}
    _check(known)
    for i, probabilities in enumerate(known['probabilities']):
        if len(probabilities) == 1:
            probabilities = torch.cat([1 - probabilities, probabilities])
        epsg = int(known['crs'][i])
        if epsg <= 0:
            raise MapError('predictions have no EPSG code; give the data set a CRS that has one')
        own, observations = _own_pixels(known, i), _observations(known, i)
        pixels = probabilities.detach()[:, *own]
        transform = Affine(*known['transform'][i].flatten().tolist()[:6])
        yield PredictedWindow(
            pixels,
            Grid(crs_of(epsg), transform, pixels.shape[2], pixels.shape[1]),
            None if observations is None else observations[own],
            int(known['index'][i]) if 'index' in known else None,
        )


def _check(known: Mapping[str, Any]) -> None:
    missing = [k for k in ('probabilities', 'transform', 'crs') if k not in known]
    if missing:
        raise MapError(
            f'a map cannot be made without {", ".join(missing)}: predict_step must return a dict '
            "with 'probabilities' (B, K, H, W), and it or the batch must hold 'transform' (B, 9) "
            "and 'crs' (B,), an EPSG code"
        )
    shape = tuple(known['probabilities'].shape)
    if len(shape) != 4:
        raise MapError(f'probabilities have the shape {shape}, expected (B, K, H, W)')
    if known['transform'].dtype not in (torch.float32, torch.float64):
        raise MapError(
            f'transform is {known["transform"].dtype}, too coarse to place a map; predict with '
            'precision 32 or a mixed precision'
        )
    values = known['probabilities'].nan_to_num(0.5, 0.5, 0.5)
    if values.min() < -0.01 or values.max() > 1.01:
        raise MapError(
            f'predictions lie in {values.min():.4g}..{values.max():.4g}, probabilities in 0..1; '
            'apply softmax in predict_step'
        )


def _own_pixels(known: Mapping[str, Tensor], i: int) -> tuple[slice, slice]:
    """Rows and columns of a sample, which may be filled up to the size of its batch."""
    if 'bounds' not in known:
        return slice(None), slice(None)
    xmin, xmax, xres, ymin, ymax, yres = known['bounds'][i][:6].tolist()
    return slice(round((ymax - ymin) / yres)), slice(round((xmax - xmin) / xres))


def _observations(known: Mapping[str, Tensor], i: int) -> Tensor | None:
    if 'valid_count' in known:
        return known['valid_count'][i]
    if 'valid' in known:
        return known['valid'][i].sum().expand(known['probabilities'].shape[-2:])
    return None


class MapWriter(BasePredictionWriter):
    """What writers of maps share: the folder, the classes and the walk through a batch.

    Predictions are not kept in memory, so ``Trainer.predict`` returns None.
    """

    def __init__(
        self, output_dir: str | Path | None = None, classes: int | ClassScheme | None = None
    ) -> None:
        """Keep the settings.

        Args:
            output_dir: Folder of the maps, ``maps`` in the trainer's root folder unless given.
            classes: Class scheme, or number of classes; that of the data set unless given.
        """
        super().__init__(write_interval='batch')
        self.output_dir = Path(output_dir).expanduser() if output_dir is not None else None
        self._folder = self.output_dir or Path()
        self.classes = class_scheme(classes) if classes is not None else None
        self._workplace: Workplace | None = None
        self._unfinished: Path | None = None
        self._unknown = 0

    @abstractmethod
    def write(self, window: PredictedWindow, scheme: ClassScheme, dataset: Any) -> None:
        """Write one window.

        Args:
            window: The prediction.
            scheme: The classes.
            dataset: The data set that was predicted, asked for names of patches.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder, and in it a hidden one of this run.

        Raises:
            MapError: If they cannot be made, or the task is multilabel.
        """
        super().setup(trainer, pl_module, stage)
        if stage == 'predict':
            if getattr(pl_module, 'hparams', {}).get('task') == 'multilabel':
                raise MapError('a map holds one class a pixel, and the task is multilabel')
            self._folder = self.output_dir or Path(trainer.default_root_dir) / 'maps'
            if trainer.is_global_zero:
                self._workplace = self._open()
            path = self._workplace.path if self._workplace else None
            self._unfinished = trainer.strategy.broadcast(path)
            self._unknown = 0

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave what can be continued, and nothing else."""
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hidden folder of the run."""
        super().teardown(trainer, pl_module, stage)
        self._leave()

    def _open(self) -> Workplace:
        folder = self._folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            left, living = Workplace.found(folder)
            if living:
                warn(
                    f'{living} other runs are at work in {folder}; their unfinished files are '
                    'left alone, but of maps of the same name the last one stays'
                )
            return self._choose(left)
        except OSError as error:
            raise MapError(
                f'no map can be written to {folder}: {error}. Give output_dir a folder that can '
                'be written to'
            ) from error

    def _choose(self, left: list[Workplace]) -> Workplace:
        """One of those that interrupted runs left, or a new one."""
        for workplace in left:
            workplace.leave()
        return Workplace.new(self._folder)

    def _leave(self) -> None:
        if self._workplace:
            self._workplace.leave()
            self._workplace = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the classes are known, before anything is predicted."""
        self._scheme_of(trainer)
        trainer.predict_loop.return_predictions = False

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the windows of a batch.

        Raises:
            MapError: If the predictions are not class probabilities with a georeference.
        """
        dataset = predict_datasets(trainer)[dataloader_idx]
        scheme = self._scheme(dataset)
        for window in predicted_windows(prediction, batch):
            if len(window.probabilities) != len(scheme):
                raise MapError(
                    f'the model predicts {len(window.probabilities)} classes, the maps shall have '
                    f'{len(scheme)}; give model and data the same number'
                )
            self._unknown += _is_unknown(window)
            self.write(window, scheme, dataset)
        if trainer.received_sigterm:  # as Lightning's other loops do
            raise SIGTERMException(128 + signal.SIGTERM)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many predictions are not finite."""
        if self._unknown:
            warn(
                f'{self._unknown} predictions are not finite where there are observations; their '
                'pixels have no class in the map'
            )

    def _warn_of_older(self, paths: Iterable[Path]) -> None:
        """Say which files beside new maps are not of this run."""
        names = sorted(path.name for path in paths)
        if names:
            warn(
                f'{len(names)} files in {self._folder} are of an earlier run and do not belong '
                f'to the maps of this one: {", ".join(names[:5])}. Delete them, or give another '
                'output_dir'
            )

    def _scheme_of(self, trainer: Trainer) -> ClassScheme:
        return self._scheme(predict_datasets(trainer)[0])

    def _scheme(self, dataset: Any) -> ClassScheme:
        scheme = self.classes or getattr(dataset, 'classes', None)
        if not isinstance(scheme, ClassScheme):
            raise MapError(
                f'{type(dataset).__name__} has no class scheme; give {type(self).__name__} the '
                'argument classes'
            )
        return scheme


def _is_unknown(window: PredictedWindow) -> bool:
    lost = ~window.probabilities.isfinite().all(0)
    if window.observations is not None:
        lost &= window.observations.to(lost.device) > 0
    return bool(lost.any())


def predict_datasets(trainer: Trainer) -> list[Any]:
    """Data sets behind the loaders, whose numbers the batches hold."""
    datasets = []
    for loader in CombinedLoader(trainer.predict_dataloaders).flattened:
        dataset = getattr(loader, 'dataset', None)
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        datasets.append(dataset)
    return datasets


class GeoTIFFWriter(MapWriter):
    """Writes each predicted patch as a GeoTIFF in its own CRS.

    A map ``NAME.tif`` holds class numbers as the class scheme gives them, 0 without an
    observation, with colour table, class names in the band's tags ``CLASS_1``, ``CLASS_2``, ...
    and in the sidecar ``NAME.tif.aux.xml``. ``NAME_confidence.tif`` holds the probability of that
    class in percent, 255 without an observation. Both are Cloud-Optimized GeoTIFFs. NAME is the
    patch's name, or EPSG code and upper left corner. A map of an earlier run is replaced; a map
    is there whole, with its sidecar and its confidence, or not at all.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        confidence: bool = False,
        classes: int | ClassScheme | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            output_dir: Folder of the maps, ``maps`` in the trainer's root folder unless given.
            confidence: Write the confidence too.
            classes: Class scheme, or number of classes; that of the data set unless given.
        """
        super().__init__(output_dir, classes)
        self.confidence = confidence
        self._written: set[str] = set()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the maps of an earlier run."""
        super().on_predict_start(trainer, pl_module)
        self._written.clear()

    def write(self, window: PredictedWindow, scheme: ClassScheme, dataset: Any) -> None:
        """Write the map of one patch; see :meth:`MapWriter.write`.

        Raises:
            MapError: If this run has written a map of that name.
        """
        grid, corner = window.grid, window.grid.transform
        name = f'{grid.epsg}_{corner.c:.12g}_{corner.f:.12g}'
        if window.index is not None and hasattr(dataset, 'name'):
            name = dataset.name(window.index)
        if name in self._written:
            raise MapError(
                f'two predictions are called {name}; predict each place once, or use SceneWriter '
                'for windows of a scene'
            )
        if not name or name != Path(name).name:
            raise MapError(f'a patch is called {name!r}, which is no file name; rename it')
        values = classify(window.probabilities, window.observations, scheme.ids)
        count = 2 if self.confidence else 1
        layers = map_layers(scheme)[:count]
        check_replaceable(layer.path(self._folder, name) for layer in layers)
        pixels = [(Window(0, 0, grid.width, grid.height), values[:count])]
        write_layers(self._folder, name, layers, grid, pixels, self._unfinished)
        self._written.add(name)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many maps there are, and where."""
        super().on_predict_end(trainer, pl_module)
        if not self.confidence:
            beside = (CONFIDENCE.path(self._folder, n) for n in self._written)
            self._warn_of_older(filter(Path.exists, beside))
        count = torch.tensor(len(self._written), device=pl_module.device)
        total = int(trainer.strategy.reduce(count, reduce_op='sum'))
        if trainer.is_global_zero:
            print(f'maps written to {self._folder}: {total:,}')
