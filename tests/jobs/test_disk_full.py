"""Disks that are full and places that cannot be written: one line, the exit status, nothing half-written."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from lvlmrec import cluster, config, storage, tracking
from lvlmrec.errors import InputError, StorageError, StorageRefused, writing
from lvlmrec.features import imported, store
from lvlmrec.features.compact import compact
from lvlmrec.features.imported import ImportConfig
from lvlmrec.jobs import job, sample, training
from lvlmrec.runs import evaluating, experiment
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.tracking import Run
from tests.conftest import ROOT
from tests.feature_sets import recipe_of, vectors, write_set
from tests.toy import ITEM_IDS, fitted, publish, train_config

LLM = ["describe/llm.0/visual_mean", "describe/llm.2/visual_mean", "describe/llm.4/visual_mean"]
MANY = [f"item{i}" for i in range(30_000)]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small tmpfs; without the right to mount one the test is skipped, saying so."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "small", "size=1m") as folder:
        yield folder


def read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def in_child(body: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `body` where no file may be longer than 64 kB: a disk that is full, without the rights of root."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
    command = [sys.executable, "-c", limit + body, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("writes", ["storage.write_bytes", "storage.create_bytes"])
def test_what_was_there_stays_where_a_file_does_not_fit(tmp_path: Path, writes: str) -> None:
    (tmp_path / "there").write_bytes(b"before")
    target = tmp_path / ("there" if writes == "storage.write_bytes" else "new")
    done = in_child(f"from lvlmrec import storage\n{writes}(sys.argv[1], bytes(1 << 20))", target)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"lvlmrec.errors.StorageError: {target}: File too large; free some, then the same command")
    assert left(tmp_path) == ["there"] and (tmp_path / "there").read_bytes() == b"before"


COMPACT = f"""
from lvlmrec.features import store
from lvlmrec.features.compact import compact
items = [f"item{{i}}" for i in range({len(MANY)})]
compact([(store.read(sys.argv[1]), {LLM})], items, sys.argv[2])
"""


@pytest.fixture(scope="module")
def large_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1.4 MB in the cache."""
    recipe = recipe_of()
    uri = store.locate(str(tmp_path_factory.mktemp("large")), "tiny", recipe)
    store.create(uri, recipe)
    columns = {str(column.name): torch.ones(len(MANY), int(np.prod(column.shape))) for column in recipe.columns}
    store.write_part(uri, recipe, store.feature_table(recipe, MANY, [8] * len(MANY), columns))
    store.commit(uri)
    return uri


@pytest.mark.thorough
def test_a_cache_that_does_not_fit_is_one_line_and_no_cache(tmp_path: Path, large_set: str) -> None:
    done = in_child(COMPACT, large_set, tmp_path / "cache")
    assert "StorageError: " in done.stderr.splitlines()[-1] and "File too large" in done.stderr.splitlines()[-1]
    assert left(tmp_path / "cache") == []
    assert compact([(store.read(large_set), LLM)], MANY, str(tmp_path / "cache")).shape == (30_001, 3, 8)


