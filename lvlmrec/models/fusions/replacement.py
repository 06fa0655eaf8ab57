"""The projected feature in place of the id embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lvlmrec.config import option
from lvlmrec.models.fusions.base import FeatureProjection, FusionConfig


@dataclass(frozen=True)
class ReplacementConfig(FusionConfig):
    """e = relu(W h + b)."""

    name: str = option("replacement", "one layer's feature, projected, in place of the item embedding")
    layers: ClassVar[str] = "one"

    def build(self, num_items: int, embedding_dim: int, num_layers: int, feature_dim: int) -> nn.Module:
        return Replacement(feature_dim, embedding_dim)


class Replacement(nn.Module):
    def __init__(self, feature_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.projection = FeatureProjection(feature_dim, embedding_dim)

    def forward(self, item_index: Tensor, features: Tensor) -> Tensor:
        return self.projection(features[:, 0])
