"""What the actor of an extraction does when memory runs out, its device is lost, or one worker alone is sick."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from lvlmrec import storage
from lvlmrec.extraction import device, extractor, stages
from lvlmrec.extraction.extractor import Extractor
from lvlmrec.extraction.failures import MAX_LOSSES, Attempts, Streak
from lvlmrec.features import provenance
from lvlmrec.lvlms import LVLMS, LVLMConfig
from tests.extraction import stand_ins
from tests.extraction.stand_ins import ASSERT, COLUMN, CUDA_MEMORY, ILLEGAL, RECIPE, rows

Fail = Callable[[Sequence[str]], None]
TITLES = [f"title {k}" for k in range(16)]


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fail], Extractor]:
    """An extractor of a model that fails as told, with 8 items in a forward; instead of its process a test ends."""

    def made(fail: Fail) -> Extractor:
        monkeypatch.setitem(LVLMS, "stand_in", stand_ins.Family(fail))  # type: ignore[misc]
        return Extractor(LVLMConfig(name="stand_in", batch_size=8, device="cpu"), RECIPE)

    def end() -> None:
        raise Ended

    monkeypatch.setattr(extractor, "end_process", end)
    return made


def at_most(limit: int, error: Callable[[], BaseException]) -> Fail:
    def fail(titles: Sequence[str]) -> None:
        if len(titles) > limit:
            raise error()

    return fail


def real_cpu_error() -> BaseException:
    try:
        torch.empty(1 << 55)
    except RuntimeError as error:
        return error
    raise AssertionError


MEMORY_ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError(CUDA_MEMORY),
    "cpu": real_cpu_error,
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "hip": lambda: torch.AcceleratorError("HIP error: out of memory"),
    "numpy": MemoryError,
}
LOST = {
    "illegal": torch.AcceleratorError(ILLEGAL),
    "assert": torch.AcceleratorError(ASSERT),
    "ecc": RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    "launch": RuntimeError("CUDA error: unspecified launch failure"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, ...)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "hip": RuntimeError("HIP error: unspecified launch failure"),
    "hipblas": RuntimeError("CUDA error: HIPBLAS_STATUS_EXECUTION_FAILED when calling `hipblasGemmEx`"),
}
HARMLESS = {
    "nccl": RuntimeError("NCCL error: unhandled cuda error, last: CUDA error: an illegal memory access"),
    "argument": torch.AcceleratorError("CUDA error: invalid argument"),
    "kernel": torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    "shape": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    "value": ValueError("CUDA error: an illegal memory access was encountered"),
}


@pytest.mark.parametrize("name", MEMORY_ERRORS)
def test_what_says_that_memory_ran_out(name: str) -> None:
    error = MEMORY_ERRORS[name]()
    assert device.ran_out_of_memory(error)
    assert not device.is_lost(error)


@pytest.mark.parametrize("name", LOST)
def test_what_says_that_the_device_is_lost(name: str) -> None:
    assert device.is_lost(LOST[name])
    wrapped = ValueError("of a library")
    wrapped.__cause__ = LOST[name]
    assert device.is_lost(wrapped)
    assert not device.ran_out_of_memory(wrapped)


@pytest.mark.parametrize("name", HARMLESS)
def test_other_errors_are_an_items_own(name: str) -> None:
    assert not device.is_lost(HARMLESS[name])
    assert not device.ran_out_of_memory(HARMLESS[name])


@pytest.mark.parametrize("name", MEMORY_ERRORS)
def test_forwards_become_smaller_until_they_fit_and_stay_so(
    name: str, make: Callable[[Fail], Extractor], capsys: pytest.CaptureFixture[str]
) -> None:
    actor = make(at_most(2, MEMORY_ERRORS[name]))
    table = actor(rows(*TITLES))
    assert table["item_id"].to_pylist() == TITLES
    assert table[COLUMN].to_pylist() == [[float(len(title))] * 3 for title in TITLES]
    assert actor.lvlm.forwards == [8, 4, *[2] * 8]  # type: ignore[attr-defined]
    actor(rows(*TITLES[:4]))
    assert actor.lvlm.forwards[10:] == [2, 2]  # type: ignore[attr-defined]
    assert actor.attempts.report() == {"oom_fallbacks": 2, "device_failures": 0, "lowest_batch_size": 2}
    assert capsys.readouterr().err.count("ran out of memory with lvlm.batch_size=") == 2


def test_rows_and_parts_say_what_they_were_made_with(make: Callable[[Fail], Extractor], tmp_path: Path) -> None:
    actor = make(at_most(2, MEMORY_ERRORS["cuda"]))
    first = actor(rows(*TITLES[:2]))
    both = pa.concat_tables([first, actor(rows(*TITLES))])
    written = stages.write(both, str(tmp_path), RECIPE, 1)
    assert written["made_with"].to_pylist() == both["made_with"].to_pylist()
    table = storage.read_table(f"{tmp_path}/parts/{written['part'][0].as_py()}")
    found = [json.loads(each) for each in provenance.read(table.schema.metadata)]
    assert sorted(each["batch_size"] for each in found) == ["2", "8"]
    expected = {"device": f"cpu {torch.backends.cpu.get_cpu_capability()}", "attention": "sdpa", "compile": "False"}
    assert all(expected.items() <= each.items() and each["torch"] == version("torch") for each in found)


def test_an_item_too_large_for_memory_is_rejected_and_slows_nothing_else(make: Callable[[Fail], Extractor]) -> None:
    def fail(titles: Sequence[str]) -> None:
        if "huge" in titles:
            raise torch.OutOfMemoryError(CUDA_MEMORY)

    actor = make(fail)
    actor(rows(*TITLES))  # forwards of 8 fit
    table = actor(rows("a", "huge", "b"))
    found = {row["item_id"]: row for row in table.to_pylist()}
    assert [found[i]["error"] for i in ("a", "b", "huge")] == [None, None, "out_of_memory"]
    assert found["huge"]["stage"] == "model"
    assert found["huge"]["message"].startswith("alone in the model: title of 4 letters; fewer recipe.frames, ")
    assert found["huge"]["message"].endswith(CUDA_MEMORY)
    assert actor.lvlm.batch_size == 8
    assert actor.attempts.report()["oom_fallbacks"] == 3


def test_an_item_too_large_before_anything_went_through(make: Callable[[Fail], Extractor]) -> None:
    actor = make(at_most(0, MEMORY_ERRORS["cuda"]))
    assert actor(rows(*TITLES))["error"].to_pylist() == ["out_of_memory"] * 16
    assert actor.lvlm.batch_size == 1  # nothing larger is known to fit


@pytest.mark.parametrize("name", LOST)
def test_the_process_ends_with_its_device_and_its_items_are_suspects(
    name: str, make: Callable[[Fail], Extractor], capsys: pytest.CaptureFixture[str]
) -> None:
    actor = make(at_most(1, lambda: LOST[name]))
    with pytest.raises(Ended):
        actor(rows("a", "b"))
    assert "ends, its device is lost: " in capsys.readouterr().err
    assert [actor.attempts.deaths([item]) for item in "ab"] == [1, 1]
    after = make(at_most(1, lambda: LOST[name]))  # as Ray does
    after.attempts = actor.attempts
    assert after(rows("a", "b"))["error"].to_pylist() == [None, None]
    assert after.lvlm.forwards == [1, 1]  # type: ignore[attr-defined]
    assert actor.attempts.deaths(["a", "b"]) == 0
    assert actor.attempts.report() == {"oom_fallbacks": 0, "device_failures": 1}


def through(make: Callable[[Fail], Extractor], fail: Fail, *titles: str) -> tuple[pa.Table, int]:
    """One block through one process after another, as many as it takes; and how many ended."""
    attempts, ended = Attempts(), 0
    while True:
        actor = make(fail)
        actor.attempts = attempts
        try:
            return actor(rows(*titles)), ended
        except Ended:
            ended += 1


def test_an_item_that_costs_the_device_each_time_is_rejected(make: Callable[[Fail], Extractor]) -> None:
    def fail(titles: Sequence[str]) -> None:
        if "poison" in titles:
            raise torch.AcceleratorError(ASSERT)

    table, ended = through(make, fail, "a", "poison", "b")
    errors = dict(zip(table["item_id"].to_pylist(), table["error"].to_pylist(), strict=True))
    assert errors == {"a": None, "poison": "worker_died", "b": None}
    assert ended == 3


def test_a_device_that_fails_again_and_again_stops_the_run(make: Callable[[Fail], Extractor]) -> None:
    table, ended = through(make, at_most(0, lambda: LOST["ecc"]), *TITLES)
    assert ended == MAX_LOSSES - 1
    assert {(row["stage"], row["error"]) for row in table.to_pylist()} == {("device", "device_failed")}
    assert table["message"][0].as_py().startswith("this machine failed again and again, the last time with RuntimeErr")


def test_a_device_that_fails_now_and_then_is_borne_but_not_without_end() -> None:
    attempts = Attempts()
    for _ in range(200):
        assert not attempts.lose("GPU 0")
        attempts.end(TITLES + TITLES[:4], "GPU 0")
    losses = 0
    while not attempts.lose("GPU 0"):
        attempts.end(["one"], "GPU 0")
        losses += 1
    assert losses < 2 * MAX_LOSSES
    assert not attempts.lose("GPU 1")


def written(*told: tuple[str, str, str | None]) -> pa.Table:
    """Rows of what came out of writing: node of decoding, process of the model or nothing, error."""
    known = [
        {
            "item_id": str(k),
            "decoded_on": node,
            "extracted_on": process or None,
            "stage": error and ("model" if process else "fetch"),
            "error": error,
            "message": error and "said so",
        }
        for k, (node, process, error) in enumerate(told)
    ]
    return pa.Table.from_pylist(known, schema=stages.WRITTEN)


def test_one_sick_process_among_healthy_ones_stops_the_run() -> None:
    streak = Streak(3)
    healthy, ill = ("node a", "process 1 on GPU 0", None), ("node a", "process 2 on GPU 1 of node b", "RuntimeError")
    assert not streak.add(written(healthy, ill, healthy, ill, healthy))
    assert streak.add(written(healthy, ill))
    assert streak.reason == ("model", "RuntimeError")
    assert str(streak).startswith(
        "3 items one after another were rejected, all with model/RuntimeError on process 2 on GPU 1 of node b, the last"
    )


def test_one_sick_node_among_healthy_ones_stops_the_run() -> None:
    streak = Streak(3)
    healthy, ill = ("node a", "process 1", None), ("node b", "", "OSError")
    assert not streak.add(written(ill, healthy, ill, healthy))
    assert streak.add(written(ill))
    assert "all with fetch/OSError on node b, the last by: said so" in str(streak)


def test_what_came_through_or_another_reason_begins_anew() -> None:
    streak = Streak(3)
    fetched, other = ("node b", "", "OSError"), ("node b", "", "ValueError")
    through_b = ("node b", "process 1", None)
    rejected_by_model = ("node b", "process 1", "RuntimeError")
    for _ in range(5):
        assert not streak.add(written(fetched, fetched, through_b, fetched, fetched, rejected_by_model))
        assert not streak.add(written(fetched, other, fetched, fetched, through_b))


def test_rows_of_a_failed_device_are_neither_written_nor_rejected(
    make: Callable[[Fail], Extractor], tmp_path: Path
) -> None:
    actor = make(at_most(0, lambda: LOST["illegal"]))
    while not actor.attempts.lose(actor.place):
        pass
    told = stages.write(actor(rows("a", "b")), str(tmp_path), RECIPE, 1)
    assert told["stage"].to_pylist() == ["device", "device"]
    assert not list(tmp_path.rglob("*"))
