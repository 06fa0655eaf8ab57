"""Qwen2.5-VL (https://arxiv.org/abs/2502.13923): window attention in the tower, time in seconds in the positions.

They take one number of seconds between frames for a whole video: of one of variable frame rate, the mean.
"""

from __future__ import annotations

from lvlmrec.lvlms.families import qwen2_vl
from lvlmrec.lvlms.families.family import NativeFamily, max_pixels_in_size, patches_of_packed_clips

FAMILY = NativeFamily(
    name="qwen2_5_vl",
    vision_layers="visual.blocks",
    patches=patches_of_packed_clips,
    video_options=qwen2_vl.VIDEO_OPTIONS,
    processor_options=max_pixels_in_size,
    state_attributes=qwen2_vl.STATE_ATTRIBUTES,
)
