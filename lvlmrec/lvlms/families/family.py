"""A family of models native to transformers, described by what differs from the others.

Legend: B clips, F frames, P patch tokens, D width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlmrec.features.recipe import LVLMInfo, Recipe
from lvlmrec.lvlms.files import source
from lvlmrec.lvlms.protocol import LVLM, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Patches = Callable[["Tensor", Mapping[str, Any], int], Sequence["Tensor"]]
SharesPrefix = Callable[[Any, "Tensor"], bool]


def always(base: Any, lengths_PB: Tensor) -> bool:
    """Each prompt's own end continues the states of what all of them begin with."""
    return True


def never(base: Any, lengths_PB: Tensor) -> bool:
    """Every prompt is read from its beginning."""
    return False


@dataclass(frozen=True)
class NativeFamily:
    """An entry of `LVLMS` that the one adapter in `native.py` serves.

    name            the family's `model_type` in transformers
    vision_layers   path of the vision tower's layer list inside the base model
    patches         splits a vision hidden state into each clip's patch tokens [P, D]
    vision_width    the vision configuration's key for the width of its layers
    modality        whether the model takes the frames as a `video` or as one `image` each
    minimum_frames  a shorter clip repeats its last frame up to this many
    video_options   options of the video processor that a recipe records and may set, with their defaults
    shares_prefix   whether prompts with so many tokens [P, B] may share one run of the base model over their video
    tiny            configuration and processor of a tiny model; see `tiny.py`
    """

    name: str
    vision_layers: str
    patches: Patches
    tiny: Callable[[], tuple[Any, Any]]
    vision_width: str = "hidden_size"
    modality: str = "video"
    minimum_frames: int = 1
    video_options: Mapping[str, Any] = field(default_factory=dict)
    shares_prefix: SharesPrefix = always

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        """What the model is, from its files, without loading its weights. Raises `ConfigError`."""
        model_config = source.read_model_config(config, self.name)
        info = describe(self.name, config, model_config, self.video_options, self.vision_width)
        return replace(info, bos_written=source.bos_written(config))

    def load(self, config: ModelConfig, recipe: Recipe) -> LVLM:
        """The model, cut to the layers that `recipe` needs, with pooling in its forward. Raises `ConfigError`."""
        from lvlmrec.lvlms.engine import native

        return native.load(self, config, recipe)

    def processor(self, config: ModelConfig) -> Any:
        """What turns a conversation and its media into the model's inputs. Raises `ConfigError`."""
        from lvlmrec.lvlms.files import loading

        return loading.load_processor(config)

    def write_tiny(self, directory: Path, seed: int) -> None:
        """A tiny random model as an ordinary Hugging Face directory, the same bytes for the same seed."""
        from lvlmrec.lvlms import tiny
        from lvlmrec.lvlms.files import torchvision_shim

        torchvision_shim.ensure_importable()
        tiny.write(*self.tiny(), directory, seed)


def describe(
    family: str,
    config: ModelConfig,
    model_config: Any,
    video_options: Mapping[str, Any],
    vision_width: str = "hidden_size",
) -> LVLMInfo:
    """What `model_config` says of a model of `family`; `vision_width` is its key for the width of the tower."""
    text, vision = model_config.get_text_config(), model_config.vision_config
    return LVLMInfo(
        family=family,
        identity=source.identity(config),
        compute_dtype=config.dtype,
        num_layers={"llm": text.num_hidden_layers, "vision": vision.num_hidden_layers},
        width={"llm": text.hidden_size, "vision": getattr(vision, vision_width)},
        video_options=dict(video_options),
        context=context_of(text),
        generation=source.generation(config),
    )


def context_of(text: Any) -> int:
    """The tokens that a language model of this configuration reads at most, 0 where it does not say.

    `max_position_embeddings`, times what its rotary positions are stretched by: YaRN's count from the length before.
    Others (llama3, longrope) and those that differ by layer name the stretched length itself.
    """
    length = int(getattr(text, "max_position_embeddings", None) or 0)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return length
    before = rope.get("original_max_position_embeddings") or length
    return max(length, int(before * float(rope.get("factor") or 1)))


def patches_of_frames(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """Patch tokens of each clip, [F * P, D], from frames that lie one after another, [B * F, P, D]."""
    return list(hidden.reshape(num_clips, -1, hidden.shape[-1]))


def patches_behind_class_token(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """As `patches_of_frames`, for a tower that puts a class token before each frame's patches."""
    return patches_of_frames(hidden[:, 1:], inputs, num_clips)


def patches_of_packed_clips(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """Patch tokens of each clip, [P, D], from clips of any size packed into one sequence, [sum of P, D]."""
    return hidden.split(inputs["video_grid_thw"].prod(dim=-1).tolist())
