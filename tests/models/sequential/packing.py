"""Padded grids and plain features for the tests, as the models read them."""

import torch
from torch import Tensor, nn

from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.sequential.histories import pack


def grid_mask(lengths: list[int], width: int) -> Tensor:
    """bool [B, width]: real positions on the right."""
    return torch.stack([torch.arange(width) >= width - length for length in lengths])


def encode_grid(backbone: nn.Module, embeddings: Tensor, mask: Tensor) -> Tensor:
    """embeddings [B, S, E] -> [B, S, E]: packed, encoded, and put back where they stood; NaN at padding."""
    histories = pack(mask)
    encoded = backbone(embeddings.flatten(0, 1)[histories.grid_index], histories)
    grid = encoded.new_full((mask.numel(), encoded.shape[1]), torch.nan)
    return grid.index_copy(0, histories.grid_index, encoded).unflatten(0, mask.shape)


def as_stored(*features: Tensor) -> ItemFeatures:
    """Features [N, L, D] of N items, one of each feature set, with nothing to scale and nothing missing."""
    row = torch.arange(len(features[0]), device=features[0].device)
    missing = row.new_zeros(len(row), sum(each.shape[1] for each in features), dtype=torch.bool)
    return ItemFeatures(features, row, None, None, missing)
