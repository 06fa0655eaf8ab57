"""Tags that name the process of a run, so that a later job can tell whether it is still alive."""

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
HOST, PID, STARTED, HEARTBEAT = "owner.host", "owner.pid", "owner.born", "owner.beat"
HEARTBEAT_SECONDS = 60.0
# Clocks of hosts disagree by minutes at most, and a tracker may be away for a while.
EXPIRY_SECONDS = 3600.0


def tags(work: Mapping[str, Any]) -> dict[str, str]:
    """Tags that name this process, and a key: the hash of the `work` that it does."""
    key = hashlib.blake2b(json.dumps(work, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    started = processes.born(os.getpid())
    return {KEY: key, HOST: processes.host(), PID: str(os.getpid()), STARTED: str(started), **_heartbeat_tag()}


def is_dead(run_tags: Mapping[str, str]) -> bool:
    """Whether the process that a run's tags name is dead: on this host by PID and start, else by its heartbeat."""
    try:
        if run_tags[HOST] == processes.host():
            return not processes.is_alive(int(run_tags[PID]), float(run_tags[STARTED]))
        return time.time() - float(run_tags[HEARTBEAT]) > EXPIRY_SECONDS
    except (KeyError, ValueError):  # a run of an earlier release
        return False


@contextmanager
def heartbeat(write: Callable[[Mapping[str, str]], None]) -> Iterator[None]:
    """Within the block, pass the heartbeat tag to `write` every `HEARTBEAT_SECONDS`; errors of `write` are ignored."""
    stopped = threading.Event()

    def write_repeatedly() -> None:
        while not stopped.wait(HEARTBEAT_SECONDS):
            try:
                write(_heartbeat_tag())
            except Exception:  # whatever the tracker raises: the next heartbeat is as good
                continue

    threading.Thread(target=write_repeatedly, daemon=True).start()
    try:
        yield
    finally:
        stopped.set()


def _heartbeat_tag() -> dict[str, str]:
    return {HEARTBEAT: f"{time.time():.0f}"}
