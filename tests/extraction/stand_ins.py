"""A model that fails as devices do, and rows to show it; apart from the tests, because Ray's workers import it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from lvlmrec.extraction import failures, stages
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe import Recipe
from lvlmrec.features.recipe_config import LVLMInfo, RecipeConfig
from lvlmrec.lvlms import LVLMS
from lvlmrec.lvlms.protocol import Item, ModelConfig

INFO = LVLMInfo("stand_in", "x", "float32", {"llm": 2}, {"llm": 3}, inputs=("text",))
RECIPE = recipes.resolve(
    RecipeConfig(taps=["llm.1"], prompts={"p": Prompt("{title}", input="text")}, poolings=["last_token"]), INFO
)
COLUMN = "p/llm.1/last_token"

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
ASSERT = "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in https://docs.nvidia.com/"
CUDA_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.99 GiB"


class StandIn:
    """Its feature of an item is the length of its title. `fail` looks at each forward and may raise."""

    info = INFO

    def __init__(self, batch_size: int, fail: Callable[[Sequence[str]], None]) -> None:
        self.batch_size, self.fail = batch_size, fail
        self.forwards: list[int] = []

    def prepare(self, items: Sequence[Item]) -> list[list[Item]]:
        return [list(items[i : i + self.batch_size]) for i in range(0, len(items), self.batch_size)]

    def extract(self, prepared: list[list[Item]]) -> dict[str, torch.Tensor]:
        for batch in prepared:
            self.forwards.append(len(batch))
            self.fail([item.texts["title"] for item in batch])
        lengths = [float(len(item.texts["title"])) for batch in prepared for item in batch]
        return {COLUMN: torch.tensor(lengths)[:, None].expand(-1, 3)}


class Family:
    """The entry of `LVLMS`."""

    name = "stand_in"

    def __init__(self, fail: Callable[[Sequence[str]], None]) -> None:
        self.fail = fail

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        return INFO

    def load(self, config: ModelConfig, recipe: Recipe) -> StandIn:
        return StandIn(config.batch_size, self.fail)


def rows(*titles: str) -> pa.Table:
    """Items whose id is their title, as they come from decoding."""
    known = [{"item_id": title, "uri": "", "source": "v", "texts": [("title", title)]} for title in titles]
    return pa.Table.from_pylist(
        [row | {"decode_seconds": 0.0, "decoded_on": "node a"} for row in known], schema=stages.DECODED
    )


def sick(titles: Sequence[str]) -> None:
    """Raise what the titles say, or what the environment says of this process."""
    if any("assert" in title for title in titles):
        raise torch.AcceleratorError(ASSERT)
    if any("huge" in title for title in titles) or sum("large" in title for title in titles) > 1:
        raise torch.OutOfMemoryError(CUDA_MEMORY)
    broken = os.environ.get("LVLMREC_TEST_BROKEN", "")
    if broken == "device":
        raise torch.AcceleratorError(ILLEGAL)
    if broken == "one":
        claim = Path(os.environ["LVLMREC_TEST_CLAIM"])
        if not claims(claim):
            claim.with_name("healthy").touch()
            return
        while not claim.with_name("healthy").exists():
            time.sleep(0.05)
        raise RuntimeError("a kernel gave nonsense")


def claims(path: Path) -> bool:
    """Whether this process is the first that asked."""
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(str(os.getpid()))
    return path.read_text() == str(os.getpid())


class Sick:
    """The text encoder with `sick` before each forward."""

    def __init__(self, family: Any) -> None:
        self.family, self.name = family, family.name

    def inspect(self, config: Any) -> Any:
        return self.family.inspect(config)

    def load(self, config: Any, recipe: Any) -> Any:
        if os.environ.get("LVLMREC_TEST_BROKEN") == "load":
            raise torch.OutOfMemoryError(CUDA_MEMORY)
        model = self.family.load(config, recipe)
        extract, prepare, titles = model._extract_batch, model.prepare, {}

        def remember(items: Sequence[Item]) -> Any:
            titles["of"] = [item.texts["title"] for item in items]
            return prepare(items)

        def fail(batch: Any) -> Any:
            sick([titles["of"][row] for row in batch.rows])
            return extract(batch)

        model.prepare, model._extract_batch = remember, fail
        return model


def register() -> None:
    """First thing in each of Ray's workers."""
    failures.MAX_LOSSES = 4
    LVLMS["text_encoder"] = Sick(LVLMS["text_encoder"])  # type: ignore[index]
