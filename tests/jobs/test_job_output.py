"""What a person reads on a job's stderr: its own lines and real failures, nothing that Ray says of itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lvlmrec import tracking
from tests.conftest import ROOT
from tests.toy import arguments, settings
from tests.videos import write_video

RAYS = [
    "[2026-11-30 22:45:04,212 E 31582 31612] core_worker.cc:2465: Actor with class name: 'X' has constructor arguments",
    "[2026-11-30 22:45:04,212 W 31582 31612] (raylet) node_manager.cc:12: Health check failed",
    "[2026-11-30 22:45:05,001 E 1 2] core_worker_process.cc:842: Failed to establish connection to the metrics agent",
]
OURS = [
    "train: epoch 1/3, loss 3.9721, validation HR@10 0.2133 NDCG@10 0.1093, 0.03 s",
    "[2026-11-30 22:45:05,001 F 1 2] core_worker.cc:20: Check failed: status.ok()",
    "Traceback (most recent call last):",
    '  File "train.py", line 3, in <module>',
    "RuntimeError: core_worker.cc:2465 is only named here",
]
# As a job does: the settings must be made before anything imports ray.
SHOWN = """
import json, runpy, sys
runpy.run_path(sys.argv[1], run_name="imported")
from ray._private.ray_logging import stderr_deduplicator
shown = []
for pid in (1, 2, 3):
    batch = {"ip": "127.0.0.1", "pid": pid, "is_err": True, "lines": json.loads(sys.argv[2])}
    for each in stderr_deduplicator.deduplicate(batch):
        shown += each["lines"]
print(json.dumps(shown + [line for batch in stderr_deduplicator.flush() for line in batch["lines"]]))
"""


def shown(job: str, **environment: str) -> list[str]:
    """What a driver that ran a job shows of the lines of three processes."""
    clean = {name: value for name, value in os.environ.items() if "DEDUP" not in name}
    command = [sys.executable, "-c", SHOWN, str(ROOT / "rayjobs" / f"{job}.py"), json.dumps(RAYS + OURS)]
    done = subprocess.run(command, env=clean | environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.thorough
@pytest.mark.parametrize("job", ["extract", "train", "tune", "study"])
def test_what_workers_say_is_shown_of_each_and_what_ray_says_is_not(job: str) -> None:
    assert shown(job) == OURS * 3


@pytest.mark.thorough
def test_who_wants_rays_lines_gets_them() -> None:
    assert shown("train", RAY_DEDUP_LOGS="0") == (RAYS + OURS) * 3


PREFIX = re.compile(r"(\x1b\[\d+m)?\((\w+|study\S*) pid=\d+\)(\x1b\[\d+m)? ")


def strangers(stderr: list[str], job: str) -> list[str]:
    """The lines of a job's stderr that are not its own, but for those that say which Ray it is on."""
    lines = [PREFIX.sub("", line) for line in stderr]
    return [line for line in lines if not line.startswith(f"{job}: ") and "INFO worker.py" not in line]


def said(job: str, given: list[str], folder: Path, tracking_uri: str) -> list[str]:
    """The stderr of a job that must succeed, on a Ray of its own beside that of the tests."""
    tracking.start(tracking_uri, str(folder), "test", {}).finish("FINISHED")  # the database is there
    command = [sys.executable, str(ROOT / "rayjobs" / f"{job}.py"), f"tracking_uri={tracking_uri}", *given]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_TRAIN")}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.slow
def test_a_training_beside_another_ray_says_nothing_but_how_it_goes(
    ray_address: str, world: Path, tmp_path: Path, tracking_uri: str
) -> None:
    values: dict[str, Any] = {"training__num_workers": 2, "training__epochs": 3}
    lines = said("train", arguments(settings(world, tmp_path, **values)), tmp_path, tracking_uri)
    assert sum("train: epoch " in line for line in lines) == 3
    assert strangers(lines, "train") == []


@pytest.mark.slow
def test_an_extraction_beside_another_ray_says_nothing_but_how_it_goes(
    ray_address: str, tmp_path: Path, tracking_uri: str
) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", num_frames=30)
    lines = said("extract", [f"workspace={tmp_path}", f"input={tmp_path}/videos"], tmp_path, tracking_uri)
    assert [line for line in strangers(lines, "extract") if not line.startswith("sample: ")] == []
