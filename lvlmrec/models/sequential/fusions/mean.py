"""The id embedding gated with the plain mean of all feature layers: what DFF's learned weights must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lvlmrec.config import option
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.sequential.fusions.base import FeatureShape, FusionConfig, GatedFusion


@dataclass(frozen=True)
class MeanConfig(FusionConfig):
    """v = relu(W m + b), m = (1 / L) sum_l h_l, e = g * e_id + (1 - g) * v; of several feature sets [m_1; ...; m_K]."""

    name: str = option("mean", "gate of the item embedding and the mean of all layers' features")
    layers: ClassVar[str] = "many"

    def build(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape]) -> nn.Module:
        return MeanFusion(num_items, embedding_dim, shapes)


class MeanFusion(GatedFusion):
    def forward(self, item_index: Tensor, features: ItemFeatures) -> Tensor:
        shares = [self.ids.weight.new_full((size,), 1 / size) for size in self.projection.num_layers]
        return self.fuse(item_index, self.projection.projected_sum(features, torch.cat(shares)))
