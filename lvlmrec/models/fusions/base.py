"""What the fusions share: their configuration, the item table, the projection of features and the gate.

Shapes: N items asked for, K feature sets, L feature layers of all sets, D dim of the widest feature, E embedding dim.
Features [N, L, D] hold the layers of one feature set after the other; behind a narrower feature stand zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmrec.models.initial import xavier_normal


class FeatureShape(NamedTuple):
    """The features of an item in one feature set."""

    num_layers: int
    dim: int


@dataclass(frozen=True)
class FusionConfig(ABC):
    """One entry of FUSIONS. `layers` says how many layers of each feature set it reads: none, one or many."""

    name: str
    layers: ClassVar[str]

    @abstractmethod
    def build(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape]) -> nn.Module:
        """A module `forward(item_index [N], features [N, L, D] or None) -> [N, E]`; items are 1..num_items."""


def item_table(num_items: int, embedding_dim: int) -> nn.Embedding:
    """Learned item embeddings [I + 1, E]; row 0 is padding: zero, and never gets a gradient."""
    return nn.Embedding(num_items + 1, embedding_dim, padding_idx=0)


class FeatureProjection(nn.Module):
    """v = relu(W [h_1; ...; h_K] + b), W = [W_1 ... W_K]: feature sets side by side, each with its own W_k."""

    def __init__(self, shapes: Sequence[FeatureShape], embedding_dim: int) -> None:
        super().__init__()
        self.num_layers = [shape.num_layers for shape in shapes]
        self.dims = [shape.dim for shape in shapes]
        self.linear = nn.Linear(sum(self.dims), embedding_dim)
        self.apply(xavier_normal)

    def forward(self, features: Tensor) -> Tensor:
        """One vector of each feature set, [N, K, D] in any float dtype -> [N, E]."""
        joined = torch.cat([features[:, k, :dim] for k, dim in enumerate(self.dims)], dim=-1)
        return torch.relu(self.linear(joined.to(self.linear.weight.dtype)))

    def each_layer(self, features: Tensor) -> Tensor:
        """relu(W_k h_l + b) of every layer l of every feature set k: [N, L, D] -> [N, L, E]."""
        parts = features.to(self.linear.weight.dtype).split(self.num_layers, dim=1)
        weights = self.linear.weight.split(self.dims, dim=1)
        triples = zip(parts, weights, self.dims, strict=True)
        return torch.cat(
            [functional.linear(part[..., :dim], weight, self.linear.bias) for part, weight, dim in triples], dim=1
        ).relu()

    def sum_of_layers(self, features: Tensor, weights: Tensor) -> Tensor:
        """features [N, L, D], weights [L] -> [N, K, D]: of each feature set the weighted sum of its layers."""
        parts = features.to(weights.dtype).split(self.num_layers, dim=1)
        pairs = zip(parts, weights.split(self.num_layers), strict=True)
        return torch.stack([torch.einsum("l,nld->nd", weight, part) for part, weight in pairs], dim=1)


class GatedFusion(nn.Module):
    """g = sigmoid(G([e_id; v])), e = g * e_id + (1 - g) * v, each elementwise; v the projected features.

    G is linear, or an MLP with one hidden layer of E units and relu; it gives E gates, or one for all dimensions.
    """

    def __init__(
        self,
        num_items: int,
        embedding_dim: int,
        shapes: Sequence[FeatureShape],
        gate: str = "linear",
        gate_size: str = "elementwise",
    ) -> None:
        super().__init__()
        self.ids = item_table(num_items, embedding_dim)
        self.projection = FeatureProjection(shapes, embedding_dim)
        num_gates = embedding_dim if gate_size == "elementwise" else 1
        if gate == "linear":
            self.gate: nn.Module = nn.Linear(2 * embedding_dim, num_gates)
        else:
            hidden = nn.Linear(2 * embedding_dim, embedding_dim)
            self.gate = nn.Sequential(hidden, nn.ReLU(), nn.Linear(embedding_dim, num_gates))
        self.apply(xavier_normal)

    def fuse(self, item_index: Tensor, projected: Tensor) -> Tensor:
        """item_index [N], projected features [N, E] -> [N, E]."""
        ids = self.ids(item_index)
        gate = torch.sigmoid(self.gate(torch.cat([ids, projected], dim=-1)))
        return gate * ids + (1 - gate) * projected
