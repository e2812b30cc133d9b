import json
import os
import signal
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from benchmarks import model
from torchgeo_s1s2.models import ConvLSTM, fuselstm_to_unet

NAMES = ("TorchGeo's ConvLSTM", 'L-TAE at each pixel')


@pytest.fixture(scope='module')
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('model')
    options = ['--slots', '1', '2', '--sizes', '16', '--rounds', '2', '--models', *NAMES]
    model.main([*options, '--output', str(folder)])
    return folder


def results(output: Path) -> list[dict[str, Any]]:
    return list(json.loads((output / 'results.json').read_text())['results'])


def test_operations_by_hand() -> None:
    """A multiplication and an addition for each weight and pixel."""
    convolution, product = model.Convolution(channels=3, size=8), model.Product(16)
    assert model.count_flops(convolution) == 2 * (3 * 3 * 9) * 8 * 8
    assert model.count_flops(lambda: product(torch.empty(0))) == 2 * 16**3
    # The first slot has no hidden state: 2 bands to 4 gates x 3, and 2 bands and 3 of it after.
    layer = ConvLSTM(2, 3)
    expected = 2 * 9 * 12 * (2 + 5 + 5) * 16
    x = torch.zeros(1, 3, 2, 4, 4)
    assert model.count_flops(lambda: layer(x)) == expected
    # Backward as much again for the weights, and 4 gates x 3 to 3 hidden channels in two slots.
    backward = expected + 2 * 9 * 12 * (3 + 3) * 16
    assert model.count_flops(lambda: layer(x).sum().backward()) == expected + backward


def test_parameters_by_hand(output: Path) -> None:
    by_name = {r['model']: r for r in results(output)}
    assert by_name['Convolution']['parameters'] == 128 * 128 * 9
    assert by_name['Convolution']['flops'] == 2 * 128 * 128 * 9 * 128 * 128
    assert by_name['Matrix product']['flops'] == 2 * 1024**3
    # The classifier of L-TAE: 64 features and a bias for each of 10 classes.
    head = model.MODELS['L-TAE at each pixel'](2).get_submodule('head')
    assert sum(p.numel() for p in head.parameters()) == 65 * 10


def test_all_rows_of_the_full_comparison_take_a_series() -> None:
    for name, build in model.MODELS.items():
        if name != model.COMPILED:
            module = build(2).eval()
            with torch.no_grad():
                assert module(torch.zeros(1, 2, 12, 32, 32)).shape == (1, 10, 32, 32), name


def test_every_model_is_measured_in_every_cell(output: Path) -> None:
    found = results(output)
    names = [*NAMES, 'Matrix product', 'Convolution']
    assert [(r['slots'], r['model']) for r in found] == [(t, n) for t in (1, 2) for n in names]
    for result in found:
        assert len(result['forward_seconds']) == 2
        assert result['forward'] == pytest.approx(sum(result['forward_seconds']) / 2)
        assert result['forward_peak'] > 0
    by_cell = {(r['slots'], r['model']): r for r in found}
    # One more convolution of the same width for one more slot.
    one, two = (by_cell[t, NAMES[0]] for t in (1, 2))
    assert one['parameters'] == two['parameters']
    assert one['flops'] < two['flops'] <= 2 * one['flops']


def test_table_holds_ratios_and_rates() -> None:
    def result(job: int, name: str, forward: float, step: float, flops: float) -> dict[str, Any]:
        made = {'model': name, 'slots': 4, 'size': 64, 'parameters': 1234, 'flops': flops}
        times = {'forward': forward, 'step': step, 'forward_peak': 10, 'step_peak': 1020.4}
        return {'job': job} | made | times

    rows = [
        result(1, 'Plain implementation', 0.5, 2, 30e9),
        result(1, 'Ours', 0.25, 1, 20e9),
        result(1, 'Convolution', 0.1, 0, 10e9),
        result(2, 'Plain implementation', 0.6, 3, 30e9),
        result(2, 'Ours, compiled', 0.2, 1, 20e9),
    ]
    *_, plain, ours, compiled = model.table(rows).splitlines()
    assert plain.endswith('| 30.0 | 500 | 1.00 | 2,000 | 1.00 | 10 | 1,020 | 60 | 60% |')
    assert ours == (
        '| 4 | 64 | Ours | 1,234 | 20.0 | 250 | 2.00 | 1,000 | 2.00 | 10 | 1,020 | 80 | 80% |'
    )
    assert '| 4 | 64 | Ours, compiled | 1,234 | 20.0 | 200 | 3.00 | 1,000 | 3.00 |' in compiled


