"""What the fusions share: their configuration, the item embeddings, the projection of features and the gate.

Shapes: N items of the batch, K feature sets, L feature layers of all sets, E embedding dim. Layers are numbered through
all feature sets, one set after the other.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmrec.models.initial import xavier_normal
from lvlmrec.models.item_features import ItemFeatures, sum_of_layers


class FeatureShape(NamedTuple):
    """The shape of an item's features in one feature set: `num_layers` x `tokens` vectors of `dim` numbers.

    frames  (F, 3, H, W) where the features are stored pixels; each frame is a token
    tokens  1 for a pooled vector
    """

    num_layers: int
    dim: int
    frames: tuple[int, ...] = ()
    tokens: int = 1


@dataclass(frozen=True)
class FusionConfig(ABC):
    """One entry of FUSIONS.

    layers        how many layers of each feature set it reads: "none", "one" or "many"
    reads_frames  it encodes stored frames, which is so much work that training workers share it
    reads_tokens  it reads layers of several tokens per item
    """

    name: str
    layers: ClassVar[str]
    reads_frames: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False

    @property
    def pretrained(self) -> str:
        """The directory of the published weights that training starts from; empty without them."""
        return ""

    @abstractmethod
    def build(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape]) -> nn.Module:
        """A module `forward(item_index int64 [N], ItemFeatures or None) -> [N, E]`; items are 1..num_items."""


def item_table(num_items: int, embedding_dim: int) -> nn.Embedding:
    """Learned item embeddings [I + 1, E]; row 0, padding, is zero and gets no gradient."""
    return nn.Embedding(num_items + 1, embedding_dim, padding_idx=0)


class FeatureProjection(nn.Module):
    """v = relu(W [h_1; ...; h_K] + b), W = [W_1 ... W_K]: feature sets concatenated, each with its own W_k."""

    def __init__(self, shapes: Sequence[FeatureShape], embedding_dim: int) -> None:
        super().__init__()
        self.num_layers = [shape.num_layers for shape in shapes]
        self.dims = [shape.dim for shape in shapes]
        self.linear = nn.Linear(sum(self.dims), embedding_dim)
        self.apply(xavier_normal)

    def forward(self, features: ItemFeatures) -> Tensor:
        """Features with one layer per feature set -> [N, E]."""
        return self.project([features.layer(k, self.linear.weight.dtype) for k in range(len(self.dims))])

    def project(self, vectors: Sequence[Tensor]) -> Tensor:
        """One vector per feature set, K x [N, its dim or wider] -> [N, E]."""
        joined = torch.cat([vector[:, :dim] for vector, dim in zip(vectors, self.dims, strict=True)], dim=-1)
        return torch.relu(self.linear(joined))

    def sum_of_projected(self, features: ItemFeatures, weights: Tensor) -> Tensor:
        """sum_l w_l relu(W_k h_l + b) over every layer l of every feature set k, weights [L] -> [N, E]."""
        matrices = self.linear.weight.split(self.dims, dim=1)
        total = weights.new_zeros(())
        for layers, matrix, dim in zip(self._layers(), matrices, self.dims, strict=True):
            for number in layers:
                vector = features.layer(number, matrix.dtype)[:, :dim]
                total = total + weights[number] * functional.linear(vector, matrix, self.linear.bias).relu()
        return total

    def projected_sum(self, features: ItemFeatures, weights: Tensor) -> Tensor:
        """relu(W [s_1; ...; s_K] + b), s_k = sum_l w_l h_l over the layers of feature set k, weights [L] -> [N, E]."""
        chosen = self._layers()
        return self.project([sum_of_layers(weights[layers.start : layers.stop], features, layers) for layers in chosen])

    def _layers(self) -> list[range]:
        """The numbers of each feature set's layers, 0..L-1 in all."""
        ends = [0, *itertools.accumulate(self.num_layers)]
        return [range(*pair) for pair in itertools.pairwise(ends)]


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
