"""Gemma 4: frames of any shape, each behind its time in minutes and seconds.

The larger models let the tokens of a frame attend to each other both ways in sliding layers; the smaller ones read an
embedding of each token in every layer, and their upper layers share keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lvlmrec.lvlms.families.family import NativeFamily
from lvlmrec.lvlms.files import source

if TYPE_CHECKING:
    from torch import Tensor


def patches(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """Patch tokens of each clip, [P, D], from frames padded to one number of patches, [B * F, N, D]."""
    is_patch = (inputs["video_position_ids"] != -1).all(dim=-1)
    split = zip(hidden.chunk(num_clips), is_patch.chunk(num_clips), strict=True)
    return [clip_FND[mask_FN] for clip_FND, mask_FN in split]


FAMILY = NativeFamily(
    name="gemma4",
    vision_layers="vision_tower.encoder.layers",
    patches=patches,
    position_arguments=("per_layer_inputs",),
    depth_keys=source.DEPTH_KEYS,
)
