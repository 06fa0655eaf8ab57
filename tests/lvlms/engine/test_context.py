"""Prompt, video and answer longer than what the model reads: an error with both numbers, never features."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray

from lvlmrec.errors import ConfigError, InputError
from lvlmrec.extraction import inspection, pipeline
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features.model_recipe import ModelRecipe, Prompt
from lvlmrec.features.recipe_config import RecipeConfig, resolve_source
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.families.family import context_of
from lvlmrec.lvlms.protocol import Item
from tests.lvlms.conftest import LVLM_FAMILIES

PROMPT = Prompt("What is shown?")


def make_config(directory: Path) -> LVLMConfig:
    return LVLMConfig(name=directory.name, model=str(directory), device="cpu")


def shortened(directory: Path, target: Path, length: int, **rope: Any) -> Path:
    """A copy of a tiny model that reads `length` tokens at most, `rope` written into its rotary positions."""
    copy = Path(shutil.copytree(directory, target / directory.name))
    tree = json.loads((copy / "config.json").read_text())
    text = tree.get("text_config", tree)
    text["max_position_embeddings"] = length
    text["rope_parameters"] = text.get("rope_parameters", {}) | rope
    (copy / "config.json").write_text(json.dumps(tree))
    return copy


def plan(directory: Path, frames: int = 4, **prompt: Any) -> tuple[LVLMConfig, ModelRecipe, int]:
    config = make_config(directory)
    info = LVLMS[config.name].inspect(config)
    prompts = {"ask": dataclasses.replace(PROMPT, **prompt)}
    poolings = ["new_mean"] if prompt.get("max_new_tokens") else ["last_token"]
    recipe = resolve_source(RecipeConfig(frames=frames, taps=["llm.0"], prompts=prompts, poolings=poolings), info)
    return config, recipe, info.context


def num_tokens(directory: Path, item: Item) -> int:
    config, recipe, _ = plan(directory)
    (batch,) = LVLMS[config.name].load(config, recipe).prepare([item])
    return len(batch.prompts["ask"][0])


@pytest.mark.parametrize("family", LVLM_FAMILIES)
def test_an_item_that_does_not_fit_is_rejected_with_both_numbers(tiny_models, tmp_path, clips, family) -> None:
    item = Item("a", clips[0])
    length = num_tokens(tiny_models[family], item)
    config, recipe, limit = plan(shortened(tiny_models[family], tmp_path, length))
    assert limit == length
    model = LVLMS[family].load(config, recipe)
    model.extract(model.prepare([item]))  # to the last token
    config, recipe, _ = plan(shortened(tiny_models[family], tmp_path / "less", length - 1))
    told = rf"^item 'a': prompt 'ask' with its video is {length} tokens, {length} in all, .* reads {length - 1} at most"
    with pytest.raises(InputError, match=told):
        LVLMS[family].load(config, recipe).prepare([item])


@pytest.mark.parametrize("family", LVLM_FAMILIES)
def test_a_recipe_that_never_fits_ends_before_the_run(tiny_models, tmp_path, family) -> None:
    config, recipe, limit = plan(shortened(tiny_models[family], tmp_path, 16), frames=8)
    with pytest.raises(
        ConfigError, match=r"^recipe\.frames: 8: prompt 'ask' with its video is \d\d+ .* reads 16 at mo"
    ):
        inspection.check_length(config, recipe, limit)
    inspection.check_length(*plan(tiny_models[family]))
    if family == "llava_onevision":
        found = dataclasses.replace(config, name="auto")
        with pytest.raises(ConfigError, match=r"^recipe\.frames: 8"):
            inspection.check_length(found, dataclasses.replace(recipe, family="stranger"), limit)


def test_the_answer_counts(tiny_models, tmp_path, clips) -> None:
    item, directory = Item("a", clips[0]), tiny_models["qwen2_vl"]
    length = num_tokens(directory, item)
    config, recipe, limit = plan(shortened(directory, tmp_path, length + 8), max_new_tokens=9)
    assert limit == length + 8
    model = LVLMS["qwen2_vl"].load(config, recipe)
    with pytest.raises(InputError, match=rf"is {length} tokens and max_new_tokens=9, {length + 9} in all"):
        model.prepare([item])
    fitting = shortened(directory, tmp_path / "fits", length + 9)
    config, recipe, _ = plan(fitting, max_new_tokens=9)
    LVLMS["qwen2_vl"].load(config, recipe).prepare([item])
    huge = plan(directory, max_new_tokens=4096)
    with pytest.raises(ConfigError, match=r"max_new_tokens=4096, 4\d\d\d in all, and the model reads 4096 at most"):
        inspection.check_length(*huge)


def test_long_titles_and_covers_count(tiny_models, tmp_path, items) -> None:
    directory = shortened(tiny_models["qwen2_vl"], tmp_path, 40)
    config, recipe, limit = plan(directory, text="{title}", input="text")
    inspection.check_length(config, recipe, limit)
    model = LVLMS["qwen2_vl"].load(config, recipe)
    with pytest.raises(InputError, match=r"item 'b': prompt 'ask' is \d+ tokens"):
        model.prepare([Item("b", texts={"title": "many words " * 20})])
    model.prepare([Item("a", texts={"title": "few"})])
    config, recipe, limit = plan(shortened(tiny_models["qwen2_vl"], tmp_path / "cover", 8), input="cover")
    with pytest.raises(ConfigError, match=r"prompt 'ask' with its cover is \d+ tokens"):
        inspection.check_length(config, recipe, limit)


def test_the_job_ends_before_its_run(tiny_models, tmp_path) -> None:
    directory = shortened(tiny_models["llava_onevision"], tmp_path, 64)
    (tmp_path / "items.csv").write_text("item_id,uri\na,nowhere.mp4\n")
    config = ExtractConfig(
        workspace=str(tmp_path),
        input=str(tmp_path / "items.csv"),
        store=str(tmp_path / "store"),
        lvlm=make_config(directory),
        recipe=RecipeConfig(frames=32, taps=["llm.0"]),
    )
    with pytest.raises(ConfigError, match=r"^recipe\.frames: 32: prompt 'describe' .* reads 64 at most"):
        pipeline.run(pipeline.plan(config), lambda *_: None)
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({}, 4096),
        ({"rope_type": "default", "rope_theta": 1e4}, 4096),
        ({"rope_type": "linear", "factor": 8.0}, 32768),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 2048}, 4096),
        ({"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 1024}, 4096),
        (
            {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}},
            4096,
        ),
    ],
)
def test_stretched_positions_are_longer_contexts(rope, length) -> None:
    text = type("Text", (), {"max_position_embeddings": 4096, "rope_parameters": rope})
    assert context_of(text) == length
    assert context_of(object()) == 0
