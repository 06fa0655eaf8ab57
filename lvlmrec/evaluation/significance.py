"""Is one way to train better than another? A test over seeds, and one over users, which leaves the seeds out.

The primary test is Student's paired t-test over seeds, as in the papers, with Holm's correction over the methods that a
table compares: another seed gives another run, and a method is better when it is so beyond that. It needs two seeds.

The other is a sign-flip permutation test over users: if two runs are exchangeable, each user's difference is as likely
to have the other sign. It tells whether these very runs differ on other users, not whether the methods do: two seeds of
one method differ by it far more often than one time in twenty. Its p value is therefore called `p_users`. It asks about
the mean that is reported. Wilcoxon's signed-rank test asks about another quantity and is weak here: most users differ
by nothing, and the rest are full of ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

LEFT_OUT = "seeds left out"  # beside every p_users that people read


def permutation_test(
    values_a: NDArray[np.float64], values_b: NDArray[np.float64], num_resamples: int = 100_000, seed: int = 0
) -> dict[str, float | int]:
    """Two-sided test of the mean difference a - b of a metric of the same users in the same order, [U] each.

    A user is flipped as a whole, with all its targets: its value is that of its set, or its mean over seeds. Returns
    difference, p_users (at least 1 / (num_resamples + 1)), users, and how many of them are better under a, worse,
    equal. Raises `ValueError` when the users do not match.
    """
    if values_a.shape != values_b.shape or len(values_a) == 0:
        raise ValueError(f"values: {len(values_a)} and {len(values_b)} users, expected the same users and some")
    differences = (values_a - values_b).round(9)  # so that differences equal on paper fall together
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
    are None when all differences are equal: there is no spread to hold the difference against. Raises `ValueError`
    for fewer than two seeds or unequal numbers of them.
    """
    if len(values_a) != len(values_b) or len(values_a) < 2:
        raise ValueError(f"seeds: {len(values_a)} and {len(values_b)} values, expected the same seeds and at least two")
    from scipy import stats  # here, for workers that train do without it

    a, b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    differences = a - b
    spread = bool(np.ptp(differences) > 1e-12 * np.abs([a, b]).max())  # differences equal on paper differ by rounding
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
    """Share of random sign assignments whose |sum| reaches that of `differences` [U], counting the observed one.

    Differences of equal size are flipped together: the signs of n of them sum to 2 Binomial(n, 1/2) - n. That is
    the same distribution, and memory stays at `num_resamples` numbers (there are at most K (K + 1) / 2 sizes for
    a metric cut off at K).
    """
    rng = np.random.default_rng(seed)
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    sums = np.zeros(num_resamples)
    for size, count in zip(sizes, counts, strict=True):
        sums += size * (2 * rng.binomial(count, 0.5, num_resamples) - count)
    slack = 1e-9 * sizes.sum()  # sums that are equal on paper differ by rounding
    reached = np.abs(sums) >= abs(differences.sum()) - slack
    return float((1 + reached.sum()) / (1 + num_resamples))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) step-down correction of several named p values, in the given order."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - place)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
