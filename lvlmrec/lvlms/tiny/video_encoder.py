"""A tiny VideoMAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny
from lvlmrec.lvlms.tiny.image_encoder import SIZES


def make() -> tuple[Any, Any]:
    """3 layers x 48; 8 frames of 56 px in pairs, 4 x 4 patches each."""
    from transformers import VideoMAEConfig, VideoMAEVideoProcessor

    side = {"height": 56, "width": 56}
    model_config = VideoMAEConfig(**SIZES, image_size=56, patch_size=14, num_frames=8, tubelet_size=2)
    return model_config, VideoMAEVideoProcessor(size={"shortest_edge": 56}, crop_size=side)


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed, "AutoModel")
