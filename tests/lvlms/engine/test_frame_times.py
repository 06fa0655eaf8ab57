"""Prompts name the frames' times in the file, also where the frame rate varies."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlmrec import storage
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features import store
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.engine import inputs
from lvlmrec.lvlms.files import loading
from lvlmrec.lvlms.ports import minicpm_v_processor
from lvlmrec.media.sampling import Clip, sample_clip
from tests.videos import write_video

# family -> the times in the text that stands for a video, and its own way from four frames' seconds to such texts
WRITTEN: dict[str, tuple[str, Any]] = {
    "qwen3_vl": (r"<([\d.]+) seconds>", lambda t: [f"{(t[0] + t[1]) / 2:.1f}", f"{(t[2] + t[3]) / 2:.1f}"]),
    "gemma4": (r"(\d\d:\d\d) ", lambda t: [f"{int(s) // 60:02d}:{int(s) % 60:02d}" for s in t]),
    "smolvlm": (r"Frame from (\d\d:\d\d):", lambda t: [f"{int(s) // 60:02d}:{int(s) % 60:02d}" for s in t]),
    "video_llama_3": (r"Time ([\d.]+)s:", lambda t: [f"{s:.1f}" for s in t]),
}
SECONDS = {
    "a burst, then little": [0.0, 0.4, 0.8, 96.0],
    "whole seconds": [0.0, 14.0, 15.0, 29.0],  # 14 / 3.3 * 3.3 is less than 14
    "a long last frame": [0.0, 1.2, 2.4, 3.6],
}


def processor_of(directory: Path) -> Any:
    return loading.load_processor(
        dataclasses.replace(LVLMConfig(), name=directory.name, model=str(directory), device="cpu")
    )


def texts(processor: Any, clip: Clip, family: str) -> str:
    return inputs.process(LVLMS[family], processor, "video", [clip], {}).texts[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("family", WRITTEN)
def test_the_times_are_those_of_the_file(family: str, name: str, tiny_models, make_clip) -> None:
    pattern, expected = WRITTEN[family]
    seconds = np.array(SECONDS[name])
    clip = dataclasses.replace(make_clip(112, 112), timestamps=seconds, duration=100.0)
    assert re.findall(pattern, texts(processor_of(tiny_models[family]), clip, family)) == expected(seconds)


@pytest.mark.parametrize("family", WRITTEN)
def test_a_file_of_variable_frame_rate(family: str, tmp_path: Path, tiny_models) -> None:
    pts = [
        *range(0, 1000, 20),
        *range(1000, 20_000, 500),
    ]  # units of 1/600 s: a burst at 30 per second, then one a second
    path = write_video(tmp_path / "v.mp4", size=(112, 112), num_frames=len(pts), pts=pts)
    clip = sample_clip(path, 4, 112)
    pattern, expected = WRITTEN[family]
    shown = [pts[index] / 600 for index in (np.arange(4) * len(pts) // 4).tolist()]
    assert re.findall(pattern, texts(processor_of(tiny_models[family]), clip, family)) == expected(shown)


def test_ticks_and_intervals(tiny_models, make_clip) -> None:
    """MiniCPM-V 4.5 is told tenths of a second; Qwen2.5-VL one interval for a whole video, the mean."""
    seconds = np.array(SECONDS["a burst, then little"])
    clip = dataclasses.replace(make_clip(112, 112), timestamps=seconds, duration=100.0)
    assert minicpm_v_processor.frame_ticks(inputs._metadata(clip, 4)) == [0, 4, 8, 960]
    for family, expected in (("qwen2_5_vl", 2 * 100 / 4), ("qwen2_vl", None)):
        seen = inputs.process(LVLMS[family], processor_of(tiny_models[family]), "video", [clip], {}).inputs  # type: ignore[arg-type]
        assert (seen["second_per_grid_ts"] if expected else None) == (pytest.approx([expected]) if expected else None)


@pytest.mark.parametrize("fps", [0.5, 8.0, 15.0, 24000 / 1001, 25.0, 30.0, 60.0, 240.0])
@pytest.mark.parametrize("rounding", [1 / 90_000, 1 / 600, 0.001])
@pytest.mark.parametrize("last", [1.0, 0.1, 1.9])
def test_a_constant_rate_stays_what_transformers_reads(fps: float, rounding: float, last: float, make_clip) -> None:
    """As before, bit for bit, however the container rounds and whatever it says of the last frame's duration."""
    indices = np.arange(4) * 199 // 4
    timestamps = np.round(indices / fps / rounding) * rounding
    duration = float(np.round((198 + (last if fps > 10 else 1.0)) / fps / rounding) * rounding)
    clip = Clip(make_clip(20, 20).frames, timestamps, indices, 199, duration)
    metadata = inputs._metadata(clip, 6)
    assert (metadata["total_num_frames"], metadata["fps"], metadata["duration"]) == (199, 199 / duration, duration)
    assert metadata["frames_indices"] == [*indices.tolist(), indices[-1], indices[-1]]


@pytest.mark.parametrize(("input_", "says"), [("video", "2"), ("text", None)])
def test_the_recipe_says_which_times_its_prompts_name(tmp_path: Path, input_: str, says: str | None) -> None:
    info = recipes.LVLMInfo("stand_in", "x", "float32", {"llm": 2}, {"llm": 3})
    prompt = Prompt("What is it?", input=input_)
    recipe = recipes.resolve(RecipeConfig(taps=["llm.1"], prompts={"p": prompt}, poolings=["last_token"]), info)
    store.create(str(tmp_path), recipe)
    assert json.loads(storage.read_bytes(f"{tmp_path}/recipe.json"))["versions"].get("frame_times") == says
    assert store.read_recipe(str(tmp_path)) == recipe
