"""Errors that end a job with one line: exit status 2 for a wrong configuration or input, 1 for a run that failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class InputError(ValueError):
    """A configuration or an input is wrong; the message names the thing, the value and the choices."""


class ConfigError(InputError):
    """A configuration key or value is wrong."""


class JobFailed(RuntimeError):
    """A job started and could not finish; it ends with exit status 1 and one line."""


class StorageError(OSError, JobFailed):
    """A store failed after all retries, or is full; the message names the URI and the cause."""


class StorageRefused(OSError, InputError):
    """A store cannot be reached, denies access or cannot be written; the message names the URI and the cause."""


def one_line(error: object, most: int | None = None) -> str:
    """The message of an error, or a text, on one line: line ends become spaces; at most `most` characters, if given."""
    return " ".join(str(error).split())[:most]


@contextmanager
def writing(place: str) -> Iterator[None]:
    """Raises `StorageError` for a full disk and `StorageRefused` for a `place` that cannot be written, in one line."""
    try:
        yield
    except (InputError, JobFailed):
        raise
    except Exception as error:
        number = error_number(error)
        if number in FULL:
            text = f"{place}: {os.strerror(number)}; free some, then the same command goes on where it stopped"
            raise StorageError(text) from error
        if number in CLOSED:
            raise StorageRefused(f"{place}: cannot be written: {os.strerror(number)}; choose another place") from error
        raise


def error_number(error: Exception) -> int:
    """The errno of an error, 0 without one; of libraries that only quote its text, that of a full disk."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return next((number for number in FULL if os.strerror(number) in str(error)), 0)
