"""The id embedding gated with the feature of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lvlmrec.config import option
from lvlmrec.models.fusions.base import FusionConfig, GatedFusion


@dataclass(frozen=True)
class SingleLayerConfig(FusionConfig):
    """e = g * e_id + (1 - g) * relu(W h + b)."""

    name: str = option("fusion", "gate of the item embedding and one layer's projected feature")
    layers: ClassVar[str] = "one"

    def build(self, num_items: int, embedding_dim: int, num_layers: int, feature_dim: int) -> nn.Module:
        return SingleLayerFusion(num_items, embedding_dim, feature_dim)


class SingleLayerFusion(GatedFusion):
    def forward(self, item_index: Tensor, features: Tensor) -> Tensor:
        return self.fuse(item_index, features[:, 0])
