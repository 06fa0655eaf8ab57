import dataclasses

import pytest

from lvlmrec.config import load
from lvlmrec.errors import ConfigError
from lvlmrec.features.recipe import LVLMInfo, Recipe, RecipeConfig, resolve

INFO = LVLMInfo("llava_onevision", "content:1", "float32", {"llm": 4, "vision": 2}, {"llm": 8, "vision": 6})


def make(*overrides: str, info: LVLMInfo = INFO) -> Recipe:
    return resolve(load(RecipeConfig, [], list(overrides)), info)


def test_names_have_one_column_per_prompt_tap_and_pooling_and_vision_once() -> None:
    recipe = make(
        "taps=[vision.-1,llm.-1,llm.0]",
        "prompts={a: {text: x}, b: {text: y, place: before}}",
        "poolings=[visual_mean,last_token]",
    )
    assert [str(name) for name in recipe.feature_names] == [
        "video/vision.2/visual_mean",
        "a/llm.0/visual_mean",
        "a/llm.0/last_token",
        "a/llm.4/visual_mean",
        "a/llm.4/last_token",
        "b/llm.0/visual_mean",
        "b/llm.0/last_token",
        "b/llm.4/visual_mean",
        "b/llm.4/last_token",
    ]


def test_merged_tokens_are_two_columns_with_shapes_of_their_own() -> None:
    recipe = make("taps=[llm.1,projector]", "poolings=[merged_16,visual_mean]")
    assert {str(name): recipe.shape(name) for name in recipe.feature_names} == {
        "video/projector/visual_mean": (8,),
        "describe/llm.1/merged_16": (16, 8),
        "describe/llm.1/merged_16.sizes": (16,),
        "describe/llm.1/visual_mean": (8,),
    }
    assert [str(n) for n in recipe.vector_names] == ["video/projector/visual_mean", "describe/llm.1/visual_mean"]
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("pooling", ["merged_0", "merged_", "merged_x", "merged_16.sizes", "merged_-4"])
def test_what_is_no_number_of_tokens_is_refused(pooling: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.poolings: .*merged_K such as merged_16"):
        make(f"poolings=[{pooling}]")


def test_a_recipe_reads_back_from_json() -> None:
    recipe = make("prompts={a: {text: x, place: before}}")
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(ConfigError, match="recipe format 0"):
        Recipe.from_json(recipe.to_json() | {"format": 0})


@pytest.mark.parametrize(
    "overrides",
    [
        ["frames=4"],
        ["taps=[llm.1]"],
        ["prompts={describe: {text: other}}"],
        ["prompts={describe: {text: Describe this video., place: before}}"],
        ["poolings=[all_mean]"],
        ["dtype=float32"],
        ["frame_max_side=320"],
    ],
)
def test_whatever_changes_a_feature_changes_the_fingerprint(overrides: list[str]) -> None:
    assert make("taps=[llm.0]", *overrides).fingerprint != make("taps=[llm.0]").fingerprint


def test_the_fingerprint_names_the_model_by_content_and_ignores_how_taps_are_written() -> None:
    other = LVLMInfo("llava_onevision", "content:2", "float32", INFO.num_layers, INFO.width)
    assert make(info=other).fingerprint != make().fingerprint
    assert make("taps=[llm.-1,llm.0]").fingerprint == make("taps=[llm.0,llm.4]").fingerprint


def test_keys_that_came_later_count_where_they_have_an_effect_alone() -> None:
    assert make().fingerprint == "b904d6f064389040"  # as before there were such keys
    written = make(info=dataclasses.replace(INFO, bos_written=True))
    assert written.fingerprint != make().fingerprint and Recipe.from_json(written.to_json()) == written


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts={a/b: {text: x}}", "prompts.a/b"),
        ("prompts={video: {text: x}}", "prompts.video"),
        ("taps=[]", "at least one"),
        ("taps=[llm.9]", "out of range"),
        ("poolings=[median]", "poolings: 'median' is not one of visual_mean, all_mean, last_token, new_mean"),
        ("frames=0", "frames: 0 is below 1"),
    ],
)
def test_what_is_wrong_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(override)


@pytest.mark.parametrize(
    ("prompt", "fingerprint"),
    [
        ("{text: x}", "15b5cb80364657fe"),
        ("{text: x, max_new_tokens: 5}", "fc5454e5c74fe7ea"),
        ("{text: x, temperature: 0.7}", "fb41c13d4ec93e1c"),
    ],
)
def test_recipes_that_draw_no_answer_keep_their_fingerprints(prompt: str, fingerprint: str) -> None:
    recipe = make(f"prompts={{p: {prompt}}}")
    assert recipe.fingerprint == fingerprint
    assert "noise" not in recipe.to_json()


def test_recipes_that_draw_answers_are_other_ones_than_those_of_another_generator() -> None:
    recipe = make("prompts={p: {text: x, max_new_tokens: 5, temperature: 0.7}}")
    assert recipe.noise == 2
    before = {key: value for key, value in recipe.to_json().items() if key != "noise"}
    assert (
        Recipe.from_json(before).fingerprint == "f654bc79344bc82d"
    )  # what was stored stays readable, under its own name
    assert recipe.fingerprint != "f654bc79344bc82d"
    assert Recipe.from_json(recipe.to_json()) == recipe
