"""Ranking metrics: means over users, computed from the item ranks of their targets. Ranks count from 1.

A user has one target, or a set of them where the split holds out several. With one target recall@k equals hr@k and
map@k equals mrr@k, so only hr@k and mrr@k are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lvlmrec.errors import InputError

GAINS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "hr": np.ones_like,
    "ndcg": lambda ranks: 1 / np.log2(ranks + 1),
    "mrr": lambda ranks: 1 / ranks,
}
# What a target among the first k adds to its user's metric. p: its place in the list; n: how many of the user's targets
# stand at this place or before; t: how many targets the user has; k: the cut-off.
Gain = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int], NDArray[np.float64]]
GAINS_OF_SETS: dict[str, Gain] = {
    "hr": lambda p, n, t, k: (n == 1).astype(np.float64),  # any target
    "recall": lambda p, n, t, k: 1 / t,
    "ndcg": lambda p, n, t, k: 1 / np.log2(p + 1) / _ideal_dcg(k)[np.minimum(t, k) - 1],
    "map": lambda p, n, t, k: n / p / np.minimum(t, k),
    "mrr": lambda p, n, t, k: (n == 1) / p,
}


def metrics(ranks: NDArray[np.int64], ks: Sequence[int] = (10, 20), users: NDArray | None = None) -> dict[str, float]:
    """Means over users: hr@k, ndcg@k and mrr@k for every cut-off k, in this order; ranks [T], one per target.

    users [T]: the user of each target, where users have several; then also recall@k and map@k, and every user counts
    once. None: each rank is another user's. Raises `ValueError` without ranks, which have no mean.
    """
    if len(ranks) == 0:
        raise ValueError("ranks: no users to average over")
    names = [f"{gain}@{k}" for k in ks for gain in (GAINS if users is None else GAINS_OF_SETS)]
    return {name: float(per_user(ranks, name, users).mean()) for name in names}


def per_user(ranks: NDArray[np.int64], metric: str, users: NDArray | None = None) -> NDArray[np.float64]:
    """The metric (such as `ndcg@10`) of each user, [U]: the gain of the target's rank, 0 beyond the cut-off k.

    With `users` [T], the user of each target, the metric of the user's set of targets, users in sorted order:
    hr      1 when any target is among the first k
    recall  share of the targets that are among the first k
    ndcg    sum of 1 / log2(place + 1) over that of a list that begins with the targets (Jarvelin and Kekalainen, TOIS
            2002, binary relevance)
    map     mean precision at the targets' places, over min(k, number of targets)
    mrr     1 / place of the first target

    A target is ranked among all candidates, the user's other targets included, so tied targets have the same rank, the
    last of their places; here each gets a place of its own.

    Raises `InputError` for an unknown metric, `ValueError` for a rank below 1.
    """
    gain, _, cutoff = metric.partition("@")
    gains = GAINS if users is None else GAINS_OF_SETS
    if gain not in gains or not cutoff.isdecimal() or int(cutoff) < 1:
        raise InputError(f"metric {metric!r}: expected {', '.join(f'{name}@K' for name in gains)} such as ndcg@10")
    if len(ranks) and ranks.min() < 1:
        raise ValueError(f"ranks: {ranks.min()} found, ranks count from 1")
    k = int(cutoff)
    if users is None:
        return np.where(ranks <= k, GAINS[gain](ranks.astype(np.float64)), 0.0)
    user_codes = np.unique(users, return_inverse=True)[1]
    order = np.lexsort((ranks, user_codes))
    ranks, user_codes = ranks[order], user_codes[order]
    tie_groups = np.r_[True, (ranks[1:] != ranks[:-1]) | (user_codes[1:] != user_codes[:-1])].cumsum() - 1
    places = ranks - np.bincount(tie_groups)[tie_groups] + _number_within_groups(tie_groups)
    sizes = np.bincount(user_codes)
    gains_of_targets = GAINS_OF_SETS[gain](places, _number_within_groups(user_codes), sizes[user_codes], k)
    return np.bincount(user_codes, weights=np.where(places <= k, gains_of_targets, 0.0)).astype(np.float64)


def _number_within_groups(groups: NDArray[np.integer]) -> NDArray[np.int64]:
    """1, 2, ... within each run of equal numbers, [T]; `groups` [T] ascends from 0 without gaps."""
    sizes = np.bincount(groups)
    return 1 + np.arange(len(groups)) - (sizes.cumsum() - sizes)[groups]


def _ideal_dcg(k: int) -> NDArray[np.float64]:
    """DCG of lists that begin with 1, 2, ..., k targets, [k]."""
    return (1 / np.log2(np.arange(k) + 2)).cumsum()
