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

    name                the key in `LVLMS`
    vision_layers       path of the vision tower's layer list inside the base model; empty: no vision taps
    patches             splits a hidden state of the tower into each clip's patch tokens [N, D]; it is given the state,
                        the processor's outputs for the videos, and how many clips they are
    modality            whether the model takes the frames as a `video` or as one `image` each
    minimum_frames      a shorter clip repeats its last frame up to this many
    video_options       options of the video processor that a recipe records and may set, with their defaults
    processor_options   those options as the video processor takes them, from the processor and the options
    token_types         the base model's argument for each token's kind, of processors that tell it
    kept_tokens         the processor's output that says which projected tokens the decoder reads, a bool vector over
                        the tokens of all clips; empty: it reads all of them
    left_behind         attributes of the base model in which a forward leaves what the next one would read: they are
                        None before each
    per_position        arguments of the decoder with an entry for each position, [B, S, ...], beside the embeddings,
                        the mask and the positions
    visual_only         arguments of the decoder that say something of visual tokens alone
    shares_prefix       whether prompts with so many tokens [P, B] may share one run of the base model over their video
    depth_matters       keys of the text configuration: where one is not 0, weights depend on the number of layers, so
                        that a model without its top layers cannot be loaded
    """

    name: str
    vision_layers: str
    patches: Patches = patches_of_frames
    modality: str = "video"
    minimum_frames: int = 1
    video_options: Mapping[str, Any] = field(default_factory=dict)
    processor_options: ProcessorOptions = as_named
    token_types: str = "mm_token_type_ids"
    kept_tokens: str = ""
    left_behind: Sequence[str] = ()
    per_position: Sequence[str] = ()
    visual_only: Sequence[str] = ()
    shares_prefix: SharesPrefix = always
    depth_matters: Sequence[str] = ()
