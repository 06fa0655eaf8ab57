"""A pooling that is one entry of `POOLINGS`: from the recipe through the forward and the store and back.

`peak`, the largest value of each dimension over all tokens, is declared twice: with what lets prompts share a
beginning, and without, so that each prompt is read as a whole. `spread` is of the visual tokens
and has columns of two shapes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lvlmrec.features import recipe_config, store
from lvlmrec.features.compact import choose_columns, compact
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.poolings import POOLINGS
from lvlmrec.features.poolings.pooling import ALL, ANSWER, VECTOR, VISUAL, WIDTH, Pooling
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.engine import prefix
from lvlmrec.lvlms.protocol import Item

PROMPTS = {
    "short": Prompt("What is shown?"),
    "long": Prompt("What is shown, and why does the person look so surprised?"),
    "before": Prompt("Look.", "before"),
    "asked": Prompt("What is it?", max_new_tokens=3),
}
ITEMS = ["a", "b", "c"]


def peak(hidden_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor]:
    return (hidden_BSD.float().masked_fill(~mask_BS[..., None], -torch.inf).amax(dim=1),)


def join_peak(beginning: tuple[Tensor], hidden_BQD: Tensor, mask_BQ: Tensor) -> tuple[Tensor]:
    return (torch.maximum(*beginning, *peak(hidden_BQD, mask_BQ)),)


def spread(hidden_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    (low_BD,), (high_BD,) = peak(-hidden_BSD, mask_BS), peak(hidden_BSD, mask_BS)
    return torch.stack([-low_BD, high_BD], dim=1).flatten(1), (high_BD + low_BD).mean(dim=1, keepdim=True)


@pytest.fixture
def config(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> LVLMConfig:
    entries = {
        "peak": Pooling(ALL, peak, VECTOR, begin=peak, join=join_peak),
        "peak_alone": Pooling(ALL, peak, VECTOR),
        "new_peak": Pooling(ANSWER, peak, VECTOR),
        "spread": Pooling(VISUAL, spread, {"": (2, WIDTH), ".mean": (1,)}),
    }
    for name, entry in entries.items():
        monkeypatch.setitem(POOLINGS, name, entry)
    return LVLMConfig(name="llava_onevision", model=str(tiny_models["llava_onevision"]), device="cpu")


def extracted(config: LVLMConfig, clips: list, poolings: list[str]) -> tuple[recipe_config.Recipe, dict[str, Tensor]]:
    entry = LVLMS[config.name]
    wanted = RecipeConfig(taps=["llm.1", "llm.-1"], prompts=PROMPTS, poolings=poolings, dtype="float32")
    recipe = recipe_config.resolve(wanted, entry.inspect(config))
    model = entry.load(config, recipe.source)
    items = [Item(name, clip) for name, clip in zip(ITEMS, clips, strict=True)]
    return recipe, model.extract(model.prepare(items))


def test_prompts_that_are_read_together_and_alone_give_the_same(
    config: LVLMConfig, clips: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []
    run = prefix.run_suffixes
    monkeypatch.setattr(prefix, "run_suffixes", lambda *given: shared.append(len(given[2])) or run(*given))
    _, together = extracted(config, clips, ["peak", "visual_mean"])
    assert shared, "no prompts were read together"
    shared.clear()
    _, alone = extracted(config, clips, ["peak_alone", "visual_mean"])
    assert not shared
    columns = [column for column in together if column.endswith("/peak")]
    assert len(columns) == 2 * len(PROMPTS)
    for column in columns:
        other = alone[f"{column}_alone"]
        torch.testing.assert_close(together[column], other, rtol=0, atol=2e-6 * float(other.abs().max()))


def test_its_columns_are_stored_and_come_back(config: LVLMConfig, clips: list, tmp_path: Path) -> None:
    recipe, features = extracted(config, clips, ["spread", "new_peak", "peak"])
    shapes = {str(column.name): column.shape for column in recipe.columns}
    width = shapes["short/llm.1/peak"][0]
    assert shapes["short/llm.1/spread"] == (2, width) and shapes["short/llm.1/spread.mean"] == (1,)
    assert [name.split("/")[0] for name in shapes if name.endswith("new_peak")] == ["asked", "asked"]
    uri = store.locate(str(tmp_path / "store"), "peaks", recipe)
    store.create(uri, recipe)
    store.write_part(uri, recipe, store.feature_table(recipe, ITEMS, [4] * len(ITEMS), features))
    store.commit(uri)
    feature_set = store.read(uri)
    assert feature_set.recipe == recipe
    for pattern in ("short/llm.1/peak", "short/llm.1/spread"):
        names = choose_columns(feature_set, [pattern], "all")
        array = compact([(feature_set, names)], ITEMS, str(tmp_path / "cache"))
        assert torch.equal(array.stored()[0][1:].flatten(1), features[pattern].flatten(1)), pattern
