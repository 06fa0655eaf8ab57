"""A tiny LLaVA-OneVision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny

# The published template: every image and video comes before every text, whatever their order in the message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}<video>{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make() -> tuple[Any, Any]:
    """6 layers x 128 over 3 vision layers x 96; 84 px frames of 6 x 6 patches, 9 tokens per frame."""
    text = {
        "num_hidden_layers": 6,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {"num_hidden_layers": 3, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
    return sized(text, vision, side=84)


def sized(text: dict[str, Any], vision: dict[str, Any], side: int) -> tuple[Any, Any]:
    """Configuration and processor of a model of any size, over frames of `side` px, a multiple of 14.

    `text` and `vision` are sizes of transformers' Qwen2Config and SiglipVisionConfig.
    """
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    words = tiny.tokenizer({"image_token": "<image>", "video_token": "<video>"})
    patch = 14
    size = {"height": side, "width": side}
    model_config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**tiny.chat_sizes(words) | text),
        vision_config=SiglipVisionConfig(**vision, image_size=side, patch_size=patch, vision_use_head=False),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=[[side, side]],
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[side, side]]),
        tokenizer=words,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    return model_config, processor


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
