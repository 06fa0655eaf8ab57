import math

import numpy as np
import pytest

from lvlmrec.evaluation.beyond_accuracy import beyond_accuracy, coverage, gini, novelty, popularity

COUNTS = np.array([0, 8, 4, 2, 2, 0])  # items 1 to 5, 16 interactions; item 5 is cold
LISTS = np.array([[1, 2], [1, 3], [1, 5], [2, 0]])  # the last user has one candidate


def test_all_measures_by_hand():
    result = beyond_accuracy(LISTS, np.array([1, 4, 5, 2]), COUNTS, ks=(1, 2))
    expected = {
        "target_popularity": (8 + 2 + 0 + 4) / 4,
        "coverage@1": 2 / 5,  # items 1 and 2
        "gini@1": (4 * 3 + 2 * 1) / (4 * 4),  # exposures 0 0 0 1 3
        "novelty@1": (3 * 1 + 1 * 2) / 4,
        "popularity@1": (3 * 8 + 4) / 4,
        "coverage@2": 4 / 5,
        "gini@2": (-2 * 1 + 0 * 1 + 2 * 2 + 4 * 3) / (4 * 7),  # exposures 0 1 1 2 3
        "novelty@2": (3 * 1 + 2 * 2 + 1 * 3 + 1 * 4) / 7,  # the cold item counts as one interaction: 4 bits
        "popularity@2": (3 * 8 + 2 * 4 + 2 + 0) / 7,
    }
    assert result == pytest.approx(expected) and list(result) == list(expected)
    assert all(type(value) is float for value in result.values())


def test_gini_is_0_for_equal_exposure_and_1_for_one_item():
    assert gini(np.full(7, 3)) == pytest.approx(0)
    assert gini(np.array([0, 0, 9, 0])) == pytest.approx(1)
    assert gini(np.array([5])) == 0


def test_gini_is_the_mean_difference_of_all_pairs():
    """Its other definition: mean |x - y| over pairs of different items, over twice the mean."""
    exposure = np.random.default_rng(0).integers(0, 50, 40)
    pairs = np.abs(exposure[:, None] - exposure[None]).sum() / (40 * 39)
    assert gini(exposure) == pytest.approx(pairs / (2 * exposure.mean()))


def test_novelty_of_shares_and_the_rest_on_their_own():
    assert novelty(np.array([1, 1]), np.array([3, 1])) == pytest.approx((math.log2(4 / 3) + 2) / 2)
    assert popularity(np.array([1, 3]), np.array([4, 8])) == 7
    assert coverage(np.array([0, 2, 0, 1])) == 0.5


def test_empty_lists_and_too_long_a_cut_off_are_refused():
    for lists in (np.zeros((0, 2), np.int64), np.zeros((3, 2), np.int64)):
        with pytest.raises(ValueError, match="0 items"):
            beyond_accuracy(lists, np.ones(len(lists), np.int64), COUNTS, ks=(2,))
    with pytest.raises(ValueError, match="2 places"):
        beyond_accuracy(LISTS, np.array([1, 1, 1, 1]), COUNTS, ks=(2, 3))
