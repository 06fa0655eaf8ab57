"""The stages without Ray, for items that are not videos."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest

from lvlmrec import storage
from lvlmrec.columns import COVER_URI, ERROR, ITEM_ID
from lvlmrec.extraction import stages
from lvlmrec.extraction.extractor import Extractor
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features import store
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe import Recipe
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.sampling import sample_clip

PROMPTS = {
    "text_encoder": {"title": Prompt("{title}", input="text")},
    "image_encoder": {"image": Prompt("", input="cover")},
}


def resolve(name: str, directory: Path, taps: list[str], pooling: str) -> tuple[LVLMConfig, Recipe]:
    LVLMS[name].write_tiny(directory, seed=0)
    config = dataclasses.replace(LVLMConfig(), name=name, model=str(directory), device="cpu")
    wanted = RecipeConfig(taps=taps, prompts=PROMPTS[name], poolings=[pooling], dtype="float32")
    return config, recipes.resolve(wanted, LVLMS[name].inspect(config))


def test_titles_travel_as_one_table_and_an_empty_one_is_rejected(tmp_path: Path) -> None:
    lvlm, recipe = resolve("text_encoder", tmp_path / "model", ["text.*"], "all_mean")
    titles = ["A dog runs", "", "How to cook a quick meal at home", "music"]
    rows = pa.table({ITEM_ID: ["a", "b", "c", "d"], "title": titles})
    (decoded,) = stages.decode(rows, recipe.reading, stages.DecodeConfig())
    assert decoded.schema == stages.DECODED
    assert decoded[ERROR].to_pylist() == [None, "empty", None, None]
    extractor = Extractor(lvlm, recipe)
    store.create(str(tmp_path / "set"), recipe)
    stages.write(extractor(decoded), str(tmp_path / "set"), recipe, 1)
    assert store.commit(str(tmp_path / "set"))[ITEM_ID].to_pylist() == ["a", "c", "d"]
    assert store.read_rejected(str(tmp_path / "set"))[ITEM_ID].to_pylist() == ["b"]
    (part,) = storage.list_files(str(tmp_path / "set" / "parts"))
    stored = storage.read_table(part.uri).to_pylist()
    expected = extractor.lvlm.extract(extractor.lvlm.prepare([Item("c", texts={"title": titles[2]})]))
    for name, values in expected.items():
        np.testing.assert_allclose(stored[1][name], values[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_covers_are_decoded_and_encoded(tmp_path: Path, suffix: str) -> None:
    lvlm, recipe = resolve("image_encoder", tmp_path / "model", ["vision.-1"], "first_token")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    with av.open(str(tmp_path / f"cover.{suffix}"), "w", format="image2") as file:
        stream = file.add_stream("png" if suffix == "png" else "mjpeg")
        stream.width, stream.height = 64, 40
        stream.pix_fmt = "rgb24" if suffix == "png" else "yuvj420p"
        file.mux([*stream.encode(av.VideoFrame.from_ndarray(pixels)), *stream.encode()])
    rows = pa.table({ITEM_ID: ["a", "b"], COVER_URI: [str(tmp_path / f"cover.{suffix}"), ""]})
    decoded = pa.concat_tables(list(stages.decode(rows, recipe.reading, stages.DecodeConfig())))
    assert decoded[ERROR].to_pylist() == [None, "missing"]
    extractor = Extractor(lvlm, recipe)
    feature = extractor(decoded)["cover/vision.3/first_token"][0].as_py()
    clip = sample_clip(tmp_path / f"cover.{suffix}", 1, 1280)
    expected = extractor.lvlm.extract(extractor.lvlm.prepare([Item("a", cover=clip)]))
    np.testing.assert_allclose(feature, expected["cover/vision.3/first_token"][0], rtol=0, atol=1e-5)
