"""A tiny SmolVLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny


def make() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 48; 56 px frames of 4 x 4 patches, 4 tokens per frame."""
    from transformers import (
        LlamaConfig,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    words = tiny.tokenizer(
        {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
            "video_token": "<video>",
        },
        [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)],
    )
    side, patch = 56, 14
    sizes: dict[str, Any] = {"num_attention_heads": 4}
    text = sizes | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128}
    vision = sizes | {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96}
    model_config = SmolVLMConfig(
        text_config=LlamaConfig(**tiny.chat_sizes(words), **text, num_key_value_heads=2).to_dict(),
        vision_config=vision | {"image_size": side, "patch_size": patch},
        image_token_id=words.image_token_id,
        scale_factor=2,
    )
    size: dict[str, Any] = {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**size),
        tokenizer=words,
        video_processor=SmolVLMVideoProcessor(**size),
        image_seq_len=(side // patch // 2) ** 2,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    return model_config, processor


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
