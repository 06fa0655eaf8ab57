"""A tiny Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny
from lvlmrec.lvlms.tiny import qwen2_vl


def make() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 32, the second of full attention; at most 112 x 112 px per frame."""
    text = qwen2_vl.TEXT | {"rope_parameters": qwen2_vl.rope([2, 3, 3])}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return sized(text, vision, largest=112 * 112)


def sized(text: dict[str, Any], vision: dict[str, Any], largest: int) -> tuple[Any, Any]:
    """Configuration and processor of a model of any size, over frames of at most `largest` pixels.

    `text` and `vision` are sizes of transformers' Qwen2_5_VLTextConfig and Qwen2_5_VLVisionConfig.
    """
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    words = qwen2_vl.tokenizer()
    model_config = Qwen2_5_VLConfig(
        text_config=tiny.chat_sizes(words) | text, vision_config=vision, **qwen2_vl.token_ids(words)
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": largest}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=qwen2_vl.chat_template(),
    )
    return model_config, processor


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
