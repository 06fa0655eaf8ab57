"""The stages of the pipeline as plain functions over Arrow tables, without Ray."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from lvlmrec.extraction import estimate, stages
from lvlmrec.extraction.progress import Tally
from lvlmrec.extraction.stages import DecodeConfig, Extractor
from lvlmrec.features import recipe as recipes
from lvlmrec.features.recipe import LVLMInfo, Prompt, Recipe, RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.protocol import Item
from tests.videos import write_video

INFO = LVLMInfo("stand_in", "x", "float32", {"llm": 2, "vision": 1}, {"llm": 3, "vision": 3})
PREPARE, EXTRACT = 0.02, 0.05


class StandIn:
    """A model of known pace that fails on one item and notices when two threads are in one of its methods."""

    info = INFO

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
    return pa.concat_tables(list(stages.decode(pa.Table.from_pylist(rows), recipe_of(), DecodeConfig())))


def test_an_item_that_fails_costs_no_neighbour_and_its_time_is_counted(tmp_path: Path, extractor: Extractor) -> None:
    rows = decoded(tmp_path, "a", "poison", "broken", "b")
    assert rows["error"].to_pylist()[2] is not None
    assert min(rows["decode_seconds"].to_pylist()) > 0
    table = extractor(rows)
    found = {row["item_id"]: row for row in table.to_pylist()}
    assert [found[i]["stage"] for i in ("a", "b", "poison")] == [None, None, "model"]
    assert found["poison"]["message"] == "device-side assert"
    assert found["broken"]["stage"] == rows["stage"].to_pylist()[2]
    # the batch once, then its three decoded items one by one
    assert sum(table["forward_seconds"].to_pylist()) == pytest.approx(4 * EXTRACT, rel=0.5)
    assert sum(table["prepare_seconds"].to_pylist()) == pytest.approx(4 * PREPARE, rel=0.5)
    assert table["decode_seconds"].to_pylist() == [
        row["decode_seconds"]
        for name in ("a", "poison", "b", "broken")
        for row in rows.to_pylist()
        if row["item_id"] == name
    ]


def test_one_batch_is_prepared_while_another_is_in_the_model(tmp_path: Path, extractor: Extractor) -> None:
    rows = decoded(tmp_path, "a", "b")
    with ThreadPoolExecutor(3) as threads:
        tables = list(threads.map(extractor, [rows] * 6))
    assert extractor.lvlm.overlapped  # type: ignore[attr-defined]
    assert all(
        table.select(["item_id", "p/llm.1/visual_mean"]) == tables[0].select(["item_id", "p/llm.1/visual_mean"])
        for table in tables
    )


def test_what_prompts_name_travels_with_the_item_and_must_say_something() -> None:
    recipe = recipe_of(t=Prompt("{title}: {text}", input="text"))
    rows = pa.Table.from_pylist(
        [{"item_id": "a", "title": "cat", "text": ""}, {"item_id": "b", "title": " ", "text": ""}]
    )
    good, bad = pa.concat_tables(list(stages.decode(rows, recipe, DecodeConfig()))).to_pylist()
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
