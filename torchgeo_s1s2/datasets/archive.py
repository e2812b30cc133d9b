"""Files out of a gzipped tar archive on a server, as it streams by.

The archive is never on disk. A gzip stream cannot be entered anywhere, since its blocks begin
within a byte and refer to the 32 KiB of output before them. But where a block happens to end with
a byte, one in eight does, ``zlib.decompressobj(-15, zdict=...)`` can begin if it is given those
32 KiB. A journal keeps such a restart point about every GiB, with the names of the files between
them. So a run that was interrupted continues at the last restart point, and a later one reads
only the stretches that hold its files.
"""

import json
import re
import struct
import tarfile
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterator, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from torchgeo_s1s2.errors import ArchiveChangedError, DownloadError, warn
from torchgeo_s1s2.files import write_json

_WINDOW = 2**15
_CHUNK = 2**16
_MOST = 2**25
_MAGIC = b'\x1f\x8b'
_EMPTY_FINAL_BLOCK = b'\x03\x00'


class Kind(NamedTuple):
    """What an archive can hold: names of files and, so that a hostile one does no harm, the most.

    Sizes are in bytes; ``total_size`` is that of the whole tar archive.
    """

    names: str = '.+'
    files: int = 2**23
    file_size: int = 2**24
    total_size: int = 2**42


class Version(NamedTuple):
    """What tells one version of a file on a server from another; None where it does not say."""

    etag: str | None
    modified: str | None
    length: int | None

    @classmethod
    def of(cls, response: requests.Response) -> 'Version':
        """Version of the file of which a response brings the whole or a part."""
        headers = response.headers
        length = headers.get('Content-Length', '')
        if response.status_code == requests.codes.partial_content:
            length = headers.get('Content-Range', '').rpartition('/')[2]
        known = int(length) if length.isdigit() else None
        return cls(headers.get('ETag'), headers.get('Last-Modified'), known)

    def differs(self, other: 'Version') -> bool:
        """Whether both say something, and not the same."""
        return any(a != b for a, b in zip(self, other, strict=True) if None not in (a, b))


class RestartPoint(NamedTuple):
    """Where reading can begin.

    Attributes:
        compressed: Bytes of the gzip stream before it.
        position: Bytes of the tar archive before it.
        header: Where the first header at or after it begins in the tar archive.
        crc: Checksum of what the gzip member has given so far.
        size: How many bytes these are.
        window: The last 32 KiB of them; empty where a gzip member begins.
    """

    compressed: int = 0
    position: int = 0
    header: int = 0
    crc: int = 0
    size: int = 0
    window: bytes = b''


