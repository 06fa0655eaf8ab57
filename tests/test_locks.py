"""Locks between processes: one holder, freed by its death."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lvlmrec import locks
from lvlmrec.errors import InputError
from lvlmrec.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from lvlmrec.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_freed_by_the_death_of_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
        with pytest.raises(InputError, match=r"new/lock: another process has held this lock"), locked(file):
            pass
        holder.kill()
    with locked(file) as alone:
        assert alone


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_folder_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(file: object, operation: int) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refused)
    with locked(tmp_path / "lock") as alone:
        assert not alone


def test_who_waits_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        try:
            monkeypatch.setattr(locks, "SILENT_SECONDS", 0.0)
            monkeypatch.setattr(locks, "WAIT_SECONDS", 0.3)
            with pytest.raises(InputError, match=rf"lock for 0 s, process {holder.pid} since 2"), locked(file):
                pass
        finally:
            holder.kill()
    (said,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"{file}: waiting for process {holder.pid} since \S+Z, which holds this lock", said)
    with locked(file):
        assert file.read_text().startswith(f"process {os.getpid()} since ")
