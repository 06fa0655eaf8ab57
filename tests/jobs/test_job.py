"""What a job's command line gives back: exit status, one line on stderr, JSON on the last line of stdout."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest

from lvlmrec.config import option
from lvlmrec.errors import ConfigError, InputError, JobFailed
from lvlmrec.jobs import job
from lvlmrec.tracking import Run
from tests.conftest import ROOT


@dataclass(frozen=True)
class Training:
    epochs: int = option(3, "passes over the data", minimum=1)
    precision: str = option("float32", "arithmetic", choices=("float32", "bfloat16"))


@dataclass(frozen=True)
class Config:
    workspace: str = option("./workspace", "where all lies")
    tracking_uri: str = option("", "tracking database")
    training: Training = option(Training, "the training")


Start = Callable[..., int]


@pytest.fixture
def start(tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Run a job `train` with a body and arguments, in this process; returns its exit status."""

    def start(body: Callable[[Any, Run], dict[str, Any]], *arguments: str) -> int:
        place = [f"workspace={tmp_path}", f"tracking_uri={tracking_uri}"]
        layer = tmp_path / "layer.yaml"
        layer.write_text("training: {epochs: 5}\n")
        monkeypatch.setattr(sys, "argv", ["train.py", str(layer), *place, *arguments])
        return job.main("train", Config, body)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield start
    for number, handler in before.items():
        signal.signal(number, handler)


def epochs(config: Config, run: Run) -> dict[str, Any]:
    print("on the way")
    return {"epochs": config.training.epochs}


def test_a_job_that_ends_gives_its_result_as_the_last_line(start: Start, capsys, tracking_uri: str) -> None:
    assert start(epochs, "training.precision=bfloat16") == 0
    *others, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert others == ["on the way"]
    assert list(result) == ["job", "run_id", "epochs"]
    assert (result["job"], result["epochs"]) == ("train", 5)
    found = mlflow.MlflowClient(tracking_uri).get_run(result["run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["training.precision"] == "bfloat16"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("training.epoch=3", ["training.epoch=3", "unknown key", "did you mean training.epochs?"]),
        ("nonsense=1", ["nonsense=1", "unknown key", "choices: tracking_uri, training, workspace"]),
        ("training.epochs=many", ["training.epochs", "many"]),
        ("training.epochs=0", ["training.epochs", "0", "below 1"]),
        ("training.precision=int8", ["training.precision", "int8", "bfloat16, float32"]),
        ("nowhere.yaml", ["nowhere.yaml", "no such file", "train.yaml"]),
        ("--epochs", ["--epochs", "dotted.key=value"]),
    ],
)
def test_a_wrong_configuration_is_one_line_and_status_2(start: Start, capsys, argument: str, words: list[str]) -> None:
    assert start(epochs, argument) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("train: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("features 'x': none there\n  extract first"), 2, "train: features 'x': none there extract first"),
        (ConfigError("seed: no"), 2, "train: seed: no"),
        (JobFailed("all 3 trials failed"), 1, "train: all 3 trials failed"),
        (KeyboardInterrupt("after epoch 3 of 9"), 1, "train: interrupted; the same command goes on after epoch 3 of 9"),
        (KeyboardInterrupt(), 1, "train: interrupted; the same command goes on where it stopped"),
        (SystemExit(15), 1, "train: interrupted; the same command goes on where it stopped"),
    ],
    ids=["input", "config", "failed", "interrupted at an epoch", "interrupted", "terminated"],
)
def test_an_error_is_one_line_and_its_status(
    start: Start, capsys, error: BaseException, status: int, line: str
) -> None:
    def body(config: Config, run: Run) -> dict[str, Any]:
        raise error

    assert start(body) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [line]


def test_a_bug_shows_its_traceback(start: Start, capsys) -> None:
    def body(config: Config, run: Run) -> dict[str, Any]:
        raise ZeroDivisionError("by nothing")

    assert start(body) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Traceback")
    assert captured.err.endswith("ZeroDivisionError: by nothing\n")


def test_a_terminated_job_leaves_a_killed_run(start: Start, tracking_uri: str, capsys) -> None:
    runs = []

    def body(config: Config, run: Run) -> dict[str, Any]:
        runs.append(run)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("still here")

    assert start(body) == 1
    assert mlflow.MlflowClient(tracking_uri).get_run(runs[0].id).info.status == "KILLED"


def test_help_shows_every_key_with_its_default(start: Start, capsys) -> None:
    assert start(epochs, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python rayjobs/train.py [layer.yaml ...] [dotted.key=value ...]")
    assert "training.epochs=3  passes over the data" in shown
    assert "training.precision='float32'  arithmetic (bfloat16, float32)" in shown


@pytest.mark.thorough
def test_a_job_script_is_called_as_documented(tmp_path: Path) -> None:
    """From another folder, with a misspelt key: one line, nothing started, nothing written."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "rayjobs" / "evaluate.py"), "chekpoint=x"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.splitlines() == [
        "evaluate: chekpoint='x': unknown key; did you mean checkpoint? choices: against, baselines, checkpoint, "
        "dataset_path, features, item_knn_neighbours, ks, seed, tracking_uri, workspace"
    ]
    assert list(tmp_path.iterdir()) == []
