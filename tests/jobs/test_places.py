"""What a job writes is refused a place where it would be lost, before the job starts."""

import sys
from pathlib import Path
from typing import Any

import pytest

from lvlmrec import config, storage, tracking
from lvlmrec.errors import ConfigError
from lvlmrec.extraction.manifest import read_manifest
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.jobs import job, places
from lvlmrec.runs import experiment, grid
from lvlmrec.runs.experiment import TrainConfig
from tests.conftest import never
from tests.test_conf import JOBS
from tests.toy import train_config

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


RELATIVE = {
    "extract": ["input=videos", "store=out", "lvlm.model=models/a/b", "lvlm.code=code/repository"],
    "train": ["features=[sets/a,~/b,file:///c/d]", "dataset.path=data", "cache=c"],
    "tune": ["features=sets/a"],
    "evaluate": ["checkpoint=ck", "dataset_path=d", "features=[f, g]", "against=[r/one, s3://b/two/]"],
    "vacuum": ["features=sets/a"],
    "study": ["dataset.path=data"],
    "import_features": ["file=a.npy", "item_ids=ids.csv"],
}


def uris(resolved: Any) -> list[str]:
    """All that is named in a configuration."""
    found: list[str] = []
    config.with_uris(resolved, lambda uri: found.append(uri) or uri)  # type: ignore[func-returns-value]
    return found


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_given_absolute_places(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_uri: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "workspace=w", f"tracking_uri={tracking_uri}", *RELATIVE[name]])
    given: list[Any] = []
    assert job.main(name, JOBS[name], lambda resolved, run: given.append(resolved) or {}) == 0
    (resolved,) = given
    found = uris(resolved)
    assert f"{tmp_path}/w" in found and len(found) >= 2
    assert all(uri == storage.absolute(uri) and storage.is_absolute(uri) for uri in found), found


@pytest.mark.parametrize("name", JOBS)
def test_every_place_of_a_schema_is_marked_as_one(name: str) -> None:
    """What lies in the workspace by default, and what the layers of the project call a path."""
    defaults = config.load(JOBS[name], [], ["workspace=WORKSPACE"])
    named = {key for key, value in config.flatten(config.to_dict(defaults)) if str(value).startswith("WORKSPACE")}
    marked = config.with_uris(defaults, lambda uri: f"marked:{uri}")
    assert named == {key for key, value in config.flatten(config.to_dict(marked)) if str(value).startswith("marked:")}


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("lvlm.model=owner/name", "owner/name"),  # of the hub
        ("lvlm.code=https://host/repository.zip", "https://host/repository.zip"),
        ("input=s3://bucket/videos/", "s3://bucket/videos"),
    ],
)
def test_what_is_no_path_stays(argument: str, kept: str) -> None:
    resolved = config.with_uris(config.load(ExtractConfig, [], [argument]), storage.absolute)
    assert dict(config.flatten(config.to_dict(resolved)))[argument.partition("=")[0]] == kept


def test_keywords_are_no_paths() -> None:
    counted = config.with_uris(config.load(JOBS["import_features"], []), storage.absolute)
    assert counted.item_ids == "from_zero"
    video = ["model.item_encoder.name=video", "feature_scaling=none"]
    random = config.with_uris(config.load(TrainConfig, [], video), storage.absolute)
    assert dict(config.flatten(config.to_dict(random)))["model.item_encoder.encoder_weights"] == "random"
    given = config.load(TrainConfig, [], [*video, "model.item_encoder.encoder_weights=weights"])
    assert config.with_uris(given, storage.absolute).model.item_encoder.pretrained == storage.absolute("weights")


def test_a_model_folder_named_like_one_of_the_hub_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    resolved = config.with_uris(config.load(ExtractConfig, [], ["lvlm.model=owner/name"]), storage.absolute)
    assert resolved.lvlm.model == f"{tmp_path}/owner/name"


def test_a_method_of_a_study_may_name_relative_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    methods = {"ID": {}, "mean": {"model.item_encoder.name": "mean", "features": "sets/a"}}
    plan = grid.make_plan(config.load(JOBS["study"], [{"study": {"methods": methods}}]))
    assert [each.features for each in plan.configs["mean"]] == [f"{tmp_path}/sets/a"] * 2


def test_without_a_job_relative_places_count_from_here(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = experiment.prepare(train_config(world, tmp_path / "w", model__item_encoder__name="dff"))
    monkeypatch.chdir(world)
    here = train_config(Path(), Path("w"), model__item_encoder__name="dff", cache=f"{tmp_path}/c")
    relative = experiment.prepare(here)
    assert relative.key == absolute.key and relative.checkpoint == f"w/{absolute.checkpoint.partition('/w/')[2]}"
    (world / "videos").mkdir(exist_ok=True)
    (world / "videos" / "a.mp4").touch()
    (world / "videos" / "items.csv").write_text("item_id,uri\na,a.mp4\n")
    for source in ("videos/items.csv", f"file://{world}/videos/items.csv"):
        (uri,) = read_manifest(source)[0]["uri"].to_pylist()
        assert storage.absolute(uri) == f"{world}/videos/a.mp4"
