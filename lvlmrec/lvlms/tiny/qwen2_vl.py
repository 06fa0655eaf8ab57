"""A tiny Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny

TEXT = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 32; patches of 14 px, at most 112 x 112 px per frame."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    words = tokenizer()
    model_config = Qwen2VLConfig(
        text_config=text_sizes(words) | {"rope_parameters": rope([2, 3, 3])},
        vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        **token_ids(words),
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=chat_template(),
    )
    return model_config, processor


def tokenizer() -> Any:
    """A tokenizer with Qwen-VL's media tokens."""
    return tiny.tokenizer(
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        }
    )


def chat_template() -> str:
    """Order kept, each video between its two marks."""
    return tiny.chat_template(*(f"<|vision_start|>{pad}<|vision_end|>" for pad in ("<|video_pad|>", "<|image_pad|>")))


def text_sizes(words: Any) -> dict[str, Any]:
    """A text configuration of 4 layers x 64, four heads of 16."""
    return tiny.chat_sizes(words) | TEXT


def rope(mrope_section: list[int]) -> dict[str, Any]:
    """Multimodal RoPE; the sections (time, height, width) sum to half a head."""
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": mrope_section}


def token_ids(words: Any) -> dict[str, Any]:
    """Ids of the media tokens, as the model's configuration names them."""
    return {
        "image_token_id": words.image_token_id,
        "video_token_id": words.video_token_id,
        "vision_start_token_id": words.vision_bos_token_id,
        "vision_end_token_id": words.vision_eos_token_id,
    }


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
