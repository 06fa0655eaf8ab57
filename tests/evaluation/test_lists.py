"""The lists of recommendations, against sorting one user at a time."""

import numpy as np
import pytest
import torch

from lvlmrec.evaluation.lists import top_from_scores
from lvlmrec.evaluation.ranking import score_chunks


def sorted_whole(scores, histories, k):
    """The rule, one user at a time: best score first, NaN above all, of tied items the smaller index first."""
    lists = []
    for row, history in zip(scores, histories, strict=True):
        candidates = [item for item in range(1, len(row)) if item not in history]
        keys = {item: (-np.inf if np.isnan(row[item]) else -row[item], item) for item in candidates}
        best = sorted(candidates, key=keys.__getitem__)[:k]
        lists.append(best + [0] * (k - len(best)))
    return np.array(lists)


def top_items(queries, items, histories, k, chunk_size=128):
    """The lists of chunk after chunk; each chunk's scores lie where those of the one before lay."""
    chunks = score_chunks(queries, items, chunk_size)
    return np.concatenate([top_from_scores(scores, histories[users], k) for users, scores in chunks])


def case(seed, num_users=60, num_items=15, levels=4, odd=0.05):
    """Scores of few levels, so most are tied, with NaN and infinities; histories that repeat."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=(num_users, num_items + 1)).astype(np.float32)
    for value in (np.nan, np.inf, -np.inf):
        scores[rng.random(scores.shape) < odd] = value
    return scores, rng.integers(0, num_items + 1, (num_users, 5)).astype(np.int32)


@pytest.mark.parametrize("k", [1, 4, 10, 15, 16, 20])
@pytest.mark.parametrize("seed", range(3))
def test_the_lists_are_those_of_a_whole_sort_with_ties_and_nan(seed, k):
    scores, histories = case(seed)
    before = scores.copy()
    lists = top_from_scores(scores, histories, k)
    assert lists.dtype == np.int64
    np.testing.assert_array_equal(lists, sorted_whole(scores, histories, k))
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("chunk_size", [1, 7, 60, 1000])
def test_top_items_is_the_same_whatever_the_chunk(chunk_size):
    rng = np.random.default_rng(0)
    queries = torch.from_numpy(rng.integers(-2, 3, (60, 3)).astype(np.float32))  # whole numbers: ties are exact
    items = torch.from_numpy(rng.integers(-2, 3, (16, 3)).astype(np.float32))
    _, histories = case(0)
    lists = top_items(queries, items, histories, 6, chunk_size)
    np.testing.assert_array_equal(lists, sorted_whole((queries @ items.T).numpy(), histories, 6))


def test_equal_and_nan_scores_list_the_first_candidates():
    history = np.array([[0, 2, 3]])
    for value in (0.0, np.nan, np.inf, -np.inf):
        assert top_from_scores(np.full((1, 8), value), history, 3).tolist() == [[1, 4, 5]]
    assert top_items(torch.full((1, 2), torch.nan), torch.randn(8, 2), history, 3).tolist() == [[1, 4, 5]]


def test_half_precision_and_autocast_make_no_ties():
    items = torch.tensor([[0.0], [1.0], [1.001]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lists = top_items(torch.ones(1, 1, dtype=torch.bfloat16), items, np.array([[0]]), 2)
    assert lists.tolist() == [[2, 1]]


def test_no_users_have_no_lists():
    assert list(score_chunks(torch.empty(0, 2), torch.randn(4, 2))) == []
    lists = top_from_scores(torch.empty(0, 5), np.empty((0, 3), np.int32), 5)
    assert lists.shape == (0, 5) and lists.dtype == np.int64
