import gzip
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from conftest import S1_DATES, S2_DATES, full_disk, write_label_file
from torchgeo.datasets import DatasetNotFoundError

from benchmarks.server import Files, serve_files
from torchgeo_s1s2.datamodules import MultiSenGEDataModule
from torchgeo_s1s2.datasets import (
    AllDates,
    DateRule,
    Download,
    DownloadError,
    EvenlySpaced,
    MonthlySeries,
    MultiSenGE,
    NoSeriesError,
    RandomDates,
    SeasonDownload,
    archive,
    download,
)
from torchgeo_s1s2.datasets.archive import (
    GzipReader,
    Journal,
    RemoteArchive,
    RemoteFile,
    RestartPoint,
)
from torchgeo_s1s2.datasets.synthetic import write_synthetic
from torchgeo_s1s2.errors import S1S2Warning

FOLDERS = ('labels', 'ground_reference', 's2', 's1')


def compress(data: bytes, level: int = 6) -> bytes:
    """A gzip stream of short blocks, so that small archives have restart points."""
    deflate = zlib.compressobj(level, zlib.DEFLATED, 31, memLevel=1)
    return deflate.compress(data) + deflate.flush()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, target: str = '') -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info.tobuf(tarfile.GNU_FORMAT)


def pack(members: Sequence[tuple[str, bytes]], level: int = 6, special: bytes = b'') -> bytes:
    """A .tgz of files, which special headers precede."""
    files = (header(name, len(c)) + c + bytes(-len(c) % tarfile.BLOCKSIZE) for name, c in members)
    return compress(b''.join([special, *files, bytes(tarfile.RECORDSIZE)]), level)


def pack_folder(root: Path, folder: str, leave_out: Collection[str] = ()) -> bytes:
    """A folder in an order of no meaning, as a directory lists its files."""
    names = sorted({p.name for p in (root / folder).iterdir()} - set(leave_out))
    random.Random(0).shuffle(names)
    return pack([(f'{folder}/{n}', (root / folder / n).read_bytes()) for n in names])


def tree(root: Path) -> dict[str, bytes]:
    """Files of a data set by path, without what the download keeps for itself."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob('*')
        if p.is_file() and p.relative_to(root).parts[0] in FOLDERS
    }


def season_of(root: Path, dataset: MultiSenGE) -> dict[str, bytes]:
    """Files that a data set reads, with all labels and label rasters, from a complete root."""
    names = {
        str(path.relative_to(root))
        for i in range(len(dataset))
        for paths in dataset.files_of(i).values()
        for path in paths
    }
    whole = tree(root)
    return {k: v for k, v in whole.items() if k in names or k.split('/')[0] in FOLDERS[:2]}


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete data set: 3 patches in train, one in test."""
    root = tmp_path_factory.mktemp('source')
    return write_synthetic(
        root, size=16, patches={'31UFQ': 3, '31UEQ': 1}, incomplete=0, progress=False
    )


@pytest.fixture(scope='module')
def archives(source: Path) -> Mapping[str, bytes]:
    return {f'{folder}.tgz': pack_folder(source, folder) for folder in FOLDERS}


