"""Metrics of parts of the users, with how many they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lvlmrec.evaluation.metrics import metrics


def by_coldness(cold: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """The slices overall, warm and cold; `cold` [U] is True where the target never occurs in training."""
    return {"overall": np.ones_like(cold), "warm": ~cold, "cold": cold}


def slice_metrics(
    ranks: NDArray[np.int64], slices: Mapping[str, NDArray[np.bool_]], ks: Sequence[int] = (10, 20)
) -> dict[str, dict[str, float]]:
    """For each named mask [U] over ranks [U]: `users`, and the metrics unless there are none."""
    table: dict[str, dict[str, float]] = {}
    for name, mask in slices.items():
        inside = ranks[mask]
        table[name] = {"users": len(inside), **(metrics(inside, ks) if len(inside) else {})}
    return table
