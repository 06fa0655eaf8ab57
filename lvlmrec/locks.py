"""File locks between processes that share a folder: the operating system releases a lock when its process dies."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lvlmrec.errors import InputError

WAIT_SECONDS = 600.0  # for a process that is alive but makes no progress
POLL_SECONDS = 0.05


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Within the block this process holds the lock file `path`, created where it is missing; others wait.

    Yields False where the file system has no locks: the block must be correct without one.
    Raises `InputError` when another process holds the lock for `WAIT_SECONDS`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield _take(file, path)


def _take(file: IO[str], path: Path) -> bool:
    ends = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > ends:
                raise InputError(
                    f"{path}: another process has held this lock for {WAIT_SECONDS:.0f} s; end it and start again"
                ) from None
        except OSError:  # a network folder without a lock service
            return False
        time.sleep(POLL_SECONDS)
