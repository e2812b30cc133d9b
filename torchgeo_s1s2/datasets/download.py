"""Downloads what a season needs of a data set in MultiSenGE's archives, and no more."""

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from torchgeo_s1s2.datasets.archive import RemoteArchive
from torchgeo_s1s2.datasets.catalog import (
    GROUND_REFERENCE,
    LABELS,
    Catalog,
    reference_name,
)
from torchgeo_s1s2.datasets.sensors import SENSORS
from torchgeo_s1s2.datasets.time_series import DateRule, MonthlySeries
from torchgeo_s1s2.errors import ArchiveChangedError, DownloadError, NoSeriesError
from torchgeo_s1s2.files import whole

FILE_SIZE = {GROUND_REFERENCE: 256 * 256, 's2': 256 * 256 * 10 * 2, 's1': 256 * 256 * 2 * 4}
"""Bytes of the pixels of a file; real images take about as much after LZW compression."""

CHECKSUMS = 'checksums.sha256'
_LABEL = re.compile(r'\w+_\d+_\d+\.json')
_RECORD = re.compile(r'([0-9a-f]{64})  ([^\n]+)\n')
_HIDDEN = '.download'


@dataclass(frozen=True)
class DownloadPlan:
    """What a season needs, and how much of it is not on disk yet; ``print`` shows it.

    Sizes are estimates from the label files: the number of images times the bytes of their
    pixels (256 x 256, 10 bands of 2 bytes or 2 of 4).

    Attributes:
        root: Folder of the data set.
        patches: Number of patches with a full series.
        patches_in_all: Number of patches in the label files.
        needed: Names of the files by folder.
        missing: Those that are not on disk.
        in_all: Number of files that the label files name, by folder.
    """

    root: Path
    patches: int
    patches_in_all: int
    needed: Mapping[str, frozenset[str]]
    missing: Mapping[str, frozenset[str]]
    in_all: Mapping[str, int]

    @property
    def size(self) -> int:
        """Bytes to be written, estimated."""
        return sum(FILE_SIZE[folder] * len(names) for folder, names in self.missing.items())

    def __str__(self) -> str:
        """A table of files and gigabytes."""
        rows = [
            f'{self.root}: {self.patches:,} of {self.patches_in_all:,} patches have the series',
            f'{"":16} {"needed":>19} {"to be written":>19} {"label files name":>19}',
        ]
        for folder, size in FILE_SIZE.items():
            counts = [len(d.get(folder, ())) for d in (self.needed, self.missing)]
            cells = [_cell(n, n * size) for n in (*counts, self.in_all[folder])]
            rows.append(' '.join([f'{folder:16}', *cells]))
        rows.append('GB are estimates: number of images times the bytes of their pixels')
        return '\n'.join(rows)

    def check_disk(self) -> None:
        """Look whether the disk can hold what is to be written.

        Raises:
            DownloadError: If it cannot.
        """
        free = shutil.disk_usage(self.root).free
        if self.size > free:
            raise DownloadError(
                f'about {_gigabytes(self.size)} GB are to be written to {self.root}, its disk has '
                f'{_gigabytes(free)} GB free; make room, give another root, or choose fewer dates, '
                'tiles or sensors'
            )


