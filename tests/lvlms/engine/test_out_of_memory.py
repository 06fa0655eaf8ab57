"""Every kind of model goes on with smaller forwards when memory runs out, and its features stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from lvlmrec.extraction import stages
from lvlmrec.extraction.extractor import Extractor
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe import Recipe
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.engine import prefix
from lvlmrec.lvlms.protocol import Item
from tests.lvlms.conftest import ENCODERS, LVLM_FAMILIES

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
TAPS = {"text_encoder": "text.1", "image_encoder": "vision.1", "video_encoder": "vision.1"}


def rows_of(items: Sequence[Item], recipe: Recipe) -> pa.Table:
    """Items as they come from decoding."""
    known = []
    for item in items:
        row: dict[str, Any] = {"item_id": item.item_id, "uri": "", "source": "v", "texts": list(item.texts.items())}
        for kind in recipe.reading.media:
            row |= {f"{kind}.{name}": value for name, value in stages._clip_row(getattr(item, kind)).items()}
        known.append(row)
    return pa.Table.from_pylist(known, schema=stages.DECODED)


def extractor_of(family: str, directory: Path, prompts: dict[str, Prompt], frames: int, pooling: str = "") -> Extractor:
    config = LVLMConfig(name=family, model=str(directory), batch_size=4, device="cpu")
    poolings = [pooling or ("all_mean" if "text_encoder" in family else "visual_mean")]
    wanted = RecipeConfig(
        frames=frames, taps=[TAPS.get(family, "llm.1")], prompts=prompts, poolings=poolings, dtype="float32"
    )
    return Extractor(config, recipes.resolve(wanted, LVLMS[family].inspect(config)))


@pytest.mark.parametrize("family", [*LVLM_FAMILIES, *ENCODERS])
def test_forwards_become_smaller(
    family: str, tiny_models: dict[str, Path], make_clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = 8 if family == "video_encoder" else 2
    shown = {"text_encoder": "text"}.get(family, "video")
    prompts = {"p": Prompt("{title}" if shown == "text" else "" if family in TAPS else "Look.", input=shown)}
    extractor = extractor_of(family, tiny_models[family], prompts, frames)
    items = [Item(f"item{k}", make_clip(56, 56, frames, k), None, {"title": f"number {k}"}) for k in range(5)]
    rows = rows_of(items, extractor.recipe)
    expected = extractor(rows)
    assert extractor.lvlm.batch_size == 4
    run, sizes = extractor.lvlm._extract_batch, []  # type: ignore[attr-defined]

    def run_out(batch: Any) -> Any:
        sizes.append(len(batch.rows))
        if len(batch.rows) > 1:
            raise MEMORY
        return run(batch)

    monkeypatch.setattr(extractor.lvlm, "_extract_batch", run_out)
    found = extractor(rows)
    assert sizes == [4, 2, 1, 1, 1, 1, 1]
    assert extractor.attempts.report() == {"oom_fallbacks": 2, "device_failures": 0, "lowest_batch_size": 1}
    (column,) = map(str, extractor.recipe.feature_names)
    assert found["item_id"].to_pylist() == expected["item_id"].to_pylist()
    one, other = (torch.tensor(table.sort_by("item_id")[column].to_pylist()) for table in (found, expected))
    torch.testing.assert_close(one, other, rtol=0, atol=4e-5 * float(other.abs().max()))


def test_prompts_of_one_item_are_read_by_fewer_at_once(
    tiny_models: dict[str, Path], make_clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {f"p{k}": Prompt(f"Question {k}?") for k in range(4)}
    extractor = extractor_of("llava_onevision", tiny_models["llava_onevision"], prompts, 2, "last_token")
    rows = rows_of([Item("item", make_clip(56, 56, 2))], extractor.recipe)
    expected = extractor(rows)
    run, sizes = prefix.run_suffixes, []

    def run_out(family: Any, decoder: Any, calls: Sequence[Any], *rest: Any) -> None:
        sizes.append(len(calls))
        if len(calls) > 1:
            raise MEMORY
        run(family, decoder, calls, *rest)

    monkeypatch.setattr(prefix, "run_suffixes", run_out)
    found = extractor(rows)
    assert sizes == [4, 2, 1, 1, 1, 1]
    for name in map(str, extractor.recipe.feature_names):
        torch.testing.assert_close(*(torch.tensor(table[name].to_pylist()) for table in (found, expected)))
