"""Qwen2-VL (https://arxiv.org/abs/2409.12191): frames of any size, pairs of frames merged, multimodal RoPE."""

from __future__ import annotations

from typing import Any

from lvlmrec.lvlms.families.family import NativeFamily, max_pixels_in_size, patches_of_packed_clips

# The cap is the reference implementation's (qwen-vl-utils); transformers 5.23 warns that it will become the default.
# So are 602,112 pixels a frame, but published processors name the 12,845,056 of images; 0 leaves it to the files.
VIDEO_OPTIONS = {"cap_pixels_per_frame": True, "max_pixels": 0}
LEFT_BEHIND = ("rope_deltas",)  # how far the positions of a video's tokens fall behind their number

TINY_TEXT = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 32; patches of 14 px, at most 112 x 112 px per frame."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    words = tiny_tokenizer()
    model_config = Qwen2VLConfig(
        text_config=tiny_text(words) | {"rope_parameters": tiny_rope([2, 3, 3])},
        vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        **tiny_token_ids(words),
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=tiny_chat_template(),
    )
    return model_config, processor


def tiny_tokenizer() -> Any:
    """A tokenizer with Qwen-VL's media tokens."""
    from lvlmrec.lvlms.tiny import tokenizer

    return tokenizer(
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        }
    )


def tiny_chat_template() -> str:
    """Order kept, each video between its two marks."""
    from lvlmrec.lvlms.tiny import chat_template

    return chat_template(*(f"<|vision_start|>{pad}<|vision_end|>" for pad in ("<|video_pad|>", "<|image_pad|>")))


def tiny_text(words: Any) -> dict[str, Any]:
    """A text configuration of 4 layers x 64, four heads of 16."""
    from lvlmrec.lvlms.tiny import chat_sizes

    return chat_sizes(words) | TINY_TEXT


def tiny_rope(mrope_section: list[int]) -> dict[str, Any]:
    """Multimodal RoPE; the sections (time, height, width) sum to half a head."""
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": mrope_section}


def tiny_token_ids(words: Any) -> dict[str, Any]:
    """Ids of the media tokens, as the model's configuration names them."""
    return {
        "image_token_id": words.image_token_id,
        "video_token_id": words.video_token_id,
        "vision_start_token_id": words.vision_bos_token_id,
        "vision_end_token_id": words.vision_eos_token_id,
    }


FAMILY = NativeFamily(
    name="qwen2_vl",
    vision_layers="visual.blocks",
    patches=patches_of_packed_clips,
    tiny=tiny,
    vision_width="embed_dim",
    video_options=VIDEO_OPTIONS,
    processor_options=max_pixels_in_size,
    left_behind=LEFT_BEHIND,
)
