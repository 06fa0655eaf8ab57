"""The interface of sequence encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class BackboneConfig(ABC):
    """One entry of BACKBONES."""

    name: str

    def check_width(self, embedding_dim: int) -> None:  # noqa: B027  most are of any width
        """Raises `ConfigError` when the sequence encoder cannot have this width."""

    @abstractmethod
    def build(self, embedding_dim: int, max_length: int) -> nn.Module:
        """A module `forward(embeddings [P, E], histories, last=False) -> [P, E]`.

        The P rows are the real positions of `histories` in packed order (`models.sequential.histories`), at most
        max_length per user. The output at a position depends only on that user's items up to it. With `last` only the
        outputs at the users' last positions, `histories.ends`, are computed: [users with a history, E].
        """
