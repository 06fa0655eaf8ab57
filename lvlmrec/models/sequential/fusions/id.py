"""Item ids alone: the twin without features that every fusion is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lvlmrec.config import option
from lvlmrec.models.initial import xavier_normal
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.sequential.fusions.base import FeatureShape, FusionConfig, item_table


@dataclass(frozen=True)
class IdConfig(FusionConfig):
    """e = e_id."""

    name: str = option("id", "learned item embeddings, no features")
    layers: ClassVar[str] = "none"

    def build(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape]) -> nn.Module:
        return IdOnly(num_items, embedding_dim)


class IdOnly(nn.Module):
    def __init__(self, num_items: int, embedding_dim: int) -> None:
        super().__init__()
        self.ids = item_table(num_items, embedding_dim)
        self.apply(xavier_normal)

    def forward(self, item_index: Tensor, features: ItemFeatures | None = None) -> Tensor:
        return self.ids(item_index)
