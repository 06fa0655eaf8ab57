"""Training on Ray: the same as in one process, whatever dies on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from lvlmrec import tracking
from lvlmrec.errors import JobFailed
from lvlmrec.features.cache import Cache
from lvlmrec.jobs import training
from lvlmrec.jobs.training import _worker as product_worker
from lvlmrec.runs import experiment
from lvlmrec.runs.experiment import Experiment
from lvlmrec.tracking import Run
from tests import chaos
from tests.conftest import ROOT
from tests.toy import Fitting, arguments, fitted, settings, train_config
from tests.tracking_server import server

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tracking_uri: str, tmp_path: Path) -> Run:
    return tracking.start(tracking_uri, str(tmp_path), "train", {})


def weights(prepared: Experiment) -> dict[str, torch.Tensor]:
    return load_file(Path(prepared.checkpoint, "model.safetensors"))


def assert_bit_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def hit_rates(run: Run) -> dict[int, float]:
    history = mlflow.MlflowClient(run.tracking_uri).get_metric_history(run.id, "validation/hr_at_10")
    return {point.step: point.value for point in history}


def two_workers(world: Path, workspace: Path) -> Experiment:
    config = train_config(
        world, workspace, model__item_encoder__name="dff", training__num_workers=2, training__epochs=5
    )
    return experiment.prepare(config)


def pausing_worker(config: dict[str, Any]) -> None:
    """A checkpoint after every epoch; after the fourth it waits to be killed."""
    training.CHECKPOINT_SECONDS = 0.0
    tell = training._tell

    def pausing_tell(metrics: dict[str, float], epochs: int, selected_by: str) -> None:
        if metrics["epoch"] == 5:
            time.sleep(600)
        tell(metrics, epochs, selected_by)

    training._tell = pausing_tell
    product_worker(config)


def wait_until_noted(workspace: Path, epoch: int) -> None:
    """Wait until Ray Train has taken note of an epoch's checkpoint: some time after a worker has reported it."""
    snapshots = Path(workspace, "runs")
    chaos.wait_for(
        lambda: any(
            f'"epoch":{epoch},' in file.read_text() for file in snapshots.rglob("checkpoint_manager_snapshot.json")
        ),
        timeout_s=200,
    )


def dying_worker(config: dict[str, Any]) -> None:
    """A checkpoint after every epoch; once, after the third, a worker that does not lead is killed."""
    training.CHECKPOINT_SECONDS = 0.0
    workspace = Path(ray.get(config["experiment"]).config.workspace)
    marker = workspace / "killed"
    fit = training.fit

    def deadly_fit(config: Any, data: Any, features: Any, state: Any, report: Any, device: Any) -> None:
        def deadly_report(metrics: dict[str, float], state: Any) -> None:
            report(metrics, state)
            if metrics["epoch"] == 3 and ray.train.get_context().get_world_rank() == 1 and not marker.exists():
                wait_until_noted(workspace, 3)
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        fit(config, data, features, state, deadly_report, device)

    training.fit = deadly_fit
    product_worker(config)


def failing_worker(config: dict[str, Any]) -> None:
    raise RuntimeError("the disk is full")


