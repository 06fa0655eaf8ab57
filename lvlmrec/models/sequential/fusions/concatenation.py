"""The id embedding and the projected feature, concatenated and projected: MicroLens' VIDRec with a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lvlmrec.config import option
from lvlmrec.models.initial import xavier_normal
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.sequential.fusions.base import FeatureProjection, FeatureShape, FusionConfig, item_table


@dataclass(frozen=True)
class ConcatenationConfig(FusionConfig):
    """v = relu(W h + b), e = W_c [e_id; v] + b_c; h of several feature sets: [h_1; ...; h_K]."""

    name: str = option(
        "concatenation", "the item embedding and one layer's projected feature, concatenated and projected"
    )
    layers: ClassVar[str] = "one"

    def build(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape]) -> nn.Module:
        return Concatenation(num_items, embedding_dim, shapes)


class Concatenation(nn.Module):
    def __init__(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape]) -> None:
        super().__init__()
        self.ids = item_table(num_items, embedding_dim)
        self.projection = FeatureProjection(shapes, embedding_dim)
        self.joint = nn.Linear(2 * embedding_dim, embedding_dim)
        self.apply(xavier_normal)

    def forward(self, item_index: Tensor, features: ItemFeatures) -> Tensor:
        return self.joint(torch.cat([self.ids(item_index), self.projection(features)], dim=-1))
