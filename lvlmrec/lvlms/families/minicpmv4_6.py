"""MiniCPM-V 4.6: SigLIP tower that merges its patches midway, Qwen3.5 decoder of linear and full attention.

Frames enter whole, in their own shape; a cover is cut into slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lvlmrec.lvlms.engine.layout import never
from lvlmrec.lvlms.families.family import NativeFamily

if TYPE_CHECKING:
    from torch import Tensor

VIDEO_OPTIONS = {"max_slice_nums": 1, "stack_frames": 1}  # one picture for each of the recipe's frames


def patches(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """Patch tokens of each clip, [P, D], from frames packed into one sequence, [1, sum of P, D].

    Behind the merger inside the tower, one token stands for four patches.
    """
    lengths = inputs["target_sizes_videos"].prod(dim=-1).reshape(num_clips, -1).sum(dim=1)
    return hidden[0].split((lengths * hidden.shape[1] // lengths.sum()).tolist())


FAMILY = NativeFamily(
    name="minicpmv4_6",
    vision_layers="vision_tower.encoder.layers",
    patches=patches,
    video_options=VIDEO_OPTIONS,
    shares_prefix=never,  # the state of a linear layer cannot be split among prompts
)
