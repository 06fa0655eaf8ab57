"""A small recipe, and feature sets of random vectors that depend on item and column alone."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from lvlmrec.features import store
from lvlmrec.features.recipe import LVLMInfo, Prompt, Recipe, RecipeConfig, resolve

INFO = LVLMInfo("llava_onevision", "content:1", "float32", {"llm": 4, "vision": 2}, {"llm": 8, "vision": 6})

TEXT_INFO = LVLMInfo("text_encoder", "content:2", "float32", {"text": 2}, {"text": 5}, inputs=("text",))


def captions_recipe(dtype: str = "float32") -> Recipe:
    """Captions through a text encoder of two layers, as conf/lvlm/minilm_captions.yaml."""
    prompts = {"caption": Prompt(text="{caption}", input="text")}
    config = RecipeConfig(taps=["text.*"], prompts=prompts, poolings=["all_mean"], dtype=dtype)
    return resolve(config, TEXT_INFO)


def recipe_of(dtype: str = "float16", poolings: Sequence[str] = ("visual_mean",)) -> Recipe:
    taps = ["llm.0", "llm.2", "llm.-1", "vision.-1"]
    return resolve(RecipeConfig(taps=taps, poolings=list(poolings), dtype=dtype), INFO)


def vectors(recipe: Recipe, items: Sequence[str]) -> dict[str, torch.Tensor]:
    features = {}
    for column, name in enumerate(recipe.feature_names):
        rows = []
        for item in items:
            generator = torch.Generator().manual_seed(1000 * column + sum(map(ord, item)))
            rows.append(torch.randn(math.prod(recipe.shape(name)), generator=generator))
        features[str(name)] = torch.stack(rows)
    return features


def write_set(folder: Path, parts: Sequence[Sequence[str]], recipe: Recipe, commit: bool = True) -> str:
    """A feature set of `recipe` in the store `folder`, one part for each list of items."""
    uri = store.locate(str(folder), "tiny", recipe)
    store.create(uri, recipe)
    for items in parts:
        rows = store.feature_table(recipe, list(items), [8] * len(items), vectors(recipe, items))
        store.write_part(uri, recipe, rows)
    if commit:
        store.commit(uri)
    return uri


def write_values(folder: Path, items: Sequence[str], values: torch.Tensor) -> str:
    """A feature set whose columns describe/llm.0, .2 and .4 are `values` [N, 3, 8]; float32, one part."""
    recipe = recipe_of("float32")
    columns = vectors(recipe, items) | {f"describe/llm.{2 * k}/visual_mean": values[:, k] for k in range(3)}
    uri = store.locate(str(folder), "tiny", recipe)
    store.create(uri, recipe)
    store.write_part(uri, recipe, store.feature_table(recipe, list(items), [8] * len(items), columns))
    store.commit(uri)
    return uri
