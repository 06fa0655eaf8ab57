"""Failures that are not one item's, and what changes between runs, on a local Ray with a real encoder of titles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lvlmrec.config import load
from lvlmrec.errors import InputError, JobFailed
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.pipeline import Plan
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features import lease, store
from lvlmrec.lvlms import LVLMS
from lvlmrec.lvlms.protocol import Item
from tests.extraction import deadly
from tests.extraction.test_pipeline import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def cluster(ray_address: str) -> Iterator[None]:
    import ray

    ray.init(ray_address, log_to_driver=False, runtime_env={"worker_process_setup_hook": deadly.register})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "text_encoder"
    LVLMS["text_encoder"].write_tiny(directory, seed=0)
    return directory


def write_items(path: Path, titles: dict[str, str]) -> None:
    pd.DataFrame({"item_id": [*titles], "title": [*titles.values()]}).to_csv(path, index=False)


def plan_of(folder: Path, model: Path, *overrides: str) -> Plan:
    base = [
        f"workspace={folder}",
        f"input={folder}/items.csv",
        "lvlm.name=text_encoder",
        f"lvlm.model={model}",
        "lvlm.batch_size=1",
        "recipe.taps=[text.*]",
        "recipe.prompts={title: {input: text, text: '{title}'}}",
        "recipe.poolings=[all_mean]",
        "recipe.dtype=float32",
        "pool.videos_per_part=4",
    ]
    return pipeline.plan(load(ExtractConfig, [], [*base, *overrides]))


def run(plan: Plan) -> dict[str, Any]:
    return pipeline.run(plan, lambda metrics, step: None)


def missing(plan: Plan) -> list[str]:
    sources = pipeline._sources(plan) if plan.config.redo_changed else None
    items: list[str] = pipeline.missing(plan, store.read_index(plan.feature_set), sources)["item_id"].to_pylist()
    return items


def test_an_item_that_kills_its_process_is_one_rejected_row(tmp_path: Path, model: Path) -> None:
    titles = {f"item{k}": f"number {k}" for k in range(20)} | {"item7": "a deadly one"}
    write_items(tmp_path / "items.csv", titles)
    plan = plan_of(tmp_path, model)
    result = run(plan)
    assert (result["written"], result["rejected_by_reason"]) == (19, {"model/worker_died": 1})
    rows = rows_of(result["feature_set"])
    assert sorted(rows) == sorted({*titles} - {"item7"})
    encoder = LVLMS["text_encoder"].load(plan.config.lvlm, plan.recipe.reading)
    for item_id, row in rows.items():
        for name, values in encoder.extract(encoder.prepare([Item(item_id, texts={"title": titles[item_id]})])).items():
            np.testing.assert_array_equal(row[name], values[0].numpy())


def test_a_run_in_which_all_fails_alike_stops_and_forgets(tmp_path: Path) -> None:
    """Nobody may read the videos: 400 of them are not rejected, for it is no fault of theirs."""
    videos = pd.DataFrame({"item_id": [f"v{k}" for k in range(400)], "uri": f"{tmp_path}/locked"})
    (tmp_path / "locked").mkdir()
    videos.to_csv(tmp_path / "videos.csv", index=False)
    image = tmp_path / "llava_onevision"
    LVLMS["llava_onevision"].write_tiny(image, seed=0)
    overrides = [f"workspace={tmp_path}", f"input={tmp_path}/videos.csv", f"lvlm.model={image}", "estimate.videos=0"]
    plan = pipeline.plan(load(ExtractConfig, [], [*overrides, "max_rejected_in_a_row=20", "pool.videos_per_part=8"]))
    with pytest.raises(JobFailed, match=r"stopped: \d+ items one after another were rejected, all with open/"):
        run(plan)
    assert len(store.read_rejected(plan.feature_set)) < 100
    with lease.hold(plan.feature_set):  # the stopped run holds nothing any more
        pass


def test_what_changed_or_was_rejected_is_done_again_when_asked(tmp_path: Path, model: Path) -> None:
    titles = {"a": "one", "b": "two", "c": "three", "gone": "four", "empty": "", "blank": ""}
    write_items(tmp_path / "items.csv", titles)
    first = run(plan_of(tmp_path, model))
    assert (first["written"], first["rejected"], first["not_in_input"]) == (4, 2, 0)
    before = rows_of(first["feature_set"])
    titles |= {"b": "two, told anew", "empty": "not any more", "new": "five"}
    del titles["gone"]
    write_items(tmp_path / "items.csv", titles)
    assert missing(plan_of(tmp_path, model)) == ["new"]
    assert missing(plan_of(tmp_path, model, "retry_rejected=true")) == ["empty", "blank", "new"]
    assert missing(plan_of(tmp_path, model, "redo_changed=true")) == ["b", "empty", "new"]

    redone = run(plan_of(tmp_path, model, "redo_changed=true", "retry_rejected=true"))
    assert (redone["written"], redone["rejected"], redone["not_in_input"]) == (3, 1, 1)
    after = rows_of(redone["feature_set"])
    assert sorted(after) == ["a", "b", "c", "empty", "gone", "new"]
    assert [i for i in before if after[i] != before[i]] == ["b"]
    assert missing(plan_of(tmp_path, model, "redo_changed=true")) == []


def test_a_second_extraction_of_the_same_is_refused(tmp_path: Path, model: Path) -> None:
    write_items(tmp_path / "items.csv", {"a": "one"})
    plan = plan_of(tmp_path, model)
    with lease.hold(plan.feature_set), pytest.raises(InputError, match=rf"process {os.getpid()} on .* is writing it"):
        run(plan)
