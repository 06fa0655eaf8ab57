"""One writer per feature set, with real processes that really die."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lvlmrec import processes, storage
from lvlmrec.config import load
from lvlmrec.errors import InputError, JobFailed
from lvlmrec.features import lease, store, vacuum
from lvlmrec.features.vacuum import VacuumConfig
from tests.feature_sets import recipe_of, vectors, write_set

HOLD = """
import sys, time
from lvlmrec.features import lease
with lease.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.2)
    monkeypatch.setattr(lease, "EXPIRY", 2.0)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "600"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def numbers(uri: Path) -> list[int]:
    return [int(Path(file.uri).stem) for file in storage.list_files(f"{uri}/writers")]


def move(uri: Path, number: int) -> None:
    """The holder of a lease seems to be on another host."""
    path = uri / "writers" / f"{number:06d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere"}))


def test_writers_follow_one_another_at_once(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        started = time.monotonic()
        with lease.hold(str(tmp_path)) as held:
            assert held.number == number
            held.check()
        assert time.monotonic() - started < lease.EXPIRY / 2
    assert numbers(tmp_path) == [3]


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    said = rf"process {holder.pid} on .* is writing it; wait for that extraction"
    with pytest.raises(InputError, match=said), lease.hold(str(tmp_path)):
        pass
    holder.kill()  # and nobody waits for it: what is left is a zombie
    while processes.born(holder.pid):
        time.sleep(0.01)
    started = time.monotonic()
    with lease.hold(str(tmp_path)) as held:
        assert held.number == 2
    assert time.monotonic() - started < lease.EXPIRY / 2


def test_a_writer_elsewhere_is_watched(tmp_path: Path) -> None:
    with lease.hold(str(tmp_path)) as first:
        first._about["host"] = "elsewhere"
        move(tmp_path, 1)
        with pytest.raises(InputError, match=r"on elsewhere .* is writing it"), lease.hold(str(tmp_path)):
            pass
        first.check()


@pytest.mark.thorough
def test_a_writer_that_stops_elsewhere_is_taken_over_and_finds_out(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)
    move(tmp_path, 1)
    with lease.hold(str(tmp_path)) as held:
        assert held.number == 2
        assert "looking for at most 2 s whether process" in capsys.readouterr().err
    slow = lease.Lease(str(tmp_path), 1, {"host": "elsewhere", "beat": 0})
    with pytest.raises(JobFailed, match="another extraction took over"):
        slow.check()
    slow._ended.set()


@pytest.mark.thorough
def test_of_many_who_take_over_one_gets_it(bucket: str) -> None:
    command = [sys.executable, "-c", HOLD, f"{bucket}/set", "600"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    begun = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    deadline = time.monotonic() + 200
    while sum(process.poll() is None for process in begun) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in begun:
        process.kill()
    said = [process.communicate() for process in begun]
    assert sorted(out for out, _ in said) == ["", "", "", "held\n"]
    assert sum("InputError" in error and "is writing it" in error for _, error in said) == 3, said


def test_vacuum_is_refused_beside_a_writer_and_counts_what_it_removes(tmp_path: Path) -> None:
    recipe = recipe_of()
    uri = write_set(tmp_path, [["a"]], recipe)
    rows = store.feature_table(recipe, ["a"], [8], vectors(recipe, ["b"]))
    store.write_part(uri, recipe, rows, generation=5)
    store.commit(uri)
    config = load(VacuumConfig, [], [f"features={tmp_path}"])
    with lease.hold(uri), pytest.raises(InputError, match="is writing it"):
        vacuum.run(config)
    result = vacuum.run(config)
    assert (result["feature_set"], result["removed_parts"]) == (uri, 1)
    assert result["removed_bytes"] > 100
    assert vacuum.run(config)["removed_parts"] == 0
    assert store.read(uri).index["part"][0].as_py().startswith("part-000005-")


@pytest.mark.parametrize("ended", [True, False])
def test_a_vacuum_leaves_a_set_as_finished_as_it_was(tmp_path: Path, ended: bool) -> None:
    """Also when it runs twice; and a killed extraction stays one."""
    uri = write_set(tmp_path, [["a", "b"]], recipe_of())
    with lease.hold(uri) as held:
        if ended:
            held.finish()
    for _ in range(2):
        vacuum.run(VacuumConfig(features=uri))
        assert lease.is_unfinished(uri) is not ended
