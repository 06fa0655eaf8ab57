"""How large Qwen-VL's frames are: as the files say, or as a recipe says."""

from __future__ import annotations

import dataclasses

import pytest

from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.protocol import Item


@pytest.mark.parametrize(("max_pixels", "side"), [(0, 112), (56 * 112, 56), (168 * 168, 168)])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_recipe_may_bound_the_pixels_of_a_frame(family, max_pixels, side, tmp_path, make_clip) -> None:
    LVLMS[family].write_tiny(tmp_path, seed=0)
    config = dataclasses.replace(LVLMConfig(), name=family, model=str(tmp_path), device="cpu")
    options = {"max_pixels": max_pixels} if max_pixels else {}
    wanted = RecipeConfig(taps=["llm.-1"], video_options=options)
    recipe = recipes.resolve_source(wanted, LVLMS[family].inspect(config))
    assert recipe.video_options["max_pixels"] == max_pixels
    model = LVLMS[family].load(config, recipe)
    (batch,) = model.prepare([Item("a", make_clip(200, 200))])
    assert batch.media["video"].inputs["video_grid_thw"].tolist() == [[2, side // 14, side // 14]]
