"""The stages of the pipeline as plain functions over Arrow tables, without Ray."""

import dataclasses
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pytest
import torch

from lvlmrec import storage
from lvlmrec.errors import JobFailed
from lvlmrec.extraction import estimate, pipeline, stages
from lvlmrec.extraction.extractor import Extractor
from lvlmrec.extraction.failures import Streak
from lvlmrec.extraction.progress import Tally, tell_rejected
from lvlmrec.extraction.stages import DecodeConfig
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features import store
from lvlmrec.features.model_recipe import MOTION, Prompt
from lvlmrec.features.recipe import Recipe
from lvlmrec.features.recipe_config import LVLMInfo, RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.isolation import IsolatedDecoder, NoDecoderError
from lvlmrec.media.motion import ENCODER, motion_clips
from tests.videos import write_video

INFO = LVLMInfo("stand_in", "x", "float32", {"llm": 2, "vision": 1}, {"llm": 3, "vision": 3})
PREPARE, EXTRACT = 0.02, 0.05


class StandIn:
    """A model of known pace that fails on one item and notices when two threads are in one of its methods."""

    info = INFO
    batch_size = 4

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.inside = {"prepare": 0, "extract": 0}
        self.overlapped = False

    def prepare(self, items: list[Item]) -> list[Item]:
        self._spend("prepare", PREPARE)
        return items

    def extract(self, prepared: list[Item]) -> dict[str, torch.Tensor]:
        self._spend("extract", EXTRACT)
        if any(item.item_id == "poison" for item in prepared):
            raise RuntimeError("device-side\nassert")
        value = torch.tensor([[float(item.video.frames.mean())] * 3 for item in prepared if item.video])
        return {str(name): value for name in self.recipe.feature_names}

    def _spend(self, method: str, seconds: float) -> None:
        self.inside[method] += 1
        assert self.inside[method] == 1, f"two threads in {method}"
        self.overlapped |= all(self.inside.values())
        time.sleep(seconds)
        self.inside[method] -= 1


class Family:
    name = "stand_in"

    def inspect(self, config: Any) -> LVLMInfo:
        return INFO

    def load(self, config: Any, recipe: Recipe) -> StandIn:
        return StandIn(recipe)


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> Extractor:
    monkeypatch.setitem(LVLMS, "stand_in", Family())  # type: ignore[misc]
    return Extractor(LVLMConfig(name="stand_in"), recipe_of())


def recipe_of(**prompts: Prompt) -> Recipe:
    bank = prompts or {"p": Prompt("x")}
    poolings = ["visual_mean"] if not prompts else ["last_token"]
    return recipes.resolve(RecipeConfig(frames=2, taps=["llm.1"], prompts=bank, poolings=poolings), INFO)


def decoded(folder: Path, *item_ids: str) -> pa.Table:
    rows = []
    for k, item_id in enumerate(item_ids):
        path = folder / f"{item_id}.mp4"
        if item_id == "broken":
            path.write_bytes(b"no video")
        else:
            write_video(path, num_frames=4 + k, size=(48, 32))
        rows.append({"item_id": item_id, "uri": str(path)})
    return pa.concat_tables(list(stages.decode(pa.Table.from_pylist(rows), recipe_of().reading, DecodeConfig())))


def test_decoding_imports_no_torch() -> None:
    """Each of Ray's processes for decoding would take seconds and hundreds of MB more."""
    code = "import sys; from lvlmrec.extraction.stages import decode; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lvlmrec.extraction.stages" in loaded
    assert not {"torch", "transformers"} & {*loaded}


