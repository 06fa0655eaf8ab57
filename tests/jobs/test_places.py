"""What a job writes is refused a place where it would be lost, before the job starts."""

import sys
from pathlib import Path
from typing import Any

import pytest

from lvlmrec import config, tracking
from lvlmrec.errors import ConfigError
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.jobs import job, places
from lvlmrec.runs.experiment import TrainConfig
from tests.conftest import never
from tests.test_conf import JOBS

pytestmark = pytest.mark.usefixtures("own_signals")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as Ray unpacks a working directory into; the process is in it."""
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    (folder / "rayjobs").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def refused(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """The one line that a job ends with."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert job.main(name, JOBS[name], never) == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


@pytest.mark.parametrize("name", JOBS)
def test_defaults_that_ray_would_remove_are_refused(
    name: str, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    said = refused(name, [], monkeypatch, capsys)
    assert said.startswith(f"{name}: workspace='./workspace'")
    assert "tracking_uri='sqlite:///./workspace/mlflow.db': in " in said and str(package) in said
    assert "give an absolute path" in said and "http://SERVER:5000 for tracking_uri" in said
    assert [path.name for path in package.iterdir()] == ["rayjobs"]


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["workspace=s3://b/w", "tracking_uri=http://server:5000", "store=features"], "store='features': in "),
        (["workspace={other}", "tracking_uri=sqlite:///mlflow.db"], "tracking_uri='sqlite:///mlflow.db': in "),
        (["workspace={package}/w", "tracking_uri=http://s", "store={other}"], "workspace='{package}/w': in "),
        (["workspace=file://{package}/w", "tracking_uri=http://s", "store=s3://b"], "workspace='file://{package}/w'"),
    ],
    ids=["store", "database", "absolute", "file"],
)
def test_each_place_is_named(
    arguments: list[str], keys: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    where = {"other": tmp_path / "other", "package": package}
    given = [argument.format(**where) for argument in arguments]
    assert refused("extract", given, monkeypatch, capsys).startswith(f"extract: {keys.format(**where)}")


@pytest.mark.parametrize("name", ["extract", "train", "evaluate"])
def test_a_database_cannot_lie_in_object_storage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(name, ["workspace=s3://bucket/w"], monkeypatch, capsys)
    assert said == (
        f"{name}: tracking_uri: 'sqlite:///s3://bucket/w/mlflow.db': a database file lies on a disk, not in object "
        "storage; give tracking_uri=http://SERVER:5000 or sqlite:////FOLDER/mlflow.db"
    )
    assert not list(tmp_path.iterdir())


def test_what_is_read_may_lie_there_and_other_places_may_be_written(package: Path, tmp_path: Path) -> None:
    out = [f"workspace={tmp_path}/w", f"store={tmp_path}/f"]
    places.check(config.load(ExtractConfig, [], [*out, "input=videos", "lvlm.model=model"]))
    server = ["workspace=s3://b/w", "tracking_uri=http://server:5000"]
    places.check(config.load(TrainConfig, [], [*server, "dataset.path=interactions", "features=features"]))


def test_elsewhere_a_relative_place_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_ray_pkg_mine").mkdir()
    monkeypatch.chdir(tmp_path / "_ray_pkg_mine")  # a folder of that name is not Ray's by that
    places.check(config.load(TrainConfig, []))


@pytest.mark.parametrize(
    ("tracking_uri", "workspace", "artifacts"),
    [
        ("sqlite:////srv/t/mlflow.db", "s3://bucket/w", "file:///srv/t/artifacts"),
        ("sqlite:////srv/t/mlflow.db", "/data/w", "file:///data/w/artifacts"),
        ("sqlite:////srv/t/mlflow.db", "file:///data/w", "file:///data/w/artifacts"),
        ("postgresql://host/db", "s3://bucket/w", "s3://bucket/w/artifacts"),
        ("http://server:5000", "s3://bucket/w", None),
    ],
)
def test_artifacts_never_lie_in_a_local_folder_named_like_a_bucket(
    tracking_uri: str, workspace: str, artifacts: str | None
) -> None:
    assert tracking.artifacts(tracking_uri, workspace) == artifacts


def test_a_database_under_a_file_uri_is_refused() -> None:
    with pytest.raises(ConfigError, match="a database file lies on a disk"):
        places.check(config.load(TrainConfig, [], ["workspace=file:///data/w"]))
