"""SASRec (Kang and McAuley, 2018) as in the MicroLens benchmark: post-LN, Xavier normal initial weights.

Shapes: P real positions of all users, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmrec.config import option
from lvlmrec.errors import ConfigError
from lvlmrec.models.initial import xavier_normal
from lvlmrec.models.sequential.backbones.base import BackboneConfig
from lvlmrec.models.sequential.histories import Histories, join_runs, split_runs

NORM_EPS = 1e-6


@dataclass(frozen=True)
class SASRecConfig(BackboneConfig):
    """Causal self-attention over the history."""

    name: str = option("sasrec", "causal self-attention over the history")
    num_blocks: int = option(2, "attention blocks", minimum=1)
    num_heads: int = option(2, "attention heads per block; divides the embedding dim", minimum=1)
    dropout: float = option(
        0.1, "dropout rate after the input, the attention and each half of a block", minimum=0, below=1
    )

    def check_width(self, embedding_dim: int) -> None:
        if embedding_dim % self.num_heads:
            raise ConfigError(
                f"model.backbone.num_heads: {self.num_heads} does not divide embedding_dim {embedding_dim}"
            )

    def build(self, embedding_dim: int, max_length: int) -> nn.Module:
        """Raises `ConfigError` when the heads do not divide the embedding dim."""
        self.check_width(embedding_dim)
        return SASRec(embedding_dim, max_length, self.num_blocks, self.num_heads, self.dropout)


class SASRec(nn.Module):
    """x = Drop(LN(e + p)), then the blocks."""

    def __init__(self, embedding_dim: int, max_length: int, num_blocks: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.positions = nn.Embedding(max_length, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(embedding_dim, num_heads, dropout) for _ in range(num_blocks))
        self.apply(xavier_normal)

    def forward(self, embeddings: Tensor, histories: Histories, last: bool = False) -> Tensor:
        """embeddings [P, E] -> [P, E]; with `last` [users, E], of the last positions."""
        # Positions count from the end of the history, so that the longest history of a batch changes nothing.
        position_embeddings = functional.embedding(
            self.positions.num_embeddings - 1 - histories.age, self.positions.weight
        )
        x = self.dropout(self.norm(embeddings + position_embeddings))
        for number, block in enumerate(self.blocks, 1):
            x = block(x, histories, last and number == len(self.blocks))
        return x


class Block(nn.Module):
    """x = LN(x + Drop(W_o MHA(x))), x = LN(x + Drop(W_2 relu(W_1 x))); W_1: E -> 4E; no bias in Q, K, V, O."""

    def __init__(self, embedding_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(embedding_dim, embedding_dim, bias=False)
        self.key = nn.Linear(embedding_dim, embedding_dim, bias=False)
        self.value = nn.Linear(embedding_dim, embedding_dim, bias=False)
        self.output = nn.Linear(embedding_dim, embedding_dim, bias=False)
        self.attention_norm = nn.LayerNorm(embedding_dim, eps=NORM_EPS)
        self.inner = nn.Linear(embedding_dim, 4 * embedding_dim)
        self.outer = nn.Linear(4 * embedding_dim, embedding_dim)
        self.feed_forward_norm = nn.LayerNorm(embedding_dim, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, histories: Histories, last: bool) -> Tensor:
        """x [P, E] -> [P, E]; with `last` [users, E]: of the other positions only keys and values are computed."""
        keys, values = self.key(x), self.value(x)
        x = x[histories.ends] if last else x
        outputs = self.attend(self.query(x), keys, values, histories.runs, last)
        x = self.attention_norm(x + self.dropout(self.output(outputs)))
        return self.feed_forward_norm(x + self.dropout(self.outer(torch.relu(self.inner(x)))))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, runs: list[tuple[int, int]], last: bool) -> Tensor:
        """queries [P, E] (with `last` [users, E]), keys and values [P, E] -> outputs of the queries' shape.

        One attention per run of users of one length: without padding no mask but the causal one is needed.
        """
        query_runs = [(1, users) for _, users in runs] if last else runs
        dropout = self.dropout.p if self.training else 0.0
        outputs = []
        parts = split_runs(queries, query_runs), split_runs(keys, runs), split_runs(values, runs)
        for run in zip(*parts, strict=True):
            q_BHSE, k_BHSE, v_BHSE = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in run)
            out = functional.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, dropout_p=dropout, is_causal=not last)
            outputs.append(out.transpose(1, 2).flatten(-2))
        return join_runs(outputs, queries)
