"""Beyond-accuracy metrics of the lists of all users: coverage, Gini index, novelty and popularity.

All follow from each item's exposure, the number of lists that contain it. Items without a training interaction count,
in the catalogue and in the lists. A popular item is not a bad recommendation: compare a model with the baselines and
with what users chose themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def beyond_accuracy(
    lists: NDArray[np.integer],
    targets: NDArray[np.integer],
    train_counts: NDArray[np.integer],
    ks: Sequence[int] = (10, 20),
) -> dict[str, float]:
    """`target_popularity`, and for every k coverage@k, gini@k, novelty@k and popularity@k.

    lists [U, K]: item indices, best first, 0 in empty places. targets [U]. train_counts [I + 1], by item index.
    `target_popularity` is the mean training count of the users' targets: popularity@k above it is popularity bias.
    Raises `ValueError` when all lists are empty, or for a k above K.
    """
    if not lists.any() or max(ks) > lists.shape[1]:
        raise ValueError(f"lists: {lists.shape[1]} places, {(lists > 0).sum()} items; expected {max(ks)} and some")
    result = {"target_popularity": float(train_counts[targets].mean())}
    for k in ks:
        exposure_I = np.bincount(lists[:, :k].ravel(), minlength=len(train_counts))[1:]
        result[f"coverage@{k}"] = coverage(exposure_I)
        result[f"gini@{k}"] = gini(exposure_I)
        result[f"novelty@{k}"] = novelty(exposure_I, train_counts[1:])
        result[f"popularity@{k}"] = popularity(exposure_I, train_counts[1:])
    return result


def coverage(exposure_I: NDArray[np.integer]) -> float:
    """Share of the catalogue that is in at least one list; exposure_I [I].

    Catalogue coverage of Ge, Delgado-Battenfeld and Jannach, Beyond accuracy, RecSys 2010.
    """
    return float((exposure_I > 0).mean())


def gini(exposure_I: NDArray[np.integer]) -> float:
    """Gini index of exposure_I [I]: 0 when all items are shown equally often, 1 when only one item is shown.

    sum_j (2 j - I - 1) x_j / ((I - 1) sum_j x_j), exposures x ascending, j = 1..I: Shani and Gunawardana, Evaluating
    recommendation systems, Recommender Systems Handbook, 2011. 0 for a catalogue of one item.
    """
    num_items = len(exposure_I)
    if num_items == 1:
        return 0.0
    weights = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float(weights @ np.sort(exposure_I) / ((num_items - 1) * exposure_I.sum()))


def novelty(exposure_I: NDArray[np.integer], train_counts_I: NDArray[np.integer]) -> float:
    """Mean self-information of the shown items, in bits: -log2 of an item's share of the training interactions.

    exposure_I and train_counts_I [I]. Zhou et al., Solving the apparent diversity-accuracy dilemma of recommender
    systems, PNAS 2010, with interactions in place of users. An item without a training interaction counts as if it had
    one: its self-information would be infinite.
    """
    bits_I = -np.log2(np.maximum(train_counts_I, 1) / train_counts_I.sum())
    return float(exposure_I @ bits_I / exposure_I.sum())


def popularity(exposure_I: NDArray[np.integer], train_counts_I: NDArray[np.integer]) -> float:
    """Mean training count of the shown items; exposure_I and train_counts_I [I].

    Average recommendation popularity of Yin et al., Challenging the long tail recommendation, VLDB 2012. Theirs is a
    mean over users of the mean over places, which is equal when all lists are full.
    """
    return float(exposure_I @ train_counts_I / exposure_I.sum())
