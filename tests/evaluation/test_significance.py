import itertools

import numpy as np
import pytest

from lvlmrec.evaluation.metrics import per_user
from lvlmrec.evaluation.significance import holm, paired_t_test, permutation_test, sign_flip_p_value


def paired_test(ranks_a, ranks_b, metric="ndcg@10", users=None, **settings):
    """The permutation test for two runs' ranks of the same targets."""
    return permutation_test(per_user(ranks_a, metric, users), per_user(ranks_b, metric, users), **settings)


def test_identical_ranks_are_no_evidence():
    ranks = np.random.default_rng(0).integers(1, 50, 1000)
    result = paired_test(ranks, ranks)
    assert result["p_users"] == 1 and result["difference"] == 0
    assert (result["users"], result["better"], result["worse"], result["equal"]) == (1000, 0, 0, 1000)


def test_counts_and_difference_are_those_of_the_users():
    result = paired_test(np.array([1, 1, 30, 2, 40]), np.array([3, 1, 1, 3, 50]), metric="hr@2")
    assert result["users"] == 5
    assert (result["better"], result["worse"], result["equal"]) == (2, 1, 2)
    assert result["difference"] == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    "differences",
    [
        [0.5, 0.5, -0.25, 1.0, 0.25, 0.5],
        [1.0, 1.0, 1.0],
        [0.3, -0.1, 0.0, 0.2],
        [0.1, 0.2, 0.9, 0.3],  # in sorted order the same sum is smaller by rounding
    ],
)
def test_p_value_is_that_of_all_sign_assignments(differences):
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product([-1, 1], repeat=len(differences))]
    exact = np.mean(np.array(sums) >= abs(sum(differences)) - 1e-12)
    assert sign_flip_p_value(np.array(differences), 100_000, seed=0) == pytest.approx(exact, abs=0.006)


def test_a_clear_difference_is_found_and_has_no_direction():
    rng = np.random.default_rng(0)
    worse = rng.integers(1, 40, 2000)
    better = np.maximum(1, worse - rng.integers(0, 3, 2000))
    forth, back = paired_test(better, worse), paired_test(worse, better)
    assert forth["p_users"] < 0.001 and forth["difference"] == -back["difference"] > 0
    assert forth["p_users"] == pytest.approx(back["p_users"], abs=0.001)


def test_noise_is_called_significant_at_the_stated_rate():
    """Of 400 comparisons without a difference, 5 % (20, standard deviation 4.4) fall below .05."""
    rng = np.random.default_rng(1)
    below = 0
    for _ in range(400):
        one, other = rng.integers(1, 60, (2, 300))
        below += paired_test(one, other, num_resamples=999)["p_users"] <= 0.05
    assert 7 <= below <= 33


def test_the_seed_alone_decides_the_p_value():
    one, other = np.random.default_rng(0).integers(1, 100, (2, 50_000))
    first = paired_test(one, other, num_resamples=9999)
    assert first == paired_test(one, other, num_resamples=9999)
    assert first["p_users"] != paired_test(one, other, num_resamples=9999, seed=1)["p_users"]


def test_different_users_cannot_be_paired():
    with pytest.raises(ValueError, match="3 and 2 users"):
        paired_test(np.array([1, 2, 3]), np.array([1, 2]))


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.5})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_the_t_test_over_seeds_by_hand():
    result = paired_t_test([0.30, 0.34, 0.32], [0.28, 0.30, 0.29])
    # Differences .02 .04 .03: mean .03, standard deviation .01, t = .03 / (.01 / sqrt 3), two degrees of freedom.
    t = 3 * 3**0.5
    assert result["seeds"] == 3 and result["difference"] == pytest.approx(0.03)
    assert (result["mean_a"], result["mean_b"]) == pytest.approx((0.32, 0.29))
    assert (result["sd_a"], result["sd_b"]) == pytest.approx((0.02, 0.01))
    assert result["t"] == pytest.approx(t)
    assert result["p_value"] == pytest.approx(1 - t / (2 + t * t) ** 0.5)  # the closed form for two degrees of freedom


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_without_spread_between_the_seeds_there_is_no_t_test(shift):
    values = [0.3, 0.1, 0.7]
    result = paired_t_test([value + shift for value in values], values)
    assert result["difference"] == pytest.approx(shift)
    assert (result["t"], result["p_value"]) == (None, None)


def test_one_seed_or_unequal_numbers_of_them_are_refused():
    for a, b in (([0.1], [0.2]), ([0.1, 0.2], [0.1, 0.2, 0.3]), ([], [])):
        with pytest.raises(ValueError, match="expected the same seeds and at least two"):
            paired_t_test(a, b)


def runs_of_one_method(rng, num_seeds, num_users=1000, seed_noise=0.02):
    """Whether each user is hit, [seeds, users]: the runs of a method are not equally good, and users differ."""
    easy = rng.beta(1, 9, num_users)
    good = rng.normal(0, seed_noise, (num_seeds, 1))
    return (rng.random((num_seeds, num_users)) < easy + good).astype(float)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_a_method_differs_from_itself_at_the_stated_rate_over_seeds_and_far_more_often_over_users(num_seeds):
    """Of 600 comparisons 5 % are 30, with a standard deviation of 5.3. That over users says that these runs differ, and
    they do; but the methods do not, which is why its p value says that it leaves the seeds out."""
    rng = np.random.default_rng(0)
    over_seeds = over_users = 0
    for _ in range(600):
        ours, theirs = runs_of_one_method(rng, num_seeds), runs_of_one_method(rng, num_seeds)
        p_value = paired_t_test(ours.mean(1), theirs.mean(1))["p_value"]
        over_seeds += p_value is not None and p_value < 0.05
        over_users += permutation_test(ours.mean(0), theirs.mean(0), num_resamples=499)["p_users"] < 0.05
    assert 12 <= over_seeds <= 48
    assert over_users > 120


def test_a_user_is_flipped_with_all_its_targets():
    """Two users of three targets each: the signs of two users, not of six targets, so no p value is below 1/2."""
    users = np.repeat([4, 9], 3)
    better, worse = np.array([1, 2, 3, 1, 2, 3]), np.array([50, 60, 70, 50, 60, 70])
    result = paired_test(better, worse, "recall@10", users, num_resamples=999)
    assert result["users"] == 2 and result["difference"] == 1
    assert result["p_users"] == pytest.approx(1 / 2, abs=0.06)
    assert paired_test(better, worse, "hr@10", num_resamples=999)["p_users"] < 0.06, "as if they were six users"
