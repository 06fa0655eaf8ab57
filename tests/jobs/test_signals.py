"""Jobs that are ended by a signal, as `timeout`, a cluster or Ctrl-C send it: to the whole group of processes."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest

from lvlmrec import tracking
from tests.chaos import titles_job, wait_for
from tests.conftest import ROOT
from tests.toy import arguments, settings

LONG = {"training__epochs": 100_000, "training__patience": 100_000}
# A job whose work, once its run is open, takes as long as one likes.
SLOW = """
import runpy, sys, time
from lvlmrec.runs import evaluating
from lvlmrec.features import imported
def run(config):
    print("at work", file=sys.stderr, flush=True)
    time.sleep(600)
evaluating.run = imported.run = run
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@dataclass
class Job:
    """A job in a group of its own, and what it says on stderr."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def wait_until_said(self, words: str) -> None:
        wait_for(lambda: words in self.said() or self.process.poll() is not None, timeout_s=240)
        assert words in self.said(), self.said()[-3000:]

    def end(self, number: int, times: int = 1, name: str = "") -> None:
        """Signal the whole group, as often as `times`, and check how the job ends, which calls itself `name`."""
        for _ in range(times):
            os.killpg(self.process.pid, number)
        assert self.process.wait(timeout=120) == 1, self.said()[-3000:]
        said = self.said()
        saved = "after epoch [1-9][0-9]* of 100000, the last that was saved"
        name = name or self.name
        goes_on = saved if name == "train" else "where it stopped"
        line = said.splitlines()[-1]
        assert re.fullmatch(f"{name}: interrupted; the same command goes on {goes_on}", line), said[-3000:]
        assert "Traceback" not in said and "***" not in said


@contextmanager
def begun(job: str, log: Path, given: list[str], code: str = "") -> Iterator[Job]:
    script = str(ROOT / "rayjobs" / f"{job}.py")
    command = [sys.executable, *(["-c", code, script] if code else [script]), *given]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
        try:
            yield Job(job, process, log)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def statuses(tracking_uri: str, workspace: Path) -> dict[str, list[str]]:
    """Of the runs of a workspace's jobs, the oldest first, and of their children."""
    client = mlflow.MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None

    def search(of: str) -> list[mlflow.entities.Run]:
        return list(client.search_runs([experiment.experiment_id], of, order_by=["attributes.start_time"]))

    jobs = search(f"params.workspace = '{workspace}' and tags.job != 'trial' and tags.job != 'study run'")
    children = [child for job in jobs for child in search(f"tags.`mlflow.parentRunId` = '{job.info.run_id}'")]
    return {"jobs": [run.info.status for run in jobs], "children": [run.info.status for run in children]}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("job", "number", "times"),
    [("evaluate", signal.SIGTERM, 2), ("evaluate", signal.SIGINT, 1), ("import_features", signal.SIGTERM, 3)],
)
def test_a_job_of_one_process(tmp_path: Path, tracking_uri: str, job: str, number: int, times: int) -> None:
    given = [f"workspace={tmp_path}", f"tracking_uri={tracking_uri}"]
    with begun(job, tmp_path / "log", given, SLOW) as running:
        running.wait_until_said("at work")
        running.end(number, times)
    assert statuses(tracking_uri, tmp_path) == {"jobs": ["KILLED"], "children": []}


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_demo_ends_with_its_job(tmp_path: Path, number: int) -> None:
    with begun("demo", tmp_path / "log", [f"workspace={tmp_path}"]) as running:
        running.wait_until_said("sample: rendering")
        running.end(number, name="extract")
    assert statuses(f"sqlite:///{tmp_path}/mlflow.db", tmp_path) == {"jobs": ["KILLED"], "children": []}


@pytest.mark.slow
def test_training_goes_on_after_its_last_checkpoint(world: Path, tmp_path: Path, tracking_uri: str) -> None:
    given = arguments(settings(world, tmp_path, tracking_uri=tracking_uri, **LONG))
    with begun("train", tmp_path / "first", given) as first:
        wait_for(lambda: noted(tmp_path) or first.process.poll() is not None, timeout_s=240)
        first.end(signal.SIGTERM, times=2)
    epoch = noted(tmp_path)
    assert f"goes on after epoch {epoch} of" in first.said()
    with begun("train", tmp_path / "second", given) as second:
        second.wait_until_said("train: epoch ")
        second.end(signal.SIGINT)
    told = re.search(r"epoch (\d+)/", second.said())
    assert told and int(told[1]) > epoch > 0
    assert statuses(tracking_uri, tmp_path) == {"jobs": ["KILLED", "KILLED"], "children": []}


