"""Initial weights."""

from __future__ import annotations

from torch import nn


def xavier_normal(module: nn.Module) -> None:
    """For `module.apply`: weights of linear layers and embeddings Xavier normal, biases 0, the padding row 0.

    MicroLens initialises its item embeddings, projections and SASRec so.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.xavier_normal_(module.weight)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx].detach())
