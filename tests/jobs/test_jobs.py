"""Every job as a user runs it: on the sample with nothing given, submitted to a cluster, and with bad input."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from lvlmrec import storage
from lvlmrec.features import store
from tests.videos import write_video

ROOT = Path(__file__).parent.parent.parent


def run(job: str, *arguments: str, address: str = "local") -> dict[str, Any]:
    """The JSON of the last line of stdout of a job that must succeed, on a Ray of its own or on that at `address`."""
    command = [sys.executable, str(ROOT / "rayjobs" / f"{job}.py"), *arguments]
    environment = os.environ | {"RAY_ADDRESS": address}
    process = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["job"] == job
    return result


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def extracted(workspace: Path) -> dict[str, Any]:
    return run("extract", f"workspace={workspace}")


@pytest.fixture(scope="module")
def trained(ray_address: str, workspace: Path, extracted: dict[str, Any]) -> dict[str, Any]:
    encoder = ["model.item_encoder.name=dff", f"features={extracted['feature_set']}"]
    small = ["training.epochs=2", "training.num_workers=2"]
    return run("train", f"workspace={workspace}", *small, *encoder, address=ray_address)


@pytest.fixture(scope="module")
def three_videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for extracting three videos with another family than the sample's."""
    folder = tmp_path_factory.mktemp("three")
    (folder / "videos").mkdir()
    for name in ("a", "b", "c"):
        write_video(folder / "videos" / f"{name}.mp4", num_frames=30)
    return [f"workspace={folder}", f"input={folder / 'videos'}", "lvlm.name=smolvlm"]


@pytest.fixture(scope="module")
def by_smolvlm(ray_address: str, three_videos: list[str]) -> dict[str, Any]:
    return run("extract", *three_videos, address=ray_address)


@pytest.mark.slow
def test_extract_on_the_sample(workspace: Path, extracted: dict[str, Any]) -> None:
    assert (extracted["items"], extracted["written"], extracted["rejected"]) == (360, 360, 0)
    assert extracted["videos_per_second"] > 0 and 0 < extracted["busy_fraction"] <= 1
    index = store.read(extracted["feature_set"]).index
    assert len(index["item_id"].unique()) == len(index) == 360
    again = run("extract", f"workspace={workspace}")
    assert (again["written"], again["skipped"]) == (0, 360)


@pytest.mark.slow
def test_an_estimate_alone(ray_address: str, three_videos: list[str]) -> None:
    estimated = run("extract", *three_videos, "estimate.only=true", address=ray_address)
    assert estimated["items"] == 3 and estimated["estimate"]["videos"] == 3
    assert estimated["estimate"]["hours"] > 0


@pytest.mark.slow
def test_another_family_is_one_word(three_videos: list[str], by_smolvlm: dict[str, Any]) -> None:
    result, workspace = by_smolvlm, three_videos[0].partition("=")[2]
    assert (result["written"], result["rejected"]) == (3, 0)
    frame = pd.read_parquet(f"{result['feature_set']}/parts")
    columns = [name for name in frame if "/" in name]
    assert sorted(frame["item_id"]) == ["a", "b", "c"] and len(columns) == result["features"] == 3
    assert all(len(value) == 64 for name in columns for value in frame[name])
    logged = mlflow.MlflowClient(f"sqlite:///{workspace}/mlflow.db").get_run(result["run_id"]).data
    assert (logged.params["lvlm.name"], logged.tags["feature_set"]) == ("smolvlm", result["feature_set"])
    assert (logged.metrics["written"], logged.metrics["features"]) == (3, 3)


@pytest.mark.slow
def test_train_evaluate_and_what_tracking_keeps(workspace: Path, trained: dict[str, Any]) -> None:
    assert trained["epochs"] == 2 and len(trained["feature_columns"]) == 4
    assert 0 < trained["validation"]["hr@10"] < 1
    result = run("evaluate", f"workspace={workspace}", f"checkpoint={trained['checkpoint']}")
    assert result["users"] == 2400
    assert set(result["test"]) >= {"hr@10", "ndcg@10", "mrr@10", "hr@20", "ndcg@20", "mrr@20"}
    assert result["slices"]["warm"]["users"] + result["slices"]["cold"]["users"] == 2400
    assert set(result["baselines"]) == {"popularity", "item_knn", "markov"}
    assert result["parameters"] == trained["parameters"] and 0 < result["beyond_accuracy"]["coverage@10"] <= 1
    assert sum(result["layer_weights"].values()) == pytest.approx(1)
    ranks = pd.read_parquet(result["ranks"])
    assert (ranks["item_rank"] <= 10).mean() == pytest.approx(result["test"]["hr@10"])
    client = mlflow.MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    run_of = {result["job"]: client.get_run(result["run_id"]) for result in (trained, result)}
    assert {run.info.status for run in run_of.values()} == {"FINISHED"}
    assert len(client.get_metric_history(trained["run_id"], "validation/hr_at_10")) == 2
    assert run_of["train"].data.params["model.item_encoder.name"] == "dff"
    assert run_of["train"].data.tags["feature_set"] != "none"
    assert run_of["train"].data.tags["mlflow.source.git.commit"]


