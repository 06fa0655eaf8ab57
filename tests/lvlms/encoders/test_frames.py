"""Frames as they are stored: resized alone, exactly what the item shows, and readable back by training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features import store
from lvlmrec.features.compact import choose_columns, compact
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe import Recipe
from lvlmrec.features.recipe_config import LVLMInfo, RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.protocol import Item

CONFIG = dataclasses.replace(LVLMConfig(), name="frames", model="")
WANTED = RecipeConfig(
    frames=3,
    taps=["vision.*"],
    prompts={"frames": Prompt("", input="video")},
    poolings=["pixels"],
    dtype="uint8",
    video_options={"side": 16},
)
COLUMN = "video/vision.0/pixels"


def recipe_of(**changes: object) -> Recipe:
    return recipes.resolve(dataclasses.replace(WANTED, **changes), LVLMS["frames"].inspect(CONFIG))


def stored(items: list[Item], recipe: Recipe) -> torch.Tensor:
    model = LVLMS["frames"].load(CONFIG, recipe.source)
    columns = model.extract(model.prepare(items))
    assert [*columns] == [COLUMN]
    pixels = columns[COLUMN]
    assert isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8
    return pixels.unflatten(1, recipe.columns[0].shape)


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (16, 16), (9, 30)])
def test_the_shorter_side_is_scaled_and_the_middle_cut_out(make_clip: Callable, size: tuple[int, int]) -> None:
    clip = make_clip(*size, num_frames=3)
    (pixels,) = stored([Item("a", clip)], recipe_of())
    assert pixels.shape == (3, 3, 16, 16)
    height, width = (round(length * 16 / min(size)) for length in size)
    top, left = (height - 16) // 2, (width - 16) // 2
    for frame, expected in zip(pixels, clip.frames, strict=True):
        image = Image.fromarray(expected).resize((width, height), Image.Resampling.BILINEAR)
        middle = np.asarray(image)[top : top + 16, left : left + 16]
        assert np.abs(frame.permute(1, 2, 0).numpy().astype(int) - middle).max() <= 1


def test_pixels_come_back_through_store_and_array(make_clip: Callable, tmp_path: Path) -> None:
    recipe, names = recipe_of(), ["a", "b", "c"]
    items = [Item(name, make_clip(30, 20 + 7 * k, num_frames=3, seed=k)) for k, name in enumerate(names)]
    pixels = stored(items, recipe)
    uri = store.locate(str(tmp_path / "store"), "frames", recipe)
    store.create(uri, recipe)
    store.write_part(uri, recipe, store.feature_table(recipe, names, [3] * 3, {COLUMN: pixels.flatten(1)}))
    store.commit(uri)
    feature_set = store.read(uri)
    assert feature_set.recipe == recipe
    array = compact([(feature_set, choose_columns(feature_set, [], "one"))], names[::-1], str(tmp_path / "cache"))
    assert (array.shape, array.tokens, array.item_shape) == ((4, 1, 3, 768), 3, (3, 3, 16, 16))
    (frames,) = array.stored()
    assert frames.dtype == torch.uint8
    assert torch.equal(frames[1:, 0], pixels.flatten(2).flip(0))
    assert frames[0].abs().sum() == 0
    assert Path(uri, "parts").is_dir() and sum(f.stat().st_size for f in Path(uri, "parts").iterdir()) < 3 * 2304 * 2


def test_what_is_no_pixel_is_not_stored_as_one(make_clip: Callable) -> None:
    recipe = recipe_of()
    with pytest.raises(store.CastError, match="no pixels"):
        store.feature_table(recipe, ["a"], [3], {COLUMN: torch.rand(1, 2304)})
    with pytest.raises(InputError, match="item 'a': 2 frames, not 3"):
        stored([Item("a", make_clip(30, 30, num_frames=2))], recipe)


def test_what_says_nothing_of_frames_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lvlm.model: 'x': frames reads no model"):
        LVLMS["frames"].inspect(dataclasses.replace(CONFIG, model="x"))
    with pytest.raises(ConfigError, match=r"recipe.dtype: 'float16': frames is stored as uint8"):
        recipe_of(dtype="float16")
    with pytest.raises(ConfigError, match=r"recipe.poolings: \['visual_mean'\]: frames has pixels alone"):
        recipe_of(poolings=["visual_mean"])
    with pytest.raises(ConfigError, match=r"recipe.video_options.side: 0 is below 1"):
        recipe_of(video_options={"side": 0})
    with pytest.raises(ConfigError, match=r"recipe.dtype: 'uint8': any is stored as float16"):
        recipes.resolve(RecipeConfig(dtype="uint8"), LVLMInfo("any", "x", "float32", {"llm": 6}, {"llm": 8}))
    assert recipe_of().fingerprint != recipe_of(video_options={"side": 32}).fingerprint
