"""The id embedding gated with the feature of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lvlmrec.config import option
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.sequential.fusions.base import FeatureShape, FusionConfig, GatedFusion


@dataclass(frozen=True)
class SingleLayerConfig(FusionConfig):
    """v = relu(W h + b), e = g * e_id + (1 - g) * v; h of several feature sets: [h_1; ...; h_K]."""

    name: str = option("fusion", "gate of the item embedding and one layer's projected feature")
    layers: ClassVar[str] = "one"

    def build(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape]) -> nn.Module:
        return SingleLayerFusion(num_items, embedding_dim, shapes)


class SingleLayerFusion(GatedFusion):
    def forward(self, item_index: Tensor, features: ItemFeatures) -> Tensor:
        return self.fuse(item_index, self.projection(features))