@pytest.fixture(scope="module")
def undisturbed(local_ray: str, world: Path, tracking_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The experiment, its result and its run."""
    workspace = tmp_path_factory.mktemp("undisturbed")
    run = tracking.start(tracking_uri, str(workspace), "train", {})
    prepared = two_workers(world, workspace)
    return prepared, training.run(prepared, run), run


def test_two_workers_measure_what_one_process_measures(undisturbed: Any) -> None:
    prepared, result, run = undisturbed
    alone = Fitting(prepared)
    state = alone.run()
    assert result["validation"] == pytest.approx(state.progress.best, abs=1e-9)
    assert (result["epochs"], result["best_epoch"]) == (state.progress.epoch, state.progress.best_epoch)
    assert hit_rates(run) == {epoch["epoch"]: epoch["validation/hr@10"] for epoch in alone.history}
    assert result["parameters"] == sum(value.numel() for value in state.best_weights.values())
    assert result["checkpoint"] == prepared.checkpoint
    for name, value in weights(prepared).items():
        torch.testing.assert_close(value, state.best_weights[name], rtol=2e-3, atol=2e-5)


def test_a_finished_run_is_not_repeated(undisturbed: Any, run: Run) -> None:
    prepared, result, _ = undisturbed
    before = weights(prepared)
    again = training.run(prepared, run)
    assert again == result | {"reused": True}
    assert not result["reused"]
    assert_bit_equal(weights(prepared), before)
    assert hit_rates(run) == {result["best_epoch"]: result["validation"]["hr@10"]}, "more than what tables show"
    assert not mlflow.MlflowClient(run.tracking_uri).get_metric_history(run.id, "train_loss")
    best = mlflow.MlflowClient(run.tracking_uri).get_run(run.id).data.metrics
    assert best["best/hr_at_10"] == result["validation"]["hr@10"]


def test_a_killed_worker_changes_nothing(
    undisturbed: Any, world: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_worker", dying_worker)
    prepared = two_workers(world, tmp_path)
    result = training.run(prepared, run)
    assert (tmp_path / "killed").exists()
    assert prepared.key == undisturbed[0].key
    assert_bit_equal(weights(prepared), weights(undisturbed[0]))
    assert result["validation"] == undisturbed[1]["validation"]
    history = mlflow.MlflowClient(run.tracking_uri).get_metric_history(run.id, "validation/hr_at_10")
    assert [point.step for point in history] == [1, 2, 3, 4, 5], "it did not go on after the third"


def test_a_cluster_that_is_too_small_trains_with_the_workers_that_fit(
    local_ray: str, world: Path, tmp_path: Path, run: Run
) -> None:
    """Eight are asked for and there are CPUs for fewer; what it learns is the same."""
    values = {"model__item_encoder__name": "dff", "training__epochs": 2}
    many = {"training__num_workers": 8, "training__min_workers": 1}
    result = training.run(experiment.prepare(train_config(world, tmp_path, **values, **many)), run)
    prepared, state = fitted(train_config(world, tmp_path, **values))
    assert ray.cluster_resources()["CPU"] < 8 and result["checkpoint"] == prepared.checkpoint
    assert result["validation"] == pytest.approx(state.progress.best, abs=1e-9)


def test_workers_that_cannot_work_fail_the_job(
    local_ray: str, world: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_worker", failing_worker)
    monkeypatch.setattr(training, "MAX_WORKER_FAILURES", 0)
    with pytest.raises(JobFailed, match="the disk is full"):
        training.run(experiment.prepare(train_config(world, tmp_path)), run)
    assert not (tmp_path / "checkpoints").exists()


def test_tracking_shows_the_chosen_epoch_and_not_the_last(
    local_ray: str, world: Path, tmp_path: Path, run: Run
) -> None:
    config = train_config(world, tmp_path, training__lr=0.0, training__epochs=20, training__patience=2)
    result = training.run(experiment.prepare(config), run)  # nothing moves, so the first epoch stays the best
    client = mlflow.MlflowClient(run.tracking_uri)
    shown = client.get_run(run.id).data.metrics
    for name, value in result["validation"].items():
        name = name.replace("@", "_at_")
        assert shown[f"validation/{name}"] == shown[f"best/{name}"] == value
    assert [point.step for point in client.get_metric_history(run.id, "best/hr_at_10")] == [1]
    assert [point.step for point in client.get_metric_history(run.id, "validation/hr_at_10")] == [1, 2, 3, 3]


def test_a_run_that_diverges_fails_at_once_and_publishes_nothing(
    local_ray: str, world: Path, tmp_path: Path, run: Run
) -> None:
    """With two workers, who must agree; tried again it would come to the same. Started again it says the same."""
    prepared = experiment.prepare(train_config(world, tmp_path, training__lr=1e30, training__num_workers=2))
    for _ in range(2):
        with pytest.raises(JobFailed, match=f"training {prepared.key}: epoch 1, step 2: the loss is nan; lower"):
            training.run(prepared, run)
    assert hit_rates(run) == {} and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("values", [{}, {"feature_control": "uniform"}, {"feature_pca": 3}], ids=str)
def test_a_machine_without_the_array_makes_the_same(world: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    prepared = experiment.prepare(train_config(world, tmp_path, model__item_encoder__name="dff", **values))
    elsewhere = replace(prepared.config, cache=str(tmp_path / "elsewhere"))
    features = prepared.features
    assert features is not None
    there = replace(prepared, config=elsewhere, features=replace(features, cache=Cache(tmp_path / "gone")))
    ours = training._local_features(there)
    assert ours is not None and ours.is_here() and ours.cache.folder == tmp_path / "elsewhere"
    assert torch.equal(ours.rows(np.arange(61)), features.rows(np.arange(61)))


# The job's own script, but with a checkpoint after every epoch, and a pause.
DRIVER = """
import runpy, sys
from lvlmrec.jobs import training
from tests.jobs.test_training import pausing_worker
training._worker = pausing_worker
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_killed_driver_started_again_ends_as_if_nothing_had_been(
    ray_address: str, world: Path, tmp_path: Path, tracking_uri: str
) -> None:
    """The first has a Ray of its own, which dies with it; the second runs on one that is there."""
    values = settings(
        world, tmp_path, tracking_uri=tracking_uri, model__backbone__dropout=0.3, training__epochs=12, cache="./cache"
    )
    script = str(ROOT / "rayjobs" / "train.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, script, *arguments(values)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        seen = []
        for line in iter(first.stderr.readline, ""):
            seen.append(line)
            if "epoch 4/12" in line:
                try:
                    wait_until_noted(tmp_path, 4)
                finally:
                    first.kill()
    assert first.returncode == -signal.SIGKILL, "".join(seen[-20:])
    assert not (tmp_path / "checkpoints").exists()

    environment["RAY_ADDRESS"] = ray_address
    command = [sys.executable, script, *arguments(values)]
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout.splitlines()[-1])
    assert result["epochs"] == 12
    assert "epoch 5/12" in again.stderr and "epoch 12/12" in again.stderr
    assert "epoch 4/12" not in again.stderr, "it started over"
    _, state = fitted(train_config(world, tmp_path, model__backbone__dropout=0.3, training__epochs=12))
    assert result["validation"] == state.progress.best
    assert_bit_equal(load_file(Path(result["checkpoint"], "model.safetensors")), state.best_weights)


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_trains(
    ray_address: str, world: Path, tmp_path: Path, tracking_uri: str
) -> None:
    """The job goes on to its result, and exits well; what the server missed is in the workspace."""
    tracking.start(tracking_uri, str(tmp_path), "test", {})
    shutil.copy(tracking_uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    with server(tmp_path / "mlflow.db") as (uri, process):
        values = settings(world, tmp_path, tracking_uri=uri, training__epochs=400, training__patience=400)
        command = [sys.executable, str(ROOT / "rayjobs" / "train.py"), *arguments(values)]
        environment = os.environ | {"RAY_ADDRESS": ray_address}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, env=environment, text=True, **pipes) as job:
            assert job.stderr is not None
            said = []
            for line in iter(job.stderr.readline, ""):
                said.append(line)
                if "epoch 2/400" in line:
                    os.killpg(process.pid, signal.SIGKILL)
            assert job.stdout is not None
            out = job.stdout.read()
    assert job.returncode == 0, "".join(said[-30:])
    result = json.loads(out.splitlines()[-1])
    assert result["epochs"] == 400
    kept = Path(tmp_path, "untracked", f"{result['run_id']}.jsonl").read_text()
    assert '"epoch": 400,' in kept and '"kind": "result.json"' in kept and '"content": "FINISHED"' in kept
    assert not any(line.startswith("Traceback") for line in said)
