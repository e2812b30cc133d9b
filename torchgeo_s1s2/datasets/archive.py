"""Files out of a gzipped tar archive on a server, as it streams by.

The archive is never on disk. A gzip stream cannot be entered anywhere, since its blocks begin
within a byte and refer to the 32 KiB of output before them. But where a block happens to end with
a byte, one in eight does, ``zlib.decompressobj(-15, zdict=...)`` can begin if it is given those
32 KiB. A journal keeps such a restart point about every GiB, with the names of the files between
them. So a run that was interrupted continues at the last restart point, and a later one reads
only the stretches that hold its files.
"""

import json
import os
import re
import struct
import tarfile
import time
import warnings
import zlib
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from torchgeo_s1s2.errors import ArchiveChangedError, DownloadError, S1S2Warning

_WINDOW = 2**15
_CHUNK = 2**16
_MOST = 2**25
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
        pairs = zip(self, other, strict=True)
        return any(a != b for a, b in pairs if a is not None and b is not None)


@dataclass(frozen=True)
class RestartPoint:
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

    def __init__(self, path: Path) -> None:
        """Read a journal, or begin one; a last line that was cut off is ignored.

        Raises:
            DownloadError: If it is damaged otherwise.
        """
        self.path = path
        self.version: Version | None
        self.starts: list[RestartPoint]
        self.names: list[frozenset[str]]
        self._forget()
        if not path.exists():
            return
        *lines, rest = path.read_bytes().split(b'\n')
        self._size = path.stat().st_size - len(rest)
        try:
            self._load([json.loads(line) for line in lines])
        except (ValueError, KeyError, TypeError) as error:
            raise DownloadError(
                f'{path} is damaged ({error}); delete it, and the archive is read from its start'
            ) from error

    def _load(self, contents: list[dict[str, Any]]) -> None:
        if contents:
            self.version = Version(*contents[0]['version'])
            self.replaced = contents[0]['replaced']
        for content in contents[1:]:
            self._remember(content)

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
            self._append({'version': version, 'replaced': self.replaced})

    def add(self, names: Collection[str], end: RestartPoint | None) -> None:
        """Record the stretch that follows the last one; None ends it with the archive."""
        point = end and {**vars(end), 'window': b64encode(end.window).decode()}
        content = {'names': sorted(names), 'end': point}
        self._append(content)
        self._remember(content)

    def start_anew(self) -> None:
        """Forget everything, but not that another version was there."""
        self._forget()
        self.replaced = True

    def _forget(self) -> None:
        self._size, self.version, self.replaced = 0, None, False
        self.starts, self.names = [RestartPoint()], []

    def _remember(self, content: dict[str, Any]) -> None:
        self.names.append(frozenset(content['names']))
        if end := content['end']:
            self.starts.append(RestartPoint(**{**end, 'window': b64decode(end['window'])}))

    def _append(self, content: object) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('r+b' if self.path.exists() else 'wb') as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(json.dumps(content).encode() + b'\n')
            self._size = file.tell()
            file.flush()
            os.fsync(file.fileno())


