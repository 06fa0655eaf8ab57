"""LLaVA-OneVision (Li et al. 2024, https://arxiv.org/abs/2408.03326): SigLIP tower, Qwen2 decoder.

Each frame's patch grid is halved per side; one newline token closes a video.
"""

from __future__ import annotations

from lvlmrec.lvlms.families.family import NativeFamily

FAMILY = NativeFamily(name="llava_onevision", vision_layers="vision_tower.encoder.layers")
