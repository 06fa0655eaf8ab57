"""Qwen2-VL (https://arxiv.org/abs/2409.12191): frames of any size, pairs of frames merged, multimodal RoPE."""

from __future__ import annotations

from lvlmrec.lvlms.families.family import NativeFamily, max_pixels_in_size, patches_of_packed_clips

# The cap is the reference implementation's (qwen-vl-utils); transformers 5.23 warns that it will become the default.
# So are 602,112 pixels a frame, but published processors name the 12,845,056 of images; 0 leaves it to the files.
VIDEO_OPTIONS = {"cap_pixels_per_frame": True, "max_pixels": 0}
STATE_ATTRIBUTES = ("rope_deltas",)  # how far the positions of a video's tokens fall behind their number


FAMILY = NativeFamily(
    name="qwen2_vl",
    vision_layers="visual.blocks",
    patches=patches_of_packed_clips,
    vision_width="embed_dim",
    video_options=VIDEO_OPTIONS,
    processor_options=max_pixels_in_size,
    state_attributes=STATE_ATTRIBUTES,
)
