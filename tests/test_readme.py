"""Every snippet and command of README.md, in a folder that has what they name."""

import shlex
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from conftest import quiet_trainer
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torchgeo.main import main

import torchgeo_s1s2
from benchmarks.server import serve_files
from torchgeo_s1s2.datasets import MultiSenGE
from torchgeo_s1s2.datasets.synthetic import write_synthetic
from torchgeo_s1s2.tasks import S1S2SemanticSegmentation

README = Path(__file__).parents[1] / 'README.md'
CONF = Path(__file__).parent / 'conf' / 'multisenge.yaml'


def parses(subcommand: str, *options: str) -> None:
    """``torchgeo`` knows each word and setting; nothing is run."""
    with pytest.raises(SystemExit) as done:
        main([subcommand, *options, '--print_config'])
    assert done.value.code in (0, None)


def check_commands(example: Example) -> None:
    for line in example.parsed.splitlines():
        words = shlex.split(line, comments=True)
        words = words[2:] if words[:2] == ['uv', 'run'] else words
        if not words or words == ['pytest']:
            continue
        assert words[0] == 'torchgeo', f'no test knows how to check {line!r}'
        parses(*words[1:])
        assert [Path(w).exists() for w in words if w.endswith(('.ckpt', '.yaml'))].count(False) == 0


def check_settings(example: Example) -> None:
    Path('settings.yaml').write_text(example.parsed)
    parses('fit', f'--config={CONF}', '--config=settings.yaml')


PARSERS = (
    PythonCodeBlockParser(),
    CodeBlockParser('sh', check_commands),
    CodeBlockParser('yaml', check_settings),
)
EXAMPLES = [*Sybil(PARSERS, path=str(README.parent)).parse(README).examples()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder, and a server on loopback in the place of MultiSenGE's."""
    folder = tmp_path_factory.mktemp('readme')
    (folder / 'torchgeo_s1s2').symlink_to(Path(torchgeo_s1s2.__file__).parent)
    patches = {'31UFQ': 2, '32ULU': 2, '31UFP': 1, '31UEQ': 1}
    root = write_synthetic(folder / 'data' / 'synthetic', 32, patches, incomplete=0, progress=False)
    shutil.copytree(root, folder / 'data' / 'mine', ignore=shutil.ignore_patterns('labels'))
    for name in ('demo', 'pastis'):
        write_checkpoint(folder / 'outputs' / name / 'best.ckpt')
    (folder / 'data' / 'MultiSenGE').mkdir()
    (folder / 'served').mkdir()
    for name in ('labels', 'ground_reference', 's2', 's1'):
        with tarfile.open(folder / 'served' / f'{name}.tgz', 'w:gz') as tar:
            tar.add(root / name, name)
    with serve_files(folder / 'served') as files, pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiSenGE, 'url', files.url)
        yield folder


def write_checkpoint(path: Path) -> None:
    """Of the demo's model and classes, from random weights."""
    task = S1S2SemanticSegmentation(
        backbone='resnet18_convlstm_inception', in_channels=48, num_classes=10
    )
    trainer = quiet_trainer()
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)['state_dict']


@pytest.mark.parametrize('example', EXAMPLES, ids=[f'line {e.line}' for e in EXAMPLES])
@pytest.mark.filterwarnings('ignore')
def test_snippet(example: Example, folder: Path) -> None:
    with chdir(folder):
        example.evaluate()


def test_every_block_is_tried() -> None:
    blocks = README.read_text().split('\n```')
    languages = [block.partition('\n')[0] for block in blocks[1::2]]
    assert set(languages) <= {'', 'sh', 'python', 'yaml'}  # those without a language are text
    assert len(EXAMPLES) == len(languages) - languages.count('')
