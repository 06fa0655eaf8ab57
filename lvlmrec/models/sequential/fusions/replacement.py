"""The projected feature in place of the id embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lvlmrec.config import option
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.sequential.fusions.base import FeatureProjection, FeatureShape, FusionConfig


@dataclass(frozen=True)
class ReplacementConfig(FusionConfig):
    """e = relu(W h + b); h of several feature sets: [h_1; ...; h_K]."""

    name: str = option("replacement", "one layer's feature, projected, in place of the item embedding")
    layers: ClassVar[str] = "one"

    def build(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape]) -> nn.Module:
        return Replacement(embedding_dim, shapes)


class Replacement(nn.Module):
    def __init__(self, embedding_dim: int, shapes: Sequence[FeatureShape]) -> None:
        super().__init__()
        self.projection = FeatureProjection(shapes, embedding_dim)

    def forward(self, item_index: Tensor, features: ItemFeatures) -> Tensor:
        return self.projection(features)
