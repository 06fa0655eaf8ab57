"""An answer is made as the recipe says: what generation_config.json says of it is recorded, not applied."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lvlmrec.features import recipe_keys
from lvlmrec.features.model_recipe import ModelRecipe, Prompt
from lvlmrec.features.recipe_config import RecipeConfig, resolve_source
from lvlmrec.lvlms import LVLMS, LVLMConfig

ASK = Prompt("What is shown?", max_new_tokens=12)
SAMPLED = dataclasses.replace(ASK, temperature=0.7, top_p=0.9)


def answers(directory: Path, items: Any, prompt: Prompt, family: str = "qwen2_vl") -> tuple[list[str], ModelRecipe]:
    config = LVLMConfig(name=family, model=str(directory), device="cpu")
    recipe = resolve_source(RecipeConfig(taps=["llm.1"], prompts={"ask": prompt}), LVLMS[family].inspect(config))
    columns: Any = LVLMS[family].load(config, recipe)
    columns = columns.extract(columns.prepare(items))
    return columns["ask/text"] + columns["ask/finish"], recipe


def with_settings(directory: Path, target: Path, settings: dict[str, Any]) -> Path:
    copy = Path(shutil.copytree(directory, target))
    path = copy / "generation_config.json"
    given = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(given | settings))
    return copy


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 0.2},
        {"repetition_penalty": 8.0, "no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"begin_suppress_tokens": list(range(20, 200))},
        {"bad_words_ids": [[i] for i in range(20, 200)]},
        {"forced_eos_token_id": 5},
        {"stop_strings": ["e", "a", "o"]},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("prompt", [ASK, SAMPLED], ids=["likeliest", "sampled"])
def test_settings_of_the_checkpoint_change_no_answer(tiny_models, tmp_path, items, settings, prompt) -> None:
    expected, plain = answers(tiny_models["qwen2_vl"], items, prompt)
    found, recipe = answers(with_settings(tiny_models["qwen2_vl"], tmp_path / "m", settings), items, prompt)
    assert found == expected
    assert recipe.generation_left_out == recipe_keys.of_model(recipe)["generation_left_out"] == settings
    assert "generation_left_out" not in recipe_keys.of_model(plain)
    same = dataclasses.replace(recipe, identity=plain.identity, generation_left_out={})
    assert same == plain


def test_of_ports_too(tiny_models, tmp_path, items) -> None:
    expected, _ = answers(tiny_models["minicpm_v_4_5"], items, ASK, "minicpm_v_4_5")
    settings = {"repetition_penalty": 0.2, "num_beams": 2}
    found, recipe = answers(
        with_settings(tiny_models["minicpm_v_4_5"], tmp_path / "m", settings), items, ASK, "minicpm_v_4_5"
    )
    assert (found, recipe.generation_left_out) == (expected, settings)


def test_neutral_and_sampling_settings_and_recipes_without_answers_count_nothing(tiny_models, tmp_path, items) -> None:
    neutral = {"repetition_penalty": 1.0, "do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001}
    directory = with_settings(tiny_models["qwen2_vl"], tmp_path / "m", neutral)
    expected, _ = answers(tiny_models["qwen2_vl"], items, ASK)
    found, recipe = answers(directory, items, ASK)
    assert found == expected and recipe.generation_left_out == {}
    directory = with_settings(tiny_models["qwen2_vl"], tmp_path / "n", {"repetition_penalty": 1.05})
    info = LVLMS["qwen2_vl"].inspect(LVLMConfig(name="qwen2_vl", model=str(directory)))
    assert info.generation == {"repetition_penalty": 1.05}
    assert resolve_source(RecipeConfig(taps=["llm.0"]), info).generation_left_out == {}


def test_every_token_that_ends_an_answer_by_the_files_still_does(tiny_models, tmp_path, items) -> None:
    tokenizer = json.loads((tiny_models["qwen2_vl"] / "tokenizer.json").read_text())
    expected, _ = answers(tiny_models["qwen2_vl"], items, ASK)
    own = json.loads((tiny_models["qwen2_vl"] / "config.json").read_text())["text_config"]["eos_token_id"]
    ends = [own, *range(len(tokenizer["added_tokens"]), len(tokenizer["model"]["vocab"]) // 2)]
    found, _ = answers(with_settings(tiny_models["qwen2_vl"], tmp_path / "m", {"eos_token_id": ends}), items, ASK)
    assert found != expected and found[len(items) :] == ["eos"] * len(items)
