"""The rank of each user's target among the whole catalogue.

The rule, the same for every model and baseline: the candidates are all items but padding and the user's history;
rank = 1 + candidates scored higher + other candidates tied with the target. Ties do not help, nor does NaN: a NaN
target ranks last, a NaN candidate counts as higher. A target that also stands in the history is still ranked,
against the items outside the history: it is what the user chose, and dropping the user would change the mean.

Shapes: U users, E embedding, I items, H history; column 0 is padding.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray | Tensor


def rank_targets(
    queries: Tensor, item_embeddings: Tensor, targets: Array, histories: Array, chunk_size: int = 128
) -> NDArray[np.int64]:
    """Ranks [U] for scores `queries @ item_embeddings.T`, over `chunk_size` users at a time.

    queries [U, E], item_embeddings [I + 1, E], targets [U], histories [U, H] padded with 0. Scores are computed in
    float32 or better whatever the autocast state: half precision makes ties that are not in the model. Equal
    embeddings tie up to the rounding of the matrix product, which may differ between columns in a chunk of one user.
    """
    dtype = torch.promote_types(torch.promote_types(queries.dtype, item_embeddings.dtype), torch.float32)
    items = item_embeddings.to(dtype)
    ranks = [np.empty(0, dtype=np.int64)]
    scores = items.new_empty(min(chunk_size, len(queries)), len(items))  # one for all: new memory costs page faults
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        for start in range(0, len(queries), chunk_size):
            users = slice(start, start + chunk_size)
            asked = queries[users].to(dtype)
            torch.mm(asked, items.T, out=scores[: len(asked)])
            ranks.append(rank_from_scores(scores[: len(asked)], targets[users], histories[users]))
    return np.concatenate(ranks)


def rank_from_scores(scores: Array, targets: Array, histories: Array) -> NDArray[np.int64]:
    """Ranks [U] for scores [U, I + 1], targets [U] in 1..I, histories [U, H] padded with 0.

    Raises `ValueError` when a target is padding or outside the catalogue.
    """
    scores = torch.as_tensor(scores)
    targets_U1, histories = _numbers(targets, scores.device)[:, None], _numbers(histories, scores.device)
    num_items = scores.shape[1] - 1
    if len(scores) and not 1 <= int(targets_U1.min()) <= int(targets_U1.max()) <= num_items:
        raise ValueError(f"targets: {int(targets_U1.min())} to {int(targets_U1.max())}, expected 1 to {num_items}")
    target_scores = scores.gather(1, targets_U1)
    # Numbers, not booleans: their sum is several times faster. float32 counts exactly up to 2^24.
    below = torch.empty_like(scores, dtype=torch.float32 if num_items < 2**24 else torch.float64)
    torch.lt(scores, target_scores, out=below)
    not_below = num_items + 1 - below.sum(1).long()  # what a comparison with NaN is not, either
    left_out = torch.cat([torch.zeros_like(targets_U1), targets_U1, histories], dim=1).sort(dim=1).values
    first = torch.ones_like(left_out, dtype=torch.bool)
    first[:, 1:] = left_out[:, 1:] != left_out[:, :-1]
    left_out_not_below = (first & ~(scores.gather(1, left_out) < target_scores)).sum(1)
    return (1 + not_below - left_out_not_below).cpu().numpy()


def _numbers(values: Array, device: torch.device) -> Tensor:
    """int64. Arrays from Ray's object store cannot be written to, of which torch warns: those are copied."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.require(values, np.int64, "W"))
    return values.to(device, torch.int64)
