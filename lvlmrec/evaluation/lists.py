"""The list of K items that each user is recommended.

The rule, the same for every model and baseline: the candidates are all items but padding and the user's history, best
score first. Ties are broken by the smaller item index, which is reproducible and independent of the model. As in the
ranking of targets NaN counts as higher than any number. A user with fewer than K candidates has 0 in the last places.

Shapes: U users, I items, H history, K cut-off; column 0 of the scores is padding.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray | Tensor


def top_from_scores(scores: Array, histories: Array, k: int) -> NDArray[np.int64]:
    """The best `k` item indices [U, K] for scores [U, I + 1], left as they are, histories [U, H] padded with 0."""
    scores = torch.as_tensor(scores)
    histories = torch.as_tensor(histories, dtype=torch.int64, device=scores.device)
    lowest = torch.finfo(scores.dtype).min  # -inf marks items that are no candidates
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=lowest)
    scores[:, 0] = -torch.inf
    scores.scatter_(1, histories, -torch.inf)
    best, items = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if best.shape[1] > k:
        tied = best[:, k - 1] == best[:, k]
        items = items[:, :k]
        items[tied] = _break_ties(scores[tied], best[tied, k - 1, None], k)
    items = items.sort(dim=1).values
    best, order = scores.gather(1, items).sort(dim=1, descending=True, stable=True)
    items = items.gather(1, order).masked_fill(best == -torch.inf, 0)
    return np.pad(items.cpu().numpy(), ((0, 0), (0, k - items.shape[1])))


def _break_ties(scores: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Item indices [U, K]: of scores [U, I + 1] those above `threshold` [U, 1], and the first of those equal to it."""
    chosen = scores > threshold
    tied = scores == threshold
    chosen |= tied & (tied.cumsum(dim=1) <= k - chosen.sum(dim=1, keepdim=True))
    return chosen.nonzero()[:, 1].view(-1, k)
