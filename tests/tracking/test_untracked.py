"""A tracker that stops, hangs or refuses does not end a run: what could not be sent is saved in the workspace."""

import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest

from lvlmrec import storage, tracking
from lvlmrec.tracking import Run, untracked
from tests.tracking_server import server

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _no_earlier_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untracked, "_retry_at", {})
    monkeypatch.setattr(untracked, "_warned", set())
    monkeypatch.setattr(tracking, "_unsent_statuses", {})


def kept(run: Run) -> list[tuple[str, Any]]:
    """Kind and content of each record saved in the workspace for a run."""
    file = Path(run.workspace, "untracked", f"{run.id}.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(line["kind"], line["content"]) for line in lines]


@pytest.fixture
def database(tracking_uri: str, tmp_path: Path) -> Path:
    """A database of its own."""
    tracking.start(tracking_uri, str(tmp_path), "test", {})
    file = tmp_path / "own" / "mlflow.db"
    file.parent.mkdir()
    shutil.copy(tracking_uri.removeprefix("sqlite:///"), file)
    with closing(sqlite3.connect(file)) as connection:
        for table in ("tags", "latest_metrics", "metrics", "params", "runs"):
            connection.execute(f"delete from {table}")
        connection.execute("delete from experiments where name = ?", [tracking.EXPERIMENT])
        connection.commit()
    return file


@pytest.mark.thorough
def test_a_server_that_is_killed_in_the_middle(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(database) as (uri, process), tracking.tracked(uri, str(tmp_path), "train", {"lr": 0.1}) as run:
        run.log_metrics({"loss": 3.0, "nan": NAN, "inf": INF, "minus": -INF}, step=1)
        assert kept(run) == [] and capsys.readouterr().err == ""
        stored = mlflow.MlflowClient(uri).get_run(run.id).data.metrics
        assert math.isnan(stored.pop("nan")) and stored.pop("inf") > 1e300 > -1e300 > stored.pop("minus")
        assert stored == {"loss": 3.0}
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        run.log_metrics({"loss": 2.0, "hr@10": 0.5}, step=2)
        run.set_tags({"feature_set": "s3://key:hunter2@bucket/set"})
        run.log_json("result.json", {"hr@10": 0.5})
        child = tracking.start(uri, str(tmp_path), "trial", {"job": "trial"}, run)
        child.log_metrics({"loss": 1.0}, step=1)
        child.finish("FINISHED")
    assert kept(run) == [
        ("metrics", {"step": 2, "metrics": {"loss": 2.0, "hr@10": 0.5}}),
        ("tags", {"feature_set": "s3://key:***@bucket/set"}),
        ("result.json", {"hr@10": 0.5}),
        ("end", "FINISHED"),
    ]
    assert [kind for kind, _ in kept(child)] == ["run", "metrics", "end"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tracking: metrics not sent to {uri}: ")
    assert line.endswith(f"; it is kept in {tmp_path}/untracked/{run.id}.jsonl; the run goes on")


@pytest.mark.thorough
def test_a_server_that_comes_back_is_used_again(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also gets the final status of children that ended meanwhile."""
    monkeypatch.setattr(untracked, "PAUSE_FACTOR", 0.0)
    with server(database) as (uri, _):
        opened = tracking.tracked(uri, str(tmp_path), "tune", {})
        run = opened.__enter__()
        child = tracking.start(uri, str(tmp_path), "trial", {}, run)
    child.finish("FINISHED")
    run.log_metrics({"loss": 2.0}, step=1)
    with server(database, port=int(uri.rpartition(":")[2])):
        run.log_metrics({"loss": 1.0}, step=2)
        opened.__exit__(None, None, None)
        client = mlflow.MlflowClient(uri)
        assert [point.step for point in client.get_metric_history(run.id, "loss")] == [2]
        assert {client.get_run(each.id).info.status for each in (run, child)} == {"FINISHED"}
    assert [kind for kind, _ in kept(run)] == ["metrics"]


@pytest.mark.thorough
def test_a_tracker_that_hangs_is_left_alone(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again after the pause, a multiple of the failure's duration."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(0)
        run = Run(f"http://127.0.0.1:{silent.getsockname()[1]}", "one", str(tmp_path))
        asked = []
        for step in range(5):
            run.log_metrics({"loss": 1.0}, step)
            asked.append(connections(silent))
        untracked._retry_at[run.tracking_uri] = 0.0
        run.log_metrics({"loss": 1.0}, 5)
        asked.append(connections(silent))
    assert [bool(times) for times in asked] == [True, False, False, False, False, True]
    assert [content["step"] for _, content in kept(run)] == [0, 1, 2, 3, 4, 5]
    assert len(capsys.readouterr().err.splitlines()) == 1


def connections(silent: socket.socket) -> int:
    count = 0
    while True:
        try:
            silent.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def test_an_experiment_that_is_deleted_while_a_run_goes_on(database: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{database}"
    with tracking.tracked(uri, str(tmp_path), "train", {}) as run:
        mlflow.MlflowClient(uri).delete_experiment(run.experiment_id)
        run.log_metrics({"loss": 2.0}, step=2)
        untracked._retry_at.clear()
        child = tracking.start(uri, str(tmp_path), "trial", {}, run)
    assert kept(run) == [("metrics", {"step": 2, "metrics": {"loss": 2.0}}), ("end", "FINISHED")]
    assert kept(child) == []


def test_an_experiment_that_was_deleted_stays_so_and_the_next_runs_are_in_another(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{database}"
    client = mlflow.MlflowClient(uri)
    first = tracking.start(uri, str(tmp_path), "train", {})
    client.delete_experiment(first.experiment_id)
    runs = [tracking.start(uri, str(tmp_path), "train", {}) for _ in range(2)]
    assert {client.get_experiment(run.experiment_id).name for run in runs} == {"lvlmrec-2"}
    assert client.get_experiment(first.experiment_id).lifecycle_stage == "deleted"
    assert capsys.readouterr().err == f"tracking: experiment 'lvlmrec' in {uri} is deleted; runs are in 'lvlmrec-2'\n"


@pytest.mark.parametrize("how", ["moved", "copied", "linked"])
def test_artifacts_are_in_the_workspace_where_it_is_now(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    old, new = database.parent, tmp_path / "new's place"
    first = tracking.start(f"sqlite:///{database}", str(old), "train", {})
    first.log_json("result.json", {"run": 1})
    if how == "moved":
        old.rename(new)
    elif how == "copied":
        shutil.copytree(old, new)
    else:
        new.symlink_to(old)
    second = tracking.start(f"sqlite:///{new}/mlflow.db", str(new), "train", {})
    second.log_json("result.json", {"run": 2})
    client = mlflow.MlflowClient(f"sqlite:///{new}/mlflow.db")
    artifacts = [
        Path(storage.absolute(client.get_run(run.id).info.artifact_uri), "result.json") for run in (first, second)
    ]
    assert [json.loads(path.read_text()) for path in artifacts] == [{"run": 1}, {"run": 2}]
    place = old if how == "linked" else new
    assert all(path.is_relative_to(place / "artifacts") for path in artifacts)
    warning = f"tracking: the workspace was at {old}; its artifacts are now those in {new}/artifacts\n"
    assert capsys.readouterr().err == ("" if how == "linked" else warning)
    assert not kept(second) and (how == "moved") == (not old.exists())


@pytest.mark.parametrize("location", ["s3://bucket/artifacts", "/srv/shared"])
def test_artifacts_that_the_user_keeps_elsewhere_stay_there(database: Path, location: str) -> None:
    uri = f"sqlite:///{database}"
    client = mlflow.MlflowClient(uri)
    made = client.create_experiment(tracking.EXPERIMENT, artifact_location=location)
    tracking.start(uri, str(database.parent), "train", {})
    assert client.get_experiment(made).artifact_location == location


@pytest.mark.thorough
def test_a_database_that_is_locked(database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tracking.start(f"sqlite:///{database}", str(tmp_path), "train", {})
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("begin exclusive")
        run.log_metrics({"loss": 2.0}, step=1)
        run.set_tags({"why": "patience"})
        other.execute("rollback")
    run.finish("FINISHED", urgent=True)
    assert [kind for kind, _ in kept(run)] == ["metrics", "tags"]
    assert mlflow.MlflowClient(run.tracking_uri).get_run(run.id).info.status == "FINISHED"
    (line,) = capsys.readouterr().err.splitlines()
    assert "database is locked" in line


def test_children_that_end_while_the_tracker_is_paused_are_closed_with_their_job(
    database: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{database}"

    with pytest.raises(KeyboardInterrupt), tracking.tracked(uri, str(tmp_path), "tune", {}) as run:
        children = [tracking.start(uri, str(tmp_path), f"trial {i}", {}, run) for i in range(2)]
        untracked._retry_at[uri] = time.monotonic() + 600
        for child in children:
            child.finish("KILLED")
        raise KeyboardInterrupt
    client = mlflow.MlflowClient(uri)
    assert [client.get_run(each.id).info.status for each in (run, *children)] == ["KILLED"] * 3


def test_values_that_are_too_long_are_cut_and_kept_whole(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tracking.start(f"sqlite:///{database}", str(tmp_path), "n" * 400, {})
    run.log_config({"prompt": "p" * 7000})
    run.set_tags({"error": "e" * 9000, "short": "s"})
    run.log_metrics({"m" * 300: 0.5, **{f"metric {i}": 0.5 for i in range(1200)}})
    found = mlflow.MlflowClient(run.tracking_uri).get_run(run.id)
    assert (len(found.data.params["prompt"]), len(found.data.tags["error"])) == (6000, 8000)
    assert found.data.tags["short"] == "s" and len(found.data.metrics) == 1201 and len(found.info.run_name) == 250
    assert kept(run) == [("tags", {"error": "e" * 9000})]
    assert json.loads(Path(storage.absolute(found.info.artifact_uri), "config.json").read_text()) == {
        "prompt": "p" * 7000
    }
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_numbers_that_are_none_end_no_run(database: Path, tmp_path: Path, value: float) -> None:
    run = tracking.start(f"sqlite:///{database}", str(tmp_path), "train", {})
    run.log_metrics({"loss": value}, step=1)
    assert kept(run) == [] and "loss" in mlflow.MlflowClient(run.tracking_uri).get_run(run.id).data.metrics


@pytest.mark.parametrize("value", [None, "high", [1.0]])
def test_what_is_no_number_is_kept(database: Path, tmp_path: Path, value: Any) -> None:
    run = tracking.start(f"sqlite:///{database}", str(tmp_path), "train", {})
    run.log_metrics({"loss": value}, step=1)
    assert kept(run) == [("metrics", {"step": 1, "metrics": {"loss": value}})]


def test_a_workspace_in_an_object_store_keeps_it_too(bucket: str) -> None:
    from lvlmrec import storage

    run = Run("http://127.0.0.1:9", "one", f"{bucket}/ws", in_tracker=False)
    run.log_metrics({"loss": 1.0}, step=1)
    run.finish("FINISHED")
    files = storage.list_files(f"{bucket}/ws/untracked/one.jsonl")
    assert [json.loads(storage.read_bytes(file.uri))["kind"] for file in files] == ["metrics", "end"]


def test_a_workspace_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "untracked").write_text("a file")
    run = Run("nonsense://nowhere", "one", str(tmp_path))
    run.log_metrics({"loss": 1.0}, step=1)
    assert "and it could not be kept in" in capsys.readouterr().err
