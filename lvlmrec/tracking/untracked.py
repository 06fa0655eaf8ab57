"""What a tracker does not take: said once, kept in the workspace, and the run goes on.

    <workspace>/untracked/<run id>.jsonl    {"time", "kind", "content", "reason"} a line; in an object store a folder of
                                            that name with an object each

A tracker that failed is left alone for `PATIENCE` times as long as its failure took, so that one which hangs costs a
run a few percent and not its epochs, and one that refuses a single name misses nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lvlmrec import storage

PATIENCE = 20.0
FOLDER = "untracked"

_asked_again_at: dict[str, float] = {}  # tracker -> when, by this process's clock
_told: set[tuple[str, str]] = set()


class LeftAlone(RuntimeError):
    """The tracker was not asked."""


def attempt(tracker: str, call: Callable[[], None], urgent: bool = False) -> Exception | None:
    """Do `call`, and give what it raised; nothing is tried while the tracker is left alone, unless it is urgent."""
    started = time.monotonic()
    if not urgent and started < _asked_again_at.get(tracker, 0.0):
        return LeftAlone("it failed a moment ago")
    try:
        call()
    except Exception as error:  # MLflow lets through what SQLAlchemy, requests or the file system raised
        ended = time.monotonic()
        _asked_again_at[tracker] = ended + PATIENCE * (ended - started)
        return error
    return None


def keep(tracker: str, workspace: str, run_id: str, kind: str, content: str, reason: str, sort: str) -> None:
    """Write down what could not be sent, `content` as JSON, and say so once for each sort of reason. Raises nothing."""
    uri = storage.join(workspace, FOLDER, f"{run_id}.jsonl")
    line = f'{{"time": {time.time():.3f}, "kind": "{kind}", "content": {content}, "reason": {json.dumps(reason)}}}\n'
    kept = f"it is kept in {uri}"
    try:
        if storage.is_remote(uri):
            storage.write_bytes(f"{uri}/{time.time_ns()}.jsonl", line.encode())
        else:
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            with Path(uri).open("a") as file:
                file.write(line)
    except OSError as error:
        kept = f"and it could not be kept in {uri}: {error}"
    if sort != LeftAlone.__name__:
        tell(tracker, sort, f"{kind} not sent to {tracker}: {reason}; {kept}; the run goes on")


def tell(tracker: str, about: str, message: str) -> None:
    """Say something about a tracker, once."""
    if (tracker, about) not in _told:
        _told.add((tracker, about))
        sys.stderr.write(f"tracking: {message}\n")
