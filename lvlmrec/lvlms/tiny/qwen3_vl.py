"""A tiny Qwen3-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny
from lvlmrec.lvlms.tiny import qwen2_vl


def make() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 32, two of them stacked into the decoder; patches of 16 px."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    words = qwen2_vl.tokenizer()
    rope = qwen2_vl.rope([4, 2, 2]) | {"mrope_interleaved": True}
    text = {key: value for key, value in qwen2_vl.text_sizes(words).items() if key != "bos_token_id"}
    model_config = Qwen3VLConfig(
        text_config=text | {"head_dim": 16, "rope_parameters": rope},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2],
        },
        **qwen2_vl.token_ids(words),
    )
    size = {"shortest_edge": 64 * 64, "longest_edge": 8 * 128 * 128}  # of the whole video, not of a frame
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer=words,
        video_processor=Qwen3VLVideoProcessor(size=size),
        chat_template=qwen2_vl.chat_template(),
    )
    return model_config, processor


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
