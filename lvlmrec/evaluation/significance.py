"""Significance of the difference between two methods: a test over seeds, and one over users that ignores the seeds.

The primary test is Student's paired t-test over seeds, as in the papers, with Holm's correction over the methods that a
table compares: a method is better when the difference exceeds what another seed alone changes. It needs two seeds.

The other is a sign-flip permutation test over users: if two runs are exchangeable, each user's difference could as well
have the opposite sign. It says whether these two runs differ on other users too, not whether the methods differ: two
seeds of one method differ by it far more often than one time in twenty. Its p value is therefore called `p_users`. It
tests the mean that is reported. Wilcoxon's signed-rank test is about another quantity and has little power here, as
most differences are zero and many of the others tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

LEFT_OUT = "seeds left out"  # beside every p_users that people read


def permutation_test(
    values_a: NDArray[np.float64], values_b: NDArray[np.float64], num_resamples: int = 100_000, seed: int = 0
) -> dict[str, float | int]:
    """Two-sided test of the mean difference a - b of a metric; values [U] of the same users in the same order.

    A user's sign is flipped for all its targets together: its value is the metric of its set, or a mean over seeds.
    Returns difference, p_users (at least 1 / (num_resamples + 1)), users, and how many users are better under a, worse
    and equal. Raises `ValueError` when the numbers of users differ or are 0.
    """
    if values_a.shape != values_b.shape or len(values_a) == 0:
        raise ValueError(f"values: {len(values_a)} and {len(values_b)} users, expected the same users and some")
    differences = (values_a - values_b).round(9)  # so that differences that are equal but for rounding are equal
    return {
        "difference": float((values_a - values_b).mean()),
        "p_users": sign_flip_p_value(differences, num_resamples, seed),
        "users": len(differences),
        "better": int((differences > 0).sum()),
        "worse": int((differences < 0).sum()),
        "equal": int((differences == 0).sum()),
    }


def paired_t_test(values_a: Sequence[float], values_b: Sequence[float]) -> dict[str, float | int | None]:
    """Two-sided paired t-test (Student, 1908) of a metric of two methods, run with the same seeds in the same order.

    Returns seeds, mean and sample standard deviation of both, the mean difference a - b, t and p_value. The last two
    are None when all differences are equal, as t divides by their standard deviation. Raises `ValueError` for fewer
    than two seeds or unequal numbers of them.
    """
    if len(values_a) != len(values_b) or len(values_a) < 2:
        raise ValueError(f"seeds: {len(values_a)} and {len(values_b)} values, expected the same seeds and at least two")
    from scipy import stats  # slow to import, and training workers do not need it

    a, b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    differences = a - b
    spread = bool(np.ptp(differences) > 1e-12 * np.abs([a, b]).max())  # equal differences may differ by rounding
    test = stats.ttest_rel(a, b) if spread else None
    return {
        "seeds": len(a),
        "mean_a": float(a.mean()),
        "sd_a": float(a.std(ddof=1)),
        "mean_b": float(b.mean()),
        "sd_b": float(b.std(ddof=1)),
        "difference": float(differences.mean()),
        "t": float(test.statistic) if test else None,
        "p_value": float(test.pvalue) if test else None,
    }


def sign_flip_p_value(differences: NDArray[np.float64], num_resamples: int, seed: int) -> float:
    """Share of random sign assignments whose |sum| is at least that of `differences` [U], counting the observed one.

    Differences of equal size are flipped together: the signs of n of them sum to 2 Binomial(n, 1/2) - n. The
    distribution is the same, and memory is `num_resamples` numbers (a metric cut off at K has at most K (K + 1) / 2
    sizes of difference).
    """
    rng = np.random.default_rng(seed)
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    sums = np.zeros(num_resamples)
    for size, count in zip(sizes, counts, strict=True):
        sums += size * (2 * rng.binomial(count, 0.5, num_resamples) - count)
    tolerance = 1e-9 * sizes.sum()  # equal sums may differ by rounding
    is_as_extreme = np.abs(sums) >= abs(differences.sum()) - tolerance
    return float((1 + is_as_extreme.sum()) / (1 + num_resamples))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) step-down correction of named p values; the result has the order of `p_values`."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - place)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
