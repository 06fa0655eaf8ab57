"""Gemma 3 (https://arxiv.org/abs/2503.19786): frames enter as images, whose tokens attend to each other both ways.

SigLIP tower; five of six layers of the decoder look back over a sliding window only. Its processor knows no videos: a
clip is its frames, one image after another, and no time is written.
"""

from __future__ import annotations

from lvlmrec.lvlms.families.family import NativeFamily

FAMILY = NativeFamily(
    name="gemma3",
    vision_layers="vision_tower.encoder.layers",
    modality="image",
    token_types_argument="token_type_ids",
)
