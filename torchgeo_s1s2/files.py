"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a place to write a file and its sidecars; they reach ``path`` only when complete.

    What is written is on the disk before it takes its name, so a disk that fills up or a power cut
    leaves no half file. Several processes and machines may write the same file: the last one stays.

    Args:
        path: Where the file shall be; a file that is there is replaced.

    Yields:
        A path of the same name in a temporary folder of the same file system.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        sidecars = (file for file in sorted(Path(folder).iterdir()) if file != temporary)
        for file in (*sidecars, temporary):
            with file.open('rb') as written:
                os.fsync(written.fileno())
            file.replace(path.parent / file.name)
