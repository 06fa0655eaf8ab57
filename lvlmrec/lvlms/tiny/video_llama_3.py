"""A tiny VideoLLaMA 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny


def make() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 48; patches of 14 px, four frames of at most 112 x 112 px."""
    from transformers import (
        Qwen2Config,
        VideoLlama3Config,
        VideoLlama3ImageProcessor,
        VideoLlama3Processor,
        VideoLlama3VideoProcessor,
    )

    words = tiny.tokenizer({"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    sizes: dict[str, Any] = {"num_attention_heads": 4}
    text = sizes | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    vision = sizes | {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96, "patch_size": 14}
    model_config = VideoLlama3Config(
        text_config=Qwen2Config(**tiny.chat_sizes(words), **text).to_dict(),
        vision_config=vision,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 4 * 112 * 112}
    processor = VideoLlama3Processor(
        image_processor=VideoLlama3ImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}),
        tokenizer=words,
        video_processor=VideoLlama3VideoProcessor(size=size),
        chat_template=tiny.chat_template("<|video_pad|>", "<|image_pad|>"),
    )
    return model_config, processor


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
