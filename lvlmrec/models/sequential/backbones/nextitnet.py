"""NextItNet (Yuan et al., 2019) as in the MicroLens benchmark: residual blocks (b) of the paper, no dropout.

Shapes: P real positions of all users, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from lvlmrec.config import option
from lvlmrec.models.sequential.backbones.base import BackboneConfig
from lvlmrec.models.sequential.histories import Histories, join_runs, split_runs

KERNEL_SIZE = 3
DILATIONS = (1, 4)
NORM_EPS = 1e-8


@dataclass(frozen=True)
class NextItNetConfig(BackboneConfig):
    """Dilated causal convolutions over the history."""

    name: str = option("nextitnet", "dilated causal convolutions over the history")
    num_blocks: int = option(2, f"how often the pair of blocks with dilations {DILATIONS} is repeated", minimum=1)

    def build(self, embedding_dim: int, max_length: int) -> nn.Module:
        return NextItNet(embedding_dim, self.num_blocks)


class NextItNet(nn.Module):
    """Two residual blocks, of dilations 1 and 4, repeated `num_blocks` times."""

    def __init__(self, embedding_dim: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(embedding_dim, dilation) for dilation in DILATIONS * num_blocks)

    def forward(self, embeddings: Tensor, histories: Histories, last: bool = False) -> Tensor:
        """embeddings [P, E] -> [P, E]; with `last` [users, E], of the last positions."""
        x = embeddings
        for block in self.blocks:
            x = block(x, histories.runs)
        return x[histories.ends] if last else x


class Block(nn.Module):
    """y = relu(LN(conv_a(x))), x + relu(LN(conv_2a(y))); conv_a(x)_s = b + sum_k W_k x_{s - (2 - k) a}, k = 0, 1, 2."""

    def __init__(self, embedding_dim: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(embedding_dim, embedding_dim, KERNEL_SIZE, dilation=dilation)
        self.first_norm = nn.LayerNorm(embedding_dim, eps=NORM_EPS)
        self.second = nn.Conv1d(embedding_dim, embedding_dim, KERNEL_SIZE, dilation=2 * dilation)
        self.second_norm = nn.LayerNorm(embedding_dim, eps=NORM_EPS)

    def forward(self, x: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """x [P, E] -> [P, E]."""
        y = self.first_norm(causal_convolution(self.first, x, runs)).relu()
        return x + self.second_norm(causal_convolution(self.second, y, runs)).relu()


def causal_convolution(convolution: nn.Conv1d, x: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """x [P, E] -> [P, E]: an output reads its user's inputs up to its position; zeros stand before the first one."""
    past = (KERNEL_SIZE - 1) * convolution.dilation[0]
    padded = [functional.pad(run.transpose(1, 2), (past, 0)) for run in split_runs(x, runs)]
    return join_runs([convolution(run).transpose(1, 2) for run in padded], x)