@pytest.mark.slow
def test_tune_on_the_sample(ray_address: str, workspace: Path, extracted: dict[str, Any]) -> None:
    encoder = ["model.item_encoder.name=dff", f"features={extracted['feature_set']}"]
    budget = ["search.trials=3", "training.epochs=3", "search.grace_epochs=1", "search.embedding_dims=[16,32]"]
    result = run("tune", f"workspace={workspace}", *encoder, *budget, address=ray_address)
    assert (result["trials"], result["failed"]) == (3, 0)
    assert set(result["best"]["config"]) == {"training.lr", "model.embedding_dim", "taps"}
    client = mlflow.MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    experiment = client.get_experiment_by_name("lvlmrec")
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{result['run_id']}'")
    assert len(children) == 3
    assert {child.info.status for child in children} == {"FINISHED"}
    best = max(child.data.metrics["best/hr_at_10"] for child in children)
    assert result["best"]["validation"]["hr@10"] == best


@pytest.mark.slow
def test_a_submitted_job_ends_with_the_index_of_a_direct_run(
    tmp_path: Path, three_videos: list[str], by_smolvlm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    monkeypatch.delenv("RAY_ADDRESS")  # the client would heed it more than what it is given
    ray = Path(sys.executable).parent / "ray"
    folder = tempfile.mkdtemp(prefix="ray")  # the names of sockets are short, pytest's folders are not
    output, port, deadline = tmp_path / "head.log", _free_port(), time.monotonic() + 240
    ports = [f"--dashboard-port={port}", f"--dashboard-agent-listen-port={_free_port()}"]
    environment = os.environ | {"RAY_TMPDIR": folder, "PATH": f"{ray.parent}{os.pathsep}{os.environ['PATH']}"}
    with output.open("w") as log:
        head = subprocess.Popen(
            [str(ray), "start", "--head", "--block", "--port=0", "--num-cpus=2", *ports],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        arguments = " ".join([*three_videos, f"store={tmp_path / 'submitted'}"])
        excludes = {"working_dir": str(ROOT), "excludes": [".venv", ".git", "workspace", ".mypy_cache"]}
        submission = {"entrypoint": f"python rayjobs/extract.py {arguments}", "runtime_env": excludes}
        while True:  # the server is up before it takes jobs
            try:
                client = JobSubmissionClient(f"http://127.0.0.1:{port}")
                job = client.submit_job(**submission)
                break
            except (ConnectionError, RuntimeError):
                assert head.poll() is None and time.monotonic() < deadline, output.read_text()[-3000:]
                time.sleep(1)
        status = _ended(client, job)
        logs = client.get_job_logs(job)
        assert status == JobStatus.SUCCEEDED, logs[-3000:]
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
    submitted, direct = store.find(str(tmp_path / "submitted")), by_smolvlm["feature_set"]
    assert submitted.rsplit("/", 1)[1] == direct.rsplit("/", 1)[1]
    by_item = [store.read(uri).index.sort_by("item_id").to_pylist() for uri in (submitted, direct)]
    assert by_item[0] == by_item[1]
    for part in storage.list_files(f"{submitted}/parts"):
        assert storage.read_bytes(part.uri) == storage.read_bytes(part.uri.replace(submitted, direct))


def _free_port() -> int:
    """A port above those that Ray gives to its workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ended(client: Any, job: str) -> Any:
    deadline = time.monotonic() + 400
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)[-3000:]
        time.sleep(1)
    return status


@pytest.mark.parametrize(
    ("job", "arguments", "said"),
    [
        ("extract", ["recipe.frmes=4"], "did you mean recipe.frames? choices: "),
        ("extract", ["lvlm.name=llava"], "lvlm.name: 'llava' is not one of auto, frames, "),
        ("extract", ["lvlm.model=/nowhere/model", "input={videos}"], "lvlm.model"),
        (
            "extract",
            ["input=/nowhere/videos"],
            "input '/nowhere/videos': no such manifest, folder, prefix or feature set",
        ),
        ("extract", ["input={broken}"], "broken.parquet': unreadable manifest"),
        (
            "extract",
            ["lvlm.name=video_encoder", "lvlm.model={vjepa2}", "input={videos}", "recipe.frames=5"],
            "recipe.frames: 5: this video_encoder reads frames in groups of 2",
        ),
        ("train", ["model.item_encoder.name=dfff"], "model.item_encoder.name: 'dfff' is not one of concatenation,"),
        ("train", ["dataset.path=/nowhere"], "/nowhere"),
        (
            "train",
            ["dataset.split=time"],
            "dataset.split: 'time' is not one of given, global_time, leave_one_out, random",
        ),
        ("import_features", [], "file: '': expected a file that ends in .npy"),
        ("import_features", ["file=/nowhere/a.npy"], "file: '/nowhere/a.npy': no such file"),
        ("evaluate", ["checkpoint=/nowhere"], "checkpoint '/nowhere': no checkpoint there; train first"),
        ("evaluate", ["baselines=[best]"], "baselines: 'best' is not one of item_knn, markov, popularity"),
        ("tune", ["search.trials=0"], "search.trials: 0 is below 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    job: str,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    (tmp_path / "vjepa2").mkdir()
    (tmp_path / "vjepa2" / "config.json").write_text(json.dumps({"model_type": "vjepa2", "num_hidden_layers": 2}))
    places = {"videos": tmp_path / "videos", "broken": tmp_path / "broken.parquet", "vjepa2": tmp_path / "vjepa2"}
    given = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [job, f"workspace={tmp_path}", f"tracking_uri={tracking_uri}", *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "rayjobs" / f"{job}.py"), run_name="__main__")
    out, err = capfd.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert said in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith(f"{job}: ")


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("training.epochs=1", 2)])
def test_the_demo_starts_nothing_when_asked_what_it_takes(tmp_path: Path, argument: str, status: int) -> None:
    command = [sys.executable, str(ROOT / "rayjobs" / "demo.py"), argument]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert process.returncode == status and "usage: python rayjobs/demo.py" in process.stderr
    assert not list(tmp_path.iterdir())
