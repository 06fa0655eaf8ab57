"""Ranking metrics: means over users, of the item ranks of their targets, counted from 1.

A user has one target, or a set of them where a split holds out several. With one target recall@k is hr@k and map@k is
mrr@k, and neither is repeated under a second name.
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
# What a target among the first k adds to the metric of its user. p: its place in the list; n: how many of the user's
# targets stand up to there, it included; t: how many the user has; k: the cut-off.
Gain = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int], NDArray[np.float64]]
GAINS_OF_SETS: dict[str, Gain] = {
    "hr": lambda p, n, t, k: (n == 1).astype(np.float64),  # any target
    "recall": lambda p, n, t, k: 1 / t,
    "ndcg": lambda p, n, t, k: 1 / np.log2(p + 1) / _best_gain(k)[np.minimum(t, k) - 1],
    "map": lambda p, n, t, k: n / p / np.minimum(t, k),
    "mrr": lambda p, n, t, k: (n == 1) / p,
}


def metrics(ranks: NDArray[np.int64], ks: Sequence[int] = (10, 20), users: NDArray | None = None) -> dict[str, float]:
    """Means over users: hr@k, ndcg@k and mrr@k for every cut-off k, in this order.

    With `users` [T], whose target each rank is, also recall@k and map@k, and every user counts once, however many
    targets it has. Raises `ValueError` without users: a mean over nobody is not a number.
    """
    if len(ranks) == 0:
        raise ValueError("ranks: no users to average over")
    names = [f"{gain}@{k}" for k in ks for gain in (GAINS if users is None else GAINS_OF_SETS)]
    return {name: float(per_user(ranks, name, users).mean()) for name in names}


def per_user(ranks: NDArray[np.int64], metric: str, users: NDArray | None = None) -> NDArray[np.float64]:
    """The metric (such as `ndcg@10`) of each user, [U]: the gain of the rank, 0 beyond the cut-off.

    With `users` [T], whose target each rank is, that of the user's whole set, users in sorted order: hr: is any target
    among the first k; recall: the share of them there; ndcg: their gains 1 / log2(place + 1) over those of a list that
    begins with them (Jarvelin and Kekalainen, TOIS 2002, binary); map: mean precision at their places, over
    min(k, targets); mrr: 1 / place of the first. Each target was ranked among all candidates, the user's other targets
    too, so targets that tie have one rank, the last of their places: they are given a place each.

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
    owners = np.unique(users, return_inverse=True)[1]
    order = np.lexsort((ranks, owners))
    ranks, owners = ranks[order], owners[order]
    tied = np.r_[True, (ranks[1:] != ranks[:-1]) | (owners[1:] != owners[:-1])].cumsum() - 1
    places = ranks - np.bincount(tied)[tied] + _within(tied)
    sizes = np.bincount(owners)
    added = GAINS_OF_SETS[gain](places, _within(owners), sizes[owners], k)
    return np.bincount(owners, weights=np.where(places <= k, added, 0.0)).astype(np.float64)


def _within(groups: NDArray[np.integer]) -> NDArray[np.int64]:
    """1, 2, ... inside each run of equal numbers; `groups` [T] ascends from 0 without gaps."""
    sizes = np.bincount(groups)
    return 1 + np.arange(len(groups)) - (sizes.cumsum() - sizes)[groups]


def _best_gain(k: int) -> NDArray[np.float64]:
    """The dcg of 1, 2, ..., k targets that stand first, [k]."""
    return (1 / np.log2(np.arange(k) + 2)).cumsum()
