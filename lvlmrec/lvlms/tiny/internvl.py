"""A tiny InternVL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny


def make() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 48; 56 px frames of 4 x 4 patches, 4 tokens per frame."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    words = tiny.tokenizer(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    side, patch = 56, 14
    size = {"height": side, "width": side}
    tokens_per_frame = (side // patch) ** 2 // 4
    sizes: dict[str, Any] = {"num_attention_heads": 4}
    text = sizes | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128}
    vision = sizes | {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96}
    model_config = InternVLConfig(
        text_config=Qwen2Config(**tiny.chat_sizes(words), **text, num_key_value_heads=2).to_dict(),
        vision_config=InternVLVisionConfig(**vision, image_size=side, patch_size=patch).to_dict(),
        image_token_id=words.context_image_token_id,
        image_seq_length=tokens_per_frame,
        tie_word_embeddings=False,
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size),
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=tokens_per_frame,
        chat_template=tiny.chat_template("<video>\n", "<IMG_CONTEXT>\n"),
    )
    return model_config, processor


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
