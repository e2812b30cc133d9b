import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.metrics import (
    cohen_kappa_score,
    f1_score,
    precision_recall_fscore_support,
)

from benchmarks import accuracy
from torchgeo_s1s2.datasets.synthetic import write_synthetic

NAMES = 'torchgeo_convlstm', 'pixel_trees'


class Die(Callback):
    """Ends the process without a word amid the second epoch, the first time that it gets there."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        marker = Path(trainer.default_root_dir, 'died')
        if trainer.current_epoch == 1 and not marker.exists():
            marker.touch()
            os._exit(1)


@pytest.fixture(scope='module')
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp('benchmark')
    patches = {'31UFQ': 4, '31UFP': 1, '31UEQ': 2}
    write_synthetic(folder / 'data', 32, patches, incomplete=0, progress=False)
    configs = [str(accuracy.CONF / f'{name}.yaml') for name in NAMES]
    options = ['--root', str(folder / 'data'), '--output', str(folder / 'out')]
    return [*options, '--seeds', '1', '--epochs', '1', '--configs', *configs]


@pytest.fixture(scope='module')
def output(arguments: list[str]) -> Path:
    accuracy.main(arguments)
    return Path(arguments[3])


def run_folder(output: Path, name: str) -> Path:
    return output / 'runs' / name / 'seed_0'


def test_scores_are_those_of_the_stored_predictions(output: Path) -> None:
    content = json.loads((output / 'results.json').read_text())
    assert [run['contestant'] for run in content['runs']] == list(NAMES)
    for run in content['runs']:
        with np.load(run_folder(output, run['contestant']) / 'predictions.npz') as stored:
            truth, predicted = stored['mask'].ravel(), stored['prediction'].ravel()
        assert len(truth) == 2 * 32 * 32
        # A class that is neither true nor predicted has no weight.
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, predicted, average='weighted', zero_division=0
        )
        got = run['precision'], run['recall'], run['f1'], run['kappa']
        expected = precision, recall, f1, cohen_kappa_score(truth, predicted)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        each = f1_score(truth, predicted, labels=range(10), average=None, zero_division=0)
        np.testing.assert_allclose(list(run['class_f1'].values()), each, atol=1e-5)


def test_the_table_says_what_it_was_measured_on(output: Path) -> None:
    content = json.loads((output / 'results.json').read_text())
    lines = (output / 'table.md').read_text().splitlines()
    assert lines[0].startswith('# Synthetic data')
    for key in ('date', 'hardware', 'commit'):
        assert f'- {key}: {content["about"][key]}' in lines
    rows = [line.split(' | ') for line in lines if line.startswith('| ')]
    for run in content['runs']:
        row = next(row for row in rows if row[0] == f'| {run["title"]}')
        assert row[1:5] == [f'{run[key]:.3f}' for key in ('f1', 'precision', 'recall', 'kappa')]
    figures = {path.name for path in output.glob('*.png')}
    assert figures == {'maps.png', *(f'confusion_{name}.png' for name in NAMES)}


def test_only_what_is_unfinished_runs_again(output: Path, arguments: list[str]) -> None:
    finished, interrupted = (run_folder(output, name) for name in reversed(NAMES))
    before = json.loads((output / 'results.json').read_text())['runs']
    log = (finished / 'run.log').read_bytes()
    checkpoint = (interrupted / 'checkpoints' / 'last.ckpt').stat().st_mtime_ns
    (interrupted / 'predictions.npz').unlink()
    accuracy.main(arguments)
    assert (finished / 'run.log').read_bytes() == log
    # The epoch was done, so nothing is trained again, and the predictions are the same.
    assert (interrupted / 'checkpoints' / 'last.ckpt').stat().st_mtime_ns == checkpoint
    assert json.loads((output / 'results.json').read_text())['runs'] == before


def test_a_killed_run_goes_on_from_its_last_epoch(arguments: list[str], tmp_path: Path) -> None:
    option = '--trainer.callbacks+=tests.benchmarks.test_accuracy.Die'
    run = accuracy.Run(accuracy.CONF / 'torchgeo_convlstm.yaml', 0, tmp_path, (option,))
    root = Path(arguments[1])
    with pytest.raises(RuntimeError, match='failed; see'):
        run.start(root, epochs=2)
    assert not (tmp_path / 'predictions.npz').exists()
    run.start(root, epochs=2)
    fit = json.loads((tmp_path / 'fit.json').read_text())
    # Four patches an epoch: the first epoch was not repeated, nor its samples counted twice.
    assert len(fit['history']) == 2
    assert fit['samples'] == 8
    assert (tmp_path / 'predictions.npz').exists()


def test_other_settings_and_other_test_patches_are_refused(
    output: Path, arguments: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match='other settings'):
        accuracy.main([*arguments, '--epochs', '2'])
    runs = [
        accuracy.Run(accuracy.CONF / f'{name}.yaml', 0, run_folder(output, name)) for name in NAMES
    ]
    other = accuracy.Run(runs[1].config, 0, tmp_path)
    prediction = np.zeros((1, 32, 32), np.uint8)
    np.savez(tmp_path / 'predictions.npz', prediction=prediction, mask=prediction, classes=10)
    with pytest.raises(ValueError, match='other patches'):
        accuracy.report([runs[0], other], tmp_path, 'Synthetic data', 1)


def test_a_run_that_fails_names_its_log(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('sys.executable', 'false')
    message = r'torchgeo_convlstm.yaml with seed 0 failed; see .*run.log'
    with pytest.raises(RuntimeError, match=message):
        accuracy.main([*arguments, '--output', str(tmp_path)])


def test_time_to_a_target() -> None:
    history = [{'seconds': 3.0, 'f1': 0.5}, {'seconds': 6.0, 'f1': 0.7}, {'seconds': 9.0, 'f1': 1}]
    assert accuracy.seconds_to(history, 0.7) == 6
    assert accuracy.seconds_to(history[:1], 0.7) is None
