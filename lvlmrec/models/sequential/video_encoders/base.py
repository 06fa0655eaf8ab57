"""The interface of trainable video encoders.

Shapes: N items, F frames of H x W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lvlmrec.errors import ConfigError

# Mean and standard deviation of ImageNet's RGB in 0..1, which published vision encoders expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VideoEncoder(nn.Module, ABC):
    """`forward(frames uint8 [N, F, 3, H, W]) -> [N, width]`; an item's vector does not depend on the rest of the batch.

    embedding, blocks  the layers, in the order in which frames go through them
    """

    width: int
    embedding: nn.Module
    blocks: nn.ModuleList

    def freeze(self, num_blocks: int) -> None:
        """Do not train the embedding and the first `num_blocks` blocks; 0: train all. Raises `ConfigError`."""
        if num_blocks > len(self.blocks):
            raise ConfigError(f"item_encoder.frozen_blocks: {num_blocks}: the encoder has {len(self.blocks)}")
        for part in [self.embedding, *self.blocks[:num_blocks]] if num_blocks else []:
            part.requires_grad_(False)


@dataclass(frozen=True)
class VideoEncoderConfig(ABC):
    """One entry of VIDEO_ENCODERS."""

    name: str

    @abstractmethod
    def build(self, shape: tuple[int, ...]) -> VideoEncoder:
        """An encoder with random weights for frames of `shape` (F, 3, H, W); `ConfigError` for another shape."""

    def published_weights(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's weights, by this project's names, from a checkpoint's config.json and tensors.

        Raises `ConfigError` when they are of another encoder.
        """
        raise ConfigError(f"item_encoder.encoder_weights: {self.name!r} has no published weights; leave it random")


def normalise(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames uint8 [N, F, 3, H, W] -> pixels [N, 3, F, H, W], (frame / 255 - MEAN) / STD."""
    mean, std = (torch.tensor(part, dtype=dtype, device=frames.device)[:, None, None] for part in (MEAN, STD))
    return ((frames.to(dtype) / 255 - mean) / std).transpose(1, 2)
