import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import results, trainings
from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics.functional.classification import (
    multiclass_cohen_kappa,
    multiclass_f1_score,
    multiclass_jaccard_index,
    multiclass_precision,
    multiclass_recall,
)

import torchgeo_s1s2
from benchmarks import accuracy, pastis
from benchmarks.scores import confusions, interval, resampled, scores
from torchgeo_s1s2.datasets.synthetic import write_synthetic

NAMES = 'torchgeo_convlstm', 'pixel_trees'
Finished = tuple[accuracy.Run, list[list[str]]]


class Die(Callback):
    """Fails amid the second epoch, the first time that it gets there."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        marker = Path(trainer.default_root_dir, 'died')
        if trainer.current_epoch == 1 and not marker.exists():
            marker.touch()
            raise OSError('killed')


@pytest.fixture(scope='module', autouse=True)
def in_this_process() -> Iterator[None]:
    with trainings():
        yield


@pytest.fixture(scope='module')
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp('benchmark')
    patches = {'31UFQ': 4, '31UFP': 1, '31UEQ': 2}
    write_synthetic(folder / 'data', 32, patches, incomplete=0, progress=False)
    configs = [str(accuracy.CONF / f'{name}.yaml') for name in NAMES]
    options = ['--root', str(folder / 'data'), '--output', str(folder / 'out')]
    return [*options, '--seeds=1', '--epochs=1', '--rates=1e-3', '--configs', *configs]


@pytest.fixture(scope='module')
def output(arguments: list[str]) -> Path:
    accuracy.main(arguments)
    return Path(arguments[3])


def run_folder(output: Path, name: str) -> Path:
    return output / 'runs' / name / 'lr_0.001' / 'seed_0'


def test_scores_are_those_of_the_stored_predictions(output: Path) -> None:
    runs = results(output)
    assert [run['contestant'] for run in runs] == list(NAMES)
    for run in runs:
        with np.load(run_folder(output, run['contestant']) / 'predictions.npz') as stored:
            pair: Any = [torch.from_numpy(stored[k].astype(int)) for k in ('prediction', 'mask')]
        assert pair[1].shape == (2, 32, 32)
        weighted: Any = (*pair, 10, 'weighted')
        expected = [
            multiclass_precision(*weighted),
            multiclass_recall(*weighted),
            multiclass_f1_score(*weighted),
            multiclass_cohen_kappa(pair[0], pair[1], 10),
        ]
        got = run['precision'], run['recall'], run['f1'], run['kappa']
        np.testing.assert_allclose(got, expected, atol=1e-5)
        each = multiclass_f1_score(pair[0], pair[1], 10, 'none')
        np.testing.assert_allclose(list(run['class_f1'].values()), each, atol=1e-5)


def test_pixels_without_a_label_do_not_count() -> None:
    """Of four labelled pixels the two of class 0 and one of class 1 are right."""
    mask, found = np.array([[0, 0, 1, 1, 255]], np.uint8), np.array([[0, 0, 1, 0, 1]], np.uint8)
    made = scores(confusions(found, mask, 10)[0])
    f1 = (0.8, 2 / 3)  # precision 2/3 and recall 1; precision 1 and recall 1/2
    assert made['class_f1'] == pytest.approx([*f1, *[0] * 8])
    assert made['f1'] == made['macro_f1'] == pytest.approx(sum(f1) / 2)
    assert made['miou'] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert (made['precision'], made['recall']) == pytest.approx((5 / 6, 3 / 4))
    assert made['kappa'] == pytest.approx((0.75 - 0.5) / (1 - 0.5))


def test_intervals_are_paired() -> None:
    """B is right in half of the pixels of each patch and A in all; patches differ in size."""
    right, half = (
        [np.diag([n, 0]) for n in (2, 4, 8)],
        [np.array([[n, n], [0, 0]]) for n in (1, 2, 4)],
    )
    draws = resampled({'A': [np.array(right)], 'B': [np.array(half)]}, draws=50)
    assert interval(draws['A']) == (1, 1)
    assert interval(draws['A'] - draws['B']) == pytest.approx((1 / 3, 1 / 3))
    mixed = np.array([np.diag([5, 0]), np.array([[0, 5], [0, 0]])])
    drawn = resampled({'C': [mixed]}, draws=4000)['C']  # of two patches: 0, 1 or 2 are right
    assert {round(v, 6) for v in drawn} == {0, round(2 / 3, 6), 1}
    assert (drawn == 1).mean() == pytest.approx(1 / 4, abs=0.03)


def test_the_table_says_what_it_was_made_of(output: Path) -> None:
    lines = (output / 'table.md').read_text().splitlines()
    assert lines[0].startswith('# Synthetic data')
    rows = [line.split(' | ') for line in lines if line.startswith('| ')]
    for run in results(output):
        for key in ('date', 'hardware', 'commit'):
            assert f'- {key}: {run["made"][key]}' in lines
        for key in ('base configuration', 'code', 'data'):
            assert f'- {key} (digest): {run["made_of"][key]}' in lines
        row = next(row for row in rows if row[0] == f'| {run["title"]}')
        assert row[1:5] == [f'{run[key]:.3f}' for key in ('f1', 'macro_f1', 'miou', 'kappa')]
    assert (output / 'maps.png').stat().st_size > 10_000


def test_a_contestant_has_one_colour_and_its_own_cost() -> None:
    """Trees have no operations, and are in the second picture only."""
    cost = {'Trees': (0, 7, 0.7), **{f'U-TAE {i}': (3.2, 140 + i, 0.8) for i in range(10)}}
    rows = [dict(zip(('gflop', 'seconds', 'f1'), v, strict=True), title=k) for k, v in cost.items()]
    panels = [ax.lines for ax in accuracy._costs(rows).axes]
    for left, right, (title, (gflop, seconds, f1)) in zip(*panels, cost.items(), strict=True):
        assert left.get_color() == right.get_color()
        assert left.get_label() == right.get_label() == title
        np.testing.assert_equal(left.get_data(), ([gflop or np.nan], [f1]))
        np.testing.assert_equal(right.get_data(), ([seconds], [f1]))
    assert len({line.get_color() for line in panels[1]}) == len(cost)


def test_only_what_is_unfinished_runs_again(output: Path, arguments: list[str]) -> None:
    finished, interrupted = (run_folder(output, name) for name in reversed(NAMES))
    before = results(output)
    predicted = (finished / 'predictions.npz').stat().st_mtime_ns
    checkpoint = (interrupted / 'checkpoints' / 'last.ckpt').stat().st_mtime_ns
    (interrupted / 'predictions.npz').unlink()
    accuracy.main(arguments)
    assert (finished / 'predictions.npz').stat().st_mtime_ns == predicted
    # The epoch was done, so nothing is trained again, and the predictions are the same.
    assert (interrupted / 'checkpoints' / 'last.ckpt').stat().st_mtime_ns == checkpoint
    assert results(output) == before


def test_an_interrupted_run_goes_on_from_its_last_epoch(
    arguments: list[str], tmp_path: Path
) -> None:
    option = '--trainer.callbacks+=tests.benchmarks.test_accuracy.Die'
    run = accuracy.Run(accuracy.CONF / 'torchgeo_convlstm.yaml', 0, tmp_path, (option,))
    root = Path(arguments[1])
    with pytest.raises(RuntimeError, match=r'torchgeo_convlstm.yaml with seed 0 failed; see .*log'):
        run.start(root, epochs=2)
    assert not (tmp_path / 'predictions.npz').exists()
    run.start(root, epochs=2)
    fit = json.loads((tmp_path / 'fit.json').read_text())
    # Four patches an epoch: the first epoch was not repeated, nor its samples counted twice.
    assert len(fit['history']) == 2
    assert fit['samples'] == 8
    assert (tmp_path / 'predictions.npz').exists()


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Finished]:
    """A run of nothing, made of small files below tmp_path, and the options of its trainings."""
    for name in ('base.yaml', 'a.yaml', 'package/__init__.py', 'data/s2/image.tif'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('# A\n')
    monkeypatch.setattr(accuracy, 'BASE', tmp_path / 'base.yaml')
    monkeypatch.setattr(torchgeo_s1s2, '__file__', str(tmp_path / 'package' / '__init__.py'))
    run = accuracy.Run(tmp_path / 'a.yaml', 0, tmp_path / 'run')
    with trainings(lambda *_: (run.folder / 'predictions.npz').touch()) as trained:
        run.start(tmp_path / 'data', 1)
        run.start(tmp_path / 'data', 1)
        assert len(trained) == 1
        yield run, trained


@pytest.mark.parametrize(
    ('name', 'what'),
    [
        ('base.yaml', 'base configuration'),
        ('a.yaml', 'configuration'),
        ('package/module.py', 'code'),
        ('package/__init__.py', 'code'),
        ('data/s2/image.tif', 'data'),
        ('data/labels/31UFQ_0_0.json', 'data'),
    ],
)
def test_a_run_that_was_made_otherwise_is_refused_or_repeated(
    finished: Finished, tmp_path: Path, name: str, what: str
) -> None:
    run, trained = finished
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('# B\n')
    os.utime(tmp_path / name, (1, 1))
    with pytest.raises(ValueError, match=rf'other settings than there are now \({what}\).*--again'):
        run.start(tmp_path / 'data', 1)
    assert len(trained) == 1
    run.start(tmp_path / 'data', 1, again=True)
    run.start(tmp_path / 'data', 1)
    assert len(trained) == 2
    assert run.settings()['made_of'] == run.made_of(tmp_path / 'data', 1)


def test_other_epochs_are_refused(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'\(options\)'):
        finished[0].start(tmp_path / 'data', 2)


def test_other_test_patches_are_refused(output: Path, tmp_path: Path) -> None:
    run = accuracy.Run(accuracy.CONF / f'{NAMES[0]}.yaml', 0, run_folder(output, NAMES[0]))
    other = accuracy.Run(run.config, 0, tmp_path)
    prediction = np.zeros((1, 32, 32), np.uint8)
    np.savez(tmp_path / 'predictions.npz', prediction=prediction, mask=prediction, classes=10)
    with pytest.raises(ValueError, match='other patches'):
        accuracy.write_comparison([run, other], tmp_path, {'data': 'Synthetic data'})


def test_another_setting_than_that_of_the_data_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match='written with other settings'):
        accuracy.main([*arguments, '--setting', 'small'])


CONFIG = str(accuracy.CONF / 'pixel_trees.yaml')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--seeds', '0'], 'argument --seeds: 0 is no whole number from 1 on'),
        (['--epochs', '1.5'], 'argument --epochs: 1.5 is no whole number from 1 on'),
        (['--configs', 'none.yaml'], 'argument --configs: there is no file none.yaml'),
        (
            ['--configs', CONFIG, CONFIG],
            '--configs has pixel_trees, pixel_trees; each name has one',
        ),
        (['--robustness', '--data', 'pastis'], '--robustness is measured on synthetic data'),
        (['--robustness', '--setting', 'large'], '--setting is that of a comparison on'),
    ],
)
def test_arguments_that_mean_nothing_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('arguments', [[], ['--data', 'pastis'], ['--robustness']])
def test_nothing_is_written_into_a_folder_of_something_else(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / 'thesis.tex').write_text('mine')
    with pytest.raises(ValueError, match=rf'{tmp_path} .*hold.* files.*give another root'):
        accuracy.main([*arguments, '--root', str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


def test_time_to_a_target() -> None:
    history = [{'seconds': 3.0, 'f1': 0.5}, {'seconds': 6.0, 'f1': 0.7}, {'seconds': 9.0, 'f1': 1}]
    assert accuracy.seconds_to(history, 0.7) == 6
    assert accuracy.seconds_to(history[:1], 0.7) is None


def test_pastis_gives_the_same_table(tmp_path: Path) -> None:
    """Two test patches, on a part of whose pixels there is no label."""
    options = ['--data', 'pastis', '--root', str(tmp_path / 'data'), '--output', str(tmp_path)]
    config = accuracy.CONF / 'pastis' / 'pixel_trees.yaml'
    pastis.write(tmp_path / 'data', patches=10)
    accuracy.main([*options, '--seeds=1', '--epochs=1', '--rates=1e-3', '--configs', str(config)])
    [run] = results(tmp_path)
    with np.load(run_folder(tmp_path, 'pixel_trees') / 'predictions.npz') as stored:
        found, mask = (torch.from_numpy(stored[k].astype(int)) for k in ('prediction', 'mask'))
    assert mask.shape == (2, 32, 32)
    assert {255} < {*mask.unique().tolist()} <= {*range(19), 255}
    labelled = mask != 255
    seen = torch.cat([mask[labelled], found[labelled]]).unique()
    each: Any = multiclass_jaccard_index(found, mask, 19, 'none', ignore_index=255)
    assert run['miou'] == pytest.approx(each[seen].mean().item(), abs=1e-5)
    assert (tmp_path / 'table.md').read_text().startswith('# Synthetic PASTIS')
    assert list(run['class_f1'])[:2] == ['Background', 'Meadow']