def test_an_item_that_fails_costs_no_neighbour(tmp_path: Path, extractor: Extractor) -> None:
    rows = decoded(tmp_path, "a", "poison", "broken", "b")
    assert rows["error"].to_pylist()[2] is not None
    assert min(rows["decode_seconds"].to_pylist()) > 0
    table = extractor(rows)
    found = {row["item_id"]: row for row in table.to_pylist()}
    assert [found[i]["stage"] for i in ("a", "b", "poison")] == [None, None, "model"]
    assert found["poison"]["message"] == "device-side assert"
    assert found["broken"]["stage"] == rows["stage"].to_pylist()[2]
    assert table["decode_seconds"].to_pylist() == [
        row["decode_seconds"]
        for name in ("a", "poison", "b", "broken")
        for row in rows.to_pylist()
        if row["item_id"] == name
    ]


URIS_OF_NOTHING = [
    "zip://a.mp4",
    "s3://bucket",
    "nowhere://a.mp4",
    "file:///%FF.mp4",
    "a\0b.mp4",
    "~nobody/a.mp4",
    "::",
]


def test_whatever_a_row_raises_stays_in_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    good = str(write_video(tmp_path / "good.mp4", num_frames=4))
    uris = [*URIS_OF_NOTHING, good]
    rows = pa.table({"item_id": list(map(str, range(len(uris)))), "uri": uris})
    outcomes = pa.concat_tables(list(stages.decode(rows, recipe_of().reading, DecodeConfig()))).to_pylist()
    assert [outcome["item_id"] for outcome in outcomes] == rows["item_id"].to_pylist()
    assert [outcome["stage"] for outcome in outcomes] == ["fetch"] * len(URIS_OF_NOTHING) + [None]
    assert all(outcome["error"] and outcome["message"] for outcome in outcomes[:-1])


@pytest.mark.parametrize("error", [TypeError("not\nexpected"), KeyError("x"), RuntimeError("\udcff"), MemoryError()])
def test_any_exception_of_a_row_stays_in_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(uri: str) -> NoReturn:
        raise error

    monkeypatch.setattr(storage, "local_copy", fail)
    table = decoded(tmp_path, "a")
    assert (table["stage"][0].as_py(), table["error"][0].as_py()) == ("fetch", type(error).__name__)
    assert "\n" not in table["message"][0].as_py()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), NoDecoderError("did not start")])
def test_what_is_not_a_rows_fault_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(IsolatedDecoder, "sample_clip", fail)
    with pytest.raises(type(error)):
        decoded(tmp_path, "a")


def test_all_that_a_batch_spends_is_counted(
    tmp_path: Path, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = decoded(tmp_path, "a", "poison", "b")
    slept = [0.0]  # no other time passes
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "perf_counter", lambda: sum(slept))
    table = extractor(rows)
    # the batch once, then its three items one by one
    assert sum(table["forward_seconds"].to_pylist()) == pytest.approx(4 * EXTRACT)
    assert sum(table["prepare_seconds"].to_pylist()) == pytest.approx(4 * PREPARE)


def test_an_item_with_which_processes_die_is_alone_and_then_rejected(tmp_path: Path, extractor: Extractor) -> None:
    """A process that dies says nothing: its items stay begun."""
    rows = decoded(tmp_path, "a", "b", "c")
    batches: list[list[str]] = []
    prepare = extractor.lvlm.prepare
    extractor.lvlm.prepare = lambda items: (batches.append([i.item_id for i in items]), prepare(items))[1]  # type: ignore[method-assign]
    extractor.attempts.begin(["a", "b", "c"])
    extractor.attempts.begin(["b"])
    assert extractor(rows)["error"].to_pylist() == [None] * 3
    assert batches == [["a"], ["b"], ["c"]]
    assert extractor.attempts.deaths(["a", "b", "c"]) == 0

    for _ in range(3):
        extractor.attempts.begin(["b"])
    told = extractor(rows).to_pylist()
    assert batches[3:] == [["a"], ["c"]]
    assert (told[1]["stage"], told[1]["error"]) == ("model", "worker_died")
    assert told[1]["message"] == "3 processes died with this item in the model"


