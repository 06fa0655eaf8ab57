"""Metrics of parts of the users, with how many they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lvlmrec.evaluation.metrics import metrics


def by_coldness(cold: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """The slices overall, warm and cold; `cold` [U] is True where the target never occurs in training."""
    return {"overall": np.ones_like(cold), "warm": ~cold, "cold": cold}


def by_popularity(targets: NDArray[np.integer], train_counts: NDArray[np.integer]) -> dict[str, NDArray[np.bool_]]:
    """The slices head, mid and tail by the target's training count; with the cold targets they are all users.

    targets [U], train_counts [I + 1] by item index. Each holds a third of the training interactions: an item is head
    when the items more popular than it have less than a third of them together, mid when less than two thirds, else
    tail. So items of the same count are in the same slice.
    """
    counts, items = np.unique(train_counts[1:], return_counts=True)
    up_to = np.cumsum(counts * items)  # interactions of items of this count or a smaller one
    above = (up_to[-1] - up_to) / up_to[-1]
    bucket = np.searchsorted([1 / 3, 2 / 3], above, side="right")  # of each count
    of_users = bucket[np.searchsorted(counts, train_counts[targets])]
    warm = train_counts[targets] > 0
    return {name: warm & (of_users == number) for number, name in enumerate(("head", "mid", "tail"))}


def by_history_length(histories: NDArray[np.integer]) -> dict[str, NDArray[np.bool_]]:
    """The slices of users with up to 5, 6 to 10 and over 10 items before the target; histories [U, H] padded with 0."""
    lengths = (histories > 0).sum(axis=1)
    return {
        "history_upto_5": lengths <= 5,
        "history_6_to_10": (lengths > 5) & (lengths <= 10),
        "history_over_10": lengths > 10,
    }


def slice_metrics(
    ranks: NDArray[np.int64],
    slices: Mapping[str, NDArray[np.bool_]],
    ks: Sequence[int] = (10, 20),
    users: NDArray[np.int64] | None = None,
) -> dict[str, dict[str, float]]:
    """For each named mask [T] over ranks [T]: `users`, and the metrics unless there are none.

    With `users` [T], whose target each rank is, a user's set is its targets in the slice, and `targets` counts them.
    """
    table: dict[str, dict[str, float]] = {}
    for name, mask in slices.items():
        inside = ranks[mask]
        if users is None:
            table[name] = {"users": len(inside), **(metrics(inside, ks) if len(inside) else {})}
        else:
            of = users[mask]
            counts = {"users": len(np.unique(of)), "targets": len(inside)}
            table[name] = {**counts, **(metrics(inside, ks, of) if len(inside) else {})}
    return table
