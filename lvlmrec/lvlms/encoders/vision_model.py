"""A loaded image or video encoder: every layer pooled inside one forward per batch of clips.

Legend: B clips, F frames, T tokens of one sequence, D width, H and W pixels. An image encoder has F sequences per clip,
a video encoder one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvlmrec.errors import InputError
from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms.encoders import encoder
from lvlmrec.lvlms.engine import inputs
from lvlmrec.lvlms.engine.copies import to_device, to_host
from lvlmrec.lvlms.engine.hooks import Pool, ignore
from lvlmrec.lvlms.files import loading, source, torchvision_shim
from lvlmrec.lvlms.protocol import Item, ModelConfig
from lvlmrec.media.sampling import Clip
from lvlmrec.taps import FeatureName, Tap


@dataclass(frozen=True)
class Batch:
    """Clips of one kind (`video` or `cover`) for one forward, of the items at `rows`, on the CPU; [B, F, C, H, W]."""

    kind: str
    rows: list[int]
    pixels: Tensor


def load(
    config: ModelConfig, recipe: ModelRecipe, info: LVLMInfo, model_config: Any, before_patches: int
) -> VisionModel:
    """The model of `config`, ready for `recipe`. Raises `ConfigError`, also when the files are not the recipe's."""
    torchvision_shim.ensure_importable()
    from transformers import AutoImageProcessor, AutoVideoProcessor

    reads_images = "cover" in info.inputs
    auto: Any = AutoImageProcessor if reads_images else AutoVideoProcessor
    folder = source.directory(config)
    with loading.reading(config):
        processor = auto.from_pretrained(folder, trust_remote_code=False)
    model = encoder.load(config, recipe, info, model_config)
    layers = encoder.find_layers(model, config)
    return VisionModel(model, layers, processor, recipe, info, config.batch_size, before_patches)


class VisionModel:
    """A loaded image or video encoder; see `protocol.LVLM`."""

    def __init__(
        self,
        model: Any,
        layers: Any,
        processor: Any,
        recipe: ModelRecipe,
        info: LVLMInfo,
        batch_size: int,
        before_patches: int,
    ) -> None:
        self.info = info
        self._model, self._processor = model, processor
        self._recipe, self.batch_size, self._before_patches = recipe, batch_size, before_patches
        self._reads_images = "cover" in info.inputs
        # V-JEPA 2's predictor serves its pretraining
        options = inspect.signature(model.forward).parameters
        self._options = {"skip_predictor": True} if "skip_predictor" in options else {}
        self._pool: Pool = ignore
        encoder.attach(layers, recipe.taps, lambda tap, hidden: self._pool(tap, hidden))

    def prepare(self, items: Sequence[Item]) -> list[Batch]:
        """See `protocol.LVLM.prepare`. Each clip is processed by itself; those of one size share a forward.

        Raises `InputError` for an item without the video or cover that is shown, or with too few frames.
        """
        batches, batch_size = [], self.batch_size
        for kind in self._recipe.media:
            by_shape: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
            for row, item in enumerate(items):
                clip = inputs.required(getattr(item, kind), item.item_id, kind)
                if kind == "video" and not self._reads_images and len(clip.frames) != self._recipe.frames:
                    raise InputError(f"item {item.item_id!r}: {len(clip.frames)} frames, not {self._recipe.frames}")
                pixels = self._process(clip)
                by_shape.setdefault(pixels.shape, []).append((row, pixels))
            for group in by_shape.values():
                for first in range(0, len(group), batch_size):
                    rows, pixels_FCHW = zip(*group[first : first + batch_size], strict=True)
                    stacked = to_host(torch.stack(pixels_FCHW), self._model.device)
                    batches.append(Batch(kind, list(rows), stacked))
        return batches

    def extract(self, prepared: Sequence[Batch]) -> dict[str, Tensor | list[str]]:
        """See `protocol.LVLM.extract`."""
        num_items = sum(len(batch.rows) for batch in prepared if batch.kind == self._recipe.media[0])
        features = {str(name): torch.empty(num_items, *shape) for name, shape in self._recipe.shapes.items()}
        for batch in prepared:
            for name, pooled_BD in self._extract_batch(batch).items():
                features[name][batch.rows] = pooled_BD.cpu()
        return dict(features)

    def _process(self, clip: Clip) -> Tensor:
        """[F, C, H, W] in the dtype of the model, as its own processor makes it."""
        frames = np.require(clip.frames, requirements=["C", "W"])
        if self._reads_images:
            made = self._processor(images=[*frames], input_data_format="channels_last", return_tensors="pt")
        else:
            made = self._processor(
                videos=[frames], input_data_format="channels_last", do_sample_frames=False, return_tensors="pt"
            )
        pixels = made[self._model.main_input_name]
        return (pixels if self._reads_images else pixels[0]).to(self._model.dtype)

    @torch.inference_mode()
    def _extract_batch(self, batch: Batch) -> dict[str, Tensor]:
        pixels_BFCHW = to_device(batch.pixels, self._model.device)
        pooled: dict[str, Tensor] = {}

        def pool(tap: Tap, hidden: Tensor) -> None:
            states = pool_states(self._recipe.poolings, hidden, len(batch.rows), self._before_patches)
            pooled.update({str(FeatureName(batch.kind, tap, pooling)): state for pooling, state in states.items()})

        self._pool = pool
        pixels = pixels_BFCHW.flatten(0, 1) if self._reads_images else pixels_BFCHW
        self._model(**{self._model.main_input_name: pixels}, **self._options)
        return pooled


def pool_states(poolings: Sequence[str], hidden: Tensor, num_clips: int, before_patches: int) -> dict[str, Tensor]:
    """Pooling -> float32 [B, D] of states [B or B * F, T, D] or, of a ResNet, maps [B * F, D, H, W].

    `visual_mean` is over the patches of all frames, `first_token` over the frames' class tokens.
    """
    tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    tokens_BFTD = tokens.unflatten(0, (num_clips, -1)).float()
    pooled = {}
    if "visual_mean" in poolings:
        pooled["visual_mean"] = tokens_BFTD[:, :, before_patches:].mean(dim=(1, 2))
    if "first_token" in poolings:
        pooled["first_token"] = tokens_BFTD[:, :, 0].mean(dim=1)
    return pooled
