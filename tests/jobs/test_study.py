"""A study on Ray: resumable at any moment, each run a child run, failures told and the rest done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch

from lvlmrec import tracking
from lvlmrec.config import load
from lvlmrec.errors import InputError, JobFailed
from lvlmrec.jobs import study
from lvlmrec.jobs.study import train as product_train
from lvlmrec.runs import checkpoint, evaluating, experiment, grid
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.runs.grid import Trial
from lvlmrec.tracking import Run
from tests.conftest import ROOT
from tests.runs.test_grid import study_config
from tests.toy import Fitting, arguments, fitted, publish, settings, train_config

NUMBERS = ["validation", "test", "difference", "p "]


def test_an_interrupted_run_goes_on_after_its_last_saved_epoch(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "STATE_SECONDS", 0.0)
    config = train_config(world, tmp_path, model__backbone__dropout=0.3, training__epochs=5)
    prepared, saved = experiment.prepare(config), str(tmp_path / "runs" / "state.tar")

    def killed(metrics: dict[str, float], epoch: int) -> None:
        if epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study._fit(prepared, saved, killed)
    told: list[int] = []
    state = study._fit(prepared, saved, lambda metrics, epoch: told.append(epoch))
    assert told == [4, 5]
    alone = Fitting(prepared).run()
    assert state.progress.best == alone.progress.best
    for name, value in alone.best_weights.items():
        assert torch.equal(state.best_weights[name], value), name


def test_a_state_is_saved_from_time_to_time_and_at_the_end(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(study, "save_state", lambda state, uri: saved.append(state.progress.epoch))
    prepared = experiment.prepare(train_config(world, tmp_path, training__epochs=3))
    study._fit(prepared, str(tmp_path / "state.tar"), lambda metrics, epoch: None)
    assert saved == [3]


def test_an_evaluation_that_is_written_is_reused(world: Path, tmp_path: Path) -> None:
    config = train_config(world, tmp_path)
    uri = publish(*fitted(config))
    first = study.evaluate(config, uri, [], 500, 1)
    assert (first["reused"], first["baselines"]) == (False, {})
    assert study.evaluate(config, uri, [], 500, 1) == first | {"reused": True}
    assert study.evaluate(config, uri, ["markov"], 500, 1)["reused"] is False, "its baselines were not there"
    again = study.evaluate(config, uri, [], 500, 1)
    assert again["reused"] and list(again["baselines"]) == ["markov"]
    written = Path(again["ranks"]).with_name("evaluation.json")
    written.write_text(json.dumps(json.loads(written.read_text()) | {"format": evaluating.FORMAT - 1}))
    assert study.evaluate(config, uri, [], 500, 1)["reused"] is False, "of an earlier version, with fewer slices"
    checkpoint.note_trials(uri, 9)
    assert (again["trials"], study.evaluate(config, uri, [], 500, 1)["trials"]) == (1, 9)


@pytest.mark.parametrize(("ks", "reused"), [([5, 10, 50], False), ([20], False), ([1, 10, 20, 100], True)])
def test_an_evaluation_at_other_cut_offs_is_reused_where_it_has_those_of_the_tables(
    world: Path, tmp_path: Path, ks: list[int], reused: bool
) -> None:
    config = train_config(world, tmp_path)
    uri = publish(*fitted(config))
    own = {"workspace": config.workspace, "checkpoint": uri, "baselines": ["popularity"], "ks": ks}
    evaluating.run(load(EvaluateConfig, [own]))
    result = study.evaluate(config, uri, ["popularity"], 500, 1)
    assert result["reused"] is reused
    for found in (result, result["baselines"]["popularity"]):
        assert {"hr@10", "ndcg@10", "hr@20", "ndcg@20"} <= set(found["test"])


def test_what_does_not_fit_is_told_before_any_run(world: Path, tmp_path: Path) -> None:
    wrong = study_config(world, tmp_path, {"ID": {}, "A": {"model.item_encoder.name": "dff", "features": "/nowhere"}})
    with pytest.raises(InputError, match=r"study.methods.A: .*/nowhere"):
        study.check(wrong, grid.make_plan(wrong))


def failing_train(config: Any, run: Run, threads: int, name: str) -> dict[str, Any]:
    if config.model.item_encoder.name == "dff" and config.training.lr == 0.02:
        raise RuntimeError("the loss is gone")
    return product_train(config, run, threads, name)


def children(parent: Run) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(parent.tracking_uri)
    found = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert found is not None
    return list(client.search_runs([found.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.id}'"))


@pytest.mark.slow
def test_a_failed_run_is_told_and_the_rest_is_done(
    local_ray: str, world: Path, tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "train", failing_train)
    config = study_config(world, tmp_path, study__seeds=[0])
    plan = grid.make_plan(config)
    already = plan.config(Trial("ID", 1, 0))
    publish(*fitted(already))
    parent = tracking.start(tracking_uri, str(tmp_path), "study", {})
    with pytest.raises(JobFailed, match=r"1 steps failed; .*DFF, lr 0.02, seed 0: RuntimeError: the loss is gone"):
        study.run(config, plan, parent)
    table = pd.read_csv(Path(grid.folder(config), "table.csv"), index_col="method")
    assert table["status"][["ID", "DFF"]].tolist() == ["complete", "1 failed"]
    assert table["trials"][["ID", "DFF"]].tolist() == [2, 1]
    told = [json.loads(path.read_text()) for path in tmp_path.glob("evaluations/*/evaluation.json")]
    by_encoder = {Path(result["checkpoint"]).name.split("-")[1]: result["trials"] for result in told}
    assert by_encoder == {"id": 2, "dff": 1}, "of two settings of DFF one failed"
    assert table["test hr@10"].notna().all()
    runs = pd.read_csv(Path(grid.folder(config), "runs.csv"))
    assert sorted(runs["status"]) == ["complete"] * 3 + ["train failed: RuntimeError: the loss is gone"]
    found = children(parent)
    assert sorted(run.info.status for run in found) == ["FAILED"] + ["FINISHED"] * 3
    assert sum("test/hr_at_10" in run.data.metrics for run in found) == 2
    trained = [run.data.metrics for run in found if run.info.status == "FINISHED"]
    assert all(shown["validation/hr_at_10"] == shown["best/hr_at_10"] for shown in trained)
    client = mlflow.MlflowClient(tracking_uri)
    reused = {run.info.run_id: not client.get_metric_history(run.info.run_id, "train_loss") for run in found}
    assert sum(reused[run.info.run_id] for run in found if run.info.status == "FINISHED") == 1


@pytest.mark.slow
def test_a_study_ends_with_its_tables_without_its_tracker(local_ray: str, world: Path, tmp_path: Path) -> None:
    config = study_config(world, tmp_path, study__seeds=[0], study__baselines=[])
    gone = Run("http://127.0.0.1:9", "parent", str(tmp_path))
    result = study.run(config, grid.make_plan(config), gone)
    assert (result["runs"], result["failed"]) == (4, 0)
    kept = [file.read_text() for file in (tmp_path / "untracked").glob("*.jsonl")]
    assert len(kept) == 4 and all("train_loss" in text for text in kept)


def command(world: Path, workspace: Path, tracking_uri: str) -> list[str]:
    values = settings(world, workspace, tracking_uri=tracking_uri, model__backbone__dropout=0.3, training__epochs=4)
    given = {
        "methods": {"ID": {}, "DFF": {"model.item_encoder.name": "dff"}},
        "search": {"training.lr": [0.01, 0.02]},
        "seeds": [0, 1],
        "max_concurrent": 2,
    }
    layer = workspace / "study.yaml"
    layer.write_text(json.dumps({"study": given}))
    return [sys.executable, str(ROOT / "rayjobs" / "study.py"), str(layer), *arguments(values)]


def finished(started: list[str], address: str) -> dict[str, Any]:
    process = subprocess.run(started, env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def published(workspace: Path) -> dict[str, float]:
    return {str(f.relative_to(workspace)): f.stat().st_mtime for f in workspace.glob("checkpoints/*/result.json")}


@pytest.mark.slow
def test_a_killed_study_started_again_ends_as_if_nothing_had_been(
    ray_address: str, world: Path, tmp_path: Path
) -> None:
    """The first has a Ray of its own, which dies with it; the others run on one that is there."""
    tracking_uri, killed, whole = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    started = command(world, killed, tracking_uri)
    with subprocess.Popen(started, env=os.environ, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        ended = 0
        for line in iter(first.stderr.readline, ""):
            ended += line.startswith("study: train")
            if ended == 3:
                first.kill()
                break
    assert first.returncode == -signal.SIGKILL
    time.sleep(5)  # what its workers were doing ends a moment after it
    before = published(killed)
    assert 3 <= len(before) < 6

    again = finished(started, ray_address)
    assert (again["runs"], again["reused"], again["failed"]) == (6, len(before), 0)
    assert {name: time for name, time in published(killed).items() if name in before} == before
    assert not list(killed.glob("runs/study-*")), "states of published runs are left"

    undisturbed = finished(command(world, whole, tracking_uri), ray_address)
    assert undisturbed["methods"] == again["methods"]
    tables = [pd.read_csv(result["csv"], index_col="method") for result in (again, undisturbed)]
    shown = [name for name in tables[0] if any(part in name for part in NUMBERS)]
    pd.testing.assert_frame_equal(tables[0][shown], tables[1][shown])
    assert (tables[0]["status"] == "complete").all()
