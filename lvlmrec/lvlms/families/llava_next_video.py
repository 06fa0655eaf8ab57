"""LLaVA-NeXT-Video (https://llava-vl.github.io/blog/2024-04-30-llava-next-video/): CLIP tower, Llama decoder.

Each frame's patch grid is halved per side; frames are cropped to squares. A cover is cut into tiles (anyres).
"""

from __future__ import annotations

from lvlmrec.lvlms.families.family import NativeFamily, patches_behind_class_token

FAMILY = NativeFamily(
    name="llava_next_video",
    vision_layers="vision_tower.encoder.layers",
    patches=patches_behind_class_token,
)
