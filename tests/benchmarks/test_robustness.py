from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import results, trainings

from benchmarks import accuracy, robustness
from benchmarks.scores import scores
from torchgeo_s1s2.datasets import MonthlySeries, MultiSenGE
from torchgeo_s1s2.datasets.synthetic import write_synthetic

Output = tuple[Path, list[list[str]]]


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patches = {'31UFQ': 4, '31UFP': 1, '31UEQ': 1}
    folder = tmp_path_factory.mktemp('robustness')
    return write_synthetic(folder / 'data', 32, patches, incomplete=0, progress=False)


@pytest.fixture(scope='module')
def output(root: Path) -> Output:
    """Folder of the results, and the options of one training, of a smaller model."""
    folder, small = root.parent / 'out', accuracy.CONF / 'inception_resnet18.yaml'
    arguments = ['--root', str(root), '--output', str(folder), '--epochs', '1']
    with trainings() as trained, pytest.MonkeyPatch.context() as patch:
        patch.delitem(robustness.TRAININGS, 'plain')
        accuracy.main(['--robustness', *arguments, '--configs', str(small)])
    return folder, trained


def test_one_of_the_trainings_is_with_dropout(output: Output) -> None:
    assert robustness.TRAININGS['plain'] == ()
    (dropout,) = output[1]
    assert [option for option in dropout if 'dropout=' in option or 'dropout.' in option] == [
        '--data.init_args.dropout=torchgeo_s1s2.transforms.SeriesDropout',
        '--data.init_args.dropout.date=0.25',
        '--data.init_args.dropout.sensor=0.2',
    ]


def test_undisturbed_series_score_as_in_the_test_of_torchgeo(output: Output) -> None:
    undisturbed = [r for r in results(output[0]) if r['condition'] in ('4 of 4', 'both', '0')]
    assert len(undisturbed) == 4
    run = accuracy.Run(Path(), 0, output[0] / 'runs' / 'inception_resnet18 dropout')
    expected = scores(run.confusions().sum(0))
    for r in undisturbed:
        assert r['F1, inception_resnet18 dropout'] == pytest.approx(expected['f1'], abs=1e-6)
        assert r['kappa, inception_resnet18 dropout'] == pytest.approx(expected['kappa'], abs=1e-6)


def test_the_table_holds_every_condition(output: Output) -> None:
    lines = (output[0] / 'table.md').read_text().splitlines()
    assert lines[0].startswith('# Synthetic data')
    rows = [line for line in lines if line.startswith('| ')][2:]
    assert len(rows) == len(robustness.conditions()) == 22
    assert rows[-1].startswith('| days that the season is late | 30 | ')


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two patches of three slots, the last one of which Sentinel-2 did not see."""
    valid = torch.tensor([[True, True], [True, True], [False, True]]).repeat(2, 1, 1)
    image = torch.ones(2, 3, 12, 4, 4)
    image[:, 2, :10] = torch.nan
    times = torch.where(valid, 7, -1)
    return {
        'image': image,
        'mask': torch.zeros(2, 4, 4),
        'valid': valid,
        'acquisition_times': times,
    }


def check(changed: dict[str, Any], expected: list[list[bool]]) -> None:
    """Only the expected observations (slots, sensors) of both patches are there."""
    valid = torch.tensor(expected).repeat(2, 1, 1)
    assert changed['valid'].equal(valid)
    assert changed['acquisition_times'].equal(torch.where(valid, 7, -1))
    seen = changed['image'].isfinite()
    assert (seen[:, :, :10] == valid[:, :, :1, None, None]).all()
    assert (seen[:, :, 10:] == valid[:, :, 1:, None, None]).all()


def test_what_is_taken_away_was_never_observed(batch: dict[str, torch.Tensor]) -> None:
    no, yes = False, True
    check(robustness.keep_first(batch, 1), [[yes, yes], [no, no], [no, no]])
    check(robustness.keep_first(batch, 3), [[yes, yes], [yes, yes], [no, yes]])
    check(robustness.keep_sensor(batch, 's1'), [[no, yes], [no, yes], [no, yes]])
    check(robustness.keep_sensor(batch, 's2'), [[yes, no], [yes, no], [no, no]])


def test_dates_dropped_at_random(batch: dict[str, torch.Tensor]) -> None:
    many = {key: value.repeat(400, *[1] * (value.ndim - 1)) for key, value in batch.items()}
    half, quarter = (robustness.drop_dates(many, share)['valid'] for share in (0.5, 0.25))
    assert len(half) == 800 * robustness.DRAWS
    assert half.any(2).any(1).all()
    # Of five dates 2.5 stay, and one more in the share 1/32 of series that would lose all.
    assert half.sum((1, 2)).float().mean().item() == pytest.approx(2.5 + 1 / 32, abs=0.06)
    assert (quarter | ~half).all()  # what a quarter takes, a half takes too
    same = robustness.drop_dates(many, 0.5)['valid']
    assert same.equal(half)


def test_series_from_july_keep_what_is_later() -> None:
    days = ['2020-05-01', '2020-06-30', '2020-07-01', '2020-08-20', '2020-11-05']
    times = {'s2': np.array(days, 'datetime64[s]'), 's1': np.array(days[1:], 'datetime64[s]')}
    slots = robustness.FromJuly(max_length=4).select(times)
    assert slots == {'s2': ((2,), (3,), (4,), ()), 's1': ((1,), (2,), (3,), ())}


def test_the_late_year_is_of_the_same_ground(root: Path) -> None:
    late, usual = (
        robustness.read_tile(robustness.delayed(root, days), MonthlySeries()) for days in (20, 0)
    )
    assert late['mask'].equal(usual['mask'])
    assert late['acquisition_times'].equal(usual['acquisition_times'])
    assert not late['image'].equal(usual['image'])
    dataset = MultiSenGE(root / 'delay_+20', 'test')
    assert [dataset.name(i) for i in range(len(dataset))] == ['31UEQ_0_0']


def test_real_data_are_refused(two_zones: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='is not synthetic'):
        accuracy.main(['--robustness', '--root', str(two_zones), '--output', str(tmp_path / 'out')])
