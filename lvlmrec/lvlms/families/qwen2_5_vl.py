"""Qwen2.5-VL (https://arxiv.org/abs/2502.13923): window attention in the tower, time in seconds in the positions.

They take one number of seconds between frames for a whole video: of one of variable frame rate, the mean.
"""

from __future__ import annotations

from typing import Any

from lvlmrec.lvlms.families import qwen2_vl
from lvlmrec.lvlms.families.family import NativeFamily, max_pixels_in_size, patches_of_packed_clips


def tiny() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 32, the second of full attention; at most 112 x 112 px per frame."""
    text = qwen2_vl.TINY_TEXT | {"rope_parameters": qwen2_vl.tiny_rope([2, 3, 3])}
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

    from lvlmrec.lvlms.tiny import chat_sizes

    words = qwen2_vl.tiny_tokenizer()
    model_config = Qwen2_5_VLConfig(
        text_config=chat_sizes(words) | text, vision_config=vision, **qwen2_vl.tiny_token_ids(words)
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": largest}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=qwen2_vl.tiny_chat_template(),
    )
    return model_config, processor


FAMILY = NativeFamily(
    name="qwen2_5_vl",
    vision_layers="visual.blocks",
    patches=patches_of_packed_clips,
    tiny=tiny,
    video_options=qwen2_vl.VIDEO_OPTIONS,
    processor_options=max_pixels_in_size,
    left_behind=qwen2_vl.LEFT_BEHIND,
)