class SeasonDownload:
    """Download of the files that a date rule, tiles and sensors ask for.

    Each archive ``url/{labels,ground_reference,s2,s1}.tgz`` is read as a stream that ends with
    the last file needed, and only the files needed are written, so none is ever on disk; one that
    holds nothing new is not opened. A file is complete or absent. Where a label file names images
    that the archive lacks, the date rule chooses among those that it holds, as
    :class:`~torchgeo_s1s2.datasets.Catalog` does.

    What is fetched again where:

    - A connection that breaks goes on at the same byte, without anything fetched again.
    - A run that was interrupted goes on at the last restart point in the archive, which is at
      most about ``RemoteArchive.spacing``, 1 GiB, back. Files that are there are not written again.
    - A later run that needs more reads the stretches between restart points that hold it.
    - A server without ranges sends all before these once more, which is dropped as it arrives.
    - An archive that has changed on the server is read from its start, and its files are replaced.

    The journals for this are in ``root/.download``, and the SHA-256 of every file written in
    ``root/checksums.sha256``, which ``sha256sum -c`` reads too.

    Seasons may share a root. Where a rule's choice depends on how many dates there are
    (``AllDates`` with more dates than slots), it may choose others among the files of several
    seasons than it would among all.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        url: str,
        tiles: Collection[str] | None = None,
        series: DateRule | None = None,
        sensors: Sequence[str] = tuple(SENSORS),
        progress: bool = True,
    ) -> None:
        """Keep the settings.

        Args:
            root: Folder to write to; made if it is not there.
            url: Where the archives are, for example ``MultiSenGE.url``.
            tiles: Tiles of the patches; all unless given.
            series: Date rule; the paper's ``MonthlySeries()`` unless given.
            sensors: ``('s2', 's1')`` or one of them. The images of the sensor that leads the
                series are needed in any case.
            progress: Print the plan and show progress bars.
        """
        self.root = Path(root)
        self.url = url.rstrip('/')
        self.tiles = tiles
        self.series = series or MonthlySeries()
        self.sensors = tuple(sensors)
        self.progress = progress

    def plan(self) -> DownloadPlan:
        """What is needed and what of it is missing; fetches the label files (4 MB) alone.

        Raises:
            DownloadError: If they cannot be fetched.
            ValueError: If a label file is malformed.
        """
        with self._locked():
            self._prepare_folders()
            self._fetch_labels()
            return self._plan()

    def run(self) -> None:
        """Download what is missing, with the plan printed first.

        Raises:
            DownloadError: If the disk is too small, an archive cannot be read, or a file has a
                wrong length or checksum.
            ValueError: If a label file is malformed.
        """
        with self._locked():
            self._prepare_folders()
            self._fetch_labels()
            plan = self._plan()
            if self.progress:
                print(plan)
            plan.check_disk()
            self._changed: set[str] = set()
            while not self._fetch_missing(plan):
                plan = self._plan()

    def verify(self) -> None:
        """Compare the files needed with their recorded checksums, and record those that have none.

        Raises:
            DownloadError: If a file differs.
        """
        with self._locked():
            self._verify(self._plan())

    def _verify(self, plan: DownloadPlan) -> None:
        wrong = []
        for folder, names in plan.needed.items():
            there = sorted(names - plan.missing[folder])
            hidden = not (self.progress and there)
            for name in tqdm(there, f'Verifying {folder}', unit='file', disable=hidden):
                digest = hashlib.sha256((self.root / folder / name).read_bytes()).hexdigest()
                if not self._checksums.agrees(f'{folder}/{name}', digest):
                    wrong.append(str(self.root / folder / name))
                self._checksums.add(f'{folder}/{name}', digest)
        if wrong:
            more = f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''
            raise DownloadError(
                f'the checksum in {self._checksums.path} is another for {", ".join(wrong[:5])}'
                f'{more}; delete what is damaged and download again'
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; what others have done in the meantime is read anew."""
        (self.root / _HIDDEN).mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / _HIDDEN / 'lock'):
            self._checksums = _Checksums(self.root / CHECKSUMS)
            self._archives = {
                folder: RemoteArchive(
                    f'{self.url}/{folder}.tgz',
                    self.root / _HIDDEN / f'{folder}.jsonl',
                    self.progress,
                )
                for folder in (LABELS, *FILE_SIZE)
            }
            yield

    def _prepare_folders(self) -> None:
        """Make the folders, and clear them of files that an interruption left half written."""
        for folder in self._archives:
            (self.root / folder).mkdir(exist_ok=True)
            for path in (self.root / folder).glob('.*.tif.*'):
                shutil.rmtree(path)

    def _fetch_labels(self) -> None:
        journal, there = self._archives[LABELS].journal, self._finished(LABELS)
        if journal.version is None and any(map(_LABEL.fullmatch, there)):
            return  # they came in another way
        names = set(filter(_LABEL.fullmatch, journal.all_names)) if journal.complete else None
        if names is None or names - there:
            try:
                self._extract(LABELS, names)
            except ArchiveChangedError as change:
                self._start_anew(LABELS, change)
                self._extract(LABELS)

    def _fetch_missing(self, plan: DownloadPlan) -> bool:
        """Write what is missing; False if an archive is not what the plan took it to be."""
        for folder, names in plan.missing.items():
            if not names:
                continue
            try:
                self._extract(folder, names)
            except ArchiveChangedError as change:
                if folder in self._changed:
                    raise
                self._changed.add(folder)
                self._start_anew(folder, change)
                return False
            lacking = sorted(names - self._archives[folder].journal.all_names)
            if lacking and self._archives[folder].journal.complete:
                warnings.warn(
                    f'{self._archives[folder].url} lacks {len(lacking)} of the {len(names)} files '
                    f'that the series needs after the label files ({lacking[0]} ...); the series '
                    'are made of what there is',
                    stacklevel=3,
                )
                return False
        return True

    def _start_anew(self, folder: str, change: ArchiveChangedError) -> None:
        warnings.warn(
            f'{change}. It is read from its start, and what came from the old one is replaced',
            stacklevel=4,
        )
        self._archives[folder].journal.start_anew()
        self._checksums.forget(folder)

    def _extract(self, folder: str, names: Collection[str] | None = None) -> None:
        for name, content in self._archives[folder].read(names):
            if folder != LABELS or _LABEL.fullmatch(name):
                self._write(folder, name, content)

    def _write(self, folder: str, name: str, content: bytes) -> None:
        """Write a file so that it is complete or absent, even after a power cut."""
        path, digest = self.root / folder / name, hashlib.sha256(content).hexdigest()
        if not self._checksums.agrees(f'{folder}/{name}', digest):
            raise DownloadError(
                f'{path}: what {self._archives[folder].url} holds has another checksum than '
                f'{self._checksums.path} recorded; delete its line there if the archive is right'
            )
        with whole(path) as temporary:
            temporary.write_bytes(content)
        self._checksums.add(f'{folder}/{name}', digest)

    def _finished(self, folder: str) -> set[str]:
        """Names of the files on disk, without those of an archive that was replaced."""
        path = self.root / folder
        there = {entry.name for entry in os.scandir(path)} if path.is_dir() else set()
        if not self._archives[folder].journal.replaced:
            return there
        return {name for name in there if f'{folder}/{name}' in self._checksums}

    def _held(self, folder: str) -> Collection[str] | None:
        """Names of the files that there are to choose from, None while all may be."""
        journal = self._archives[folder].journal
        return journal.all_names | self._finished(folder) if journal.complete else None

    def _plan(self) -> DownloadPlan:
        catalog = Catalog(self.root, files=False, progress=self.progress)
        patches = catalog.patches
        sensors = self.series.reads(self.sensors)
        held = {folder: self._held(folder) for folder in (GROUND_REFERENCE, *sensors)}
        needed: dict[str, set[str]] = {folder: set() for folder in held}
        needed[GROUND_REFERENCE] = {
            name
            for name in map(reference_name, patches['name'])
            if _is_in(name, held[GROUND_REFERENCE])
        }
        tiles = set(patches['tile']) if self.tiles is None else self.tiles
        chosen = 0
        for row in np.flatnonzero(patches['tile'].isin(tiles)):
            images = self._images(catalog, int(row), {s: held[s] for s in sensors})
            chosen += bool(images)
            for sensor, names in images.items():
                needed[sensor] |= names
        in_all = {s: sum(len(catalog.times(r, s)) for r in range(len(patches))) for s in SENSORS}
        return DownloadPlan(
            self.root,
            chosen,
            len(patches),
            {folder: frozenset(names) for folder, names in needed.items()},
            {f: frozenset(names - self._finished(f)) for f, names in needed.items()},
            {GROUND_REFERENCE: len(patches), **in_all},
        )

    def _images(
        self, catalog: Catalog, row: int, held: Mapping[str, Collection[str] | None]
    ) -> dict[str, set[str]]:
        """Names of the images that the series of a patch needs by sensor, none without a series."""
        paths, times = {}, {}
        for sensor, names in held.items():
            t = catalog.times(row, sensor)
            at = [
                i
                for i in range(len(t))
                if names is None or catalog.path(row, sensor, i).name in names
            ]
            times[sensor], paths[sensor] = t[at], at
        try:
            chosen = self.series.candidates(times)
        except NoSeriesError:
            return {}
        if not any(chosen[sensor] for sensor in self.sensors):
            return {}
        return {
            sensor: {catalog.path(row, sensor, paths[sensor][p]).name for p in positions}
            for sensor, positions in chosen.items()
        }


