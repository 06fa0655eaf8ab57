"""The item rank of each user's target in the whole catalogue.

The rule, the same for every model and baseline: the candidates are all items but padding and the user's history, and
rank = 1 + candidates scored higher + other candidates tied with the target. A model gains nothing by ties or NaN: a NaN
target ranks last, a NaN candidate counts as higher. A target that is also in the history is ranked against the items
outside the history: the user did choose it, and dropping the user would change the mean.

Shapes: U users, E embedding, I items, H history; column 0 of the scores is padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray | Tensor


def score_chunks(queries: Tensor, item_embeddings: Tensor, chunk_size: int = 128) -> Iterator[tuple[slice, Tensor]]:
    """Which users, and their scores `queries @ item_embeddings.T` [u, I + 1], `chunk_size` users at a time.

    queries [U, E], item_embeddings [I + 1, E]. The next chunk overwrites the scores. They are computed in float32 or
    wider, also under autocast: half precision would make ties that the model does not have. Equal embeddings tie up to
    the rounding of the matrix product, which may differ between columns in a chunk of one user.
    """
    dtype = torch.promote_types(torch.promote_types(queries.dtype, item_embeddings.dtype), torch.float32)
    items = item_embeddings.to(dtype)
    scores = items.new_empty(min(chunk_size, len(queries)), len(items))  # one buffer: new memory costs page faults
    for start in range(0, len(queries), chunk_size):
        users = slice(start, start + chunk_size)
        chunk_queries = queries[users].to(dtype)
        with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
            torch.mm(chunk_queries, items.T, out=scores[: len(chunk_queries)])
        yield users, scores[: len(chunk_queries)]


def rank_targets(
    queries: Tensor, item_embeddings: Tensor, targets: Array, histories: Array, chunk_size: int = 128
) -> NDArray[np.int64]:
    """Ranks [U] for the scores of `score_chunks`; targets [U] in 1..I, histories [U, H] padded with 0."""
    ranks = [np.empty(0, dtype=np.int64)]
    for users, scores in score_chunks(queries, item_embeddings, chunk_size):
        ranks.append(rank_from_scores(scores, targets[users], histories[users]))
    return np.concatenate(ranks)


def rank_from_scores(scores: Array, targets: Array, histories: Array) -> NDArray[np.int64]:
    """Ranks [U] for scores [U, I + 1], targets [U] in 1..I, histories [U, H] padded with 0.

    Raises `ValueError` when a target is padding or outside the catalogue.
    """
    scores = torch.as_tensor(scores)
    targets_U1, histories = _as_int64(targets, scores.device)[:, None], _as_int64(histories, scores.device)
    num_items = scores.shape[1] - 1
    if len(scores) and not 1 <= int(targets_U1.min()) <= int(targets_U1.max()) <= num_items:
        raise ValueError(f"targets: {int(targets_U1.min())} to {int(targets_U1.max())}, expected 1 to {num_items}")
    target_scores = scores.gather(1, targets_U1)
    # Floats, not booleans: summing them is several times faster. float32 counts exactly up to 2^24.
    below = torch.empty_like(scores, dtype=torch.float32 if num_items < 2**24 else torch.float64)
    torch.lt(scores, target_scores, out=below)
    not_below = num_items + 1 - below.sum(1).long()  # NaN is not below, whatever it is compared with
    excluded = torch.cat([torch.zeros_like(targets_U1), targets_U1, histories], dim=1).sort(dim=1).values
    is_first = torch.ones_like(excluded, dtype=torch.bool)
    is_first[:, 1:] = excluded[:, 1:] != excluded[:, :-1]
    excluded_not_below = (is_first & ~(scores.gather(1, excluded) < target_scores)).sum(1)
    return (1 + not_below - excluded_not_below).cpu().numpy()


def _as_int64(values: Array, device: torch.device) -> Tensor:
    """An int64 tensor on `device`. Read-only arrays, as from Ray's object store, are copied: torch warns of them."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.require(values, np.int64, "W"))
    return values.to(device, torch.int64)
