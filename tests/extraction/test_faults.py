"""Failures that are not one item's, and what changes between runs, on a local Ray with a real encoder of titles."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lvlmrec.config import load
from lvlmrec.errors import InputError, JobFailed
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.pipeline import ExtractConfig
from lvlmrec.features import lease, store
from lvlmrec.lvlms import LVLMS
from tests.extraction.test_pipeline import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


class Deadly:
    """The text encoder, whose process dies when a title says so."""

    def __init__(self, family: Any) -> None:
        self.family = family
        self.name = family.name

    def inspect(self, config: Any) -> Any:
        return self.family.inspect(config)

    def load(self, config: Any, recipe: Any) -> Any:
        model = self.family.load(config, recipe)
        prepare = model.prepare

        def die(items: Any) -> Any:
            if any("deadly" in item.texts["title"] for item in items):
                os.kill(os.getpid(), signal.SIGKILL)
            return prepare(items)

        model.prepare = die
        return model


def register() -> None:
    """First thing in each of Ray's workers."""
    from lvlmrec import lvlms
    from tests.extraction.test_faults import Deadly

    lvlms.LVLMS["text_encoder"] = Deadly(lvlms.LVLMS["text_encoder"])  # type: ignore[index]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    environment = {"worker_process_setup_hook": register}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "text_encoder"
    LVLMS["text_encoder"].write_tiny(directory, seed=0)
    return directory


def write_items(path: Path, titles: dict[str, str]) -> None:
    pd.DataFrame({"item_id": [*titles], "title": [*titles.values()]}).to_csv(path, index=False)


def extract(folder: Path, model: Path, *overrides: str) -> dict[str, Any]:
    base = [
        f"workspace={folder}",
        f"input={folder}/items.csv",
        "lvlm.name=text_encoder",
        f"lvlm.model={model}",
        "lvlm.batch_size=2",
        "recipe.prompts={title: {input: text, text: '{title}'}}",
        "recipe.taps=[text.*]",
        "recipe.poolings=[all_mean]",
        "pool.videos_per_part=4",
    ]
    return pipeline.run(pipeline.plan(load(ExtractConfig, [], [*base, *overrides])), lambda metrics, step: None)


def test_an_item_that_kills_its_process_is_one_rejected_row(tmp_path: Path, model: Path) -> None:
    titles = {f"item{k}": f"number {k}" for k in range(20)}
    write_items(tmp_path / "items.csv", titles)
    undisturbed = rows_of(extract(tmp_path, model, f"store={tmp_path}/undisturbed")["feature_set"])
    write_items(tmp_path / "items.csv", titles | {"item7": "a deadly one"})
    result = extract(tmp_path, model)
    assert (result["written"], result["rejected_by_reason"]) == (19, {"model/worker_died": 1})
    assert rows_of(result["feature_set"]) == {i: row for i, row in undisturbed.items() if i != "item7"}


def test_a_run_in_which_all_fails_alike_stops_and_forgets(tmp_path: Path, model: Path) -> None:
    """Nobody may read the videos: 400 of them are not rejected, for it is no fault of theirs."""
    videos = pd.DataFrame({"item_id": [f"v{k}" for k in range(400)], "uri": f"{tmp_path}/locked"})
    (tmp_path / "locked").mkdir()
    videos.to_csv(tmp_path / "videos.csv", index=False)
    image = tmp_path / "llava_onevision"
    LVLMS["llava_onevision"].write_tiny(image, seed=0)
    overrides = [f"workspace={tmp_path}", f"input={tmp_path}/videos.csv", f"lvlm.model={image}", "estimate.videos=0"]
    plan = pipeline.plan(load(ExtractConfig, [], [*overrides, "max_rejected_in_a_row=20", "pool.videos_per_part=8"]))
    began = time.monotonic()
    with pytest.raises(JobFailed, match=r"stopped: \d+ items one after another were rejected, all with open/"):
        pipeline.run(plan, lambda metrics, step: None)
    assert time.monotonic() - began < 120
    assert len(store.read_rejected(plan.feature_set)) < 100
    with lease.hold(plan.feature_set):  # the stopped run holds nothing any more
        pass


def test_what_changed_is_done_again_when_asked(tmp_path: Path, model: Path) -> None:
    titles = {"a": "one", "b": "two", "c": "three", "gone": "four", "empty": ""}
    write_items(tmp_path / "items.csv", titles)
    first = extract(tmp_path, model)
    assert (first["written"], first["rejected"], first["not_in_input"]) == (4, 1, 0)
    before = rows_of(first["feature_set"])
    titles |= {"b": "two, told anew", "empty": "not any more", "new": "five"}
    del titles["gone"]
    write_items(tmp_path / "items.csv", titles)

    again = extract(tmp_path, model)
    assert (again["written"], again["skipped"], again["not_in_input"]) == (1, 4, 1)
    assert {i: row for i, row in rows_of(again["feature_set"]).items() if i != "new"} == before

    redone = extract(tmp_path, model, "redo_changed=true")
    assert (redone["written"], redone["rejected"]) == (2, 0)
    after = rows_of(redone["feature_set"])
    assert sorted(after) == ["a", "b", "c", "empty", "gone", "new"]
    assert [i for i in before if after[i] != before[i]] == ["b"]
    assert extract(tmp_path, model, "redo_changed=true")["written"] == 0
    assert extract(tmp_path, model, "retry_rejected=true")["written"] == 0


def test_rejected_items_are_tried_again_when_asked(tmp_path: Path, model: Path) -> None:
    write_items(tmp_path / "items.csv", {"a": "one", "b": "two", "c": ""})
    result = extract(tmp_path, model)
    store.write_rejected(
        result["feature_set"],
        [{"item_id": "x", "uri": "", "source": "", "stage": "model", "error": "OutOfMemoryError", "message": "once"}],
        generation=1,
    )
    write_items(tmp_path / "items.csv", {"a": "one", "b": "two", "c": "", "x": "three"})
    assert extract(tmp_path, model)["written"] == 0
    retried = extract(tmp_path, model, "retry_rejected=true")
    assert (retried["written"], retried["rejected_now"]) == (1, 1)
    assert sorted(rows_of(retried["feature_set"])) == ["a", "b", "x"]


def test_a_second_extraction_of_the_same_is_refused(tmp_path: Path, model: Path) -> None:
    write_items(tmp_path / "items.csv", {"a": "one"})
    uri = extract(tmp_path, model)["feature_set"]
    write_items(tmp_path / "items.csv", {"a": "one", "b": "two"})
    with lease.hold(uri), pytest.raises(InputError, match=rf"process {os.getpid()} on .* is writing it"):
        extract(tmp_path, model)
    assert extract(tmp_path, model)["written"] == 1
