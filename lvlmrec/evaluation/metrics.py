"""Ranking metrics of one target per user, from item ranks counted from 1."""

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
