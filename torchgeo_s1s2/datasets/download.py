"""Downloads what a season needs of a data set in MultiSenGE's archives, and no more."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from torchgeo_s1s2.datasets.archive import Journal, Kind, RemoteArchive, usual_name
from torchgeo_s1s2.datasets.catalog import GROUND_REFERENCE, LABELS, Catalog, reference_name, walk
from torchgeo_s1s2.datasets.sensors import SENSORS, in_order
from torchgeo_s1s2.datasets.time_series import DateRule, MonthlySeries
from torchgeo_s1s2.errors import ArchiveChangedError, DownloadError, NoSeriesError, warn
from torchgeo_s1s2.files import check_room, whole

FILE_SIZE = {GROUND_REFERENCE: 256 * 256, 's2': 256 * 256 * 10 * 2, 's1': 256 * 256 * 2 * 4}
"""Bytes of a file: Sentinel-2 is not compressed, and LZW makes Sentinel-1 hardly smaller."""

CHECKSUMS = 'checksums.sha256'
_LABEL = re.compile(r'\w+_\d+_\d+\.json')
KINDS = {
    LABELS: Kind(_LABEL.pattern, files=2**17, file_size=2**18, total_size=2**30),
    GROUND_REFERENCE: Kind(files=2**17, file_size=2**22, total_size=2**34),
    **dict.fromkeys(SENSORS, Kind()),
}
"""What each archive can hold. MultiSenGE's 8,157 label files have 40 MB, the largest 7 kB."""
_RECORD = re.compile(r'([0-9a-f]{64})  ([^\n]+)\n')
_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
_HIDDEN, _UNFINISHED = '.download', '.download/unfinished'


@dataclass(frozen=True)
class DownloadPlan:
    """What a season needs, and how much of it is not on disk yet; ``print`` shows it.

    It is what the label files promise until an archive is opened. Once that was read in part, the
    number and size of its files follow from the part, and once to its end, series from its files.

    Attributes:
        root: Folder of the data set.
        patches: Number of patches with a full series.
        patches_in_all: Number of patches in the label files.
        needed: Names of the files by folder.
        missing: Those that are not on disk.
        in_all: Number of files that the label files name, by folder.
        held: Number of files that the archive holds, as far as it is known; None before.
        sizes: Bytes of a file.
    """

    root: Path
    patches: int
    patches_in_all: int
    needed: Mapping[str, frozenset[str]]
    missing: Mapping[str, frozenset[str]]
    in_all: Mapping[str, int]
    held: Mapping[str, int | None]
    sizes: Mapping[str, float]

    @property
    def size(self) -> int:
        """Bytes to be written, estimated."""
        return round(sum(self.sizes[f] * self._files_to_write(f) for f in self.missing))

    def _files_to_write(self, folder: str) -> int:
        """Number of missing files, of which no more exist than the archive holds."""
        count, held = len(self.missing.get(folder, ())), self.held[folder]
        return count if held is None else min(count, held)

    def __str__(self) -> str:
        """A table of files and gigabytes."""
        titles = '', 'needed', 'to be written', 'label files name', 'archive holds'
        rows = [
            f'{self.root}: patches with the series: {self.patches:,} of {self.patches_in_all:,}',
            '{:16} {:>19} {:>19} {:>19} {:>19}'.format(*titles),
        ]
        for folder, held in self.held.items():
            needed, size = len(self.needed.get(folder, ())), self.sizes[folder] / 1e9
            counts = needed, self._files_to_write(folder), self.in_all[folder], held
            cells = ('not known yet' if n is None else f'{n:,} {n * size:6.1f} GB' for n in counts)
            rows.append('{:16} {:>19} {:>19} {:>19} {:>19}'.format(folder, *cells))
        rows.append('GB are estimates: number of files times the bytes that one has')
        if None in self.held.values():
            rows.append(
                'Label files name more than an archive may hold: of the S1 files of MultiSenGE '
                'about a fifth exist.\nThe series are made of what exists, once an archive was read'
            )
        return '\n'.join(rows)


