"""Qwen3-VL (https://arxiv.org/abs/2511.21631): timestamps between frames, DeepStack from the tower into the decoder."""

from __future__ import annotations

from lvlmrec.lvlms.families import qwen2_vl
from lvlmrec.lvlms.families.family import NativeFamily, patches_of_packed_clips

FAMILY = NativeFamily(
    name="qwen3_vl",
    vision_layers="visual.blocks",
    patches=patches_of_packed_clips,
    video_options={"cap_pixels_per_frame": True},  # 768 tokens a frame, as qwen-vl-utils
    minimum_frames=2,  # the video processor refuses fewer than one temporal patch
    left_behind=qwen2_vl.LEFT_BEHIND,
    per_position=("visual_pos_masks",),
    visual_only=("visual_pos_masks", "deepstack_visual_embeds"),
)
