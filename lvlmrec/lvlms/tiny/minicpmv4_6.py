"""A tiny MiniCPM-V 4.6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny


def make() -> tuple[Any, Any]:
    """4 layers x 96, every other one linear, over 3 vision layers x 48; about 4 tokens per frame."""
    from transformers import (
        MiniCPMV4_6Config,
        MiniCPMV4_6ImageProcessor,
        MiniCPMV4_6Processor,
        MiniCPMV4_6VideoProcessor,
    )

    ends = {
        f"{name}_{end}_token": f"<{slash}{name}>"
        for name in ("image", "slice", "image_id")
        for end, slash in (("start", ""), ("end", "/"))
    }
    words = tiny.tokenizer({"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", **ends})
    side, patch = 112, 14
    vision = {"num_attention_heads": 4, "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96}
    model_config = MiniCPMV4_6Config(
        text_config=text_sizes(words),
        vision_config=vision | {"image_size": side, "patch_size": patch},
        insert_layer_id=1,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
    )
    processor = MiniCPMV4_6Processor(
        image_processor=MiniCPMV4_6ImageProcessor(scale_resolution=side // 2, patch_size=patch),
        video_processor=MiniCPMV4_6VideoProcessor(scale_resolution=side, patch_size=patch),
        tokenizer=words,
        chat_template=tiny.chat_template("<|video_pad|>", "<|image_pad|>"),
    )
    return model_config, processor


def text_sizes(words: Any) -> dict[str, Any]:
    """A text configuration of 4 layers x 96, four heads of 16."""
    from transformers import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        **tiny.chat_sizes(words),
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_hidden_layers=4,
        hidden_size=96,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    )
    return dict(config.to_dict())


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
