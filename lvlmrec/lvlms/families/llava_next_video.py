"""LLaVA-NeXT-Video (https://llava-vl.github.io/blog/2024-04-30-llava-next-video/): CLIP tower, Llama decoder.

Each frame's patch grid is halved per side; frames are cropped to squares. A cover is cut into tiles (anyres).
"""

from __future__ import annotations

from typing import Any

from lvlmrec.lvlms.families.family import NativeFamily, patches_behind_class_token


def tiny() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 48; 56 px frames of 4 x 4 patches, 4 tokens per frame."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextImageProcessor,
        LlavaNextVideoConfig,
        LlavaNextVideoProcessor,
        LlavaNextVideoVideoProcessor,
    )

    from lvlmrec.lvlms.tiny import chat_sizes, chat_template, tokenizer

    words = tokenizer({"image_token": "<image>", "video_token": "<video>"})
    side, patch = 56, 14
    pinpoints = [[side, 2 * side], [2 * side, side]]
    sizes: dict[str, Any] = {"num_attention_heads": 4}
    text = sizes | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128}
    vision = sizes | {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96}
    model_config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**chat_sizes(words), **text, num_key_value_heads=2),
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
        chat_template=chat_template("<video>\n", "<image>\n"),
    )
    return model_config, processor


FAMILY = NativeFamily(
    name="llava_next_video",
    vision_layers="vision_tower.encoder.layers",
    patches=patches_behind_class_token,
    tiny=tiny,
)