def test_what_storage_does_not_take_is_said_and_not_lost(tmp_path: Path, extractor: Extractor) -> None:
    rows = extractor(decoded(tmp_path, "a", "broken"))
    (tmp_path / "set").write_bytes(b"a file where the feature set would be")
    told = stages.write(rows, str(tmp_path / "set"), recipe_of(), 1)
    assert told["item_id"].to_pylist() == ["a", "broken"]
    assert set(told["stage"].to_pylist()) == {"write"}
    with pytest.raises(JobFailed, match=r"stopped: .* features: StorageRefused: .*set.*: Not a directory"):
        pipeline._check_written(told)
    pipeline._check_written(stages.write(rows, str(tmp_path / "other"), recipe_of(), 1))


def written(*errors: str | None) -> pa.Table:
    rows = [
        {"item_id": str(k), "stage": e and "fetch", "error": e, "message": e and "no key"} for k, e in enumerate(errors)
    ]
    return pa.Table.from_pylist(rows, schema=stages.WRITTEN)


def test_a_run_stops_when_all_fail_alike() -> None:
    streak = Streak(4)
    assert not streak.add(written("PermissionError", "PermissionError", "PermissionError", None))
    assert not streak.add(written("PermissionError", "PermissionError", "PermissionError", "OSError"))
    assert not streak.add(written("PermissionError", "PermissionError"))
    assert not streak.add(written("PermissionError"))
    assert streak.add(written("PermissionError", None))
    assert str(streak).startswith(
        "4 items one after another were rejected, all with fetch/PermissionError, the last by: no"
    )
    assert streak.reason == ("fetch", "PermissionError")
    assert not Streak(0).add(written(*["PermissionError"] * 1000))


def test_one_batch_is_prepared_while_another_is_in_the_model(tmp_path: Path, extractor: Extractor) -> None:
    rows = decoded(tmp_path, "a", "b")
    batches = [rows.set_column(0, "item_id", pa.array([f"a{k}", f"b{k}"])) for k in range(6)]
    with ThreadPoolExecutor(3) as threads:
        tables = list(threads.map(extractor, batches))
    assert extractor.lvlm.overlapped  # type: ignore[attr-defined]
    assert [table["item_id"].to_pylist() for table in tables] == [[f"a{k}", f"b{k}"] for k in range(6)]
    assert all(table["p/llm.1/visual_mean"] == tables[0]["p/llm.1/visual_mean"] for table in tables)


def test_what_prompts_name_travels_with_the_item_and_must_say_something() -> None:
    recipe = recipe_of(t=Prompt("{title}: {text}", input="text"))
    rows = pa.Table.from_pylist(
        [{"item_id": "a", "title": "cat", "text": ""}, {"item_id": "b", "title": " ", "text": ""}]
    )
    good, bad = pa.concat_tables(list(stages.decode(rows, recipe.reading, DecodeConfig()))).to_pylist()
    assert dict(good["texts"]) == {"title": "cat", "text": ""}
    assert (bad["stage"], bad["error"], bad["message"]) == (
        "text",
        "empty",
        "prompt 't' shows title, text alone: empty",
    )


def test_bytes_and_hours_are_those_of_the_recipe() -> None:
    recipe = recipes.resolve(
        RecipeConfig(
            taps=["llm.1", "llm.2"], prompts={"p": Prompt("x", max_new_tokens=10)}, poolings=["new_mean", "merged_4"]
        ),
        INFO,
    )
    told = estimate.estimate(
        7200,
        recipe,
        {"load": 0.0, "decode": 1.0, "prepare": 0.1, "forward": 0.6},
        {"decode": 2, "prepare": 1, "forward": 1},
    )
    assert told["bytes_per_item"] == 2 * (3 * 2 + 4 * 3 * 2 + 4 * 4) + 4 * 10
    assert (told["hours"], told["limited_by"]) == (7200 * 0.6 / 3600, "forward")
    assert "7200 videos, 132 bytes each, 0.00095 GB, about 1.2 hours, limited by forward" in estimate.describe(told)


