"""Ranking metrics: of one target per user from item ranks counted from 1, of several from lists of items.

With one target per user recall@k is hr@k, and is not repeated under a second name.
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


def metrics(ranks: NDArray[np.int64], ks: Sequence[int] = (10, 20)) -> dict[str, float]:
    """Means over users: hr@k, ndcg@k and mrr@k for every cut-off k, in this order.

    Raises `ValueError` without users: a mean over nobody is not a number.
    """
    if len(ranks) == 0:
        raise ValueError("ranks: no users to average over")
    names = [f"{gain}@{k}" for k in ks for gain in GAINS]
    return {name: float(per_user(ranks, name).mean()) for name in names}


def per_user(ranks: NDArray[np.int64], metric: str) -> NDArray[np.float64]:
    """The metric (such as `ndcg@10`) of each user, [U]: the gain of the rank, 0 beyond the cut-off.

    Raises `InputError` for an unknown metric, `ValueError` for a rank below 1.
    """
    gain, _, cutoff = metric.partition("@")
    if gain not in GAINS or not cutoff.isdecimal() or int(cutoff) < 1:
        raise InputError(f"metric {metric!r}: expected {', '.join(f'{name}@K' for name in GAINS)} such as ndcg@10")
    if len(ranks) and ranks.min() < 1:
        raise ValueError(f"ranks: {ranks.min()} found, ranks count from 1")
    return np.where(ranks <= int(cutoff), GAINS[gain](ranks.astype(np.float64)), 0.0)


def metrics_of_sets(
    lists: NDArray[np.integer], targets: NDArray[np.integer], ks: Sequence[int] = (10, 20)
) -> dict[str, float]:
    """Means over users with several targets: hr@k, recall@k, ndcg@k and mrr@k for every k, in this order.

    lists [U, K] of item indices, best first, and targets [U, T], distinct in a row; both padded with 0. hr: any target
    among the first k; recall: share of the targets there; ndcg: of their gains 1 / log2(place + 1), over that of a list
    that begins with them (Jarvelin and Kekalainen, TOIS 2002, binary); mrr: 1 / place of the first. Which of two tied
    items stands first is the lists' matter: `top_from_scores` puts targets behind.

    Raises `ValueError` when a user has no target, or for a k beyond the lists.
    """
    sizes_U = (targets > 0).sum(axis=1)
    if len(lists) == 0 or not sizes_U.all():
        raise ValueError(f"targets: {(sizes_U == 0).sum()} of {len(lists)} users have none to average over")
    if max(ks) > lists.shape[1]:
        raise ValueError(f"lists: {lists.shape[1]} places, expected {max(ks)}")
    apart_U1 = np.arange(len(lists))[:, None] * (1 + max(int(lists.max()), int(targets.max())))
    hits_UK = np.isin(apart_U1 + lists, apart_U1 + targets) & (lists > 0)
    discounts_K = 1 / np.log2(np.arange(lists.shape[1]) + 2)
    best_K = discounts_K.cumsum()
    result: dict[str, float] = {}
    for k in ks:
        inside = hits_UK[:, :k]
        result[f"hr@{k}"] = float(inside.any(axis=1).mean())
        result[f"recall@{k}"] = float((inside.sum(axis=1) / sizes_U).mean())
        result[f"ndcg@{k}"] = float((inside @ discounts_K[:k] / best_K[np.minimum(sizes_U, k) - 1]).mean())
        result[f"mrr@{k}"] = float((inside.any(axis=1) / (1 + inside.argmax(axis=1))).mean())
    return result