class _Checksums:
    """SHA-256 of files by their path under root, in a file as ``sha256sum`` writes it."""

    def __init__(self, path: Path) -> None:
        """Read the file if there is one, without a last line that was cut off."""
        self.path = path
        text = path.read_text() if path.exists() else ''
        self._known = {name: digest for digest, name in _RECORD.findall(text)}
        if text and text != self._text():
            self._rewrite()

    def __contains__(self, name: str) -> bool:
        """Whether a file is recorded."""
        return name in self._known

    def agrees(self, name: str, digest: str) -> bool:
        """Whether a file has the recorded checksum, or none is recorded."""
        return self._known.get(name, digest) == digest

    def add(self, name: str, digest: str) -> None:
        """Record a file."""
        if name not in self._known:
            self._known[name] = digest
            with self.path.open('a') as file:
                file.write(f'{digest}  {name}\n')

    def forget(self, folder: str) -> None:
        """Forget the files of a folder."""
        self._known = {n: d for n, d in self._known.items() if not n.startswith(f'{folder}/')}
        self._rewrite()

    def _text(self) -> str:
        return ''.join(f'{digest}  {name}\n' for name, digest in self._known.items())

    def _rewrite(self) -> None:
        with whole(self.path) as temporary:
            temporary.write_text(self._text())


def _is_in(name: str, names: Collection[str] | None) -> bool:
    return names is None or name in names


def _gigabytes(size: int) -> str:
    return f'{size / 1e9:.1f}'


def _cell(count: int, size: int) -> str:
    return f'{count:9,} {_gigabytes(size):>6} GB'
