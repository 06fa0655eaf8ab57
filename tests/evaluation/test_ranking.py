import numpy as np
import pytest
import torch

from lvlmrec.evaluation.ranking import rank_from_scores, rank_targets


def brute_force(scores, targets, histories):
    """The rule, one candidate at a time."""
    ranks = []
    for row, target, history in zip(scores, targets, histories, strict=True):
        rank = 1
        for item in range(1, len(row)):
            if item == target or item in history:
                continue
            lower = row[item] < row[target]  # False for NaN on either side
            rank += 0 if lower else 1
        ranks.append(rank)
    return np.array(ranks)


def case(seed, num_users=40, num_items=15, levels=4):
    """Scores of few levels, so most are tied, with NaN and infinities; histories that repeat and hold the target."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=(num_users, num_items + 1)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.05] = np.nan
    scores[rng.random(scores.shape) < 0.05] = np.inf
    scores[rng.random(scores.shape) < 0.05] = -np.inf
    targets = rng.integers(1, num_items + 1, num_users).astype(np.int32)
    histories = rng.integers(0, num_items + 1, (num_users, 5)).astype(np.int32)
    return scores, targets, histories


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_brute_force_with_ties_and_nan(seed):
    scores, targets, histories = case(seed)
    before = scores.copy()
    ranks = rank_from_scores(scores, targets, histories)
    assert ranks.dtype == np.int64
    np.testing.assert_array_equal(ranks, brute_force(scores, targets, histories))
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 1000])
def test_rank_targets_equals_brute_force_whatever_the_chunk(chunk_size):
    rng = np.random.default_rng(0)
    queries = torch.from_numpy(rng.integers(-2, 3, (40, 3)).astype(np.float32))  # whole numbers: ties are exact
    items = torch.from_numpy(rng.integers(-2, 3, (16, 3)).astype(np.float32))
    _, targets, histories = case(0)
    ranks = rank_targets(queries, items, targets, histories, chunk_size)
    np.testing.assert_array_equal(ranks, brute_force((queries @ items.T).numpy(), targets, histories))


def test_equal_scores_rank_last_among_the_candidates():
    ranks = rank_from_scores(np.zeros((2, 11)), np.array([4, 4]), np.array([[0, 0, 0], [1, 2, 2]]))
    assert ranks.tolist() == [10, 8]


def test_nan_never_helps():
    scores = np.array([[9.0, np.nan, 1.0, 0.0], [9.0, 3.0, np.nan, np.nan]])
    ranks = rank_from_scores(scores, np.array([1, 1]), np.zeros((2, 1), dtype=np.int64))
    assert ranks.tolist() == [3, 3]
    queries, items = torch.full((1, 2), torch.nan), torch.randn(5, 2)
    assert rank_targets(queries, items, np.array([2]), np.array([[0]])).tolist() == [4]


def test_padding_and_history_are_no_candidates_and_a_target_in_the_history_is_ranked():
    scores = np.array([[99.0, 5.0, 4.0, 3.0, 2.0]])
    assert rank_from_scores(scores, np.array([4]), np.array([[0, 1, 2]])).tolist() == [2]
    assert rank_from_scores(scores, np.array([3]), np.array([[1, 3, 3]])).tolist() == [2]


def test_half_precision_and_autocast_make_no_ties():
    items = torch.tensor([[0.0], [1.0], [1.001]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ranks = rank_targets(torch.ones(1, 1, dtype=torch.bfloat16), items, np.array([2]), np.array([[0]]))
    assert ranks.tolist() == [1]


def test_no_users_have_no_ranks():
    ranks = rank_targets(torch.empty(0, 2), torch.randn(4, 2), np.empty(0, np.int32), np.empty((0, 3), np.int32))
    assert ranks.shape == (0,) and ranks.dtype == np.int64


@pytest.mark.parametrize("target", [0, 5])
def test_a_target_outside_the_catalogue_is_refused(target):
    with pytest.raises(ValueError, match="expected 1 to 4"):
        rank_from_scores(np.zeros((1, 5)), np.array([target]), np.array([[0]]))
