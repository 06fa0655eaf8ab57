"""A small recipe, and feature sets of random vectors that depend on item and column alone."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from lvlmrec.features import store
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe import Recipe
from lvlmrec.features.recipe_config import LVLMInfo, RecipeConfig, resolve

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
    for number, column in enumerate(recipe.columns):
        rows = []
        for item in items:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{number} {item}".encode()))
            rows.append(torch.randn(math.prod(column.shape), generator=generator))
        features[str(column.name)] = torch.stack(rows)
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


FRAMES_INFO = LVLMInfo(
    "frames",
    "resized",
    "uint8",
    {"vision": 0},
    {"vision": 3},
    poolings=("pixels",),
    video_options={"side": 8},
    dtypes=("uint8",),
)


def write_frames(folder: Path, items: Sequence[str]) -> str:
    """A feature set of 2 frames of 8 x 8 for each item; colours turn a ring as the items do."""
    prompts = {"frames": Prompt("", input="video")}
    recipe = resolve(
        RecipeConfig(2, taps=["vision.0"], prompts=prompts, poolings=["pixels"], dtype="uint8"), FRAMES_INFO
    )
    generator = torch.Generator().manual_seed(0)
    angle = torch.arange(len(items)) * 2 * math.pi / len(items)
    colours = 128 + 100 * torch.stack([angle.cos(), angle.sin(), (3 * angle).cos()], dim=1)
    pixels = colours[:, None, :, None, None] + torch.randint(-9, 10, (len(items), 2, 3, 8, 8), generator=generator)
    uri = store.locate(str(folder), "frames", recipe)
    store.create(uri, recipe)
    columns = {str(recipe.feature_names[0]): pixels.flatten(1).to(torch.uint8)}
    store.write_part(uri, recipe, store.feature_table(recipe, list(items), [2] * len(items), columns))
    store.commit(uri)
    return uri
