"""Files that are there whole or not at all, and the folder of a run's unfinished ones."""

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from operator import itemgetter
from pathlib import Path
from typing import Any

from torchgeo_s1s2.errors import DataError, NoRoomError

fcntl: Any = None
with suppress(ImportError):  # not on Windows
    import fcntl


@contextmanager
def whole(path: str | os.PathLike[str], within: Path | None = None) -> Iterator[Path]:
    """Give a place to write a file and those that belong to it; they take their names together.

    What is written is on the disk before it takes its name, so neither a full disk nor a power cut
    leaves half a file. Several processes and machines may write the same file: the last one stays.

    Args:
        path: Where the file shall be; a file that is there is replaced.
        within: Folder of the same file system to write in; that of the file unless given.

    Yields:
        A path of the same name in a temporary folder of the same file system.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=within or path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        others = (file for file in sorted(Path(folder).iterdir()) if file != temporary)
        files = (*others, temporary)
        for file in files:
            with file.open('rb') as written:
                os.fsync(written.fileno())
        for file in files:
            file.replace(path.parent / file.name)


def stamp(file: Path | os.DirEntry[str]) -> tuple[int, int, int]:
    """Times of modification and of change in ns, and bytes: whether a file is as it was."""
    status = file.stat()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size


def stamps[F: (Path, os.DirEntry[str])](
    files: Iterable[F],
) -> Iterator[tuple[F, tuple[int, int, int]]]:
    """Files, each with its stamp, without links to nothing."""
    for file in files:
        with suppress(FileNotFoundError):
            yield file, stamp(file)


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = None) -> None:
    """Write JSON, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent))


def read_json(path: Path) -> Any:
    """What a file of JSON that the package wrote holds.

    Raises:
        DataError: If it is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f'{path} is damaged ({error}); delete it') from error


def check_room(folder: Path, size: float, choice: str) -> None:
    """Refuse to write more bytes than the disk has free; a choice is what else could be done."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise NoRoomError(
            f'about {size / 1e9:.1f} GB are to be written to {folder}, its disk has '
            f'{free / 1e9:.1f} GB free; make room, or {choice}'
        )


class Workplace:
    """Hidden folder of one run's unfinished files, which the run holds as long as it lives.

    Runs that share a folder, on one machine or several, each have their own, and tell by a lock
    which of the others live. A run that died leaves its folder, to be continued or removed.

    Attributes:
        path: The folder.
    """

    prefix = '.torchgeo_s1s2-'

    def __init__(self, path: Path) -> None:
        """Keep the path."""
        self.path = path
        self._lock: BufferedIOBase | None = None

    @classmethod
    def new(cls, folder: Path) -> 'Workplace':
        """Make one in a folder, and hold it.

        Raises:
            OSError: If that cannot be written to.
        """
        workplace = cls(Path(tempfile.mkdtemp(prefix=cls.prefix, dir=folder)))
        # Nobody may find the lock before it is held.
        workplace._hold('new')
        (workplace.path / 'new').rename(workplace.path / 'lock')
        return workplace

    @classmethod
    def found(cls, folder: Path) -> tuple[list['Workplace'], int]:
        """Those with parts that dead runs left in a folder, oldest first, and how many live.

        The first are held now; those without parts are removed.
        """
        # On a shared disk, what a run has just removed may still be listed.
        locks = stamps(folder.glob(f'{cls.prefix}*/lock'))
        every = [cls(lock.parent) for lock, _ in sorted(locks, key=itemgetter(1))]
        dead = [workplace for workplace in every if workplace._hold('lock')]
        for workplace in dead:
            if not workplace.parts:
                workplace.remove()
        return [workplace for workplace in dead if workplace.parts], len(every) - len(dead)

    @property
    def parts(self) -> list[Path]:
        """What the run has finished of its work, ``part-RANK-NUMBER.npz``."""
        return sorted(self.path.glob('part-?????-?????.npz'))

    def leave(self) -> None:
        """Let another run have it, or remove it if there is nothing to continue from."""
        if not self.parts:
            self.remove()
        elif self._lock:
            self._lock.close()

    def remove(self) -> None:
        """Delete what this package wrote, and the folder if it is empty then."""
        for file in self.parts:
            if zipfile.is_zipfile(file):
                file.unlink()
        for folder in self.path.glob('.*.*/'):
            shutil.rmtree(folder, ignore_errors=True)
        (self.path / 'lock').unlink(missing_ok=True)
        if self._lock:
            self._lock.close()
        with suppress(OSError):
            self.path.rmdir()

    def _hold(self, name: str) -> bool:
        """Hold it until the lock is closed; False if another run does. Without locks all do."""
        self._lock = (self.path / name).open('ab')
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._lock.close()
            return False
        except OSError:
            pass  # a file system without locks
        return True
