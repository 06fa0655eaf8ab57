"""What a run leaves in MLflow, and that no password is part of it."""

import json
import shutil
import socket
import sqlite3
import time
from pathlib import Path

import mlflow
import pytest

from lvlmrec import tracking
from lvlmrec.errors import InputError
from lvlmrec.tracking import Run

SECRET = "hunter2"
WITH_PASSWORD = f"postgresql://ann:{SECRET}@host:5432/db"


def stored(run: Run) -> mlflow.entities.Run:
    return mlflow.MlflowClient(run.tracking_uri).get_run(run.id)


def artifact(run: Run, name: str) -> str:
    return Path(stored(run).info.artifact_uri.removeprefix("file://"), name).read_text()


@pytest.fixture
def run(tracking_uri: str, tmp_path: Path) -> Run:
    return tracking.start(tracking_uri, str(tmp_path), "test", {"job": "test"})


def test_a_run_that_ends_is_finished_and_knows_its_configuration(tracking_uri: str, tmp_path: Path) -> None:
    config = {"training": {"lr": 0.002, "epochs": 4}, "features": "", "taps": ["llm.0", "llm.-1"]}
    with tracking.tracked(tracking_uri, str(tmp_path), "train", config) as run:
        assert stored(run).info.status == "RUNNING"
    found = stored(run)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == found.data.tags["job"] == "train"
    assert len(found.data.tags["mlflow.source.git.commit"]) in (len("unknown"), 40)
    params = {"training.lr": "0.002", "training.epochs": "4", "features": "", "taps": "['llm.0', 'llm.-1']"}
    assert found.data.params == params
    assert json.loads(artifact(run, "config.json")) == config


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("out of memory"), "FAILED"),
        (InputError("features: none"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(15), "KILLED"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_a_run_that_breaks_off_says_how(tracking_uri: str, tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), tracking.tracked(tracking_uri, str(tmp_path), "train", {}) as run:
        raise error
    assert stored(run).info.status == status
    if status == "FAILED":
        assert stored(run).data.tags["error"] == f"{type(error).__name__}: {error}"


def test_metrics_keep_their_steps(run: Run) -> None:
    for epoch in (1, 2, 3):
        run.log_metrics({"validation/hr@10": epoch / 10, "train_loss": 4.0 - epoch}, step=epoch)
    client = mlflow.MlflowClient(run.tracking_uri)
    history = client.get_metric_history(run.id, "validation/hr_at_10")
    assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert stored(run).data.metrics["train_loss"] == 1.0


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_tables_show_the_chosen_epoch_and_curves_every_epoch(tracking_uri: str, tmp_path: Path, chosen: int) -> None:
    run, rates = tracking.start(tracking_uri, str(tmp_path), "test", {}), {1: 0.1, 2: 0.3, 3: 0.2}
    for epoch, rate in rates.items():
        run.log_metrics({"validation/hr@10": rate, "validation/ndcg@10": rate / 2}, step=epoch)
    run.log_best_epoch({"hr@10": rates[chosen], "ndcg@10": rates[chosen] / 2}, chosen, last=3)
    shown = stored(run).data.metrics
    assert shown["validation/hr_at_10"] == shown["best/hr_at_10"] == rates[chosen]
    assert shown["validation/ndcg_at_10"] == shown["best/ndcg_at_10"] == rates[chosen] / 2
    client = mlflow.MlflowClient(run.tracking_uri)
    history = [(p.step, p.value) for p in client.get_metric_history(run.id, "validation/hr_at_10")]
    assert history == [*rates.items(), *([(3, rates[chosen])] if chosen != 3 else [])]
    assert [point.step for point in client.get_metric_history(run.id, "best/hr_at_10")] == [chosen]


def test_tables_show_a_run_that_was_found_finished(run: Run) -> None:
    run.log_best_epoch({"hr@10": 0.3}, 2)
    assert stored(run).data.metrics["validation/hr_at_10"] == stored(run).data.metrics["best/hr_at_10"] == 0.3


def test_more_parameters_than_one_call_takes(run: Run) -> None:
    run.log_config({f"key{i}": i for i in range(230)})
    assert len(stored(run).data.params) == 230


def test_json_is_an_artifact(run: Run) -> None:
    run.log_json("result.json", {"hr@10": 0.5})
    assert json.loads(artifact(run, "result.json")) == {"hr@10": 0.5}


def test_artifacts_lie_in_the_workspace_of_a_new_database(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with paths relative to the working directory, which the workers of a run do not share."""
    (tmp_path / "ws").mkdir()
    shutil.copy(run.tracking_uri.removeprefix("sqlite:///"), tmp_path / "ws" / "mlflow.db")
    with sqlite3.connect(tmp_path / "ws" / "mlflow.db") as database:  # as new, without the seconds that takes
        database.execute("update experiments set name = 'other' where name = ?", [tracking.EXPERIMENT])
    monkeypatch.chdir(tmp_path)
    new = tracking.start("sqlite:///ws/mlflow.db", "ws", "test", {})
    monkeypatch.chdir("/")
    new.log_json("result.json", {})
    new.finish("FINISHED")
    assert list((tmp_path / "ws" / "artifacts").glob("**/result.json"))
    with sqlite3.connect(tmp_path / "ws" / "mlflow.db") as database:
        assert database.execute("select status from runs where run_uuid = ?", [new.id]).fetchall() == [("FINISHED",)]


@pytest.mark.parametrize("name", ["a%20b", "a?b=c", "100% #1 [é]", "a%3F"])
def test_a_workspace_of_any_name(run: Run, tmp_path: Path, name: str) -> None:
    workspace = tmp_path / name
    workspace.mkdir()
    shutil.copy(run.tracking_uri.removeprefix("sqlite:///"), workspace / "mlflow.db")
    with sqlite3.connect(workspace / "mlflow.db") as database:
        database.execute("update experiments set name = 'other' where name = ?", [tracking.EXPERIMENT])
    new = tracking.start(f"sqlite:///{workspace}/mlflow.db?timeout=20", str(workspace), "test", {})
    child = tracking.start(new.tracking_uri, str(workspace), "child", {}, new)
    for one in (new, child):
        one.log_json("result.json", {})
        one.finish("FINISHED")
    assert len(list((workspace / "artifacts").glob("**/result.json"))) == 2
    assert list(tmp_path.iterdir()) == [workspace]
    with sqlite3.connect(workspace / "mlflow.db") as database:
        ended = database.execute("select status from runs where run_uuid in (?, ?)", [new.id, child.id]).fetchall()
    assert ended == [("FINISHED",)] * 2


def test_a_child_run_names_its_parent(run: Run, tmp_path: Path) -> None:
    child = tracking.start(run.tracking_uri, str(tmp_path), "child", {}, run)
    assert stored(child).data.tags["mlflow.parentRunId"] == run.id


def test_an_unreachable_server_is_the_users_to_mend_and_soon_known(tmp_path: Path) -> None:
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        uri = f"http://ann:{SECRET}@127.0.0.1:{probe.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(InputError, match=r"tracking_uri 'http://ann:\*\*\*@127") as caught:
            tracking.start(uri, str(tmp_path), "test", {})
    assert time.monotonic() - started < 15
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:////proc/nobody/mlflow.db", "sqlite:///{file}"])
def test_a_wrong_tracking_uri_is_the_users_to_mend(tmp_path: Path, uri: str) -> None:
    (tmp_path / "file.txt").write_text("no database" * 100)
    with pytest.raises(InputError, match="tracking_uri"):
        tracking.start(uri.format(file=tmp_path / "file.txt"), str(tmp_path), "test", {})


def test_no_password_is_logged(tracking_uri: str, tmp_path: Path) -> None:
    config = {"tracking_uri": WITH_PASSWORD, "dataset": {"path": f"https://host/x?token={SECRET}&rows=5"}}
    with pytest.raises(RuntimeError), tracking.tracked(tracking_uri, str(tmp_path), "train", config) as run:
        run.set_tags({"features": f"s3://key:{SECRET}@bucket/set"})
        run.log_json("result.json", {"nested": [{"uri": WITH_PASSWORD}]})
        raise RuntimeError(f"could not connect to {WITH_PASSWORD}")
    found = stored(run)
    everything = [found.data.params, found.data.tags, artifact(run, "config.json"), artifact(run, "result.json")]
    assert SECRET not in str(everything)
    assert found.data.params["tracking_uri"] == "postgresql://ann:***@host:5432/db"
    assert found.data.params["dataset.path"] == "https://host/x?token=***&rows=5"


@pytest.mark.parametrize(
    "text", ["sqlite:////srv/mlflow.db", "s3://bucket/a@b:c", "http://host:5000/x", "llm.0: what is it @ 3:00?"]
)
def test_what_is_no_password_stays(text: str) -> None:
    assert tracking.masked(text) == text
