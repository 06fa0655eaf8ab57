"""What every sequence encoder's configuration offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class BackboneConfig(ABC):
    """One entry of BACKBONES."""

    name: str

    @abstractmethod
    def build(self, embedding_dim: int, max_length: int) -> nn.Module:
        """A module `forward(embeddings [B, S, E], mask [B, S]) -> [B, S, E]`, S <= max_length.

        `mask` is True at real positions; padding stands on the left and has no effect on them. Output s depends
        on the inputs 0..s alone; what stands at a padding position is finite and means nothing.
        """
