"""What could not be sent to the tracker: reported once, written to the workspace, and the run goes on.

    <workspace>/untracked/<run id>.jsonl    one line {"time", "kind", "content", "reason"} each; in an object store a
                                            folder of that name with one object each

After a failure the tracker is paused for `PAUSE_FACTOR` times as long as the failure took: a tracker that hangs slows a
run by a few percent, and one that refuses a single name still gets nearly everything else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lvlmrec import storage

PAUSE_FACTOR = 20.0
FOLDER = "untracked"

_retry_at: dict[str, float] = {}  # tracker -> end of its pause, by time.monotonic()
_warned: set[tuple[str, str]] = set()


class TrackerPaused(RuntimeError):
    """The tracker failed a moment ago and was not tried."""


def attempt(tracker: str, call: Callable[[], None], urgent: bool = False) -> Exception | None:
    """Do `call`; returns what it raised, None on success. A paused tracker is only tried if the call is `urgent`."""
    started = time.monotonic()
    if not urgent and started < _retry_at.get(tracker, 0.0):
        return TrackerPaused("it failed a moment ago")
    try:
        call()
    except Exception as error:  # MLflow lets through what SQLAlchemy, requests or the file system raised
        ended = time.monotonic()
        _retry_at[tracker] = ended + PAUSE_FACTOR * (ended - started)
        return error
    if urgent:  # it answers again
        _retry_at.pop(tracker, None)
    return None


def save_locally(
    tracker: str, workspace: str, run_id: str, kind: str, content: str, reason: str, error_kind: str
) -> None:
    """Write what could not be sent, `content` as JSON, to the workspace; warn once per error_kind. Raises nothing."""
    uri = storage.join(workspace, FOLDER, f"{run_id}.jsonl")
    line = f'{{"time": {time.time():.3f}, "kind": "{kind}", "content": {content}, "reason": {json.dumps(reason)}}}\n'
    outcome = f"it is kept in {uri}"
    try:
        if storage.is_remote(uri):
            storage.write_bytes(f"{uri}/{time.time_ns()}.jsonl", line.encode())
        else:
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            with Path(uri).open("a") as file:
                file.write(line)
    except OSError as error:
        outcome = f"and it could not be kept in {uri}: {error}"
    if error_kind != TrackerPaused.__name__:
        warn_once(tracker, error_kind, f"{kind} not sent to {tracker}: {reason}; {outcome}; the run goes on")


def warn_once(tracker: str, topic: str, message: str) -> None:
    """Print `message` to stderr, once per tracker and topic."""
    if (tracker, topic) not in _warned:
        _warned.add((tracker, topic))
        sys.stderr.write(f"tracking: {message}\n")