class RemoteFile:
    """Bytes of a file on a server, read forwards; a broken connection goes on at the same byte.

    A server without ranges sends the bytes before it once more, and they are dropped.

    Attributes:
        position: Bytes before the one that is read next.
        version: Version of the file.
        retries: How often in a row a connection may fail.
        backoff: Seconds before the first retry; they double with each.
        timeout: Seconds to wait for a connection, and for bytes.
        patience: Seconds that a busy server may ask to wait.
    """

    retries = 6
    backoff = 1.0
    timeout = (10, 60)
    patience = 600.0

    def __init__(
        self,
        url: str,
        version: Version | None = None,
        position: int = 0,
        hosts: Collection[str] = (),
    ) -> None:
        """Connect at the first read.

        Args:
            url: Where the file is.
            version: Version that it must have, that of the first response if None.
            position: First byte to read.
            hosts: Other hosts to which the server may redirect.
        """
        self.url, self.version, self.position, self.hosts = url, version, position, hosts
        self._session = requests.Session()
        self._session.hooks['response'].append(self._check_redirect)
        self._response: requests.Response | None = None
        self._failures, self._pause = 0, 0.0

    def __enter__(self) -> 'RemoteFile':
        """Return the file."""
        return self

    def __exit__(self, *args: object) -> None:
        """Close the connection."""
        self._disconnect()
        self._session.close()

    def read(self, size: int) -> bytes:
        """Read up to a number of bytes, none at the end of the file.

        Raises:
            ArchiveChangedError: If the file has another version than before.
            DownloadError: If the server does not give it.
        """
        while True:
            try:
                data = self._read(size)
            except (OSError, HTTPError) as error:  # those of requests are OSErrors
                self._wait(error)
                continue
            self._failures = 0
            return data

    def _read(self, size: int) -> bytes:
        if self.version is not None and self.position == self.version.length:
            return b''
        response = self._response or self._connect()
        data: bytes = response.raw.read(size, decode_content=False)
        if not data and response.headers.get('Content-Length'):
            raise ConnectionError('the connection ended early')
        self.position += len(data)
        return data

    def _connect(self) -> requests.Response:
        headers = {'Accept-Encoding': 'identity'}
        if self.position:
            headers['Range'] = f'bytes={self.position}-'
            etag = self.version.etag if self.version else None
            if etag and not etag.startswith('W/'):
                headers['If-Range'] = etag
        response = self._session.get(self.url, headers=headers, stream=True, timeout=self.timeout)
        self._response = response
        self._check_status(response)
        self._check_version(Version.of(response))
        if response.status_code == requests.codes.partial_content:
            first = response.headers.get('Content-Range', '')
            if not first.startswith(f'bytes {self.position}-'):
                raise DownloadError(
                    f'{self.url}: asked for the bytes from {self.position} on, the server sent '
                    f'{first!r}; take another url'
                )
            return response
        skipped = 0
        while skipped < self.position:
            data = response.raw.read(min(_CHUNK, self.position - skipped), decode_content=False)
            if not data:
                raise ConnectionError('the connection ended early')
            skipped += len(data)
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

    def _check_version(self, version: Version) -> None:
        if self.version is None:
            self.version = version
        elif self.version.differs(version):
            raise ArchiveChangedError(
                f'{self.url} has changed since its download began: it was {self.version}, it is '
                f'{version}'
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
        time.sleep(max(self._pause, self.backoff * 2 ** (self._failures - 1)))
        self._pause = 0.0

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


class GzipReader:
    """Output of a gzip stream, read forwards from a restart point.

    Attributes:
        point: The last restart point that reading came by, None unless there is a new one.
    """

    def __init__(
        self, source: RemoteFile, start: RestartPoint, spacing: int, limit: int = 2**63
    ) -> None:
        """Begin at a restart point.

        Args:
            source: The gzip stream, at ``start.compressed``.
            start: Where it begins.
            spacing: Bytes of the gzip stream after which the next restart point is looked for.
            limit: Bytes that the output may have.
        """
        self.point: RestartPoint | None = None
        self._source, self._spacing, self._limit = source, spacing, limit
        self._search_from = start.compressed + spacing
        self._position = self._end = start.position
        self._crc, self._size, self._window = start.crc, start.size, start.window
        self._raw = bool(start.window)
        self._inflate: Any = None
        if self._raw:
            self._inflate = zlib.decompressobj(-zlib.MAX_WBITS, zdict=start.window)
        self._input, self._output = memoryview(b''), memoryview(b'')

    def tell(self) -> int:
        """Bytes of the output before the one that is read next."""
        return self._position

    def seek(self, position: int) -> None:
        """Read on to a position, which must not lie before this one."""
        while self._position < position and self.read(min(_CHUNK, position - self._position)):
            pass

    def read(self, size: int) -> bytes:
        """Read a number of bytes, fewer only at the end.

        Raises:
            DownloadError: If the output is larger than it may be.
            EOFError: If the stream ends within.
            tarfile.ReadError: If the number is not one that a file or a header has.
            zlib.error: If it is damaged.
        """
        if size > _MOST:
            raise tarfile.ReadError(f'a header of {size} bytes')
        parts = []
        while size > 0 and (self._output or self._fill()):
            parts.append(self._output[:size])
            self._output = self._output[size:]
            size -= len(parts[-1])
        data = b''.join(parts)
        self._position += len(data)
        return data

    def _fill(self) -> bool:
        """Give more output; False at the end of the stream."""
        while not self._output:
            if self._inflate is None and not self._begin_member():
                return False
            if not self._input:
                self._input = self._next_chunk()
            searching = self._source.position - len(self._input) >= self._search_from
            if searching and self._window and self._at_restart_point():
                self._note_restart_point()
                searching = False
            size = 1 if searching else len(self._input)
            data = self._inflate.decompress(self._input[:size])
            self._input = self._input[size:]
            self._keep(data)
            if self._inflate.eof:
                self._end_member()
        return True

    def _keep(self, data: bytes) -> None:
        if data:
            self._output = memoryview(data)
            self._end += len(data)
            self._size += len(data)
            self._crc = zlib.crc32(data, self._crc)
            self._window = (self._window + data)[-_WINDOW:]
        if self._end > self._limit:
            raise DownloadError(
                f'{self._source.url} unpacks to more than the {self._limit:,} bytes that such an '
                'archive can have; take another url'
            )

    def _next_chunk(self) -> memoryview:
        chunk = self._source.read(_CHUNK)
        if not chunk:
            raise EOFError(f'the gzip stream breaks off at its byte {self._source.position}')
        return memoryview(chunk)

    def _begin_member(self) -> bool:
        """Begin the next gzip member, which zeros may precede; False if there is none."""
        rest = bytes(self._input).lstrip(b'\0')
        while not rest:
            chunk = self._source.read(_CHUNK)
            if not chunk:
                return False
            rest = chunk.lstrip(b'\0')
        self._input = memoryview(rest)
        self._inflate, self._raw = zlib.decompressobj(16 + zlib.MAX_WBITS), False
        self._crc, self._size, self._window = 0, 0, b''
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

    def _note_restart_point(self) -> None:
        compressed = self._source.position - len(self._input)
        self._search_from = compressed + self._spacing
        self.point = RestartPoint(
            compressed, self._end, self._end, self._crc, self._size, self._window
        )


class RemoteArchive:
    """Files of a gzipped tar archive on a server.

    Attributes:
        url: Where it is.
        journal: What earlier runs saw of it.
        spacing: Bytes between restart points, and so how many are fetched again at most.
    """

    spacing = 2**30

    def __init__(
        self,
        url: str,
        journal: Path,
        progress: bool = True,
        kind: Kind | None = None,
        hosts: Collection[str] = (),
    ) -> None:
        """Read the journal; nothing is fetched.

        Args:
            url: Where the archive is.
            journal: Where to keep what is seen of it.
            progress: Show a progress bar of the bytes read.
            kind: What it can hold.
            hosts: Other hosts to which the server may redirect.
        """
        self.url = url
        self.journal = Journal(journal)
        self.kind = kind or Kind()
        self.hosts = hosts
        self.progress = progress

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
        try:
            yield from self._read(None if names is None else set(names))
        except (zlib.error, EOFError, tarfile.TarError) as error:
            raise DownloadError(
                f'{self.url} is damaged or cut off ({error}). What was written is whole; run the '
                'same again, and if it ends here again the archive on the server is, so take '
                'another url'
            ) from error

    def _read(self, todo: set[str] | None) -> Iterator[tuple[str, bytes]]:
        for start, names in list(zip(self.journal.starts, self.journal.names, strict=False)):
            there = set(names) if todo is None else todo & names
            if there:
                yield from self._wanted(self._members(start), there)
            if todo is not None:
                todo -= names
        if not self.journal.complete and (todo is None or todo):
            yield from self._wanted(self._new_members(), todo)

    def _wanted(
        self, members: Iterator[tuple[GzipReader, tarfile.TarInfo]], todo: set[str] | None
    ) -> Iterator[tuple[str, bytes]]:
        """The files to do, up to the last of them."""
        for reader, member in members:
            name = self._name(member)
            if name is not None and (todo is None or name in todo):
                yield name, self._content(reader, member)
                if todo is not None:
                    todo.remove(name)
                    if not todo:
                        return

    def _new_members(self) -> Iterator[tuple[GzipReader, tarfile.TarInfo]]:
        """Files after the last restart point, noting new ones; none of a name that was there."""
        earlier, names, again = self.journal.all_names, set[str](), list[str]()
        for reader, member in self._members(self.journal.starts[-1]):
            if reader.point and member.offset >= reader.point.position:
                self.journal.add(names, replace(reader.point, header=member.offset))
                earlier |= names
                reader.point, names = None, set()
            name = self._name(member)
            if name in names or name in earlier:
                again.append(member.name)
            elif name is not None:
                names.add(name)
                if len(earlier) + len(names) > self.kind.files:
                    raise DownloadError(
                        f'{self.url} holds more than the {self.kind.files:,} files that such an '
                        'archive can have; take another url'
                    )
                yield reader, member
        self.journal.add(names, None)
        if again:
            warnings.warn(
                f'{self.url} holds {len(again)} files with the name of another ({again[0]} ...); '
                'the first of each name is taken',
                S1S2Warning,
                stacklevel=2,
            )

    def _members(self, start: RestartPoint) -> Iterator[tuple[GzipReader, tarfile.TarInfo]]:
        """Entries from a restart point to the end, each with the reader at its content."""
        version, first = self.journal.version, start.compressed
        with RemoteFile(self.url, version, first, self.hosts) as remote:
            reader = GzipReader(remote, start, self.spacing, self.kind.total_size)
            reader.seek(start.header)
            as_file: Any = reader
            tar: Any = tarfile.TarFile(fileobj=as_file)
            self.journal.begin(remote.version)
            with self._bar(remote) as bar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # or a million of them would be kept
                    yield reader, member
                    bar.update(remote.position - bar.n)
            while rest := reader.read(_CHUNK):
                if rest.strip(b'\0'):
                    raise tarfile.ReadError(f'no header before byte {reader.tell()} of the tar')

    def _bar(self, remote: RemoteFile) -> Any:
        return tqdm(
            desc=PurePosixPath(self.url).name,
            total=remote.version.length if remote.version else None,
            initial=remote.position,
            unit='B',
            unit_scale=True,
            disable=not self.progress,
        )

    def _content(self, reader: GzipReader, member: tarfile.TarInfo) -> bytes:
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
        suffix = path.suffix.lower()
        name = path.stem + ('.tif' if suffix == '.tiff' else suffix)
        return name if re.fullmatch(self.kind.names, name) else None
