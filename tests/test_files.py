import errno
import os
from pathlib import Path

import pytest

from torchgeo_s1s2 import files
from torchgeo_s1s2.errors import DataError


@pytest.mark.skipif(files.fcntl is None, reason='this system has no locks')
@pytest.mark.parametrize(
    ('code', 'held'),
    [(errno.EWOULDBLOCK, False), (errno.EACCES, False)]
    + [(code, True) for code in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)],
)
def test_only_a_lock_of_another_run_keeps_from_a_folder(
    code: int, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = files.Workplace.new(tmp_path)
    (left.path / 'part-00000-00000.npz').touch()
    left.leave()

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, 'flock', fail)
    found, living = files.Workplace.found(tmp_path)
    assert ([other.path for other in found], living) == (([left.path], 0) if held else ([], 1))


def test_damaged_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'region.region.json'
    files.write_json(path, {'finished': True})
    assert files.read_json(path) == {'finished': True}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r'region\.region\.json is damaged \(.*\); delete it'):
        files.read_json(path)


def test_a_lock_that_is_listed_and_gone_is_of_no_run(tmp_path: Path) -> None:
    gone = tmp_path / f'{files.Workplace.prefix}gone'
    gone.mkdir()
    (gone / 'lock').symlink_to('nowhere')
    assert files.Workplace.found(tmp_path) == ([], 0)
