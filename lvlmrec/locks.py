"""File locks between processes that share a folder: the operating system releases a lock when its process dies."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lvlmrec.errors import InputError

WAIT_SECONDS = 600.0  # for a process that is alive but makes no progress
POLL_SECONDS = 0.05
SILENT_SECONDS = 5.0  # of waiting, before a line says for whom


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Within the block this process holds the lock file `path`, created where it is missing; others wait.

    Yields False where the file system has no locks: the block must be correct without one.
    Raises `InputError` when another process holds the lock for `WAIT_SECONDS`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        yield _take(file, path)


def _take(file: IO[str], path: Path) -> bool:
    started, is_told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):  # on a full disk the others know no name
                file.truncate(0)
                file.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}")
                file.flush()
            return True
        except BlockingIOError:
            waited = time.monotonic() - started
            if waited > SILENT_SECONDS and not is_told:
                is_told = True
                print(f"{path}: waiting for {_holder(file)}, which holds this lock", file=sys.stderr)
            if waited > WAIT_SECONDS:
                raise InputError(
                    f"{path}: another process has held this lock for {WAIT_SECONDS:.0f} s, {_holder(file)}; "
                    "end it and start again"
                ) from None
        except OSError:  # a network folder without a lock service
            return False
        time.sleep(POLL_SECONDS)


def _holder(file: IO[str]) -> str:
    """What the process that holds the lock wrote: its number and since when."""
    file.seek(0)
    return file.read(100) or "another process"