@pytest.fixture
def server(archives: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    monkeypatch.setattr(RemoteFile, 'backoff', 0.0)
    monkeypatch.setattr(RemoteArchive, 'spacing', 2**13)
    monkeypatch.setattr(archive, '_CHUNK', 1024)
    with serve_files() as server:
        server.contents.update(archives)
        monkeypatch.setattr(MultiSenGE, 'url', server.url)
        yield server


def season(server: Files, root: Path, **changes: Any) -> SeasonDownload:
    options: dict[str, Any] = {'tiles': MultiSenGE.splits['train'], 'progress': False} | changes
    return SeasonDownload(root, server.url, **options)


@pytest.fixture
def expected(source: Path) -> dict[str, bytes]:
    return season_of(source, MultiSenGE(source, split='train'))


def test_exactly_the_files_of_the_season(
    server: Files, tmp_path: Path, expected: Mapping[str, bytes]
) -> None:
    season(server, tmp_path).run()
    assert tree(tmp_path) == expected
    # 4 labels and label rasters; 3 patches, 4 dates, 2 sensors.
    assert len(expected) == 4 + 4 + 3 * 4 * 2
    assert server.asked == [(f'{folder}.tgz', 0) for folder in FOLDERS]
    # The data set chooses from them what it chooses from all.
    with pytest.warns(UserWarning, match='not on disk'):
        assert len(MultiSenGE(tmp_path, split='train')) == 3
    season(server, tmp_path).run()
    assert len(server.asked) == 4  # a second run asks for nothing


def test_what_the_data_set_reads_is_not_fetched_again(
    server: Files, source: Path, tmp_path: Path
) -> None:
    """At any depth, and in capitals, as an archive unpacked by hand may have it."""
    for folder in FOLDERS:
        target = tmp_path / folder / 'unpacked' / folder
        target.mkdir(parents=True)
        for path in (source / folder).iterdir():
            shutil.copy(path, target / path.name.replace('.tif', '.TIF'))
    plan = season(server, tmp_path).plan()
    assert not any(plan.missing.values())
    assert sum(map(len, plan.needed.values())) == 4 + 3 * 4 * 2
    season(server, tmp_path).verify()
    assert not server.asked
    assert len(MultiSenGE(tmp_path, split='train', download=True)) == 3
    assert not server.asked
    damaged = tmp_path / 's1' / 'unpacked' / 's1' / f'{min(plan.needed["s1"])[:-4]}.TIF'
    damaged.write_bytes(b'damaged')
    with pytest.raises(DownloadError, match=f'is another for {damaged}'):
        season(server, tmp_path).verify()


def test_a_root_that_cannot_be_written_to_says_so(server: Files, tmp_path: Path) -> None:
    (tmp_path / '.download').write_text('no folder')
    with pytest.raises(DownloadError, match=r'cannot be written to .*; leave the download out'):
        season(server, tmp_path).plan()


def test_reading_ends_with_the_last_file_needed(
    server: Files, source: Path, tmp_path: Path, expected: Mapping[str, bytes]
) -> None:
    needed = [(name, expected[name]) for name in expected if name.startswith('s1/')]
    rest = random.Random(0).randbytes(2**24)
    server.contents['s1.tgz'] = pack([*needed, ('s1/rest', rest)], level=0)
    season(server, tmp_path).run()
    assert tree(tmp_path) == expected
    assert server.sent['s1.tgz'] < 0.6 * len(server.contents['s1.tgz'])


@pytest.mark.parametrize('ranges', [True, False])
def test_dropped_connections(
    server: Files, tmp_path: Path, expected: Mapping[str, bytes], ranges: bool
) -> None:
    server.ranges = ranges
    # With ranges these count from where the response before broke off, else from the start.
    server.cuts['s2.tgz'] = [700, 5000, 9000, 1] if ranges else [700, 5700, 14700, 14701]
    season(server, tmp_path).run()
    assert tree(tmp_path) == expected
    assert server.first_bytes('s2.tgz') == [0, 700, 5700, 14700, 14701]


def test_answers_that_are_shorter_than_asked(
    server: Files, tmp_path: Path, expected: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(archive.time, 'sleep', waited.append)
    monkeypatch.setattr(RemoteFile, 'backoff', 1.0)
    server.cuts['s2.tgz'], server.most = [700], 50_000
    season(server, tmp_path).run()
    assert tree(tmp_path) == expected
    assert server.first_bytes('s2.tgz')[:5] == [0, 700, 50_700, 100_700, 150_700]
    assert {*waited} == {0}
    server.cuts['s2.tgz'], server.most = [700], 0
    with pytest.raises(DownloadError, match=r'byte 700 on failed 6 times \(the server sends no m'):
        season(server, tmp_path / 'none').run()
    assert waited[-4:] == [1, 2, 4, 8]


def interrupt(server: Files, run: Callable[[], None], name: str, *after: int) -> None:
    """Break an archive off until the run gives up, as a lost network does, and mend it."""
    server.cuts[name] = [*after] + [0] * 9
    message = rf'{name}.*from byte \d+ on failed 6 times.*run the same again'
    with pytest.raises(DownloadError, match=message):
        run()
    server.cuts.clear()
    server.asked.clear()


EVERY_DATE: dict[str, DateRule] = {
    's2': AllDates(),
    's1': AllDates(leader='s1', max_length=40, missing='keep'),
}


def every_date(server: Files, root: Path, sensor: str) -> SeasonDownload:
    return season(server, root, tiles=None, series=EVERY_DATE.get(sensor))


@pytest.mark.parametrize('ranges', [True, False])
@pytest.mark.parametrize('share', [0.0001, 0.4, 0.97])
@pytest.mark.parametrize('folder', ['labels', 's2', 's1'])
def test_interrupted_at_any_byte(
    server: Files, source: Path, tmp_path: Path, folder: str, share: float, ranges: bool
) -> None:
    name = f'{folder}.tgz'
    expected = season_of(source, MultiSenGE(source, split='all', series=EVERY_DATE.get(folder)))
    cut = int(share * len(server.contents[name]))
    interrupt(server, every_date(server, tmp_path, folder).run, name, cut)
    there = tree(tmp_path)
    assert there.items() <= expected.items()
    written = {path: (tmp_path / path).stat().st_mtime_ns for path in there}
    server.ranges = ranges
    every_date(server, tmp_path, folder).run()
    assert tree(tmp_path) == expected
    again = {path: (tmp_path / path).stat().st_mtime_ns for path in there}
    assert again == written or folder == 'labels'  # which are small, and read in one stretch
    # Restart points are 8 KiB apart, and then comes the next block that ends with a byte.
    assert cut - 2 * 2**13 < server.first_bytes(name)[0] <= cut


def test_killed_process(server: Files, tmp_path: Path, expected: Mapping[str, bytes]) -> None:
    real = Journal.add

    def add(journal: Journal, *what: Any) -> None:
        real(journal, *what)
        if journal.path.stem == 's2' and journal.starts[-1].compressed > 100_000:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, 'add', add)
        process = multiprocessing.get_context('fork').Process(target=season(server, tmp_path).run)
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    half = tmp_path / '.download' / 'unfinished' / '.31UFQ_20200101_S2_0_0.tif.ab12_xyz'
    half.mkdir(exist_ok=True)
    (half / '31UFQ_20200101_S2_0_0.tif').write_bytes(b'half')
    there = tree(tmp_path)
    server.asked.clear()
    season(server, tmp_path).run()
    assert tree(tmp_path) == expected
    assert any(path.startswith('s2/') for path in there)
    assert not half.exists()
    assert 100_000 < server.first_bytes('s2.tgz')[0] < 100_000 + 2 * 2**13


@pytest.mark.parametrize('content', ['{"version": 1}', '{"version": ["1"', '[]'])
def test_damaged_journal(server: Files, tmp_path: Path, content: str) -> None:
    (tmp_path / '.download').mkdir()
    (tmp_path / '.download' / 's2.json').write_text(content)
    with pytest.raises(DownloadError, match=r's2\.json is damaged .*; delete it'):
        season(server, tmp_path).run()


def test_arguments_that_mean_nothing_are_named(server: Files, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r'data/labels\.tgz: .*No scheme supplied'):
        SeasonDownload(tmp_path, 'data', progress=False).run()
    with pytest.raises(ValueError, match=r"no such sensor: \['s3'\]; choose from s2, s1"):
        SeasonDownload(tmp_path, 'data', sensors=['s3'])
    with pytest.raises(ValueError, match=r"tiles is '31UFQ'; expected several, as in \['31UFQ'\]"):
        SeasonDownload(tmp_path, 'data', tiles='31UFQ')
    with pytest.warns(S1S2Warning, match=r"no tiles \['31UXX'\] \(tiles there: 31UEQ, "):
        assert season(server, tmp_path, tiles=['31UXX']).plan().patches == 0


def test_a_later_season_reads_only_where_it_is(server: Files, source: Path, tmp_path: Path) -> None:
    every_date(server, tmp_path, 's1').run()
    journal = Journal(tmp_path / '.download' / 's1.json')
    path = tmp_path / 's1' / min(journal.names[7])
    content = path.read_bytes()
    path.unlink()
    server.asked.clear()
    every_date(server, tmp_path, 's1').run()
    assert path.read_bytes() == content
    assert server.asked == [('s1.tgz', journal.starts[7].compressed)]


@pytest.mark.parametrize('share', [0.3, 0.9])
def test_truncated_archive(server: Files, source: Path, tmp_path: Path, share: float) -> None:
    whole = server.contents['s2.tgz']
    server.contents['s2.tgz'] = whole[: int(share * len(whole))]
    with pytest.raises(DownloadError, match=r's2\.tgz is damaged .*breaks off at its byte'):
        every_date(server, tmp_path, 's2').run()
    assert tree(tmp_path).items() <= tree(source).items()
    server.contents['s2.tgz'] = whole
    with pytest.warns(UserWarning, match='has changed since'):
        every_date(server, tmp_path, 's2').run()
    assert tree(tmp_path) == season_of(source, MultiSenGE(source, 'all', EVERY_DATE['s2']))


def test_damaged_archive(server: Files, source: Path, tmp_path: Path) -> None:
    # One file is not there, so the archive is read to its end.
    lost = min(p.name for p in (source / 's2').iterdir())
    content = bytearray(pack_folder(source, 's2', leave_out=[lost]))
    content[-6] ^= 1  # in the checksum
    server.contents['s2.tgz'] = bytes(content)
    with pytest.raises(DownloadError, match=r's2\.tgz is damaged .*incorrect data check'):
        every_date(server, tmp_path, 's2').run()


def test_an_archive_that_is_not_there(server: Files, tmp_path: Path) -> None:
    del server.contents['labels.tgz']
    with pytest.raises(DownloadError, match=r'labels\.tgz: the server answers 404 Not Found'):
        season(server, tmp_path).run()


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (
            b'<html>Log in</html>',
            r"s2\.tgz: expected a gzip stream at byte 0, .* sends b'<html>Log in</html>'",
        ),
        (gzip.compress(b'<html>Log in</html>'), r's2\.tgz is damaged or cut off'),
        (b'', r's2\.tgz is damaged or cut off \(empty file\)'),
    ],
)
def test_a_page_in_place_of_an_archive_replaces_nothing(
    server: Files, tmp_path: Path, content: bytes, message: str
) -> None:
    season(server, tmp_path).run()
    recorded, good = (tmp_path / 'checksums.sha256').read_text(), server.contents['s2.tgz']
    server.contents['s2.tgz'], server.etags['s2.tgz'] = content, '"page"'
    lost = min((tmp_path / 's2').iterdir())
    lost.unlink()
    for _ in range(2):
        with pytest.raises(DownloadError, match=message):
            season(server, tmp_path).run()
    assert (tmp_path / 'checksums.sha256').read_text() == recorded
    server.contents['s2.tgz'], server.etags['s2.tgz'] = good, '"1"'
    server.asked.clear()
    with warnings.catch_warnings(action='error', category=S1S2Warning):
        season(server, tmp_path, tiles=['31UFQ']).run()
    assert lost.exists()
    assert len(server.asked) == 1


