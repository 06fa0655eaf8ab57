"""Noise twins: features with the statistics of the real ones that say nothing of any item.

    gaussian    every dimension on its own, with its real mean and standard deviation
    uniform     the same, drawn evenly from mean - sqrt(3) std to mean + sqrt(3) std
    covariance  Gaussian with the real mean and the real covariance, across the columns too

A gain that a twin gives as well is not the features' doing. The statistics are those of all items with features; an
item without them has none in the twin. `FeatureArray.shuffled` is the fourth control: real features of other items.

Shapes: I items, L columns of D dims each, N items drawn at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate

import numpy as np
import torch

from lvlmrec.features import array as arrays
from lvlmrec.features.array import FeatureArray
from lvlmrec.features.cache import key_of
from lvlmrec.features.compact import derive

NOISES = ("gaussian", "uniform", "covariance")
MOST_DIMENSIONS = 1 << 14  # of a covariance that is factored: 2 GB as float64
# Added to the correlations' diagonal: of features of fewer degrees of freedom than dimensions rounding would leave no
# factor. Deviations grow by half of it, less than float16 can tell.
RIDGE = 1e-6

Draw = Callable[[int, np.ndarray], np.ndarray]  # column, item_index [N] -> [N, D]


def noise_twin(array: FeatureArray, kind: str, seed: int) -> FeatureArray:
    """Make, or find, the twin of `array` of one of NOISES. It depends on the features, the kind and the seed alone.

    `covariance` factors the covariance of all L D dimensions where there are more items: (L D)^2 numbers of 8 bytes,
    2 I (L D)^2 + (L D)^3 / 3 operations. Where there are as many dimensions or more, or above MOST_DIMENSIONS, each
    item is a sum over all items, mean + sum_j z_j (h_j - mean) / sqrt(I): the same distribution without a matrix, in
    2 I^2 L D operations.
    """
    mark = f"{kind}-{seed}"
    if kind != "covariance":
        draw = _independent(array, kind, seed)
    elif sum(array.widths) < min(len(array.missing) - 1, MOST_DIMENSIONS + 1):
        mark, draw = f"{kind}-factored-{seed}", _factored(array, seed)
    else:
        draw = _summed(array, seed)
    keys = [key_of(array.digest, mark, str(column)) for column in range(len(array.columns))]
    return derive(array, keys, mark, None, draw)


def _independent(array: FeatureArray, kind: str, seed: int) -> Draw:
    """Each dimension on its own."""
    moments, dim = _moments_of(array), max(array.widths)

    def draw(column: int, item_index: np.ndarray) -> np.ndarray:
        mean, std = moments(column)
        rng = np.random.default_rng((seed, column, int(item_index[0])))
        shape = (len(item_index), dim)
        unit = rng.standard_normal(shape) if kind == "gaussian" else rng.uniform(-(3**0.5), 3**0.5, shape)
        unit = unit[:, : len(mean)]
        unit *= std
        unit += mean
        return unit

    return draw


def _factored(array: FeatureArray, seed: int) -> Draw:
    """mean + z F^T with F F^T the covariance, z standard normal [N, L D]."""
    moments, ends = _moments_of(array), [0, *accumulate(array.widths)]

    @cache
    def factor() -> np.ndarray:
        return _factor(array)

    def draw(column: int, item_index: np.ndarray) -> np.ndarray:
        begin, end = ends[column], ends[column + 1]
        drawn = np.zeros((len(item_index), end - begin), dtype=np.float32)
        for before in range(column + 1):  # the factor is lower triangular
            # The same numbers for every column, so that columns vary together as the real ones do.
            rng = np.random.default_rng((seed, int(item_index[0]), before))
            unit = rng.standard_normal((len(item_index), array.widths[before]), dtype=np.float32)
            drawn += unit @ factor()[begin:end, ends[before] : ends[before + 1]].T
        return drawn + moments(column)[0]

    return draw


def _factor(array: FeatureArray) -> np.ndarray:
    """float32 [L D, L D], lower triangular: F of the covariance F F^T over all items.

    An item without a column counts in the covariances of the others alone.
    """
    items, total = len(array.missing), sum(array.widths)
    at_once = max(1, arrays.ROWS_AT_ONCE // len(array.columns))
    widths = torch.tensor(array.widths)
    kept = torch.arange(max(array.widths)) < widths[:, None]  # [L, D], without the zeros behind narrower columns
    mean = array.compute_moments(np.arange(1, items))[0]
    weight = (len(array.missing) - torch.from_numpy(array.is_missing(np.arange(items)).sum(0))).clamp_min(1).rsqrt()
    covariance = torch.zeros(total, total, dtype=torch.float64)
    for start in range(1, items, at_once):
        index = np.arange(start, min(start + at_once, items))
        centred = (array.rows(index).double() - mean) * (weight * ~torch.from_numpy(array.is_missing(index)))[..., None]
        flat = centred[:, kept]
        covariance.addmm_(flat.T, flat)
    std = covariance.diagonal().sqrt()
    scale = torch.where(std > 0, std, 1.0)
    covariance /= scale[:, None]
    covariance /= scale
    covariance.diagonal().clamp_min_(1.0).add_(RIDGE)
    return (torch.linalg.cholesky(covariance) * std[:, None]).float().numpy()


def _summed(array: FeatureArray, seed: int) -> Draw:
    """mean + sum_j z_j (h_j - mean) / sqrt(I) over all items."""
    moments = _moments_of(array)

    def draw(column: int, item_index: np.ndarray) -> np.ndarray:
        mean, _ = moments(column)
        return mean + _like_all(array.select([array.names[column]]), mean, item_index, seed)

    return draw


def _moments_of(array: FeatureArray) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of a column over all items, float64 [D] each."""
    every = np.arange(1, len(array.missing))

    @cache
    def moments(column: int) -> tuple[np.ndarray, np.ndarray]:
        mean, variance, _ = array.select([array.names[column]]).compute_moments(every)
        return mean[0].numpy(), variance[0].sqrt().numpy()

    return moments


def _like_all(one: FeatureArray, mean: np.ndarray, item_index: np.ndarray, seed: int) -> np.ndarray:
    """[N, D]: random sums of all items' centred features in the only column of `one`."""
    total = np.zeros((len(item_index), len(mean)), dtype=np.float32)
    count, items = 0, len(one.missing)
    for start in range(1, items, arrays.ROWS_AT_ONCE):
        index = np.arange(start, min(start + arrays.ROWS_AT_ONCE, items))
        present = ~one.is_missing(index)
        centred = (one.rows(index)[:, 0].numpy() - mean.astype(np.float32)) * present
        # The same numbers for every column, so that columns vary together as the real ones do.
        rng = np.random.default_rng((seed, int(item_index[0]), start))
        total += rng.standard_normal((len(item_index), len(index)), dtype=np.float32) @ centred
        count += int(present.sum())
    return total / np.sqrt(max(count, 1))