class Journal:
    """What earlier runs saw of an archive: its version, restart points and the files between.

    Attributes:
        version: Version of the archive, None before it was first opened.
        replaced: Whether an earlier version was there, whose files may still be on disk.
        starts: Restart points; each begins a stretch.
        names: File names in each stretch that was read to its end.
    """

    version: Version | None
    names: list[frozenset[str]]

    def __init__(self, path: Path) -> None:
        """Read a journal, or begin one."""
        self.path = path
        self.replaced = False
        self._forget()
        if not path.exists():
            return
        try:
            content = json.loads(path.read_bytes())
            self.version, self.replaced = Version(*content['version']), content['replaced']
            self.names = [*map(frozenset, content['names'])]
            self.starts += [
                RestartPoint._make((*n, b64decode(window))) for *n, window in content['starts']
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise DownloadError(
                f'{path} is damaged ({error}); delete it, and the archive is read from its start'
            ) from error

    @property
    def complete(self) -> bool:
        """Whether the archive was read to its end, so that all of its files are known."""
        return len(self.names) == len(self.starts)

    @property
    def all_names(self) -> frozenset[str]:
        """Names of the files seen so far."""
        return frozenset().union(*self.names)

    @property
    def files(self) -> int | None:
        """Number of files in the archive: as the part read so far suggests, None before one is."""
        seen, length = len(self.all_names), self.version.length if self.version else None
        if self.complete:
            return seen
        return round(seen * length / self.starts[-1].compressed) if seen and length else None

    @property
    def file_size(self) -> float | None:
        """Bytes that a file takes in the tar archive, None before a part of it is read."""
        seen = sum(map(len, self.names[: len(self.starts) - 1]))
        return self.starts[-1].position / seen if seen else None

    def begin(self, version: Version | None) -> None:
        """Record the version, before anything of it is written."""
        if self.version is None and version is not None:
            self.version = version
            self._save()

    def add(self, names: Collection[str], end: RestartPoint | None) -> None:
        """Record the stretch that follows the last one; None ends it with the archive."""
        self.names.append(frozenset(names))
        self.starts += [end] if end else []
        self._save()

    def start_anew(self, version: Version | None) -> None:
        """Forget everything, but not that another version was there."""
        self._forget()
        self.version, self.replaced = version, True
        self._save()

    def _forget(self) -> None:
        self.version = None
        self.starts = [RestartPoint()]
        self.names = []

    def _save(self) -> None:
        content = {
            'version': self.version,
            'replaced': self.replaced,
            'names': [sorted(names) for names in self.names],
            'starts': [(*n, b64encode(window).decode()) for *n, window in self.starts[1:]],
        }
        write_json(self.path, content)


@dataclass
class RemoteFile:
    """Bytes of a file on a server, read forwards; a broken connection goes on at the same byte.

    A server without ranges sends the bytes before it once more, and they are dropped.

    Attributes:
        url: Where the file is.
        version: Version that it must have, that of the first response if None.
        position: Bytes before the one that is read next.
        hosts: Other hosts to which the server may redirect.
        retries: How often in a row a connection may fail.
        backoff: Seconds before the second retry in a row; they double with each. The first is made
            at once, since some proxies end their answers before the file.
        timeout: Seconds to wait for a connection, and for bytes.
        patience: Seconds that a busy server may ask to wait.
    """

    url: str
    version: Version | None = None
    position: int = 0
    hosts: Collection[str] = ()

    retries: ClassVar[int] = 6
    backoff: ClassVar[float] = 1.0
    timeout: ClassVar[tuple[int, int]] = 10, 60
    patience: ClassVar[float] = 600.0

    def __post_init__(self) -> None:
        """Connect at the first read only."""
        self._session = requests.Session()
        self._session.hooks['response'].append(self._check_redirect)
        self._response: requests.Response | None = None
        self._failures, self._pause = 0, 0.0

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()
        self._session.close()

    def read(self, size: int) -> bytes:
        """Read up to a number of bytes, none at the end of the file."""
        while self.version is None or self.position != self.version.length:
            try:
                data: bytes = (self._response or self._connect()).raw.read(size)
                if not data and self.version and self.version.length is not None:
                    raise ConnectionError('the server sends no more')
            except (OSError, HTTPError) as error:  # those of requests are OSErrors
                self._wait(error)
                continue
            self._failures = 0
            self.position += len(data)
            return data
        return b''

    def _connect(self) -> requests.Response:
        headers = {'Accept-Encoding': 'identity'}
        if self.position:
            headers['Range'] = f'bytes={self.position}-'
            etag = self.version.etag if self.version else None
            if etag and not etag.startswith('W/'):
                headers['If-Range'] = etag
        response = self._session.get(self.url, headers=headers, stream=True, timeout=self.timeout)
        response.raw.enforce_content_length = True  # urllib3 1 takes an early end for the end
        self._response = response
        self._check_status(response)
        version = Version.of(response)
        if self.version is not None and self.version.differs(version):
            raise ArchiveChangedError(
                f'{self.url} has changed since its download began: it was {self.version}, it is '
                f'{version}'
            )
        self.version = self.version or version
        if response.status_code == requests.codes.partial_content:
            first = response.headers.get('Content-Range', '')
            if first.startswith(f'bytes {self.position}-'):
                return response
            raise DownloadError(
                f'{self.url}: asked for the bytes from {self.position} on, the server sent '
                f'{first!r}; take another url'
            )
        left = self.position
        while left and (dropped := response.raw.read(min(_CHUNK, left))):
            left -= len(dropped)
        return response

    def _check_redirect(self, response: requests.Response, **_: object) -> None:
        """Refuse to be led to a host that was not agreed to, or to a connection in the clear."""
        location = self._session.get_redirect_target(response)
        if location is None:
            return
        target = urlsplit(urljoin(response.url, location))
        if response.url.startswith('https:') and target.scheme != 'https':
            raise DownloadError(
                f'{self.url} leads to {target.geturl()}, which is not encrypted; take another url'
            )
        if target.netloc not in (urlsplit(self.url).netloc, *self.hosts):
            raise DownloadError(
                f'{self.url} leads to another host, {target.netloc}; if you trust it, allow it '
                f'with SeasonDownload(hosts=[{target.netloc!r}]) or give its folder as url'
            )

    def _check_status(self, response: requests.Response) -> None:
        status = response.status_code
        if status == requests.codes.requested_range_not_satisfiable:
            raise ArchiveChangedError(f'{self.url} has changed: it has no byte {self.position} now')
        if status in (408, 429) or status >= 500:
            self._pause = Retry().get_retry_after(response.raw) or 0.0
            raise ConnectionError(f'the server answers {status} {response.reason}')
        if status not in (200, 206):
            raise DownloadError(
                f'{self.url}: the server answers {status} {response.reason}; look whether the '
                'archive has moved, and give its folder as url'
            )

    def _wait(self, error: Exception) -> None:
        self._disconnect()
        self._failures += 1
        malformed = isinstance(error, ValueError)  # the url
        if self._failures >= self.retries or malformed or self._pause > self.patience:
            when = f' in {self._pause:.0f} seconds' if self._pause else ''
            raise DownloadError(
                f'{self.url}: reading from byte {self.position} on failed {self._failures} times '
                f'({error}); run the same again{when} to continue'
            ) from error
        again = self.backoff * 2 ** (self._failures - 2) if self._failures > 1 else 0
        time.sleep(max(self._pause, again))
        self._pause = 0.0

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


@dataclass
class GzipReader:
    """Output of a gzip stream, read forwards from a restart point.

    Attributes:
        source: The gzip stream, at ``start.compressed``.
        start: Where reading begins.
        spacing: Bytes of the gzip stream after which the next restart point is looked for.
        limit: Bytes that the output may have.
        point: The last restart point that reading came by, None unless there is a new one.
    """

    source: RemoteFile
    start: RestartPoint
    spacing: int
    limit: int = 2**63
    point: RestartPoint | None = None

    def __post_init__(self) -> None:
        """Begin at the restart point."""
        compressed, self._end, _, self._crc, self._size, self._window = self.start
        self._search_from = compressed + self.spacing
        self._raw = bool(self._window)
        self._inflate: Any = None
        if self._raw:
            self._inflate = zlib.decompressobj(-zlib.MAX_WBITS, zdict=self._window)
        self._input = self._output = memoryview(b'')

    def tell(self) -> int:
        """Bytes of the output before the one that is read next."""
        return self._end - len(self._output)

    def seek(self, position: int) -> None:
        """Read on to a position, which must not lie before this one."""
        while (left := position - self.tell()) > 0 and self.read(min(_CHUNK, left)):
            pass

    def read(self, size: int) -> bytes:
        """Read a number of bytes, fewer only at the end."""
        if size > _MOST:  # no file or header has so many
            raise tarfile.ReadError(f'a header of {size} bytes')
        parts = []
        while size > 0 and (self._output or self._fill()):
            parts.append(self._output[:size])
            self._output = self._output[size:]
            size -= len(parts[-1])
        return b''.join(parts)

    def _fill(self) -> bool:
        """Give more output; False at the end of the stream."""
        while not self._output:
            if self._inflate is None and not self._begin_member():
                return False
            if not self._input:
                self._input = self._next_chunk()
            if self._searching and self._window and self._at_restart_point():
                self._note_restart_point()
            size = 1 if self._searching else len(self._input)
            data = self._inflate.decompress(self._input[:size])
            self._input = self._input[size:]
            self._keep(data)
            if self._inflate.eof:
                self._end_member()
        return True

    @property
    def _compressed(self) -> int:
        """Bytes of the gzip stream before the one that is unpacked next."""
        return self.source.position - len(self._input)

    @property
    def _searching(self) -> bool:
        return self._compressed >= self._search_from

    def _note_restart_point(self) -> None:
        self.point = RestartPoint(
            self._compressed, self._end, self._end, self._crc, self._size, self._window
        )
        self._search_from = self._compressed + self.spacing

    def _keep(self, data: bytes) -> None:
        if data:
            self._output = memoryview(data)
            self._end += len(data)
            self._size += len(data)
            self._crc = zlib.crc32(data, self._crc)
            self._window = (self._window + data)[-_WINDOW:]
        if self._end > self.limit:
            raise DownloadError(
                f'{self.source.url} unpacks to more than the {self.limit:,} bytes that such an '
                'archive can have; take another url'
            )

    def _next_chunk(self) -> memoryview:
        chunk = self.source.read(_CHUNK)
        if not chunk:
            raise EOFError(f'the gzip stream breaks off at its byte {self.source.position}')
        return memoryview(chunk)

    def _begin_member(self) -> bool:
        """Begin the next gzip member, which zeros may precede; False if there is none."""
        while not (rest := bytes(self._input).lstrip(b'\0')):
            self._input = memoryview(self.source.read(_CHUNK))
            if not self._input:
                return False
        self._input = memoryview(rest)
        if not rest.startswith(_MAGIC[: len(rest)]):
            raise DownloadError(
                f'{self.source.url}: expected a gzip stream at byte {self._compressed}, the server '
                f'sends {rest[:60]!r}; see whether it wants a login, or take another url'
            )
        self._inflate, self._raw = zlib.decompressobj(16 + zlib.MAX_WBITS), False
        self._crc, self._size, self._window = 0, 0, b''
        if self._searching:
            self._note_restart_point()
        return True

    def _end_member(self) -> None:
        """Go on after a gzip member; zlib checks its trailer unless reading began within it."""
        rest = self._inflate.unused_data + bytes(self._input)
        if self._raw:
            while len(rest) < 8:
                rest += bytes(self._next_chunk())
            if rest[:8] != self._trailer():
                raise zlib.error('incorrect data check')
            rest = rest[8:]
        self._input, self._inflate = memoryview(rest), None

    def _trailer(self) -> bytes:
        return struct.pack('<II', self._crc, self._size % 2**32)

    def _at_restart_point(self) -> bool:
        """Whether a block ends here with a byte: the stream could then end with an empty one."""
        probe, trailer = self._inflate.copy(), self._trailer()
        try:
            probe.decompress(_EMPTY_FINAL_BLOCK + trailer)
        except zlib.error:
            return False
        return bool(probe.eof) and probe.unused_data == (trailer if self._raw else b'')


def usual_name(name: str) -> str:
    """Name of a file, with ``.tif`` for ``.TIF`` and ``.tiff``."""
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    return path.stem + ('.tif' if suffix == '.tiff' else suffix)


_Members = Iterator[tuple[str, tarfile.TarInfo, GzipReader]]


@dataclass
class RemoteArchive:
    """Files of a gzipped tar archive on a server.

    Attributes:
        url: Where it is.
        journal: What earlier runs saw of it.
        kind: What it can hold.
        hosts: Other hosts to which the server may redirect.
        progress: Show a progress bar of the bytes read.
        spacing: Bytes between restart points, and so how many are fetched again at most.
    """

    url: str
    journal: Journal
    kind: Kind
    hosts: Collection[str] = ()
    progress: bool = True

    spacing: ClassVar[int] = 2**30

    def read(self, names: Collection[str] | None = None) -> Iterator[tuple[str, bytes]]:
        """Files by name, in the archive's order; reading ends with the last of them.

        Only regular files with a name of the archive's kind count, by that name without folders and
        with ``.tif`` for ``.TIF`` and ``.tiff``: no link, no device, nothing with an absolute name
        or one that leads upwards. Of two of one name the first counts, and a warning counts others.

        Args:
            names: Names of the files; all unless given.

        Yields:
            Name and content.

        Raises:
            ArchiveChangedError: If the archive is another than the journal's.
            DownloadError: If the archive cannot be read, is damaged or cut off, holds more than
                its kind can, or a file in it has a wrong length.
        """
        wanted = None if names is None else frozenset(names)
        known = [*zip(self.journal.starts, self.journal.names, strict=False)]
        with self._named():
            for start, there in known:
                stretch = there if wanted is None else there & wanted
                yield from self._wanted(self._members(start), stretch)
            if not self.journal.complete:
                rest = None if wanted is None else wanted - self.journal.all_names
                yield from self._wanted(self._new_members(), rest)

    def new_version(self) -> Version | None:
        """Version of what is there now; an error unless it begins as an archive."""
        with self._named(), closing(RemoteFile(self.url, hosts=self.hosts)) as remote:
            self._tar(GzipReader(remote, RestartPoint(), self.spacing))
            return remote.version

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn errors of reading into those of the archive."""
        try:
            yield
        except (zlib.error, EOFError, tarfile.TarError) as error:
            raise DownloadError(
                f'{self.url} is damaged or cut off ({error}). What was written is whole; run the '
                'same again, and if it ends here again the archive on the server is, so take '
                'another url'
            ) from error

    def _wanted(self, members: _Members, names: Set[str] | None) -> Iterator[tuple[str, bytes]]:
        """Contents of these files, up to the last of them; nothing is opened for none."""
        todo = None if names is None else set(names)
        while (todo is None or todo) and (found := next(members, None)):
            name, member, reader = found
            if todo is None or name in todo:
                yield name, self._content(member, reader)
                if todo:
                    todo.remove(name)

    def _new_members(self) -> _Members:
        """Files after the last restart point, noting new ones; none of a name that was there."""
        earlier, names, again = self.journal.all_names, set[str](), list[str]()
        for name, member, reader in self._members(self.journal.starts[-1]):
            if reader.point and member.offset >= reader.point.position:
                self.journal.add(names, reader.point._replace(header=member.offset))
                earlier |= names
                reader.point, names = None, set()
            if name in names or name in earlier:
                again.append(member.name)
                continue
            names.add(name)
            if len(earlier) + len(names) > self.kind.files:
                raise DownloadError(
                    f'{self.url} holds more than the {self.kind.files:,} files that such an '
                    'archive can have; take another url'
                )
            yield name, member, reader
        self.journal.add(names, None)
        if again:
            warn(
                f'{self.url} holds {len(again)} files with the name of another ({again[0]} ...); '
                'the first of each name is taken'
            )

    def _members(self, start: RestartPoint) -> _Members:
        """Files from a restart point to the end, each with the reader at its content."""
        remote = RemoteFile(self.url, self.journal.version, start.compressed, self.hosts)
        with closing(remote):
            reader = GzipReader(remote, start, self.spacing, self.kind.total_size)
            reader.seek(start.header)
            tar = self._tar(reader)
            self.journal.begin(remote.version)
            with tqdm(
                desc=PurePosixPath(self.url).name,
                total=remote.version.length if remote.version else None,
                initial=remote.position,
                unit='B',
                unit_scale=True,
                disable=not self.progress,
            ) as bar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # or a million of them would be kept
                    if name := self._name(member):
                        yield name, member, reader
                    bar.update(remote.position - bar.n)
            while rest := reader.read(_CHUNK):
                if rest.strip(b'\0'):
                    raise tarfile.ReadError(f'no header before byte {reader.tell()} of the tar')

    def _tar(self, reader: GzipReader) -> Any:
        """The tar archive, of which the first header is read."""
        return tarfile.TarFile(fileobj=reader)  # type: ignore[arg-type]

    def _content(self, member: tarfile.TarInfo, reader: GzipReader) -> bytes:
        if member.size > self.kind.file_size:
            raise DownloadError(
                f'{member.name} in {self.url} has {member.size} bytes, more than the '
                f'{self.kind.file_size} that such a file can have; take another url'
            )
        content = reader.read(member.size)
        if len(content) != member.size:
            raise DownloadError(
                f'{member.name} in {self.url} has {len(content)} bytes, its header says '
                f'{member.size}; take another url'
            )
        return content

    def _name(self, member: tarfile.TarInfo) -> str | None:
        """Name of a file without its folders, None if it is none that the archive can hold."""
        path = PurePosixPath(member.name)
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
        if not plain or path.is_absolute() or '..' in path.parts:
            return None
        name = usual_name(path.name)
        return name if re.fullmatch(self.kind.names, name) else None
