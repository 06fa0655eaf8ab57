"""DFF: the id embedding gated with a learned mix of all feature layers, as in the authors' release.

The paper writes the projection before the sum and the gate as an MLP; the release, followed here, projects the
sum and has a linear gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lvlmrec.config import option
from lvlmrec.models.fusions.base import FusionConfig, GatedFusion


@dataclass(frozen=True)
class DFFConfig(FusionConfig):
    """alpha = softmax(w), v = relu(W sum_l alpha_l h_l + b), e = g * e_id + (1 - g) * v."""

    name: str = option("dff", "gate of the item embedding and a learned mix of all layers' features")
    layers: ClassVar[str] = "many"

    def build(self, num_items: int, embedding_dim: int, num_layers: int, feature_dim: int) -> nn.Module:
        return DFF(num_items, embedding_dim, num_layers, feature_dim)


class DFF(GatedFusion):
    """One weight per layer, shared by all items; the weights start equal."""

    def __init__(self, num_items: int, embedding_dim: int, num_layers: int, feature_dim: int) -> None:
        super().__init__(num_items, embedding_dim, feature_dim)
        self.layer_logits = nn.Parameter(torch.ones(num_layers))

    def layer_weights(self) -> Tensor:
        """alpha [L]: positive, sums to 1."""
        return torch.softmax(self.layer_logits, dim=0)

    def forward(self, item_index: Tensor, features: Tensor) -> Tensor:
        weights = self.layer_weights()
        return self.fuse(item_index, torch.einsum("l,nld->nd", weights, features.to(weights.dtype)))
