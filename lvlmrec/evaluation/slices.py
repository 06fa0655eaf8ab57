"""Metrics of slices of the users, with the number of users in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lvlmrec.evaluation.metrics import metrics


def by_coldness(cold: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """The slices overall, warm and cold as masks [U]; `cold` [U] is True where the target never occurs in training."""
    return {"overall": np.ones_like(cold), "warm": ~cold, "cold": cold}


def by_popularity(targets: NDArray[np.integer], train_counts: NDArray[np.integer]) -> dict[str, NDArray[np.bool_]]:
    """The slices head, mid and tail as masks [U], by the target's training count; cold targets are in none of them.

    targets [U], train_counts [I + 1] by item index. Each slice has about a third of the training interactions: an item
    is head when all more popular items together have less than a third of them, mid when less than two thirds, else
    tail. Items of the same count are therefore in the same slice.
    """
    counts, items = np.unique(train_counts[1:], return_counts=True)
    cumulative = np.cumsum(counts * items)  # interactions of all items of at most this count
    share_above = (cumulative[-1] - cumulative) / cumulative[-1]
    bucket = np.searchsorted([1 / 3, 2 / 3], share_above, side="right")  # of each count
    of_users = bucket[np.searchsorted(counts, train_counts[targets])]
    warm = train_counts[targets] > 0
    return {name: warm & (of_users == number) for number, name in enumerate(("head", "mid", "tail"))}


def by_occurrences(counts: NDArray[np.integer]) -> dict[str, NDArray[np.bool_]]:
    """Slices by how often the target occurs in training, as masks [T]; `counts` [T]. Cold targets are in none."""
    return {
        "occurs_1_to_3": (counts >= 1) & (counts <= 3),
        "occurs_4_to_10": (counts >= 4) & (counts <= 10),
        "occurs_11_to_30": (counts >= 11) & (counts <= 30),
        "occurs_over_30": counts > 30,
    }


def slices_of(
    targets: NDArray[np.integer], train_counts: NDArray[np.integer], histories: NDArray[np.integer]
) -> dict[str, NDArray[np.bool_]]:
    """All slices of validation and test, as masks [T].

    targets [T], train_counts [I + 1] by item index, histories [T, H] padded with 0.
    """
    counts = train_counts[targets]
    return {
        **by_coldness(counts == 0),
        **by_occurrences(counts),
        **by_popularity(targets, train_counts),
        **by_history_length(histories),
    }


def by_history_length(histories: NDArray[np.integer]) -> dict[str, NDArray[np.bool_]]:
    """The slices up to 5, 6 to 10 and over 10 items before the target, as masks [U]; histories [U, H] padded with 0."""
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
    """For each named mask [T] over ranks [T]: `users`, their number, and their metrics unless it is 0.

    users [T]: the user of each target, where users have several; a user's set is then its targets in the slice, whose
    number is `targets`.
    """
    table: dict[str, dict[str, float]] = {}
    for name, mask in slices.items():
        slice_ranks = ranks[mask]
        if users is None:
            table[name] = {"users": len(slice_ranks), **(metrics(slice_ranks, ks) if len(slice_ranks) else {})}
        else:
            slice_users = users[mask]
            counts = {"users": len(np.unique(slice_users)), "targets": len(slice_ranks)}
            table[name] = {**counts, **(metrics(slice_ranks, ks, slice_users) if len(slice_ranks) else {})}
    return table
