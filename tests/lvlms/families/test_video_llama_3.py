"""VideoLLaMA 3 leaves out the tokens of what stands still, as transformers does; see also the contract."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.engine.pooling import pool_columns
from lvlmrec.lvlms.protocol import Item
from tests.lvlms.test_contract import PROMPTS, reference

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("compresses", [True, False])
def test_what_stands_still_costs_no_token(compresses, tiny_models, make_clip) -> None:
    clips = [make_clip(112, 112, seed=1), make_clip(112, 112, seed=2)]
    frames = np.array(clips[0].frames)
    frames[1:, :, :56] = frames[0, :, :56]  # the left half never moves
    clips[0] = dataclasses.replace(clips[0], frames=frames)
    directory = tiny_models["video_llama_3"]
    config = dataclasses.replace(LVLMConfig(), name="video_llama_3", model=str(directory), device="cpu")
    wanted = RecipeConfig(
        taps=["projector", "llm.*"],
        prompts={"after": PROMPTS["after"]},
        video_options={} if compresses else {"use_token_compression": False},
    )
    model = LVLMS["video_llama_3"].load(config, recipes.resolve_source(wanted, LVLMS["video_llama_3"].inspect(config)))
    (batch,) = prepared = model.prepare([Item(str(row), clip) for row, clip in enumerate(clips)])
    counts = {row: ids.count(model._base.config.video_token_id) for row, ids in enumerate(batch.prompts["after"])}
    still = 3 * 8 if compresses else 0  # three later frames, half of 4 x 4 tokens
    assert counts == {batch.rows.index(0): 4 * 16 - still, batch.rows.index(1): 4 * 16}

    features = model.extract(prepared)
    torch.testing.assert_close(features["video/projector/visual_mean"], features["after/llm.0/visual_mean"])
    if compresses:
        expected = reference(directory, [clips[row] for row in batch.rows], PROMPTS["after"])
        for layer, hidden in enumerate(expected.hidden):
            means = pool_columns(["visual_mean"], hidden, expected.masks)["visual_mean"]
            assert torch.equal(features[f"after/llm.{layer}/visual_mean"][batch.rows], means), layer
