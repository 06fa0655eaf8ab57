"""`frames`: no model at all. Its one state, `vision.0`, is the sampled frames, for encoders that are trained.

They are stored once, as bytes, so that a training run reads pixels from a memory-mapped file and decodes no video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.features.sources import FRAMES_FAMILY, PIXEL_DTYPE, PIXELS, SIDE, FramesRecipe
from lvlmrec.lvlms.engine.inputs import required
from lvlmrec.lvlms.files import source
from lvlmrec.lvlms.protocol import Item, ModelConfig

if TYPE_CHECKING:
    import torch

RESIZING = "bilinear-antialiased:1"  # counted up when the same frames give other pixels


@dataclass(frozen=True)
class FramesFamily:
    """The entry of `LVLMS`. Square frames: the shorter side is scaled to `side`, the middle is cut out."""

    name: str = FRAMES_FAMILY

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        """What its states are. Raises `ConfigError` when a model is named: none is read."""
        if config.model:
            raise ConfigError(f"lvlm.model: {config.model!r}: {self.name} reads no model; leave it empty")
        return LVLMInfo(
            family=self.name,
            identity=RESIZING,
            compute_dtype=PIXEL_DTYPE,
            num_layers={"vision": 0},
            width={"vision": 3},
            inputs=("video",),
            poolings=(PIXELS,),
            video_options={SIDE: 224},
            dtypes=(PIXEL_DTYPE,),
        )

    def load(self, config: ModelConfig, recipe: FramesRecipe) -> Frames:
        """Raises `ConfigError` as `inspect`, and when the recipe's frames were resized in another way."""
        info = self.inspect(config)
        source.check_identity(config, recipe, info)
        return Frames(info, recipe, config.batch_size)

    def check_length(self, config: ModelConfig, recipe: FramesRecipe, limit: int) -> None:
        """Nothing: no prompt is read."""

    def write_tiny(self, directory: Path, seed: int) -> None:
        """Raises `ConfigError`: there is no model to write."""
        raise ConfigError(f"lvlm.model: {self.name} reads no model; leave it empty, as conf/lvlm/frames.yaml does")


class Frames:
    """See `protocol.LVLM`."""

    def __init__(self, info: LVLMInfo, recipe: FramesRecipe, batch_size: int) -> None:
        self.info, self.batch_size = info, batch_size
        self._recipe = recipe

    def prepare(self, items: Sequence[Item]) -> torch.Tensor:
        """uint8 [B, F * 3 * side * side]. Raises `InputError` for an item without its frames."""
        import torch

        return torch.stack([self._resize(item) for item in items])

    def extract(self, prepared: torch.Tensor) -> dict[str, torch.Tensor | list[str]]:
        """See `protocol.LVLM.extract`: of one column, and in uint8."""
        (name,) = self._recipe.shapes
        return {str(name): prepared}

    def _resize(self, item: Item) -> torch.Tensor:
        import torch
        from torch.nn import functional

        frames = required(item.video, item.item_id, "video").frames
        if len(frames) != self._recipe.frames:
            raise InputError(f"item {item.item_id!r}: {len(frames)} frames, not {self._recipe.frames}")
        side = self._recipe.side
        pixels = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float()  # [F, 3, H, W]
        height, width = pixels.shape[-2:]
        scaled = [max(side, round(length * side / min(height, width))) for length in (height, width)]
        pixels = functional.interpolate(pixels, scaled, mode="bilinear", antialias=True)
        top, left = ((length - side) // 2 for length in scaled)
        middle = pixels[:, :, top : top + side, left : left + side]
        return middle.round().clamp(0, 255).to(torch.uint8).flatten()


FAMILY = FramesFamily()
