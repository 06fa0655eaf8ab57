"""Noise twins: features with the statistics of the real ones that say nothing of any item.

    gaussian    every dimension on its own, with its real mean and standard deviation
    uniform     the same, drawn evenly from mean - sqrt(3) std to mean + sqrt(3) std
    covariance  Gaussian with the real mean and the real covariance, across the columns too

A gain that a twin gives as well is not the features' doing. The statistics are those of all items with features; an
item without them has none in the twin. `FeatureArray.shuffled` is the fourth control: real features of other items.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from lvlmrec.features import compact
from lvlmrec.features.compact import FeatureArray, derive

NOISES = ("gaussian", "uniform", "covariance")


def noise_twin(array: FeatureArray, kind: str, seed: int) -> FeatureArray:
    """Make, or find, the twin of `array` of one of NOISES. It depends on the features, the kind and the seed alone.

    `covariance` draws each item as a sum over all items, mean + sum_j z_j (h_j - mean) / sqrt(I): exactly the real
    covariance whatever the width, no D x D matrix, 2 I^2 L D operations.
    """
    every = np.arange(1, array.shape[0])

    @cache
    def mean_and_std(column: int) -> tuple[np.ndarray, np.ndarray]:
        mean, variance, _ = array.select([array.names[column]]).compute_moments(every)
        return mean[0].numpy(), variance[0].sqrt().numpy()

    def draw(column: int, item_index: np.ndarray) -> np.ndarray:
        mean, std = mean_and_std(column)
        if kind == "covariance":
            return mean + _like_all(array.select([array.names[column]]), mean, item_index, seed)
        rng = np.random.default_rng((seed, column, int(item_index[0])))
        shape = (len(item_index), len(mean))
        unit = rng.standard_normal(shape) if kind == "gaussian" else rng.uniform(-(3**0.5), 3**0.5, shape)
        unit *= std
        unit += mean
        return unit

    return derive(array, f"{kind}-{seed}", array.shape[2], draw)


def _like_all(one: FeatureArray, mean: np.ndarray, item_index: np.ndarray, seed: int) -> np.ndarray:
    """[N, D]: random sums of all items' centred features in the only column of `one`."""
    total = np.zeros((len(item_index), len(mean)), dtype=np.float32)
    count, items = 0, one.shape[0]
    for start in range(1, items, compact.ROWS_AT_ONCE):
        index = np.arange(start, min(start + compact.ROWS_AT_ONCE, items))
        present = ~one.is_missing(index)
        centred = (one.rows(index)[:, 0].numpy() - mean.astype(np.float32)) * present
        # The same numbers for every column, so that columns vary together as the real ones do.
        rng = np.random.default_rng((seed, int(item_index[0]), start))
        total += rng.standard_normal((len(item_index), len(index)), dtype=np.float32) @ centred
        count += int(present.sum())
    return total / np.sqrt(max(count, 1))