class SeasonDownload:
    """Download of the files that a date rule, tiles and sensors ask for.

    Each archive ``url/{labels,ground_reference,s2,s1}.tgz`` is read as a stream that ends with
    the last file needed, and is never on disk; one that holds nothing new is not opened. A file is
    complete or absent. Where a label file names images that the archive lacks, the date rule
    chooses among those that it holds.

    A connection that breaks goes on at the same byte, an interrupted run at the last restart point
    in the archive, about 1 GiB back at most, and a later run that needs more reads the stretches
    that hold it; a server without ranges sends all before these once more. An archive that has
    changed on the server is read from its start, and its files are replaced; those that are left of
    the earlier version stay, and a warning counts them. The journals for this are in
    ``root/.download``, and the SHA-256 of every file written in ``root/checksums.sha256``, which
    ``sha256sum -c`` reads too.

    Seasons may share a root. A rule whose choice depends on how many dates there are (``AllDates``
    with more dates than slots) may then choose others than it would among all.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        url: str,
        tiles: Collection[str] | None = None,
        series: DateRule | None = None,
        sensors: Sequence[str] = tuple(SENSORS),
        progress: bool = True,
        hosts: Collection[str] = (),
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
            hosts: Hosts other than that of ``url`` to which it may redirect. Without them a
                redirect to another host is an error, and one from https to http always is.

        Raises:
            ValueError: If there is no such sensor, or tiles are no list.
        """
        if isinstance(tiles, str):
            raise ValueError(f'tiles is {tiles!r}; expected several, as in [{tiles!r}]')
        self.root = Path(root)
        self.url = url.rstrip('/')
        self.tiles = tiles
        self.series = series or MonthlySeries()
        self.sensors = in_order(sensors, [*SENSORS], 'sensor')
        self.progress = progress
        self.hosts = hosts

    def plan(self) -> DownloadPlan:
        """What is needed and what of it is missing; fetches the label files (4 MB) alone.

        Raises:
            DownloadError: If they cannot be fetched.
            ValueError: If a label file is malformed.
        """
        with self._locked():
            return self._first_plan()

    def run(self) -> None:
        """Download what is missing, with the plan printed first.

        Raises:
            DownloadError: If the disk is too small, an archive cannot be read, or a file has a
                wrong length or checksum.
            ValueError: If a label file is malformed.
        """
        with self._locked():
            plan = self._first_plan()
            while not self._carry_out(plan):
                plan = self._plan()
            self._tell_outdated()

    def verify(self) -> None:
        """Compare the label files and the files needed with their recorded checksums.

        Files that have none are recorded.

        Raises:
            DownloadError: If a file differs.
        """
        with self._locked():
            self._verify(LABELS, filter(_LABEL.fullmatch, self._files(LABELS)))
            plan = self._plan()
            for folder, names in plan.needed.items():
                self._verify(folder, names - plan.missing[folder])
            self._tell_outdated()

    def _tell_outdated(self) -> None:
        """Warn of files that an earlier version of an archive has left."""
        for folder, archive in self._archives.items():
            if archive.journal.replaced and (outdated := sorted(self._files(folder, True))):
                warn(
                    f'files in {self.root / folder} from before {archive.url} changed, still read '
                    f'({len(outdated)}): {", ".join(outdated[:3])}. It holds them no longer, or '
                    'nothing has asked for them since. Delete what '
                    f'{self._checksums.path} does not list'
                )

    def _verify(self, folder: str, names: Iterable[str]) -> None:
        wrong, there, paths = [], sorted(names), self._files(folder)
        hidden = not (self.progress and there)
        for name in tqdm(there, f'Verifying {folder}', unit='file', disable=hidden):
            digest = hashlib.sha256(paths[name].read_bytes()).hexdigest()
            if not self._checksums.agrees(f'{folder}/{name}', digest):
                wrong.append(str(paths[name]))
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
        try:
            (self.root / _HIDDEN).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / _HIDDEN / 'lock').acquire()
        except OSError as error:
            raise DownloadError(
                f'{self.root} cannot be written to ({error}); leave the download out where the '
                'data are complete, or give another root'
            ) from error
        with lock:
            self._checksums, self._changed = _Checksums(self.root / CHECKSUMS), set[str]()
            self._archives = {
                folder: RemoteArchive(
                    f'{self.url}/{folder}.tgz',
                    Journal(self.root / _HIDDEN / f'{folder}.json'),
                    kind,
                    self.hosts,
                    self.progress,
                )
                for folder, kind in KINDS.items()
            }
            try:
                yield
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                raise DownloadError(
                    f'the disk of {self.root} is full ({error}). What was written is whole; make '
                    'room, and run the same again to continue'
                ) from error

    def _first_plan(self) -> DownloadPlan:
        """The plan, in folders that are clear of what an interruption left half written."""
        shutil.rmtree(self.root / _UNFINISHED, ignore_errors=True)
        for folder in (*self._archives, _UNFINISHED):
            (self.root / folder).mkdir(exist_ok=True)
        self._fetch_labels()
        return self._plan()

    def _fetch_labels(self) -> None:
        journal, there = self._archives[LABELS].journal, self._files(LABELS)
        if journal.version is None and any(map(_LABEL.fullmatch, there)):
            return  # they came in another way
        names = journal.all_names if journal.complete else None
        if (names is None or names - there.keys()) and not self._extract(LABELS, names):
            self._extract(LABELS)

    def _carry_out(self, plan: DownloadPlan) -> bool:
        """Write what is missing; False if an archive is not what the plan took it to be."""
        if self.progress:
            print(plan)
        check_room(self.root, plan.size, 'give another root, fewer dates, tiles or sensors')
        for folder, names in plan.missing.items():
            if not names:
                continue
            if not self._extract(folder, names):
                return False
            archive = self._archives[folder]
            lacking = sorted(names - archive.journal.all_names)
            if lacking and archive.journal.complete:
                warn(
                    f'{archive.url} lacks {len(lacking)} of the {len(names)} files that the series '
                    f'needs after the label files ({lacking[0]} ...); the series are made of what '
                    'there is'
                )
                return False
        return True

    def _extract(self, folder: str, names: Collection[str] | None = None) -> bool:
        """Write files of an archive; False if it is another now, all of which is missing then."""
        archive = self._archives[folder]
        try:
            for name, content in archive.read(names):
                self._write(folder, name, content)
        except ArchiveChangedError as change:
            if folder in self._changed:
                raise
            self._changed.add(folder)
            version = archive.new_version()
            warn(f'{change}. It is read from its start, and what came from the old one is replaced')
            self._checksums.forget(folder)
            archive.journal.start_anew(version)
            return False
        return True

    def _write(self, folder: str, name: str, content: bytes) -> None:
        """Write a file, and record its checksum."""
        path, digest = self.root / folder / name, hashlib.sha256(content).hexdigest()
        if not self._checksums.agrees(f'{folder}/{name}', digest):
            raise DownloadError(
                f'{path}: what {self._archives[folder].url} holds has another checksum than '
                f'{self._checksums.path} recorded; delete its line there if the archive is right'
            )
        with whole(path, within=self.root / _UNFINISHED) as temporary:
            temporary.write_bytes(content)
        self._checksums.add(f'{folder}/{name}', digest)

    def _files(self, folder: str, outdated: bool = False) -> dict[str, Path]:
        """Files on disk by their usual names, or those of before the archive changed."""
        replaced = self._archives[folder].journal.replaced
        there = {
            usual_name(name): self.root / where / name
            for where, names in walk(self.root, folder)
            for name in names
        }
        return {
            name: path
            for name, path in there.items()
            if outdated == (replaced and f'{folder}/{name}' not in self._checksums)
        }

    def _plan(self) -> DownloadPlan:
        catalog = Catalog(self.root, files=False, progress=self.progress)
        patches, sensors = catalog.patches, self.series.reads(self.sensors)
        held = {folder: self._held(folder) for folder in (GROUND_REFERENCE, *sensors)}
        needed: dict[str, set[str]] = {folder: set() for folder in held}
        references, known = {*map(reference_name, patches['name'])}, held.pop(GROUND_REFERENCE)
        needed[GROUND_REFERENCE] = references if known is None else references & known
        there = set(patches['tile'])
        tiles = there if self.tiles is None else self.tiles
        if unknown := sorted(set(tiles) - there):
            have = ', '.join(sorted(there))
            warn(f'{self.url} has no tiles {unknown} (tiles there: {have})')
        chosen = 0
        for row in np.flatnonzero(patches['tile'].isin(tiles)):
            images = self._images(catalog, int(row), held)
            chosen += bool(images)
            for sensor, names in images.items():
                needed[sensor] |= names
        in_all = {s: sum(len(catalog.times(r, s)) for r in range(len(patches))) for s in SENSORS}
        journals = {folder: self._archives[folder].journal for folder in FILE_SIZE}
        return DownloadPlan(
            self.root,
            chosen,
            len(patches),
            {folder: frozenset(names) for folder, names in needed.items()},
            {f: frozenset(names - self._files(f).keys()) for f, names in needed.items()},
            {GROUND_REFERENCE: len(patches), **in_all},
            {folder: journal.files for folder, journal in journals.items()},
            {folder: journals[folder].file_size or size for folder, size in FILE_SIZE.items()},
        )

    def _held(self, folder: str) -> Set[str] | None:
        """Names of the files that there are to choose from, None while all may be."""
        journal = self._archives[folder].journal
        return journal.all_names | self._files(folder).keys() if journal.complete else None

    def _images(
        self, catalog: Catalog, row: int, held: Mapping[str, Set[str] | None]
    ) -> dict[str, set[str]]:
        """Names of the images that the series of a patch needs by sensor, none without a series."""
        there = {
            sensor: [
                i
                for i in range(len(catalog.times(row, sensor)))
                if names is None or catalog.path(row, sensor, i).name in names
            ]
            for sensor, names in held.items()
        }
        times = {sensor: catalog.times(row, sensor)[own] for sensor, own in there.items()}
        try:
            chosen = self.series.candidates(times)
        except NoSeriesError:
            return {}
        if not any(chosen[sensor] for sensor in self.sensors):
            return {}
        return {
            sensor: {catalog.path(row, sensor, there[sensor][p]).name for p in positions}
            for sensor, positions in chosen.items()
        }


class _Checksums(dict[str, str]):
    """SHA-256 of files by their path under root, in a file as ``sha256sum`` writes it."""

    def __init__(self, path: Path) -> None:
        """Read the file if there is one, without a last line that was cut off."""
        self.path = path
        text = path.read_text() if path.exists() else ''
        super().__init__((name, digest) for digest, name in _RECORD.findall(text))
        if text and not text.endswith('\n'):
            self._rewrite()

    def agrees(self, name: str, digest: str) -> bool:
        """Whether a file has the recorded checksum, or none is recorded."""
        return self.get(name, digest) == digest

    def add(self, name: str, digest: str) -> None:
        """Record a file."""
        if name not in self:
            self[name] = digest
            with self.path.open('a') as file:
                file.write(f'{digest}  {name}\n')

    def forget(self, folder: str) -> None:
        """Forget the files of a folder."""
        for name in [name for name in self if name.startswith(f'{folder}/')]:
            del self[name]
        self._rewrite()

    def _rewrite(self) -> None:
        with whole(self.path) as temporary:
            temporary.write_text(''.join(f'{digest}  {name}\n' for name, digest in self.items()))