@pytest.mark.parametrize(
    ("width", "most", "mb", "expected"),
    [
        (2048, 64, 64, 64),  # 8 KB an item
        (2048, 20_000, 64, 8192),
        (2048, 20_000, 1, 128),
        (4 << 20, 64, 64, 4),  # 16 MB an item
        (4 << 20, 64, 16, 1),
        (4 << 20, 64, 1, 1),  # one item that is larger than a part may be
    ],
)
def test_a_part_is_bounded_by_videos_and_by_bytes(width: int, most: int, mb: int, expected: int) -> None:
    info = dataclasses.replace(INFO, width={**INFO.width, "llm": width})
    config = RecipeConfig(taps=["llm.1", "llm.2"], prompts={"p": Prompt("x")}, poolings=["visual_mean"])
    recipe = recipes.resolve(config, info)
    assert estimate.bytes_per_item(recipe) == 2 * 2 * width
    assert estimate.videos_in_part(recipe, most, mb) == expected


def test_an_estimate_of_broken_videos_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LVLMS, "stand_in", Family())  # type: ignore[misc]
    rows = []
    for item_id in ("a", "b"):
        (tmp_path / item_id).write_bytes(b"no video")
        rows.append({"item_id": item_id, "uri": str(tmp_path / item_id)})
    manifest = pa.Table.from_pylist(rows)
    told = estimate.time_sample(manifest, recipe_of(), DecodeConfig(), LVLMConfig(name="stand_in"), {})
    assert told["decode"] > 0
    assert (told["prepare"], told["forward"]) == (0, 0)


def test_the_slowest_stage_is_named_with_a_remedy() -> None:
    tally = Tally(4, {"decode": 2, "prepare": 1, "forward": 1}, lambda metrics, step: None)
    rows = [
        {"item_id": str(i), "decode_seconds": 4.0, "prepare_seconds": 0.5, "forward_seconds": 1.0, "write_seconds": 0.1}
        for i in range(4)
    ]
    tally.add(pa.Table.from_pylist(rows, schema=stages.WRITTEN))
    report = tally.report(10.0)
    assert report["stages"]["decode"] == {"seconds": 16.0, "busy": 0.8}
    assert report["stages"]["write"] == {"seconds": 0.4}
    assert report["slowest_stage"].startswith("decode: 80% busy with 2; more pool.decode_tasks")


def test_where_no_stage_is_busy_no_stage_is_blamed() -> None:
    tally = Tally(1, {"decode": 2, "prepare": 1, "forward": 1}, lambda metrics, step: None)
    row = {"item_id": "a", "decode_seconds": 1.0, "prepare_seconds": 0.5, "forward_seconds": 2.9, "write_seconds": 0.1}
    tally.add(pa.Table.from_pylist([row], schema=stages.WRITTEN))
    assert tally.report(10.0)["slowest_stage"].startswith("forward: 29% busy with 1; no stage was the limit")
    assert tally.report(5.0)["slowest_stage"].startswith("forward: 58% busy with 1; the accelerator is the limit")


def test_a_few_rejected_items_are_named_of_each_reason_one_first(capsys: pytest.CaptureFixture[str]) -> None:
    def row(number: int, error: str) -> dict[str, str]:
        message = f"of {error}\n at {number}"
        return {
            "item_id": f"v{number}",
            "uri": "u",
            "source": "",
            "stage": "decode",
            "error": error,
            "message": message,
        }

    rows = [row(number, "truncated") for number in range(8)] + [row(8, "missing"), row(9, "no_video")]
    tell_rejected(pa.Table.from_pylist(rows, schema=store.REJECTED_SCHEMA), "s3://b/set/rejected")
    *named, last = capsys.readouterr().err.splitlines()
    assert named[0] == "extract: rejected 'v0': decode/truncated: of truncated at 0"
    assert [line.split("'")[1] for line in named] == ["v0", "v8", "v9", "v1", "v2"]
    assert last == "extract: 5 more are rejected; all of them, with reasons: s3://b/set/rejected/*.parquet"
    tell_rejected(pa.Table.from_pylist(rows[:2], schema=store.REJECTED_SCHEMA), "/set/rejected")
    assert capsys.readouterr().err.splitlines()[2] == "extract: rejected items, with reasons: /set/rejected/*.parquet"
    tell_rejected(store.REJECTED_SCHEMA.empty_table(), "/set/rejected")
    assert capsys.readouterr().err == ""


