"""What the fusions share: their configuration, the item table, the projection of a feature and the gate.

Shapes: N items asked for, L feature layers, D feature dim, E embedding dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lvlmrec.models.initial import xavier_normal


@dataclass(frozen=True)
class FusionConfig(ABC):
    """One entry of FUSIONS. `layers` says how many feature layers the fusion reads: none, one or many."""

    name: str
    layers: ClassVar[str]

    @abstractmethod
    def build(self, num_items: int, embedding_dim: int, num_layers: int, feature_dim: int) -> nn.Module:
        """A module `forward(item_index [N], features [N, L, D] or None) -> [N, E]`; items are 1..num_items."""


def item_table(num_items: int, embedding_dim: int) -> nn.Embedding:
    """Learned item embeddings [I + 1, E]; row 0 is padding: zero, and never gets a gradient."""
    return nn.Embedding(num_items + 1, embedding_dim, padding_idx=0)


class FeatureProjection(nn.Module):
    """v = relu(W h + b), from [N, D] in any float dtype to [N, E]."""

    def __init__(self, feature_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_dim, embedding_dim)
        self.apply(xavier_normal)

    def forward(self, feature: Tensor) -> Tensor:
        return torch.relu(self.linear(feature.to(self.linear.weight.dtype)))


class GatedFusion(nn.Module):
    """g = sigmoid(W_g [e_id; v] + b_g), e = g * e_id + (1 - g) * v, each elementwise; v the projected feature."""

    def __init__(self, num_items: int, embedding_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.ids = item_table(num_items, embedding_dim)
        self.projection = FeatureProjection(feature_dim, embedding_dim)
        self.gate = nn.Linear(2 * embedding_dim, embedding_dim)
        self.apply(xavier_normal)

    def fuse(self, item_index: Tensor, feature: Tensor) -> Tensor:
        """item_index [N], feature [N, D] -> [N, E]."""
        ids, projected = self.ids(item_index), self.projection(feature)
        gate = torch.sigmoid(self.gate(torch.cat([ids, projected], dim=-1)))
        return gate * ids + (1 - gate) * projected
