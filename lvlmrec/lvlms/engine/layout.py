"""What the one engine must know of a family: everything that differs from one model of transformers to the next.

Legend: P prompts, B items, F frames, S positions, N patch tokens, D width. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Patches = Callable[["Tensor", Mapping[str, Any], int], Sequence["Tensor"]]
SharesPrefix = Callable[[Any, "Tensor"], bool]
ProcessorOptions = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


def always(base: Any, lengths_PB: Tensor) -> bool:
    """Each prompt's own end continues the states of what all of them begin with."""
    return True


def never(base: Any, lengths_PB: Tensor) -> bool:
    """Every prompt is read from its beginning."""
    return False


def patches_of_frames(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """Patch tokens of each clip, [F * N, D], from frames that lie one after another, [B * F, N, D]."""
    return list(hidden.reshape(num_clips, -1, hidden.shape[-1]))


def as_named(processor: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's options are the video processor's own."""
    return dict(options)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the engine finds what it reads in a model and in what its processor makes.

    name                  the key in `LVLMS`
    vision_layers         path of the vision tower's layer list inside the base model; empty: no vision taps
    patches               from a hidden state of the tower, the processor's outputs for the videos and the number of
                          clips: each clip's patch tokens [N, D]
    modality              whether the model takes the frames as a `video` or as one `image` each
    minimum_frames        a shorter clip repeats its last frame up to this many
    video_options         options of the video processor that a recipe records and may set, with their defaults
    processor_options     from the processor and those options: the arguments that the video processor takes
    token_types_argument  the base model's argument for the kind of each token, where the processor makes it
    kept_tokens_key       key of the processor's outputs: a bool vector over the projected tokens of all clips, false
                          for those that the decoder does not read; empty: it reads all
    state_attributes      attributes of the base model that a forward sets and the next one reads; they are set to None
                          before each forward
    position_arguments    arguments of the decoder of shape [B, S, ...], beside embeddings, mask and positions
    visual_arguments      arguments of the decoder about visual tokens alone
    shares_prefix         from the base model and the number of tokens of each prompt [P, B]: whether these prompts may
                          share one run of the decoder over their video
    depth_keys            keys of the text configuration; where one is not 0, weights depend on the number of layers,
                          and a model without its top layers cannot be loaded
    """

    name: str
    vision_layers: str
    patches: Patches = patches_of_frames
    modality: str = "video"
    minimum_frames: int = 1
    video_options: Mapping[str, Any] = field(default_factory=dict)
    processor_options: ProcessorOptions = as_named
    token_types_argument: str = "mm_token_type_ids"
    kept_tokens_key: str = ""
    state_attributes: Sequence[str] = ()
    position_arguments: Sequence[str] = ()
    visual_arguments: Sequence[str] = ()
    shares_prefix: SharesPrefix = always
    depth_keys: Sequence[str] = ()
