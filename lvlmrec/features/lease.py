"""One writer per feature set.

    <feature set>/writers/<number>.json   {"host", "pid", "born", "since", "beat", "released", "finished"}

A lease is taken by creating the file with the next number, which storage grants to exactly one of many. Its holder
counts `beat` up every few seconds. Whoever finds a lease that is not released watches it: one that stands still for
`EXPIRY` seconds of the watcher's own clock (those of hosts and stores disagree), or whose process is gone from this
very host, is taken over with the next number; a holder that was only slow finds that number and stops. The number is
the generation of what the holder writes: of two rows for one item, the later generation's counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from lvlmrec import processes, storage
from lvlmrec.errors import InputError, JobFailed

WRITERS = "writers"
BEAT = 5.0  # seconds
EXPIRY = 90.0  # seconds: a beat that storage throttles takes its retries, see storage


class BusyInputError(InputError):
    """Another process is writing the feature set."""


class Lease:
    """The right to write a feature set, as long as nobody else took it over.

    `after_break`: whether the writer before may have left parts that no segment lists.
    """

    def __init__(self, uri: str, number: int, about: dict[str, Any], after_break: bool = True) -> None:
        self.number, self.after_break = number, after_break
        self._uri, self._about = uri, about
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `JobFailed` when another writer holds a later lease: what this one writes is no longer committed."""
        number = _last_number(self._uri)
        if number != self.number:
            raise JobFailed(
                f"{self._uri}: another extraction took over, for this one did not answer for {EXPIRY:.0f} s; "
                "the same command goes on once that one is through"
            )

    def finish(self) -> None:
        """Whatever this writer wrote is committed: the next one need not look for parts that are not."""
        self._about["finished"] = True

    def release(self) -> None:
        """Let the next writer begin at once."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it ends by itself
            _write(self._uri, self.number, self._about | {"released": True})
            for number in range(self.number - 1, 0, -1):
                if not storage.exists(_file(self._uri, number)):
                    break
                storage.remove(_file(self._uri, number))

    def _keep_alive(self) -> None:
        while not self._ended.wait(BEAT):
            self._about["beat"] += 1
            with contextlib.suppress(OSError):  # the next beat tries again, and `check` tells what came of it
                _write(self._uri, self.number, self._about)


def is_unfinished(uri: str) -> bool:
    """Whether the last writer of a feature set has not come to its end, be it at work or dead."""
    number = _last_number(uri)
    return number > 0 and not _read(uri, number).get("finished", True)


@contextlib.contextmanager
def hold(uri: str) -> Iterator[Lease]:
    """The lease of the feature set; waits for one that may be dead. Raises `BusyInputError` for a living one."""
    lease = _take(uri)
    try:
        yield lease
    finally:
        lease.release()


def _take(uri: str) -> Lease:
    about = {
        "host": processes.host(),
        "pid": os.getpid(),
        "born": processes.born(os.getpid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    about |= {"beat": 0, "released": False, "finished": False}
    while True:
        number = _last_number(uri)
        if number:
            _wait_for_the_end(uri, number)
        after_break = not (number and _read(uri, number).get("finished"))
        if storage.create_bytes(_file(uri, number + 1), json.dumps(about).encode()):
            return Lease(uri, number + 1, about, after_break)


def _wait_for_the_end(uri: str, number: int) -> None:
    """Returns when the lease `number` is released or dead. Raises `BusyInputError` when it is alive."""
    about = _read(uri, number)
    is_here = about["host"] == processes.host()
    if about["released"] or (is_here and not processes.is_alive(about["pid"], about["born"])):
        return
    name = f"process {about['pid']} on {about['host'].split()[0]} (since {about['since']})"
    is_alive, ends = is_here, time.monotonic() + EXPIRY
    if not is_here:
        print(f"{uri}: looking for at most {EXPIRY:.0f} s whether {name} still writes it", file=sys.stderr)
    while not is_alive and time.monotonic() < ends:
        time.sleep(BEAT / 5)
        now = _read(uri, number)
        if now["released"]:
            return
        is_alive = now["beat"] != about["beat"]
    if is_alive:
        raise BusyInputError(
            f"feature set {uri!r}: {name} is writing it; wait for that extraction, or stop it and start this one "
            "again, which goes on where it stopped"
        )


def _last_number(uri: str) -> int:
    """0 when nobody ever wrote."""
    names = (file.uri.rsplit("/", 1)[-1] for file in storage.list_files(storage.join(uri, WRITERS)))
    return max((int(name.removesuffix(".json")) for name in names), default=0)


def _file(uri: str, number: int) -> str:
    return storage.join(uri, WRITERS, f"{number:06d}.json")


def _read(uri: str, number: int) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(storage.read_bytes(_file(uri, number)))
        return about
    except FileNotFoundError:  # a later holder removed it
        return {"host": "", "pid": 0, "born": 0, "since": "", "beat": 0, "released": True}


def _write(uri: str, number: int, about: dict[str, Any]) -> None:
    storage.write_bytes(_file(uri, number), json.dumps(about).encode())
