"""Frozen large video-language models, and encoders of text, images and videos, behind one protocol.

One file per family, one line in `LVLMS`:

    info = LVLMS[config.name].inspect(config)              # from files alone
    model = LVLMS[config.name].load(config, recipe)
    features = model.extract(model.prepare(items))         # feature name -> float32 [B, D]

Importing this room imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

from lvlmrec.config import option
from lvlmrec.lvlms.encoders import frames, text_encoder, vision_encoder
from lvlmrec.lvlms.families import (
    auto,
    gemma3,
    gemma4,
    internvl,
    llava_next_video,
    llava_onevision,
    minicpmv4_6,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
    video_llama_3,
)
from lvlmrec.lvlms.ports import minicpm_v, phi_3_5_vision, video_lavit
from lvlmrec.lvlms.protocol import LVLM, LVLMFamily, ModelConfig

__all__ = ["LVLM", "LVLMS", "LVLMConfig", "LVLMFamily"]

LVLMS: dict[str, LVLMFamily] = {
    "gemma3": gemma3.FAMILY,
    "gemma4": gemma4.FAMILY,
    "internvl": internvl.FAMILY,
    "llava_next_video": llava_next_video.FAMILY,
    "llava_onevision": llava_onevision.FAMILY,
    "minicpm_v_2_6": minicpm_v.V2_6,
    "minicpm_v_4_5": minicpm_v.V4_5,
    "minicpmv4_6": minicpmv4_6.FAMILY,
    "phi_3_5_vision": phi_3_5_vision.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen2_vl": qwen2_vl.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "smolvlm": smolvlm.FAMILY,
    "video_lavit": video_lavit.FAMILY,
    "video_llama_3": video_llama_3.FAMILY,
    "frames": frames.FAMILY,
    "image_encoder": vision_encoder.IMAGE_FAMILY,
    "text_encoder": text_encoder.FAMILY,
    "video_encoder": vision_encoder.VIDEO_FAMILY,
}
LVLMS["auto"] = auto.AutoFamily({name: family for name, family in LVLMS.items() if name != "frames"})  # needs none


@dataclass(frozen=True)
class LVLMConfig(ModelConfig):
    """The model that looks at the videos, as a user names it."""

    name: str = option("llava_onevision", "model family", choices=LVLMS)
