"""SmolVLM2 (https://arxiv.org/abs/2504.05299): frames enter as images, each behind its time in minutes and seconds.

SigLIP tower, Llama decoder. A cover is cut into tiles, frames are not.
"""

from __future__ import annotations

from lvlmrec.lvlms.families.family import NativeFamily

FAMILY = NativeFamily(
    name="smolvlm",
    vision_layers="vision_model.encoder.layers",
    modality="image",
)