@pytest.mark.parametrize('seconds', [7, 601])
def test_server_that_is_busy(
    server: Files,
    tmp_path: Path,
    expected: Mapping[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
) -> None:
    server.faults['labels.tgz'] = [503, 500, 429]
    server.headers = {'Retry-After': str(seconds)}
    waited: list[float] = []
    monkeypatch.setattr(archive.time, 'sleep', waited.append)
    if seconds < RemoteFile.patience:
        season(server, tmp_path).run()
        assert tree(tmp_path) == expected
        assert waited == [7, 7, 7]
    else:
        with pytest.raises(DownloadError, match=r'answers 503 .*run the same again in 601 seconds'):
            season(server, tmp_path).run()


def test_redirects(server: Files, tmp_path: Path, expected: Mapping[str, bytes]) -> None:
    with serve_files() as other:
        other.contents = server.contents
        host = other.url.removeprefix('http://')
        server.faults['labels.tgz'] = [302] * 5
        server.headers = {'Location': f'{other.url}/labels.tgz'}
        with pytest.raises(DownloadError, match=rf"another host, {host}; .*hosts=\['{host}'\]"):
            season(server, tmp_path).plan()
        assert other.asked == []
        assert season(server, tmp_path, hosts=[host]).plan().patches == 3
        assert other.asked == [('labels.tgz', 0)]
    server.faults['ground_reference.tgz'] = [302]
    server.headers = {'Location': '/ground_reference.tgz'}
    season(server, tmp_path).run()
    assert tree(tmp_path) == expected
    response = requests.Response()
    response.status_code, response.url = 301, 'https://host/s1.tgz'
    response.headers['Location'] = 'http://host/s1.tgz'
    with pytest.raises(DownloadError, match=r'http://host/s1\.tgz, which is not encrypted'):
        RemoteFile(response.url, hosts=['host'])._check_redirect(response)


@pytest.mark.filterwarnings('ignore:.*has changed since')
@pytest.mark.parametrize('ranges', [True, False])
def test_length_that_is_wrong(server: Files, tmp_path: Path, ranges: bool) -> None:
    server.excess, server.ranges = 100, ranges
    with pytest.raises(DownloadError, match=r'labels\.tgz'):
        season(server, tmp_path).run()


def test_archive_that_has_changed(
    server: Files, source: Path, tmp_path: Path, expected: Mapping[str, bytes]
) -> None:
    interrupt(server, season(server, tmp_path).run, 's2.tgz', 150_000)
    assert any(path.startswith('s2/') for path in tree(tmp_path))
    names = sorted(p.name for p in (source / 's2').iterdir())
    server.contents['s2.tgz'] = pack([(name, b'new ' + name.encode()) for name in names])
    server.etags['s2.tgz'] = '"2"'
    # The run that finds out breaks off too.
    with pytest.warns(UserWarning, match=r'(?s)s2\.tgz has changed since.*is replaced'):
        interrupt(server, season(server, tmp_path).run, 's2.tgz', 9999, 300)
    season(server, tmp_path).run()
    new = {k: b'new ' + k.removeprefix('s2/').encode() for k in expected if k.startswith('s2/')}
    assert tree(tmp_path) == {**expected, **new}


def test_what_a_new_version_lacks_is_named_and_stays(
    server: Files, source: Path, tmp_path: Path
) -> None:
    """A date and a label raster are withdrawn, and a whole patch; another season was there, too."""
    every_date(server, tmp_path, 's2').run()
    names = {folder: sorted(p.name for p in (tmp_path / folder).iterdir()) for folder in FOLDERS}
    lacking = {'labels': names['labels'][3], 'ground_reference': names['ground_reference'][2]}
    for folder, name in lacking.items():
        server.contents[f'{folder}.tgz'] = pack_folder(source, folder, leave_out=[name])
        server.etags[f'{folder}.tgz'] = '"2"'
        (tmp_path / folder / names[folder][0]).unlink()
    before, later = tree(tmp_path), season(server, tmp_path, tiles=None)
    for _ in range(2):
        with pytest.warns(S1S2Warning) as told:
            later.run()
        texts = [str(w.message) for w in told]
        for folder, name in lacking.items():
            message = f'files in {tmp_path / folder} from before {server.url}/{folder}.tgz '
            assert sum(message in t and f'still read (1): {name}. It' in t for t in texts) == 1
    assert before.items() <= tree(tmp_path).items()
    # Of Sentinel-2 the season asks for four dates of four patches; the others are of before.
    server.contents['s2.tgz'] = pack_folder(source, 's2', leave_out=[names['s2'][0]])
    server.etags['s2.tgz'] = '"2"'
    needed = sorted(later.plan().needed['s2'])
    (tmp_path / 's2' / needed[1]).unlink()
    with pytest.warns(S1S2Warning, match=rf'in .*s2 from .*read \({len(names["s2"]) - 16}\): '):
        later.run()
    with pytest.warns(S1S2Warning, match=rf'in .*s2 from .*read \(1\): {names["s2"][0]}'):
        every_date(server, tmp_path, 's2').run()


def test_archive_that_changes_at_each_response(server: Files, tmp_path: Path) -> None:
    class Changing(defaultdict[str, str]):
        def __getitem__(self, key: str) -> str:
            return f'"{len(server.asked)}"'

    server.etags = Changing()
    server.cuts['s2.tgz'] = [2000] * 9
    with pytest.warns(match='has changed'), pytest.raises(DownloadError, match='has changed since'):
        season(server, tmp_path).run()


def test_hostile_archive(server: Files, tmp_path: Path, expected: Mapping[str, bytes]) -> None:
    root, outside = tmp_path / 'root', tmp_path / 'outside'
    outside.write_text('mine')
    server.contents['labels.tgz'] = pack(
        [
            ('../31UEQ_1_1.json', b'{}'),
            ('labels/..', b'evil'),
            ('labels/.json', b'evil'),
            ('labels/31UEQ_1_1.json\n', b'{}'),
            ('labels/setup.py', b'evil'),
            *((name, expected[name]) for name in expected if name.startswith('labels/')),
        ]
    )
    s2 = sorted(name for name in expected if name.startswith('s2/'))
    first = s2[0]
    kinds = tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE
    special = [
        header('s2', 0, tarfile.SYMTYPE, str(tmp_path)),
        header(first, 0, tarfile.SYMTYPE, str(outside)),
        header(first, 0, tarfile.LNKTYPE, '../outside'),
        *(header(first, 0, kind) for kind in kinds),
    ]
    above = '../outside', str(outside), f'../{first}', f'/{first}', f's2/../../{first}'
    members = [
        *((name, b'evil') for name in (*above, f'{first}.part', 's2/another.tif')),
        *((name, expected[name]) for name in s2[:-1]),
        (first, b'evil'),
        (s2[-1], expected[s2[-1]]),
    ]
    server.contents['s2.tgz'] = pack(members, special=b''.join(special))
    season(server, root).run()
    assert tree(root) == expected
    assert not any(p.is_symlink() for p in tmp_path.rglob('*'))
    assert outside.read_text() == 'mine'
    assert {p.name for p in tmp_path.iterdir()} == {'root', 'outside'}
    assert {p.name for p in root.iterdir()} == {*FOLDERS, '.download', 'checksums.sha256'}


@pytest.mark.parametrize(
    ('folder', 'content', 'message'),
    [
        ('labels', lambda first: header(first, 2**18 + 1), 'has 262145 bytes, more than the 2621'),
        ('ground_reference', lambda first: header(first, 2**22 + 1), 'has 4194305 bytes, more'),
        ('s2', lambda first: header(first, 2**40), r's2\.tgz has 1099511627776 bytes, more'),
        ('s2', lambda first: header(first, 3000) + bytes(2000), 'has 2000 bytes, .* says 3000'),
        # Headers that would fill the memory, or are none.
        ('s2', lambda _: header('', 2**40, tarfile.XHDTYPE), 'header of 1099511627776 bytes'),
        ('s2', lambda _: header('a', 0) + b'garbage' * 600, r's2\.tgz is damaged .*no header'),
        ('s2', lambda _: header('a', 0) + bytes(1024) + b'more' * 600, 'damaged .*no header'),
        # More than there can be: in a file that nobody wants, after the end, and in number.
        ('labels', lambda _: header('a', 2**40) + bytes(2**20), 'unpacks to more than the 1,048,'),
        ('labels', lambda _: bytes(2**20 + 1), r'labels\.tgz unpacks to more than the 1,048,576 b'),
        ('labels', lambda _: b''.join(header(f'a_0_{i}.json', 0) for i in range(9)), 'the 8 files'),
    ],
)
def test_archive_that_is_not_what_it_must_be(
    server: Files,
    tmp_path: Path,
    expected: Mapping[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    content: Callable[[str], bytes],
    message: str,
) -> None:
    small = download.KINDS['labels']._replace(files=8, total_size=2**20)
    monkeypatch.setitem(download.KINDS, 'labels', small)
    first = min(name for name in expected if name.startswith(folder))
    server.contents[f'{folder}.tgz'] = gzip.compress(content(first))
    with pytest.raises(DownloadError, match=message):
        season(server, tmp_path).run()
    assert len(list((tmp_path / folder).iterdir())) == (8 if message == 'the 8 files' else 0)


def test_other_folders_and_suffixes(
    server: Files, tmp_path: Path, expected: Mapping[str, bytes]
) -> None:
    """Further levels of folders, ``.TIF`` and ``.tiff``, and files of one name in two folders."""
    for folder in FOLDERS:
        files = {name: expected[name] for name in expected if name.startswith(folder)}
        tail = iter(['.TIF', '.tiff', '.TIFF'])
        names = [name.replace('.tif', next(tail, '.tif')) for name in files]
        members = [(f'data/{n}', c) for n, c in zip(names, files.values(), strict=True)]
        server.contents[f'{folder}.tgz'] = pack([*members, (f'old/{names[0]}', b'old')])
    with pytest.warns(
        S1S2Warning, match=r'labels\.tgz holds 1 files with the name of another \(old/'
    ):
        season(server, tmp_path).run()
    assert tree(tmp_path) == expected


def test_series_of_what_the_archive_holds(server: Files, source: Path, tmp_path: Path) -> None:
    """An S1 archive that holds every third file, as one in the wild held a fifth."""
    part, root = tmp_path / 'part', tmp_path / 'root'
    shutil.copytree(source, part)
    for i, path in enumerate(sorted((part / 's1').iterdir())):
        if i % 3:
            path.unlink()
    server.contents['s1.tgz'] = pack_folder(part, 's1')
    with pytest.warns(UserWarning, match=r's1\.tgz lacks \d+ of the 12 files'):
        season(server, root).run()
    with pytest.warns(UserWarning, match='not on disk'):
        expected = season_of(part, MultiSenGE(part, split='train'))
    there = tree(root)
    assert expected.items() <= there.items()
    # Beside them is only what was taken before the end of the archive told what it lacks.
    first_choice = season_of(source, MultiSenGE(source, split='train'))
    assert there.keys() <= expected.keys() | first_choice.keys()
    server.asked.clear()
    season(server, root).run()
    assert server.asked == []


def test_plan_follows_what_the_archive_holds(server: Files, source: Path, tmp_path: Path) -> None:
    names = sorted(p.name for p in (source / 's1').iterdir())
    server.contents['s1.tgz'] = pack_folder(source, 's1', leave_out=set(names) - {*names[::3]})
    every = season(server, tmp_path, tiles=None, series=EVERY_DATE['s1'], sensors=['s1'])
    assert every.plan().size == 4 * 65_536 + len(names) * 524_288
    interrupt(server, every.run, 's1.tgz', int(0.7 * len(server.contents['s1.tgz'])))
    plan = every.plan()
    assert plan.in_all['s1'] == len(names)
    assert plan.held['s1'] == pytest.approx(len(names) / 3, rel=0.1)
    # A file of 16 x 16 pixels of 8 bytes takes a header, its tags and at least four blocks.
    assert plan.sizes['s1'] == pytest.approx(512 * 6.5, rel=0.2)
    assert plan.size < 1.1 * len(names) / 3 * plan.sizes['s1']
    with pytest.warns(S1S2Warning, match=r's1\.tgz lacks'):
        every.run()
    plan = every.plan()
    assert plan.held['s1'] == len(names[::3])
    assert plan.needed['s1'] == {*names[::3]}
    assert plan.size == 0


def test_checksums(server: Files, tmp_path: Path, expected: Mapping[str, bytes]) -> None:
    season(server, tmp_path).run()
    lines = (tmp_path / 'checksums.sha256').read_text().splitlines()
    assert sorted(lines) == sorted(
        f'{hashlib.sha256(content).hexdigest()}  {name}' for name, content in expected.items()
    )
    season(server, tmp_path).verify()
    name = min(name for name in expected if name.startswith('s1/'))
    (tmp_path / name).write_bytes(expected[name][:-1])
    with pytest.raises(DownloadError, match=f'is another for .*/{name}; delete'):
        MultiSenGE(tmp_path, split='train', checksum=True)
    (tmp_path / name).unlink()
    label = min(name for name in expected if name.startswith('labels/'))
    (tmp_path / label).write_bytes(expected[label].replace(b'202007', b'202008'))
    with pytest.raises(DownloadError, match=f'is another for .*/{label}; delete'):
        MultiSenGE(tmp_path, split='train', checksum=True)
    (tmp_path / label).unlink()
    season(server, tmp_path).run()
    season(server, tmp_path).verify()
    assert tree(tmp_path) == expected


def test_files_of_another_source_are_recorded_when_verified(source: Path, tmp_path: Path) -> None:
    root = tmp_path / 'root'
    shutil.copytree(source, root)
    dataset = MultiSenGE(root, split='train', checksum=True)
    path = dataset.files_of(0)['s1'][0]
    path.write_bytes(b'II*\0')
    with pytest.raises(DownloadError, match=path.name):
        MultiSenGE(root, split='train', checksum=True)


def test_file_fetched_again_that_differs(
    server: Files, tmp_path: Path, expected: Mapping[str, bytes]
) -> None:
    season(server, tmp_path).run()
    names = [name for name in expected if name.startswith('s1/')]
    (tmp_path / names[0]).unlink()
    (tmp_path / '.download' / 's1.json').unlink()
    server.contents['s1.tgz'] = pack([(name, b'other') for name in names])
    with pytest.raises(DownloadError, match=f'{names[0]}: what .* another checksum than'):
        season(server, tmp_path).run()
    assert not (tmp_path / names[0]).exists()


def test_plan_by_hand(server: Files, tmp_path: Path) -> None:
    """Two patches, the second without a July."""
    s1 = ('20200703', '20200802', '20200903', '20200905', '20201107', '20201231')
    write_label_file(tmp_path, '31UEQ', 0, 0, s2=('20200101', *S2_DATES), s1=s1)
    write_label_file(tmp_path, '31UEQ', 257, 0, s2=S2_DATES[1:], s1=S1_DATES)
    plan = season(server, tmp_path, tiles=['31UEQ']).plan()
    assert server.asked == []  # the labels are there, and nothing else is needed to plan
    # S2: 6 July, 5 August, 4 September, 8 November; S1: the nearest, the earlier of two as near.
    assert plan.needed['s2'] == {f'31UEQ_{d}_S2_0_0.tif' for d in S2_DATES}
    nearest = ('20200703', '20200802', '20200903', '20201107')
    assert plan.needed['s1'] == {f'31UEQ_{d}_S1_0_0.tif' for d in nearest}
    assert plan.missing == plan.needed
    assert (plan.patches, plan.patches_in_all) == (1, 2)
    assert plan.in_all == {'ground_reference': 2, 's2': 8, 's1': 10}
    assert plan.held == {'ground_reference': None, 's2': None, 's1': None}
    assert 'of the S1 files of MultiSenGE about a fifth exist' in str(plan)
    # Two label rasters of 65,536 bytes, four images of 1,310,720 and four of 524,288.
    assert plan.size == 2 * 65_536 + 4 * 1_310_720 + 4 * 524_288
    assert 'patches with the series: 1 of 2' in str(plan)


def test_plan_of_the_paper(real_labels: Path, server: Files, tmp_path: Path) -> None:
    (tmp_path / 'labels').symlink_to(real_labels / 'labels')
    plan = season(server, tmp_path).plan()
    # 3,369 patches are published; each has four dates of each sensor.
    assert plan.patches == 3369
    assert {s: len(plan.needed[s]) for s in ('s2', 's1')} == {'s2': 4 * 3369, 's1': 4 * 3369}
    assert plan.in_all == {'ground_reference': 8157, 's2': 72033, 's1': 1012227}
    assert plan.size == 13476 * (1_310_720 + 524_288) + 8157 * 65_536


def test_disk_that_is_too_small(
    server: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 12 images of each sensor and 4 label rasters have 22.3 MB of pixels.
    usage = shutil.disk_usage(tmp_path)._replace(free=22_000_000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(DownloadError, match=r'about 0\.0 GB .* free; make room'):
        season(server, tmp_path).run()
    assert not list((tmp_path / 's2').iterdir())
    usage = usage._replace(free=23_000_000)
    season(server, tmp_path).run()


def test_disk_that_fills_up_meanwhile(
    server: Files, tmp_path: Path, expected: Mapping[str, bytes]
) -> None:
    message = r'is full \(.*\)\. What was written is whole; make'
    largest = max(map(len, expected.values()))
    with full_disk(largest - 1), pytest.raises(DownloadError, match=message):
        season(server, tmp_path).run()
    assert tree(tmp_path).items() <= expected.items()
    season(server, tmp_path).run()
    assert tree(tmp_path) == expected


@pytest.mark.parametrize('missing', ['drop', 'keep', 'nearest'])
@pytest.mark.parametrize('leader', ['s2', 's1'])
def test_every_draw_is_among_the_candidates(missing: Any, leader: Any) -> None:
    few = np.array(['2020-01-05', '2020-04-01', '2020-07-02', '2020-09-30'], 'datetime64[s]')
    many = np.datetime64('2020-01-01', 's') + np.arange(0, 366, 6) * np.timedelta64(1, 'D')
    rule = RandomDates(3, missing=missing, leader=leader, s1_per_slot=2)
    times = {'s2': few, 's1': many} if leader == 's2' else {'s2': many, 's1': few}
    candidates = rule.candidates(times)
    drawn: dict[str, set[int]] = {'s2': set(), 's1': set()}
    for draw in range(100):
        for sensor, slots in rule.select(times, draw).items():
            drawn[sensor] |= {p for slot in slots for p in slot}
    assert drawn == candidates
    if leader == 's2':
        # 5 January lies between day 0 and 6 of the year; the others are days 91, 183 and 273.
        assert candidates == {'s2': {0, 1, 2, 3}, 's1': {0, 1, 15, 16, 30, 31, 45, 46}}


@pytest.mark.parametrize('rule', [RandomDates(2), EvenlySpaced(2), MonthlySeries()])
def test_no_candidates_without_a_series(rule: DateRule) -> None:
    with pytest.raises(NoSeriesError):
        rule.candidates({'s2': np.array(['2020-01-05'], 'datetime64[s]')})


def test_data_set(
    server: Files, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    series = EvenlySpaced(2)
    with pytest.raises(DatasetNotFoundError, match='download=True'):
        MultiSenGE(tmp_path / 'none', series=series)
    with pytest.warns(UserWarning, match='not on disk'):
        dataset = MultiSenGE(tmp_path, split='test', series=series, sensors=['s2'], download=True)
    whole = MultiSenGE(source, split='test', series=series, sensors=['s2'])
    assert dataset[0]['image'].equal(whole[0]['image'])
    assert {p.name[:5] for p in (tmp_path / 's2').iterdir()} == {'31UEQ'}
    assert len(list((tmp_path / 's2').iterdir())) == 2
    assert not list((tmp_path / 's1').iterdir())
    assert 'patches with the series: 1 of 4' in capsys.readouterr().out


def test_data_module(server: Files, source: Path, tmp_path: Path) -> None:
    splits = {'train': ['31UFQ'], 'val': ['31UEQ'], 'test': ['31UEQ']}
    data = MultiSenGEDataModule(tmp_path, 1, splits=splits, source=Download(checksum=True))
    with pytest.warns(UserWarning, match='not on disk'):
        data.prepare_data()
    assert tree(tmp_path) == season_of(source, MultiSenGE(source, split='all'))
    server.asked.clear()
    data.prepare_data()
    assert server.asked == []


class InMemory(RemoteFile):
    """Bytes in memory in the place of those on a server."""

    def __init__(self, content: bytes, position: int = 0) -> None:
        self.content, self.position = content, position

    def read(self, size: int) -> bytes:
        data = self.content[self.position : self.position + size]
        self.position += len(data)
        return data


def mixed(size: int) -> bytes:
    """Noise, which deflate stores, zeros and digits."""
    rng = random.Random(1)
    digits = bytes(rng.choices(b'0123456789', k=size // 4))
    return (rng.randbytes(size // 4) + bytes(size // 4) + digits) * 2


def test_interrupted_in_a_gzip_of_many_small_members(server: Files, tmp_path: Path) -> None:
    """As pigz and bgzip write them: no block within one ends with a byte."""
    content = gzip.decompress(server.contents['s2.tgz'])
    parts = [content[i : i + 4000] for i in range(0, len(content), 4000)]
    server.contents['s2.tgz'] = b''.join(map(gzip.compress, parts)) + bytes(512)
    cut = len(server.contents['s2.tgz']) // 2
    interrupt(server, every_date(server, tmp_path, 's2').run, 's2.tgz', cut)
    every_date(server, tmp_path, 's2').run()
    # 8 KiB to the next restart point, and a member of at most 4 kB.
    assert cut - 2 * (2**13 + 4096) < server.first_bytes('s2.tgz')[0] <= cut


@pytest.mark.parametrize('level', [0, 1, 6, 9])
@pytest.mark.parametrize('members', [1, 3])
def test_output_from_every_restart_point(
    level: int, members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, '_CHUNK', 1024)
    stream = compress(mixed(100_000), level) + b''.join(
        bytes(3) + compress(mixed(50_000), level) for _ in range(members - 1)
    )
    whole = gzip.decompress(stream)
    reader = GzipReader(InMemory(stream), RestartPoint(), 2**12)
    points, parts = [], []
    while part := reader.read(777):
        parts.append(part)
        if reader.point:
            points.append(reader.point)
            reader.point = None
    assert b''.join(parts) == whole
    assert len(points) >= 2 * members
    for point in points:
        again = GzipReader(InMemory(stream, point.compressed), point, 2**30)
        assert again.tell() == point.position
        assert again.read(len(whole)) == whole[point.position :]
    damaged = stream[:-8] + bytes(8)
    with pytest.raises(zlib.error, match='incorrect data check'):
        GzipReader(InMemory(damaged, points[-1].compressed), points[-1], 2**30).seek(10**9)