def noted(workspace: Path) -> int:
    """The epoch of the last checkpoint that Ray Train has taken note of, 0 before the first."""
    notes = workspace.glob("runs/*/checkpoint_manager_snapshot.json")
    return max((int(n) for note in notes for n in re.findall(r'"epoch": ?(\d+)', note.read_text())), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["tune", "study"])
def test_jobs_with_child_runs(world: Path, tmp_path: Path, tracking_uri: str, job: str) -> None:
    layer = tmp_path / "layer.yaml"
    many = {"methods": {"ID": {}, "DFF": {"model.item_encoder.name": "dff"}}, "search": {}, "seeds": [0]}
    layer.write_text(json.dumps({"study": many} if job == "study" else {"search": {"grace_epochs": 100_000}}))
    given = [str(layer), *arguments(settings(world, tmp_path, tracking_uri=tracking_uri, **LONG))]
    with begun(job, tmp_path / "log", given) as running:
        wait_for(lambda: children_at_work(tracking_uri, tmp_path) == 2 or running.process.poll() is not None, 240)
        running.end(signal.SIGTERM, times=2)
    assert statuses(tracking_uri, tmp_path) == {"jobs": ["KILLED"], "children": ["KILLED", "KILLED"]}


def children_at_work(tracking_uri: str, workspace: Path) -> int:
    """How many child runs of a workspace's job have told of an epoch."""
    client = mlflow.MlflowClient(tracking_uri)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=50)
    jobs = {run.info.run_id for run in found if run.data.params.get("workspace") == str(workspace)}
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") in jobs]
    return sum("train_loss" in run.data.metrics for run in children)


@pytest.mark.slow
def test_an_extraction_goes_on(tmp_path: Path, tracking_uri: str) -> None:
    given = [*titles_job(tmp_path, str(tmp_path), num_items=20_000), f"tracking_uri={tracking_uri}"]
    for log, number in (("first", signal.SIGTERM), ("second", signal.SIGINT)):
        with begun("extract", tmp_path / log, given) as running:
            running.wait_until_said(" rejected, ")
            running.end(number)
    told = [re.findall(r"/(\d+) videos, \d+ rejected", (tmp_path / log).read_text()) for log in ("first", "second")]
    assert int(told[0][0]) == 20_000 > int(told[1][0])
    assert statuses(tracking_uri, tmp_path / "workspace")["jobs"] == ["KILLED", "KILLED"]


BODY = """
import sys, time
from dataclasses import dataclass
from lvlmrec import tracking
from lvlmrec.config import option
from lvlmrec.jobs import job
@dataclass(frozen=True)
class Config:
    workspace: str = option("", "where all lies")
    tracking_uri: str = option("sqlite:///${workspace}/mlflow.db", "tracking database")
    lr: float = option(0.1, "learning rate")
    seconds: float = option(0.0, "how long it works")
def body(config, run):
    child = tracking.start(run.tracking_uri, config.workspace, "child", {}, run)
    print("at work", file=sys.stderr, flush=True)
    time.sleep(config.seconds)
    child.finish("FINISHED")
    return {}
sys.argv.pop(1)
sys.exit(job.main("evaluate", Config, body))
"""


@pytest.mark.thorough
def test_what_a_killed_job_left_open_is_closed_by_the_next_of_its_kind(tmp_path: Path, tracking_uri: str) -> None:
    """Its children too; not the run of another configuration, nor one whose process lives."""
    (tmp_path / "layer.yaml").write_text("lr: 0.2\n")
    given = [str(tmp_path / "layer.yaml"), f"workspace={tmp_path}", f"tracking_uri={tracking_uri}", "seconds=600"]

    def open_runs(*expected: str) -> None:
        assert statuses(tracking_uri, tmp_path) == {"jobs": [*expected], "children": [*expected]}

    for log, changed in (("one", []), ("other", ["lr=0.3"])):
        with begun("evaluate", tmp_path / log, [*given, *changed], BODY) as running:
            running.wait_until_said("at work")
            running.process.kill()
    open_runs("RUNNING", "RUNNING")
    with begun("evaluate", tmp_path / "alive", given, BODY) as alive:
        alive.wait_until_said("at work")
        open_runs("KILLED", "RUNNING", "RUNNING")
        with begun("evaluate", tmp_path / "same", given, BODY) as same:
            same.wait_until_said("at work")
            open_runs("KILLED", "RUNNING", "RUNNING", "RUNNING")
