"""Tiny models: ordinary directories, the same bytes for a seed, and features that tell videos apart."""

from __future__ import annotations

import colorsys
import dataclasses
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from lvlmrec.errors import ConfigError
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.families.family import NativeFamily
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.sampling import Clip
from tests.lvlms.conftest import WITHOUT_TINY
from tests.lvlms.test_contract import messages, read, videos

NUM_COLOURS = 4
NUM_FRAMES = 4


# Files and shapes of weights, as transformers 5.24.0 writes them: results on the embedded sample, and its fingerprints,
# are of these models. Weights drawn from the seed can differ in their last bits from one kind of CPU to the next.
TRANSFORMERS = "5.24.0"
DIGESTS = {
    "auto": "1be257904284a1a8",
    "gemma3": "f5adfa78a398cf8b",
    "gemma4": "a168f5c26548f4bb",
    "image_encoder": "2e144bd928d1f4d5",
    "internvl": "af5ecff24ffc8f82",
    "llava_next_video": "3cf11f2914889f1e",
    "llava_onevision": "1be257904284a1a8",
    "minicpm_v_2_6": "073543dc66254012",
    "minicpm_v_4_5": "be42c6768af7b7a4",
    "minicpmv4_6": "3a8bb691ead06228",
    "phi_3_5_vision": "b3857119f2cce372",
    "qwen2_5_vl": "41664d2d04491e5e",
    "qwen2_vl": "974f7e466556561f",
    "qwen3_vl": "31abf52c6ad78d39",
    "smolvlm": "003c78d22596cf00",
    "text_encoder": "9d69a5f536787838",
    "video_encoder": "5d3448a02c40eb09",
    "video_llama_3": "218726594345d202",
}


def digest(directory: Path) -> str:
    """16 hex digits over all files of a model; of its weights their names and shapes alone."""
    found = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
            content = json.dumps(shapes).encode()
        found.update(path.name.encode() + b"\0" + content)
    return found.hexdigest()[:16]


def read_all(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("family", sorted({*LVLMS} - {*WITHOUT_TINY}))
def test_a_seed_gives_the_same_bytes(tiny_models, tmp_path, family) -> None:
    random_state, start = torch.random.get_rng_state(), time.process_time()
    LVLMS[family].write_tiny(tmp_path / "same", seed=0)
    assert time.process_time() - start < 2
    assert torch.equal(torch.random.get_rng_state(), random_state)
    LVLMS[family].write_tiny(tmp_path / "other", seed=1)
    same, other = read_all(tmp_path / "same"), read_all(tmp_path / "other")
    assert same == read_all(tiny_models[family])
    assert [name for name in same if same[name] != other[name]] == ["model.safetensors"]


@pytest.mark.skipif(transformers.__version__ != TRANSFORMERS, reason=f"digests are of transformers {TRANSFORMERS}")
@pytest.mark.parametrize("family", sorted({*LVLMS} - {*WITHOUT_TINY}))
def test_the_files_are_those_of_earlier_releases(tiny_models, family) -> None:
    assert digest(tiny_models[family]) == DIGESTS[family]


@pytest.mark.parametrize("family", WITHOUT_TINY)
def test_an_entry_without_a_tiny_model_says_so(tmp_path, family) -> None:
    with pytest.raises(ConfigError, match=r"no tiny model|reads no model"):
        LVLMS[family].write_tiny(tmp_path / family, seed=0)


@pytest.mark.parametrize("family", sorted(name for name in LVLMS if isinstance(LVLMS[name], NativeFamily)))
def test_auto_classes_load_and_generate(tiny_models, clips, family) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_models[family])
    model, report = AutoModelForImageTextToText.from_pretrained(tiny_models[family], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    content = messages(processor, Prompt("Describe this video."), len(clips[0].frames))
    inputs = read(processor, content, videos(processor, clips[:1]))
    length = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, length + 3)


def coloured_clip(colour: int, rng: np.random.Generator) -> Clip:
    """A disc of one of `NUM_COLOURS` hues, drifting over a background of any colour, with noise."""
    height, width = 90, 120
    hue = (colour + rng.uniform(-0.2, 0.2)) / NUM_COLOURS
    disc = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.7, 1), rng.uniform(0.7, 1)))
    y, x = np.mgrid[:height, :width]
    (top, left), drift = rng.uniform(30, 60, 2), rng.uniform(-5, 5, 2)
    frames = []
    for frame in range(NUM_FRAMES):
        inside = (y - top - drift[0] * frame) ** 2 + (x - left - drift[1] * frame) ** 2 < 25**2
        frames.append(
            np.where(inside[..., None], disc, rng.uniform(40, 120, 3)) + rng.normal(0, 10, (height, width, 3))
        )
    indices = np.arange(NUM_FRAMES, dtype=np.int64) * 20
    return Clip(np.stack(frames).clip(0, 255).astype(np.uint8), indices / 25, indices, 80, 3.2)


def probe_accuracy(features_BD: np.ndarray, colours_B: np.ndarray) -> float:
    """Accuracy of a ridge classifier on the second half of the clips, fitted on the first."""
    features_BD = np.c_[features_BD - features_BD.mean(axis=0), np.ones(len(features_BD))]
    half = len(features_BD) // 2
    train, targets = features_BD[:half], np.eye(NUM_COLOURS)[colours_B[:half]]
    scale = np.trace(train.T @ train) / train.shape[1]
    weights = np.linalg.solve(train.T @ train + 1e-2 * scale * np.eye(train.shape[1]), train.T @ targets)
    return float(((features_BD[half:] @ weights).argmax(axis=1) == colours_B[half:]).mean())


@pytest.mark.thorough
def test_colour_can_be_read_from_every_tap_of_the_sample_model(tiny_models) -> None:
    """Chance is 1/4. `llm.0` at the last position is the text's own embedding: no video can be in it."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, NUM_COLOURS, 120)
    config = dataclasses.replace(LVLMConfig(), model=str(tiny_models["llava_onevision"]), device="cpu", batch_size=8)
    entry = LVLMS["llava_onevision"]
    wanted = RecipeConfig(taps=["llm.*", "vision.*"], poolings=["visual_mean", "last_token"])
    model = entry.load(config, recipes.resolve_source(wanted, entry.inspect(config)))
    features = model.extract(model.prepare([Item(str(row), coloured_clip(c, rng)) for row, c in enumerate(colours)]))
    blind = features.pop("describe/llm.0/last_token")
    assert torch.equal(blind, blind[:1].expand_as(blind))
    accuracies = {name: probe_accuracy(feature.double().numpy(), colours) for name, feature in features.items()}
    assert min(accuracies.values()) > 0.6, accuracies
