"""InternVL 2.5 to 3.5 (https://arxiv.org/abs/2504.10479): frames enter as images, named "Frame1: ..." in the text."""

from __future__ import annotations

from lvlmrec.lvlms.families.family import NativeFamily, patches_behind_class_token

FAMILY = NativeFamily(
    name="internvl",
    vision_layers="vision_tower.encoder.layer",
    patches=patches_behind_class_token,
    modality="image",
)