def test_half_precision_is_close_to_single() -> None:
    """bfloat16 has 8 bits of mantissa; logits come back as single-precision numbers."""
    plain = model.ours(2).eval()
    x = torch.randn(1, 2, 12, 32, 32)
    with torch.no_grad():
        expected, found = plain(x), model.in_bfloat16(plain)(x)
    assert found.dtype == torch.float32
    error = (found - expected).abs().max() / expected.std()
    assert 0 < error < 0.2


def test_models_share_the_memory_in_groups_beside_the_plain_one() -> None:
    options = model._parser().parse_args(['--at-once', '2', '--compile-slots', '4'])
    options.models = [model.PLAIN, 'Ours', model.COMPILED, *NAMES]
    first, second = ([model.PLAIN, *names] for names in (('Ours', model.COMPILED), NAMES))
    assert model.jobs([(4, 64)], options) == [((4, 64), first), ((4, 64), second)]
    third, fourth = [model.PLAIN, 'Ours', NAMES[0]], [model.PLAIN, NAMES[1]]
    assert model.jobs([(8, 64)], options) == [((8, 64), third), ((8, 64), fourth)]
    options.models = [model.PLAIN]
    assert model.jobs([(4, 64)], options) == [((4, 64), [model.PLAIN])]


def test_plot_has_a_column_for_each_size_and_a_row_for_each_measure() -> None:
    results = [
        {'model': 'Ours', 'slots': t, 'size': size, 'forward': t, 'step': 2 * t, 'step_peak': size}
        for size in (64, 128)
        for t in (8, 4)
    ]
    figure = model.plot(results, 'title')
    drawn = [np.array(line.get_data()).tolist() for a in figure.axes for line in a.get_lines()]
    t = [4, 8]
    assert drawn == [[t, t], [t, t], [t, [8, 16]], [t, [8, 16]], [t, [64, 64]], [t, [128, 128]]]
    assert [axis.get_title() for axis in figure.axes[:2]] == ['64 x 64 pixels', '128 x 128 pixels']
    plt.close(figure)


def test_cells_are_a_cross_unless_all_are_wanted() -> None:
    assert model.cells([4, 8], [64, 128], full=False) == [(4, 64), (4, 128), (8, 64)]
    assert model.cells([4, 8], [64, 128], full=True)[-1] == (8, 128)


def test_report_says_where_it_was_measured(output: Path) -> None:
    text = (output / 'table.md').read_text()
    for fact in ('date', 'hardware', 'commit', 'running time'):
        assert f'- {fact}: ' in text
    assert '- rounds: 2 to 2' in text
    assert (output / 'model.png').stat().st_size > 10_000


def test_failure_names_the_model() -> None:
    worker = model.Worker('Convolution', (1, 16))
    with pytest.raises(RuntimeError, match="process of 'Convolution' ended with code 1; see above"):
        worker.ask('nothing')
    killed = model.Worker('Convolution', (1, 16))
    os.kill(killed.process.pid or 0, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r'ended with code -9.*--at-once'):
        killed.ask('about')


def test_deadline_ends_the_rounds_after_the_first() -> None:
    class Done:
        def ask(self, request: str, *_: Any) -> float:
            return 1.0

    workers: Any = {'a': Done()}
    found = model._rounds(workers, 'forward', rounds=9, deadline=0)
    assert found['a']['forward_seconds'] == [1.0]


def test_plain_series_reads_what_the_backbone_reads() -> None:
    """The plain model of the oracle, and ours with its weights."""
    plain, ours = model.PlainSeries().eval(), model.ours(3).eval()
    ours.load_state_dict(fuselstm_to_unet(plain.model.state_dict()))
    x = torch.randn(1, 3, 12, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-4)