@pytest.mark.thorough
def test_a_full_disk_of_the_cache_does_not_end_the_process_by_a_signal(small_disk: Path, large_set: str) -> None:
    """The array is mapped: a page that the disk has no room for is no error of a call."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import sys" + COMPACT, large_set, str(small_disk / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode != -signal.SIGBUS
    assert f"StorageError: {small_disk}/cache/" in done.stderr and "No space left on device; free" in done.stderr
    assert left(small_disk) == []


def test_a_full_store_stays_uncommitted_and_goes_on_when_there_is_room(tmp_path: Path, small_disk: Path) -> None:
    np.save(tmp_path / "features.npy", np.random.default_rng(0).standard_normal((400, 1000)))
    given = {"file": f"{tmp_path}/features.npy", "store": f"{small_disk}/store", "dtype": "float32"}
    filler = small_disk / "filler"
    with pytest.raises(StorageError, match=rf"^{small_disk}/store/.*parquet: No space left on device; free some"):
        imported.run(config.load(ImportConfig, [given]))
    (uri,) = (small_disk / "store").iterdir()
    assert not store.is_committed(str(uri)) and not list(uri.glob("parts/*"))
    filler.write_bytes(b"")
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert imported.run(config.load(ImportConfig, [given]))["written"] == 400


def test_a_read_only_place_is_refused_with_status_two(tmp_path: Path, world: Path) -> None:
    with mounted(tmp_path / "disk", "size=8m") as disk:
        settings: dict[str, Any] = {"model__item_encoder__name": "dff", "cache": disk / "cache"}
        experiment.prepare(train_config(world, tmp_path, **settings, feature_scaling="none"))
        read_only(disk)
        recipe = recipe_of()
        with pytest.raises(StorageRefused, match=rf"^{disk}/s: cannot be written: Read-only file system; choose"):
            storage.write_bytes(f"{disk}/s", b"x")
        with pytest.raises(StorageRefused, match=r"recipe\.json: cannot be written: Read-only"):
            store.create(f"{disk}/store/set", recipe)
        with pytest.raises(StorageRefused, match=rf"^{disk}/sample: cannot be written: Read-only"):
            sample.ensure(str(disk), f"{disk}/sample/interactions")
        with pytest.raises(StorageRefused, match=rf"^{disk}/cache/.*: cannot be written: Read-only"):
            experiment.prepare(train_config(world, tmp_path, **settings, feature_columns="[video/*]"))
        scaled = experiment.prepare(train_config(world, tmp_path, **settings))  # the array is there, its moments not
        assert scaled.features is not None and scaled.features.mean is not None


FAULTS = [
    (errno.ENOSPC, StorageError),
    (errno.EDQUOT, StorageError),
    (errno.EFBIG, StorageError),
    (errno.EROFS, StorageRefused),
    (errno.EACCES, StorageRefused),
    (errno.EPERM, StorageRefused),
]


@pytest.mark.parametrize(("number", "kind"), FAULTS, ids=lambda value: errno.errorcode.get(value, ""))
def test_every_fault_of_a_disk_has_its_class_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fails(descriptor: int, *others: int) -> None:
        raise OSError(number, os.strerror(number))

    uri = write_set(tmp_path / "store", [ITEM_IDS], recipe_of())
    before = left(tmp_path)
    monkeypatch.setattr(os, "fsync", fails)
    monkeypatch.setattr(os, "posix_fallocate", fails)
    recipe = recipe_of()
    rows = store.feature_table(recipe, ["a"], [8], vectors(recipe, ["a"]))
    writers: list[Callable[[], object]] = [
        lambda: storage.write_bytes(f"{tmp_path}/new", b"x"),
        lambda: storage.create_bytes(f"{tmp_path}/new", b"x"),
        lambda: store.write_part(uri, recipe, rows),
        lambda: store.create(f"{tmp_path}/other", recipe),
        lambda: compact([(store.read(uri), LLM)], ITEM_IDS, f"{tmp_path}/cache"),
        lambda: storage.check_writable(f"{tmp_path}/folder"),
    ]
    for write in writers:
        with pytest.raises(kind, match=os.strerror(number)) as error:
            write()
        assert "\n" not in str(error.value) and isinstance(error.value, OSError)
        assert isinstance(error.value, InputError) == (kind is StorageRefused)
    assert left(tmp_path) == before


def test_libraries_that_only_quote_the_error_are_understood(tmp_path: Path) -> None:
    quoted = "Error while serializing: I/O error: No space left on device (os error 28)"
    for kind in (SafetensorError, RuntimeError, OSError):
        with pytest.raises(StorageError, match=r"^place: No space left on device; free"), writing("place"):
            raise kind(quoted)
    for other in (SafetensorError("header too large"), FileNotFoundError(2, "no"), OSError("broken"), KeyError("x")):
        with pytest.raises(type(other)), writing("place"):
            raise other


@pytest.mark.parametrize("name", ["checkpoints", "runs"])
def test_training_finds_out_before_it_trains(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(cluster, "joined", lambda: pytest.fail("the work began"))
    prepared = experiment.prepare(train_config(world, tmp_path))
    (tmp_path / name).write_text("a file where the folder should be")
    with pytest.raises(StorageRefused, match=rf"^{tmp_path}/{name}/.*: cannot be written: Not a directory; choose"):
        training.run(prepared, Run("", "", str(tmp_path)))


def test_evaluation_finds_out_before_it_ranks(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = publish(*fitted(train_config(world, tmp_path, training__epochs=1)))
    (tmp_path / "evaluations").write_text("")
    monkeypatch.setattr(evaluating, "encode_catalogue", lambda *given: pytest.fail("the work began"))
    with pytest.raises(StorageRefused, match=r"evaluations/.*: cannot be written: Not a directory"):
        evaluating.run(config.load(EvaluateConfig, [{"workspace": str(tmp_path), "checkpoint": uri}]))


def full(*given: object, **named: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")


@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        (full, 1, "import_features: [Errno 28] No space left on device: '/somewhere'"),
        (
            lambda *given: storage.write_bytes(f"{__file__}/x", b""),
            2,
            f"import_features: {__file__}/x: cannot be written: Not a directory; choose another place",
        ),
    ],
)
def test_a_job_says_it_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tracking_uri: str,
    fault: Callable[..., Any],
    status: int,
    line: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["import_features.py", f"workspace={tmp_path}", f"tracking_uri={tracking_uri}"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert job.main("import_features", ImportConfig, fault) == status
    finally:
        signal.signal(signal.SIGTERM, before)
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


@pytest.mark.parametrize("call", ["log_batch", "log_text", "set_terminated"])
def test_a_disk_that_is_full_for_the_record_too_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_uri: str, call: str
) -> None:
    """Neither the tracker takes what is said of the run nor the workspace."""
    import mlflow

    def broken(self: object, *given: object, **named: object) -> None:
        raise mlflow.exceptions.MlflowException("(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT]")

    tracked = tracking.tracked(tracking_uri, str(tmp_path), "train", {})
    with pytest.raises(StorageError, match="the work's own end"), tracked as run:
        monkeypatch.setattr(mlflow.MlflowClient, call, broken)
        monkeypatch.setattr(Path, "open", full)
        run.log_metrics({"a": 1.0})
        raise StorageError("the work's own end")


def test_the_reason_of_a_failed_training_is_its_workers_last_word() -> None:
    traceback = """ray.train.v2.api.exceptions.WorkerGroupError: Traceback (most recent call last):
      File "lvlmrec/storage.py", line 1, in write
        raise StorageError(text) from error
    lvlmrec.errors.StorageError: /data/runs: No space left on device; free some"""
    assert training._reason(RuntimeError(traceback)) == "/data/runs: No space left on device; free some"
    assert training._reason(RuntimeError("another\nfault")) == "another fault"
