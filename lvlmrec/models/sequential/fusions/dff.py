"""DFF (Sun et al., arXiv 2512.21863): the id embedding gated with a learned mix of all feature layers.

The authors' release projects the sum of the layers and has a linear gate, the defaults here; the paper writes the
projection before the sum and the gate as an MLP. Layers of several feature sets share one softmax.
"""

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
class DFFConfig(FusionConfig):
    """alpha = softmax(w), v = relu(W sum_l alpha_l h_l + b), e = g * e_id + (1 - g) * v."""

    name: str = option("dff", "gate of the item embedding and a learned mix of all layers' features")
    projection: str = option(
        "after_sum",
        "after_sum: relu(W sum_l alpha_l h_l + b), as released; before_sum: sum_l alpha_l relu(W h_l + b), the paper's",
        choices=("after_sum", "before_sum"),
    )
    gate: str = option("linear", "linear, as released, or mlp, the paper's", choices=("linear", "mlp"))
    gate_size: str = option(
        "elementwise", "one gate for each dimension, or one scalar for an item", choices=("elementwise", "scalar")
    )
    layers: ClassVar[str] = "many"

    def build(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape]) -> nn.Module:
        return DFF(num_items, embedding_dim, shapes, self)


class DFF(GatedFusion):
    """One weight per layer, shared by all items; the weights start equal."""

    def __init__(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape], settings: DFFConfig) -> None:
        super().__init__(num_items, embedding_dim, shapes, settings.gate, settings.gate_size)
        self.project_first = settings.projection == "before_sum"
        self.layer_logits = nn.Parameter(torch.ones(sum(shape.num_layers for shape in shapes)))

    def layer_weights(self) -> Tensor:
        """alpha [L]: positive, sums to 1 over the layers of all feature sets."""
        return torch.softmax(self.layer_logits, dim=0)

    def forward(self, item_index: Tensor, features: ItemFeatures) -> Tensor:
        weights = self.layer_weights()
        if self.project_first:
            return self.fuse(item_index, self.projection.sum_of_projected(features, weights))
        return self.fuse(item_index, self.projection.projected_sum(features, weights))
