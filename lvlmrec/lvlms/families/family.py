"""A family of models native to transformers: its file declares what differs from the others, the engine does the rest.

Legend: B clips, F frames, N patch tokens, D width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms import protocol
from lvlmrec.lvlms.engine.layout import Layout, patches_of_frames
from lvlmrec.lvlms.files import source
from lvlmrec.lvlms.protocol import LVLM, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DeclaredFamily(Layout):
    """What families native to transformers and ports have in common."""

    def processor(self, config: ModelConfig) -> Any:
        """What turns a conversation and its media into the model's inputs, without the model. Raises `ConfigError`."""
        raise NotImplementedError

    def check_length(self, config: ModelConfig, recipe: ModelRecipe, limit: int) -> None:
        """See `LVLMFamily.check_length`."""
        from lvlmrec.lvlms.engine import context

        context.check(self, config, recipe, self.processor(config), limit)

    def write_tiny(self, directory: Path, seed: int) -> None:
        """See `LVLMFamily.write_tiny`."""
        protocol.write_tiny(self.name, directory, seed)


@dataclass(frozen=True, kw_only=True)
class NativeFamily(DeclaredFamily):
    """An entry of `LVLMS` that the one engine serves; `name` is the family's `model_type` in transformers.

    vision_width    the vision configuration's key for the width of its layers
    """

    vision_width: str = "hidden_size"

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        """What the model is, from its files, without loading its weights. Raises `ConfigError`."""
        model_config = source.read_model_config(config, self.name)
        info = describe(self.name, config, model_config, self.video_options, self.vision_width)
        return replace(info, bos_written=source.bos_written(config))

    def load(self, config: ModelConfig, recipe: ModelRecipe) -> LVLM:
        """The model, cut to the layers that `recipe` needs, with pooling in its forward. Raises `ConfigError`."""
        from lvlmrec.lvlms.engine import native

        return native.load(self, config, recipe, self.inspect(config))

    def processor(self, config: ModelConfig) -> Any:
        """See `DeclaredFamily.processor`."""
        from lvlmrec.lvlms.files import loading

        return loading.load_processor(config)


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


def max_pixels_in_size(processor: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """`max_pixels` is one entry of the video processor's `size`; 0 leaves that to the processor's files."""
    options = dict(options)
    if max_pixels := options.pop("max_pixels", 0):
        options["size"] = dict(processor.video_processor.size) | {"longest_edge": max_pixels}
    return options


def patches_behind_class_token(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """As `patches_of_frames`, for a tower that puts a class token before each frame's patches."""
    return patches_of_frames(hidden[:, 1:], inputs, num_clips)


def patches_of_packed_clips(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """Patch tokens of each clip, [N, D], from clips of any size packed into one sequence, [sum of N, D]."""
    return hidden.split(inputs["video_grid_thw"].prod(dim=-1).tolist())
