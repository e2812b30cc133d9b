"""Errors and warnings of the package."""

import warnings
from functools import cache
from pathlib import Path


class S1S2Error(Exception):
    """Base of the package's errors about data, files and downloads."""


class DataError(S1S2Error, ValueError):
    """Data are not what they must be; the message names the file or value and the remedy."""


class UnreadableError(S1S2Error, OSError):
    """A file cannot be read; the message names it."""


class NoSeriesError(DataError):
    """The acquisitions of a patch do not make a series; the message names the slot that fails."""


class NoPatchesError(DataError):
    """A split has no patch with a full series; the message says why."""


class ImplausibleValuesError(DataError):
    """Values are not in the units that the data set takes them to be in."""


class MapError(DataError):
    """A map cannot be made of these predictions, or was not written whole."""


class DownloadError(S1S2Error, RuntimeError):
    """A download cannot go on; what was written is whole."""


class NoRoomError(DownloadError, OSError):
    """The disk is too small for what is to be written."""


class ArchiveChangedError(DownloadError):
    """The archive on the server is another than the one that reading began with."""


class S1S2Warning(UserWarning):
    """Something was left out, replaced or assumed; the message counts it."""


def warn(message: str) -> None:
    """Give an S1S2Warning of the line outside the package that led to it."""
    warnings.warn(message, S1S2Warning, skip_file_prefixes=(str(Path(__file__).parent),))


@cache
def warn_once(message: str) -> None:
    """Give a warning that each of many files would give, once in a process and its forks."""
    warn(message)
