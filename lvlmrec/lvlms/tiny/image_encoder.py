"""A tiny CLIP vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny

SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
}


def make() -> tuple[Any, Any]:
    """3 layers x 48; 56 px images of 4 x 4 patches and a class token."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig

    side = {"height": 56, "width": 56}
    model_config = CLIPVisionConfig(**SIZES, image_size=56, patch_size=14)
    return model_config, CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=side)


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed, "AutoModel")
