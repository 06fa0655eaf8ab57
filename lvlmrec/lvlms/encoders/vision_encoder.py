"""Frozen encoders of images and of videos, the item features of most work before LVLMs.

`image_encoder` (CLIP, SigLIP, DINOv2, ViT, ResNet) reads a cover, or each frame of a video by itself; `video_encoder`
(VideoMAE, TimeSformer, ViViT, V-JEPA 2) reads the frames of a video together. `vision.0` is what enters the first
layer, `vision.k` what leaves layer k, before any norm behind the last; of a ResNet the stem and its stages.
SlowFast is not among them: transformers has no such model, and its weights are in no package registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms import protocol
from lvlmrec.lvlms.files import source
from lvlmrec.lvlms.protocol import LVLM, ModelConfig

# model_type -> class tokens that stand before the patches
IMAGE_MODELS = {
    "clip": 1,
    "clip_vision_model": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "resnet": 0,
    "siglip": 0,
    "siglip_vision_model": 0,
    "vit": 1,
}
VIDEO_MODELS = {"timesformer": 1, "videomae": 0, "vivit": 1, "vjepa2": 0}


@dataclass(frozen=True)
class VisionFamily:
    """An entry of `LVLMS` for frozen vision encoders.

    model_types  `model_type` in transformers -> class tokens before the patches
    inputs       what its prompts can show
    """

    name: str
    model_types: Mapping[str, int]
    inputs: tuple[str, ...]

    @property
    def reads_images(self) -> bool:
        """Whether a frame is encoded by itself, as a cover is."""
        return "cover" in self.inputs

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        """What the model is, from its files, without loading its weights. Raises `ConfigError`."""
        model_config = self.read_config(config)
        widths = getattr(model_config, "hidden_sizes", None)
        if widths:
            stages = dict(enumerate([model_config.embedding_size, *widths]))
            width = {"vision": widths[-1]} | {f"vision.{layer}": size for layer, size in stages.items()}
        else:
            width = {"vision": model_config.hidden_size}
        return LVLMInfo(
            family=self.name,
            identity=source.identity(config),
            compute_dtype=config.dtype,
            num_layers={"vision": len(widths) if widths else model_config.num_hidden_layers},
            width=width,
            inputs=self.inputs,
            poolings=("visual_mean", "first_token") if self.model_types[model_config.model_type] else ("visual_mean",),
            frames=0 if self.reads_images else getattr(model_config, "num_frames", 0),
            frame_group=1 if self.reads_images else group_size(model_config),
        )

    def load(self, config: ModelConfig, recipe: ModelRecipe) -> LVLM:
        """The model, cut to the layers that `recipe` needs, with pooling in its forward. Raises `ConfigError`."""
        from lvlmrec.lvlms.encoders import vision_model

        model_config = self.read_config(config)
        class_tokens = self.model_types[model_config.model_type]
        # DINOv2's registers lie between the class token and the patches
        before_patches = class_tokens + getattr(model_config, "num_register_tokens", 0)
        return vision_model.load(config, recipe, self.inspect(config), model_config, before_patches)

    def read_config(self, config: ModelConfig) -> Any:
        """The configuration of the vision tower. Raises `ConfigError`."""
        model_config = source.read_model_config(config, self.name, self.model_types)
        return getattr(model_config, "vision_config", model_config)

    def check_length(self, config: ModelConfig, recipe: ModelRecipe, limit: int) -> None:
        """Nothing: no prompt is read."""

    def write_tiny(self, directory: Path, seed: int) -> None:
        """See `LVLMFamily.write_tiny`."""
        protocol.write_tiny(self.name, directory, seed)


def group_size(model_config: Any) -> int:
    """How many frames a video model turns into one step of time."""
    size = getattr(model_config, "tubelet_size", 1)
    return int(size if isinstance(size, int) else size[0])


IMAGE_FAMILY = VisionFamily("image_encoder", IMAGE_MODELS, ("video", "cover"))
VIDEO_FAMILY = VisionFamily("video_encoder", VIDEO_MODELS, ("video",))