MOTION_INFO = dataclasses.replace(INFO, video_form=MOTION, video_encoder=ENCODER, is_random=True)


def motion_recipe(max_clips: int = 16) -> Recipe:
    return recipes.resolve(RecipeConfig(frames=max_clips, taps=["llm.1"]), MOTION_INFO, seed=5)


def test_videos_travel_as_key_frames_and_motion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LVLMS, "stand_in", Family())  # type: ignore[misc]
    for name, num_frames in {"short": 20, "long": 420}.items():
        write_video(tmp_path / f"{name}.mp4", num_frames=num_frames, size=(96, 64))
    uris = [str(tmp_path / "short.mp4"), __file__, str(tmp_path / "long.mp4")]
    rows = pa.table({"item_id": ["short", "text", "long"], "uri": uris})
    recipe = motion_recipe()
    assert (recipe.source.seed, recipe.source.frame_max_side) == (5, 0)
    decoded = pa.concat_tables(list(stages.decode(rows, recipe.reading, DecodeConfig())))
    assert decoded.schema == stages.DECODED
    assert decoded["stage"].to_pylist() == [None, "open", None]
    items = stages.items(decoded.take([0, 2]), recipe.reading)
    for item, num_clips in zip(items, (1, 3), strict=True):
        expected = motion_clips(tmp_path / f"{item.item_id}.mp4", 16)
        assert item.video is None
        assert item.motion is not None
        assert len(item.motion.starts) == num_clips
        for name in ("keyframes", "motion", "starts"):
            np.testing.assert_array_equal(getattr(item.motion, name), getattr(expected, name))
        assert item.motion.num_frames == expected.num_frames

    def means(prepared: list[Item]) -> dict[str, torch.Tensor]:
        value = torch.tensor([[float(item.motion.motion.mean())] * 3 for item in prepared if item.motion])
        return {str(name): value for name in recipe.feature_names}

    extractor = Extractor(LVLMConfig(name="stand_in"), recipe)
    extractor.lvlm.extract = means  # type: ignore[method-assign]
    written = extractor(decoded)
    assert dict(zip(*(written[name].to_pylist() for name in ("item_id", "num_distinct_frames")), strict=True)) == {
        "short": 1,
        "long": 3,
        "text": None,
    }
    one = next(stages.decode(rows.slice(2), motion_recipe(max_clips=1).reading, DecodeConfig()))
    assert one["motion.starts"][0].as_py() == [12]


def test_another_encoder_than_the_recipes_stops_the_run(tmp_path: Path) -> None:
    rows = pa.table({"item_id": ["a"], "uri": [str(write_video(tmp_path / "a.mp4"))]})
    recipe = motion_recipe()
    source = dataclasses.replace(recipe.source, video_encoder="libavcodec 1.0.0 mpeg4")
    other = dataclasses.replace(recipe, source=source)
    with pytest.raises(RuntimeError, match=r"encoder is libavcodec .*, the recipe's libavcodec 1\.0\.0 mpeg4"):
        next(stages.decode(rows, other.reading, DecodeConfig()))


@pytest.mark.thorough
@pytest.mark.data
def test_a_real_video_gives_three_clips(real_data: Path) -> None:
    rows = pa.table({"item_id": ["1002"], "uri": [str(real_data / "microlens_videos" / "1002.mp4")]})
    decoded = next(stages.decode(rows, motion_recipe().reading, DecodeConfig()))
    assert decoded["error"].to_pylist() == [None]
    assert decoded["motion.starts"][0].as_py() == [12, 36, 60]
    assert decoded["motion.num_frames"][0].as_py() == 98
