"""Whether the process of a run is dead."""

import subprocess
import sys
import threading
import time

import pytest

from lvlmrec import processes
from lvlmrec.tracking import owner
from lvlmrec.tracking.owner import EXPIRY_SECONDS, HEARTBEAT, HOST, KEY, PID, STARTED


@pytest.mark.parametrize(
    ("changed", "dead"),
    [
        ({}, False),
        ({STARTED: "12.5"}, True),  # another process with its number
        ({HOST: "elsewhere"}, False),
        ({HOST: "elsewhere", HEARTBEAT: f"{time.time() - EXPIRY_SECONDS - 60:.0f}"}, True),
        ({HOST: "elsewhere", PID: "0"}, False),
        ({HOST: "elsewhere", HEARTBEAT: "now"}, False),
    ],
)
def test_a_run_is_dead_with_its_process_or_its_beat(changed: dict[str, str], dead: bool) -> None:
    assert owner.is_dead(owner.tags({"job": "train"}) | changed) == dead


def test_a_process_that_ended_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        born = str(processes.born(process.pid))
        tags = owner.tags({}) | {PID: str(process.pid), STARTED: born}
        assert not owner.is_dead(tags)
    assert owner.is_dead(tags)


def test_a_run_of_an_earlier_release_is_left_alone() -> None:
    assert not owner.is_dead({"job": "train"})


def test_the_key_is_that_of_what_is_done_whoever_does_it() -> None:
    one, same, other = (owner.tags({"job": "train", "seed": seed})[KEY] for seed in (0, 0, 1))
    assert one == same != other


def test_the_beat_goes_on_although_the_tracker_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "HEARTBEAT_SECONDS", 0.001)
    beats: list[float] = []
    enough = threading.Event()

    def write(tags: object) -> None:
        beats.append(float(tags[HEARTBEAT]))  # type: ignore[index]
        if len(beats) == 3:
            enough.set()
        raise ConnectionError("no tracker")

    with owner.heartbeat(write):
        assert enough.wait(20)
    assert beats == sorted(beats)
