"""Whose a run is, as its tags, so that a later job can tell whether the process behind it still lives."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lvlmrec import processes

KEY = "owner.key"
HOST, PID, BORN, BEAT = "owner.host", "owner.pid", "owner.born", "owner.beat"
BEAT_SECONDS = 60.0
# Clocks of hosts disagree by minutes at most, and a tracker may be away for a while.
EXPIRY_SECONDS = 3600.0


def tags(what: Mapping[str, Any]) -> dict[str, str]:
    """This process, and a key of `what` it does."""
    key = hashlib.blake2b(json.dumps(what, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    born = processes.born(os.getpid())
    return {KEY: key, HOST: processes.host(), PID: str(os.getpid()), BORN: str(born), **_beat()}


def is_dead(found: Mapping[str, str]) -> bool:
    """Whether the process that a run's tags name is gone: on this host by its number and start, else by its beat."""
    try:
        if found[HOST] == processes.host():
            return not processes.is_alive(int(found[PID]), float(found[BORN]))
        return time.time() - float(found[BEAT]) > EXPIRY_SECONDS
    except (KeyError, ValueError):  # a run of an earlier release
        return False


@contextmanager
def beating(write: Callable[[Mapping[str, str]], None]) -> Iterator[None]:
    """Write the tag of the time from time to time; one that cannot be written is left out."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                write(_beat())
            except Exception:  # whatever the tracker raises: the next beat is as good
                continue

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _beat() -> dict[str, str]:
    return {BEAT: f"{time.time():.0f}"}
