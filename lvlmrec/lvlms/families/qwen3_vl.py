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
    state_attributes=qwen2_vl.STATE_ATTRIBUTES,
    position_arguments=("visual_pos_masks",),
    visual_arguments=("visual_pos_masks", "deepstack_visual_embeds"),
)
