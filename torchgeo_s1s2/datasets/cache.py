"""A table kept as GeoParquet beside the data that it describes."""

import os
import time
from hashlib import sha256
from pathlib import Path

import geopandas as gpd

from torchgeo_s1s2.errors import warn
from torchgeo_s1s2.files import stamp, stamps, whole

State = dict[str, list[int]]
"""Of files and folders by name: time of modification and of change in ns, and size or digest."""

CONTENTS = '/*'
"""A name with this ending stands for all files of a folder: newest times and a digest."""


class TableCache:
    """Keeps a table in a file as long as the files and folders that made it stay as they are.

    A folder changes when an entry is added, removed or renamed, and a file when it is written, in
    place or anew; both are noticed by the times of modification and of change, which no tool that
    restores the former can set back. Reading is as quick as that, as nothing is listed. What
    escapes is what the file system hides: a file that another machine has added to a network file
    system whose folder this one still remembers (NFS: up to a minute), and mounts of object stores
    whose folders have no times.

    The file is written aside and moved into place, so several processes may write and read at
    once. A file that is damaged or of another format counts as none.
    """

    def __init__(self, path: Path, version: int) -> None:
        """Keep the path and the number of the table's format."""
        self.path = path
        self.version = version

    def state(self, *names: str) -> State:
        """State of files and folders, relative to the folder of the cache, or of ``FOLDER/*``.

        Raises:
            OSError: If one is not there.
        """
        root = self.path.parent
        return {
            name: _stamp_all(root / name.removesuffix(CONTENTS))
            if name.endswith(CONTENTS)
            else [*stamp(root / name)]
            for name in names
        }

    def load(self) -> gpd.GeoDataFrame | None:
        """The table, None if there is none that is still true."""
        try:
            table = gpd.read_parquet(self.path, page_checksum_verification=True)
            kept = table.attrs
            if kept['version'] == self.version and kept['state'] == self.state(*kept['state']):
                return table
        except Exception:
            # Whatever is wrong with it, the table is made anew.
            return None
        return None

    def save(self, table: gpd.GeoDataFrame, state: State) -> None:
        """Write the table and its attrs, or warn that it cannot be written.

        The state is that of all that the table depends on, from before they were read.
        """
        table = table.copy(deep=False)
        table.attrs = {**table.attrs, 'version': self.version, 'state': state}
        try:
            with whole(self.path) as temporary:
                table.to_parquet(temporary, compression='zstd', write_page_checksum=True)
        except OSError as error:
            warn(f'{self.path} cannot be written ({error}); every start takes as long as this one')


def wait_for_next_tick(state: State) -> None:
    """Let the clock of the file system go on.

    A change within the tick of the last one would leave the same times. Ticks are milliseconds,
    or two seconds on file systems that keep whole seconds.
    """
    times = [ns for seen in state.values() for ns in seen[:2]]
    tick = 2_000_000_000 if all(ns % 1_000_000_000 == 0 for ns in times) else 20_000_000
    wait = max(times) + tick - time.time_ns()
    if wait > 0:
        time.sleep(min(wait, tick) / 1e9)


def _stamp_all(folder: Path) -> list[int]:
    """Newest times of the files in a folder, and a digest of all their names, times and sizes."""
    with os.scandir(folder) as files:
        stamped = {file.name: own for file, own in stamps(files)}
    digest = sha256(repr(sorted(stamped.items())).encode()).digest()
    newest = [max((times[i] for times in stamped.values()), default=0) for i in range(2)]
    return [*newest, int.from_bytes(digest[:8])]
