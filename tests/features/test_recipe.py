import dataclasses
import re
from typing import Any

import pytest

from lvlmrec.config import load
from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import recipe_keys
from lvlmrec.features.model_recipe import ModelRecipe, Prompt
from lvlmrec.features.recipe import Recipe
from lvlmrec.features.recipe import make as make_recipe
from lvlmrec.features.recipe_config import LVLMInfo, RecipeConfig, resolve
from lvlmrec.features.sources import ArrayRecipe
from lvlmrec.taps import Tap

INFO = LVLMInfo("llava_onevision", "content:1", "float32", {"llm": 4, "vision": 2}, {"llm": 8, "vision": 6})


def make(*overrides: str, info: LVLMInfo = INFO) -> Recipe:
    return resolve(load(RecipeConfig, [], list(overrides)), info)


def in_format_3(recipe: Recipe) -> dict[str, Any]:
    """recipe.json as it was before sources were told apart, without the fingerprint."""
    model = recipe.source if isinstance(recipe.source, ModelRecipe) else recipe.source.in_format_3()
    return recipe_keys.of_model(model) | {"dtype": recipe.dtype, "format": 3}


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
    assert {str(column.name): column.shape for column in recipe.columns} == {
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
    assert "noise" not in recipe.to_json()["source"]


def test_recipes_that_draw_answers_are_other_ones_than_those_of_another_generator() -> None:
    recipe = make("prompts={p: {text: x, max_new_tokens: 5, temperature: 0.7}}")
    assert recipe.source.noise == 2
    before = {key: value for key, value in in_format_3(recipe).items() if key != "noise"}
    # what was stored stays readable, under its own name
    assert Recipe.from_json(before).fingerprint == "f654bc79344bc82d"
    assert recipe.fingerprint != "f654bc79344bc82d"
    assert Recipe.from_json(recipe.to_json()) == recipe


MODELS = {
    "llm": INFO,
    "text": LVLMInfo(
        "text_encoder", "content:2", "float32", {"text": 3}, {"text": 48}, inputs=("text",), poolings=("all_mean",)
    ),
    "image": LVLMInfo(
        "image_encoder",
        "content:3",
        "float32",
        {"vision": 3},
        {"vision": 48, "vision.0": 24},
        inputs=("video", "cover"),
        poolings=("visual_mean", "first_token"),
    ),
    "frames": LVLMInfo(
        "frames",
        "bilinear-antialiased:1",
        "uint8",
        {"vision": 0},
        {"vision": 3},
        inputs=("video",),
        poolings=("pixels",),
        video_options={"side": 224},
        dtypes=("uint8",),
    ),
    "motion": LVLMInfo(
        "video_lavit",
        "content:4",
        "float32",
        {"llm": 4},
        {"llm": 8},
        video_form="motion",
        video_encoder="libavcodec 62 mpeg4",
        is_random=True,
    ),
    "bos_written": LVLMInfo(
        "gemma3",
        "content:5",
        "bfloat16",
        {"llm": 4, "vision": 2},
        {"llm": 8, "vision": 6},
        bos_written=True,
        generation={"repetition_penalty": 1.1},
    ),
}


@pytest.mark.parametrize(
    ("model", "overrides", "fingerprint"),
    [
        ("llm", [], "b904d6f064389040"),
        (
            "llm",
            ["taps=[llm.0,vision.-1,projector,llm.-1.pre_norm]", "frames=4", "frame_max_side=320"],
            "8abc349f9309836e",
        ),
        (
            "llm",
            ["prompts={a: {text: x}, b: {text: 'y {title}', place: before}, c: {text: z, input: cover}}"],
            "5d953b40de8181e6",
        ),
        (
            "llm",
            [
                "prompts={a: {text: x, max_new_tokens: 8, stop: ['.']}}",
                "poolings=[visual_mean,new_mean,eos,last_token]",
            ],
            "5ef21980ba6de3f6",
        ),
        ("llm", ["prompts={a: {text: x, max_new_tokens: 8, temperature: 0.7, top_p: 0.9}}"], "e0a5ddb213771fb7"),
        ("llm", ["poolings=[merged_16,visual_mean]", "dtype=float32"], "e77568a795986a13"),
        (
            "llm",
            ["prompts={a: {text: x, max_new_tokens: 4}}", "poolings=[new_merged_4]", "dtype=bfloat16"],
            "1941263f99219f0d",
        ),
        (
            "text",
            ["taps=[text.-1,text.0]", "prompts={title: {text: '{title}', input: text}}", "poolings=[all_mean]"],
            "cbec0e4426c53173",
        ),
        (
            "image",
            ["taps=[vision.-1]", "prompts={c: {text: '', input: cover}}", "poolings=[first_token,visual_mean]"],
            "fac3806444d174b1",
        ),
        ("image", ["taps=[vision.*]", "prompts={c: {text: '', input: video}}"], "4d5476958e80dbfb"),
        (
            "frames",
            [
                "taps=[vision.0]",
                "prompts={v: {text: ''}}",
                "poolings=[pixels]",
                "dtype=uint8",
                "video_options={side: 32}",
            ],
            "d9df679a5cba62bf",
        ),
        ("motion", [], "c5af1a982a9f848b"),
        ("bos_written", ["prompts={a: {text: x, max_new_tokens: 8}}"], "bcb9822ffb788b16"),
        ("bos_written", [], "c77d56c2914ad6f1"),
    ],
)
def test_every_kind_of_recipe_keeps_its_fingerprint(model: str, overrides: list[str], fingerprint: str) -> None:
    recipe = resolve(load(RecipeConfig, [], overrides), MODELS[model], seed=3, texts_from="0123456789abcdef")
    assert recipe.fingerprint == Recipe.from_json(recipe.to_json()).fingerprint == fingerprint
    assert Recipe.from_json(in_format_3(recipe)) == Recipe.from_json(recipe.to_json()) == recipe


def test_an_imported_set_keeps_its_fingerprint() -> None:
    layers = (Tap("llm", 0), Tap("llm", 1))
    recipe = make_recipe(ArrayRecipe("a.npy content:00 items:11", "float64", "imported", layers, 8), "float16")
    assert recipe.fingerprint == "2bde850507160375"
    assert Recipe.from_json(recipe.to_json()) == Recipe.from_json(in_format_3(recipe)) == recipe


@dataclasses.dataclass(frozen=True)
class GrownPrompt(Prompt):
    audio: bool = False
    speakers: list[str] = dataclasses.field(default_factory=list)
    rate: int = 16_000


@dataclasses.dataclass(frozen=True)
class GrownRecipe(ModelRecipe):
    sampling: str = "uniform"
    windows: int = 0


@pytest.mark.parametrize("change", [{"audio": True}, {"speakers": ["a"]}, {"rate": 8_000}])
def test_a_new_key_of_a_prompt_counts_where_it_is_not_at_its_default(change: dict[str, object]) -> None:
    recipe = make()

    def grown(**values: object) -> Recipe:
        prompts = {"describe": GrownPrompt(**values)}  # type: ignore[arg-type]
        return dataclasses.replace(recipe, source=dataclasses.replace(recipe.source, prompts=prompts))

    assert grown().fingerprint == recipe.fingerprint != grown(**change).fingerprint


@pytest.mark.parametrize("change", [{"sampling": "scenes"}, {"windows": 3}])
def test_a_new_key_of_a_recipe_counts_where_it_is_not_at_its_default(change: dict[str, object]) -> None:
    recipe = make()
    values = vars(recipe.source)

    def grown(**more: object) -> Recipe:
        return dataclasses.replace(recipe, source=GrownRecipe(**values, **more))

    assert grown().fingerprint == recipe.fingerprint != grown(**change).fingerprint


TREES = ["today", "format 3"]


def tree_of(recipe: Recipe, form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """recipe.json, and the part of it that says what a model was asked."""
    tree = recipe.to_json() if form == "today" else in_format_3(recipe)
    return tree, tree["source"] if form == "today" else tree


@pytest.mark.parametrize("form", TREES)
@pytest.mark.parametrize("value", [False, 0, "", {}, [], None])
def test_unknown_keys_that_are_empty_are_ignored(form: str, value: object) -> None:
    tree, source = tree_of(make(), form)
    source["prompts"]["describe"]["audio"] = source["audio_rate"] = tree["later"] = value
    assert Recipe.from_json(tree) == make()


@pytest.mark.parametrize("form", TREES)
@pytest.mark.parametrize("value", [True, 16_000, "scenes", {"a": 1}, ["a"]])
def test_unknown_keys_that_are_in_use_are_named_in_one_line(form: str, value: object) -> None:
    tree, source = tree_of(make(), form)
    source["prompts"]["describe"]["audio"] = source["sampling"] = value
    with pytest.raises(
        InputError, match=r"^[^\n]*newer version[^\n]*sampling=.*prompts\.describe\.audio=[^\n]*install"
    ):
        Recipe.from_json(tree)


def test_what_is_unknown_of_columns_and_of_other_sources_is_named() -> None:
    recipe = make_recipe(ArrayRecipe("a.npy", "float64", "imported", (Tap("llm", 0),), 8), "float16")
    tree = recipe.to_json()
    for change, named in (
        ({"windows": 3}, "windows=3"),
        ({"source": tree["source"] | {"codec": "x"}}, "source.codec='x'"),
        ({"source": {"kind": "compressor"}}, "source.kind='compressor'"),
    ):
        with pytest.raises(InputError, match=rf"newer version of lvlmrec: unknown {re.escape(named)}; install"):
            Recipe.from_json(tree | change)


def test_recipe_json_says_where_values_come_from_and_which_columns_there_are() -> None:
    tree = make("taps=[llm.1]", "poolings=[merged_4,visual_mean]").to_json()
    assert tree["source"]["kind"] == "model" and tree["source"]["family"] == "llava_onevision"
    assert tree["columns"] == [
        {"name": "describe/llm.1/merged_4", "shape": [4, 8], "dtype": "float16"},
        {"name": "describe/llm.1/merged_4.sizes", "shape": [4], "dtype": "float32"},
        {"name": "describe/llm.1/visual_mean", "shape": [8], "dtype": "float16"},
    ]


def test_a_recipe_that_was_read_has_the_fingerprint_it_was_stored_with_and_one_made_of_it_its_own() -> None:
    read = Recipe.from_json(make().to_json() | {"fingerprint": "00112233aabbccdd"})
    assert read == make() and read.fingerprint == "00112233aabbccdd"
    changed = dataclasses.replace(read, source=dataclasses.replace(read.source, frames=4))
    assert changed.fingerprint == make("frames=4").fingerprint
