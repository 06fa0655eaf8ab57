"""GRU4Rec (Hidasi et al., 2016) as in the MicroLens benchmark: no bias, Xavier uniform initial weights.

Shapes: P real positions of all users, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lvlmrec.config import option
from lvlmrec.models.sequential.backbones.base import BackboneConfig
from lvlmrec.models.sequential.histories import Histories, join_runs, split_runs


@dataclass(frozen=True)
class GRU4RecConfig(BackboneConfig):
    """A gated recurrent network over the history."""

    name: str = option("gru4rec", "a gated recurrent network over the history")
    num_blocks: int = option(1, "recurrent blocks, one on top of the other", minimum=1)
    dropout: float = option(0.1, "dropout rate of the inputs", minimum=0, below=1)

    def build(self, embedding_dim: int, max_length: int) -> nn.Module:
        return GRU4Rec(embedding_dim, self.num_blocks, self.dropout)


class GRU4Rec(nn.Module):
    """r = sg(W_r x + U_r h), z = sg(W_z x + U_z h), n = tanh(W_n x + r * U_n h), h' = (1 - z) * n + z * h; h_0 = 0."""

    def __init__(self, embedding_dim: int, num_blocks: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(embedding_dim, embedding_dim, num_blocks, bias=False, batch_first=True)
        for weight in self.gru.parameters():
            nn.init.xavier_uniform_(weight)

    def forward(self, embeddings: Tensor, histories: Histories, last: bool = False) -> Tensor:
        """embeddings [P, E] -> [P, E]; with `last` [users, E], of the last positions."""
        runs = split_runs(self.dropout(embeddings), histories.runs)
        states = join_runs([self.gru(run)[0] for run in runs], embeddings)
        return states[histories.ends] if last else states
