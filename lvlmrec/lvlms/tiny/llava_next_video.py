"""A tiny LLaVA-NeXT-Video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny


def make() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 48; 56 px frames of 4 x 4 patches, 4 tokens per frame."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextImageProcessor,
        LlavaNextVideoConfig,
        LlavaNextVideoProcessor,
        LlavaNextVideoVideoProcessor,
    )

    words = tiny.tokenizer({"image_token": "<image>", "video_token": "<video>"})
    side, patch = 56, 14
    pinpoints = [[side, 2 * side], [2 * side, side]]
    sizes: dict[str, Any] = {"num_attention_heads": 4}
    text = sizes | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128}
    vision = sizes | {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96}
    model_config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**tiny.chat_sizes(words), **text, num_key_value_heads=2),
        vision_config=CLIPVisionConfig(**vision, image_size=side, patch_size=patch),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=pinpoints,
    )
    size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(**size, image_grid_pinpoints=pinpoints),
        tokenizer=words,
        video_processor=LlavaNextVideoVideoProcessor(**size),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.chat_template("<video>\n", "<image>\n"),
    )
    return model_config, processor


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
