"""Fits and tests one contestant with TorchGeo's command, in a process of its own."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, cat
from torch.utils.flop_counter import FlopCounterMode
from torchgeo.main import main
from torchmetrics.functional.classification import multiclass_f1_score

from torchgeo_s1s2.files import whole, write_json

FIT, PREDICTIONS = 'fit.json', 'predictions.npz'


class Recorder(Callback):
    """Measures a fit and keeps the predictions of a test, in the trainer's root folder.

    All it expects of a task is that its steps call ``self(image)`` and get logits (B, K, H, W).
    """

    def __init__(self) -> None:
        self.seconds, self.samples, self.memory, self.flop = 0.0, 0, 0, 0
        self.history: list[dict[str, float]] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        names = 'seconds', 'samples', 'memory', 'flop', 'history'
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.register_forward_hook(self._keep)
        # On a CPU the time of the processor, which other work on the machine does not lengthen.
        on_cpu = trainer.strategy.root_device.type == 'cpu'
        self._clock = time.process_time if on_cpu else time.perf_counter

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = self._clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += self._clock() - self._start
        self.samples += len(batch['mask'])

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._pairs.append((self._prediction, batch['mask'].cpu()))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        score = multiclass_f1_score(
            *self._collected(), self._classes, 'weighted', ignore_index=255
        ).item()
        self.history.append({'seconds': self.seconds, 'f1': score})
        if not self.flop:
            with FlopCounterMode(display=False) as counter:
                pl_module(self._image)
            self.flop = counter.get_total_flops()
        self.memory = max(self.memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = sum(p.numel() for p in pl_module.parameters())
        content = {**self.state_dict(), 'parameters': parameters}
        write_json(Path(trainer.default_root_dir, FIT), content, indent=1)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        prediction, mask = (t.numpy().astype(np.uint8) for t in self._collected())
        with whole(Path(trainer.default_root_dir, PREDICTIONS)) as path:
            np.savez_compressed(path, prediction=prediction, mask=mask, classes=self._classes)

    def _keep(self, module: LightningModule, inputs: Any, logits: Tensor) -> None:
        self._classes = logits.shape[1]
        self._image = getattr(inputs[0], 'image', inputs[0])[:1]  # of an ImageSeries
        self._prediction = logits.detach().argmax(1).cpu()

    def _collected(self) -> tuple[Tensor, Tensor]:
        """Predictions and masks of an epoch, flattened over its batches; forgets them."""
        prediction, mask = (cat(parts) for parts in zip(*self._pairs, strict=True))
        self._pairs.clear()
        return prediction, mask


def run(folder: str, *options: str) -> None:
    """Go on from the last checkpoint in a folder if there is one, and test the best one."""
    options = (*options, f'--trainer.default_root_dir={folder}')
    main(['fit', *options, '--ckpt_path=last'])
    main(['test', *options, f'--ckpt_path={Path(folder, "checkpoints", "best.ckpt")}'])


if __name__ == '__main__':
    run(*sys.argv[1:])
