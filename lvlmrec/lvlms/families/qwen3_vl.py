"""Qwen3-VL (https://arxiv.org/abs/2511.21631): timestamps between frames, DeepStack from the tower into the decoder."""

from __future__ import annotations

from typing import Any

from lvlmrec.lvlms.families import qwen2_vl
from lvlmrec.lvlms.families.family import NativeFamily, patches_of_packed_clips


def tiny() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 32, two of them stacked into the decoder; patches of 16 px."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    words = qwen2_vl.tiny_tokenizer()
    rope = qwen2_vl.tiny_rope([4, 2, 2]) | {"mrope_interleaved": True}
    text = {key: value for key, value in qwen2_vl.tiny_text(words).items() if key != "bos_token_id"}
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
        **qwen2_vl.tiny_token_ids(words),
    )
    size = {"shortest_edge": 64 * 64, "longest_edge": 8 * 128 * 128}  # of the whole video, not of a frame
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer=words,
        video_processor=Qwen3VLVideoProcessor(size=size),
        chat_template=qwen2_vl.tiny_chat_template(),
    )
    return model_config, processor


FAMILY = NativeFamily(
    name="qwen3_vl",
    vision_layers="visual.blocks",
    patches=patches_of_packed_clips,
    tiny=tiny,
    video_options={"cap_pixels_per_frame": True},  # 768 tokens a frame, as qwen-vl-utils
    minimum_frames=2,  # the video processor refuses fewer than one temporal patch
    left_behind=qwen2_vl.LEFT_BEHIND,
    per_position=("visual_pos_masks",),
    visual_only=("visual_pos_masks", "deepstack_visual_embeds"),
)
