"""benchmarks/model_sizes.py: its formula against torch's own count, its models against published sizes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.sampling import Clip

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import model_sizes

pytestmark = pytest.mark.thorough

FRAMES, SIDE = 4, 112
# What 4 frames of 112 x 112 px are to each tiny tower; paths are those of the full size.
SEEN = {
    "llava_onevision": ("llava_onevision_7b", 4 * 36, 36),  # 84 px in patches of 14
    "llava_next_video": ("llava_next_video_7b", 4 * 17, 17),  # 56 px, and a class token
    "qwen2_vl": ("qwen2_vl_7b", 2 * 64, 64),  # 112 px, two frames a step
    "qwen2_5_vl": ("qwen2_5_vl_7b", 2 * 64, (16 + 64 + 16) / 3),  # windows of 56 px in two of three layers
    "qwen3_vl": ("qwen3_vl_8b", 2 * 64, 64),  # 128 px in patches of 16
    "internvl": ("internvl3_8b", 4 * 17, 17),
    "video_llama_3": ("video_llama_3_7b", 4 * 64, 64),
    "gemma3": ("gemma3_12b", 4 * 16, 16),
    "minicpm_v_2_6": ("minicpm_v_2_6", 4 * 64, 64),
    "minicpm_v_4_5": ("minicpm_v_4_5", 4 * 64, 64),
    "phi_3_5_vision": ("phi_3_5_vision", 4 * 2 * 17, 17),  # 28 px in patches of 7, a tile and the whole
}


@pytest.mark.parametrize("family", sorted(SEEN))
def test_operations_are_those_that_torch_counts(family: str, tmp_path: Path) -> None:
    LVLMS[family].write_tiny(tmp_path, seed=0)
    config = dataclasses.replace(LVLMConfig(), name=family, model=str(tmp_path), device="cpu", attention="eager")
    lvlm: Any = LVLMS[family].load(
        config, recipes.resolve_source(RecipeConfig(frames=FRAMES, taps=["llm.-1"]), LVLMS[family].inspect(config))
    )
    pixels = np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    indices = np.arange(FRAMES, dtype=np.int64) * 30
    prepared = lvlm.prepare([Item("a", Clip(pixels, indices / 30, indices, 120, 4.0))])
    with FlopCounterMode(display=False) as counter:
        lvlm.extract(prepared)

    model, (ids,) = lvlm._base, prepared[0].prompts["describe"]
    visual = getattr(model.config, f"{lvlm._modality('video')}_token_id")
    num_visual = ids.count(visual)
    layer, patches, span = SEEN[family]
    full = model_sizes.table()[layer]
    # what a part reads: patches, visual tokens, or both numbers in the same relation as at full size
    beside = {path: patches if count == full.patches else num_visual for path, count in full.beside.items()}
    seen = dataclasses.replace(
        full,
        patches=patches,
        span=span,
        tokens=num_visual,
        beside=beside,
        resampled=num_visual if full.resampled else 0,
    )
    formula = sum(model_sizes.operations(model, seen, prompt_tokens=len(ids) - num_visual).values())
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_models_have_the_published_sizes() -> None:
    """Parameters with the head; of MiniCPM-V 4.5 from the bytes that its published index names."""
    published = {"qwen3_vl_8b": 8_767_123_696, "minicpm_v_4_5": 17_391_790_560 // 2}
    for layer, expected in published.items():
        row = model_sizes.measure(model_sizes.table()[layer])
        assert row["parameters"] + row["head"] == expected


def test_a_batch_is_what_is_left_beside_the_weights() -> None:
    assert model_sizes.batch_sizes(15e9, 1e9) == {"24 GB": 6, "80 GB": 16, "141 GB": 16}
    assert model_sizes.batch_sizes(24e9, 4e9) == {"24 GB": 0, "80 GB": 12, "141 GB": 16}


def test_a_stack_is_its_weights_and_its_attention() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 8, bias=False) for _ in range(2)])
    assert model_sizes.stack_operations(layers, tokens=10, span=5, heads_width=4) == 2 * 64 * 10 + 4 * 2 * 10 * 5 * 4
