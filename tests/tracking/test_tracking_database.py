"""The tracking database of a new workspace: first jobs at the same time, and one killed while creating it."""

import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest

from lvlmrec import tracking
from lvlmrec.errors import InputError
from lvlmrec.tracking import database

START = """
import sys
from lvlmrec import tracking
run = tracking.start(f"sqlite:///{sys.argv[1]}/mlflow.db", sys.argv[1], "test", {})
run.log_metrics({"hr@10": 0.5})
print(run.id)
"""
EARLY = "451aebb31d03"  # the second of MLflow's migrations


def job(workspace: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", START, str(workspace)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_ids(workspace: Path) -> list[str]:
    client = mlflow.MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments() if e.name == tracking.EXPERIMENT]
    assert len(experiments) == 1
    return [run.info.run_id for run in client.search_runs(experiments)]


@pytest.mark.thorough
@pytest.mark.parametrize("round_", [1, 2])
def test_three_first_jobs_at_once(tmp_path: Path, round_: int) -> None:
    jobs = [job(tmp_path) for _ in range(3)]
    outcomes = [(*process.communicate(), process.returncode) for process in jobs]
    assert [status for *_, status in outcomes] == [0, 0, 0], [err[-500:] for _, err, _ in outcomes]
    assert sorted(out.strip() for out, *_ in outcomes) == sorted(run_ids(tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


@pytest.mark.thorough
def test_a_job_that_is_killed_while_it_makes_the_database_harms_no_other(tmp_path: Path) -> None:
    with job(tmp_path) as killed:
        deadline = time.monotonic() + 120
        while not any(tables(file) > 3 for file in [*tmp_path.glob("*.db"), *tmp_path.glob(".*.making")]):
            assert killed.poll() is None and time.monotonic() < deadline, "it made no tables"
        killed.kill()
    with job(tmp_path) as next_job:
        out, err = next_job.communicate()
    assert next_job.returncode == 0, err
    assert run_ids(tmp_path) == [out.strip()]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def tables(file: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return int(connection.execute("select count(*) from sqlite_master").fetchone()[0])
    except sqlite3.Error:
        return 0


@pytest.fixture
def whole(tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete database; jobs that need a new one copy it, which saves the seconds that creating one takes."""
    tracking.start(tracking_uri, str(tmp_path), "test", {})
    file = tmp_path / "whole.db"
    shutil.copy(tracking_uri.removeprefix("sqlite:///"), file)
    with closing(sqlite3.connect(file)) as connection:
        for name in database._tables(connection) - database.SEEDED_TABLES:
            connection.execute(f'delete from "{name}"')
        connection.execute("delete from experiments where name = ?", [tracking.EXPERIMENT])
        connection.commit()
    original = mlflow.MlflowClient

    def client(uri: str, *rest: Any) -> mlflow.MlflowClient:
        if uri.endswith(".making"):
            shutil.copy(file, uri.removeprefix("sqlite:///"))
        return original(uri, *rest)

    monkeypatch.setattr(mlflow, "MlflowClient", client)
    return file


def write_incomplete(whole: Path, file: Path, left: str) -> None:
    """Write the database that a process killed in the middle of the migrations leaves."""
    shutil.copy(whole, file)
    with closing(sqlite3.connect(file)) as connection:
        kept = {"initial": {"experiments"}, "unversioned": {"experiments", "metrics", "params", "runs", "tags"}}
        emptied = database._tables(connection) - kept.get(left, {"alembic_version"} | kept["unversioned"])
        for name in emptied:
            connection.execute(f'drop table "{name}"')
        if left == "migrating":
            connection.execute("update alembic_version set version_num = ?", [EARLY])
        if left == "renaming":
            connection.execute("alter table experiments rename to _alembic_tmp_experiments")
            connection.execute("update alembic_version set version_num = ?", [EARLY])
        connection.commit()


@pytest.mark.parametrize("left", ["initial", "unversioned", "migrating", "renaming"])
def test_a_half_made_database_without_a_run_is_made_anew(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    file = tmp_path / "ws" / "mlflow.db"
    file.parent.mkdir()
    write_incomplete(whole, file, left)
    file.with_name("mlflow.db-journal").write_bytes(b"")
    run = tracking.start(f"sqlite:///{file}", str(file.parent), "test", {})
    assert run_ids(file.parent) == [run.id]
    assert capsys.readouterr().err == f"tracking: {file} was left half-made and holds no run: made anew\n"


@pytest.mark.parametrize("content", [b"", None])
def test_an_empty_database_is_made_anew_in_silence(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    (tmp_path / "ws").mkdir()
    if content is not None:
        (tmp_path / "ws" / "mlflow.db").write_bytes(content)
    run = tracking.start(f"sqlite:///{tmp_path}/ws/mlflow.db", str(tmp_path / "ws"), "test", {})
    assert run_ids(tmp_path / "ws") == [run.id]
    assert capsys.readouterr().err == ""


def test_a_half_made_database_with_runs_is_named_with_what_to_do(whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    write_incomplete(whole, file, "migrating")
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("insert into runs (run_uuid) values ('one')")
        connection.commit()
    with pytest.raises(InputError) as caught:
        tracking.start(f"sqlite:///{file}", str(tmp_path), "test", {})
    assert f"'mlflow db upgrade sqlite:///{file}', or move it away for a new one" in str(caught.value)
    assert "\n" not in str(caught.value)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("select run_uuid from runs").fetchall() == [("one",)]


@pytest.mark.parametrize(
    "foreign", ["create table mine (number int)", "create table alembic_version (version_num text)"]
)
def test_what_is_no_half_made_database_of_mlflow_stays(tmp_path: Path, foreign: str) -> None:
    file = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(foreign)
        name = foreign.split()[2]
        connection.execute(f"insert into {name} values ('7')")
        connection.commit()
    assert not database._is_incomplete(file)


def test_a_database_of_a_later_mlflow_stays(whole: Path) -> None:
    with closing(sqlite3.connect(whole)) as connection:
        connection.execute("update alembic_version set version_num = 'ffffffffffff'")
        connection.commit()
    assert not database._is_incomplete(whole) and not database.is_outdated(whole)


def test_two_jobs_that_make_the_experiment_at_once_use_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes without a lock, as on a server: the second sees no experiment, and then cannot create it."""
    first = tracking.start(f"sqlite:///{whole}", str(tmp_path), "test", {})
    found = mlflow.tracking.MlflowClient.get_experiment_by_name
    seen: list[str] = []

    def not_yet(self: mlflow.tracking.MlflowClient, name: str) -> Any:
        seen.append(name)
        return None if len(seen) == 1 else found(self, name)

    monkeypatch.setattr(mlflow.tracking.MlflowClient, "get_experiment_by_name", not_yet)
    second = tracking.start(f"sqlite:///{whole}", str(tmp_path), "test", {})
    assert len(seen) == 2
    assert sorted(run_ids(whole.rename(tmp_path / "mlflow.db").parent)) == sorted([first.id, second.id])


@pytest.mark.thorough
def test_the_first_job_of_a_workspace_says_nothing_of_tables(tmp_path: Path) -> None:
    code = "import sys; from lvlmrec import tracking; tracking.start(sys.argv[1], sys.argv[2], 'first', {})"
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / "mlflow.db").exists() and "INFO" not in done.stderr and "tables" not in done.stderr
