"""The metrics on random rankings with ties, against the formulas written out one user and one place at a time.

The same rankings are given to another library by benchmarks/metrics_peers.py.
"""

import math

import numpy as np
import pytest

from lvlmrec.errors import InputError
from lvlmrec.evaluation.metrics import metrics, per_user
from lvlmrec.evaluation.ranking import rank_from_scores


def ranking(row, history, relevant):
    """Candidates, best first; of tied ones the relevant last."""
    candidates = [item for item in range(1, len(row)) if item not in history]
    return sorted(candidates, key=lambda item: (-row[item], item in relevant))


def reference(scores, histories, targets, ks):
    """hr, recall, ndcg, map and mrr from their definitions, users averaged with equal weight."""
    sums = {}
    for row, history, wanted in zip(scores, histories, targets, strict=True):
        relevant = {int(item) for item in wanted if item}
        order = ranking(row, set(history.tolist()), relevant)
        for k in ks:
            places = [place for place, item in enumerate(order[:k], start=1) if item in relevant]
            ideal = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(relevant)) + 1))
            values = {
                "hr": 1.0 if places else 0.0,
                "recall": len(places) / len(relevant),
                "ndcg": sum(1 / math.log2(place + 1) for place in places) / ideal,
                "map": sum(n / place for n, place in enumerate(places, start=1)) / min(k, len(relevant)),
                "mrr": 1 / places[0] if places else 0.0,
            }
            for name, value in values.items():
                sums[f"{name}@{k}"] = sums.get(f"{name}@{k}", 0.0) + value
    return {name: value / len(scores) for name, value in sums.items()}


def case(seed, num_targets, num_users=80, num_items=40, levels=6):
    """Tied scores, histories, and 1 to `num_targets` distinct targets outside them."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=(num_users, num_items + 1)).astype(np.float32)
    shuffled = rng.permuted(np.tile(np.arange(1, num_items + 1), (num_users, 1)), axis=1)
    histories, targets = shuffled[:, :6].copy(), shuffled[:, 6 : 6 + num_targets].copy()
    histories[rng.random(histories.shape) < 0.3] = 0
    targets[:, 1:][rng.random(targets[:, 1:].shape) < 0.4] = 0
    return scores, histories, targets


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_one_target(seed):
    scores, histories, targets = case(seed, num_targets=1)
    expected = reference(scores, histories, targets, (1, 5, 10, 40))
    ranks = rank_from_scores(scores, targets[:, 0], histories)
    result = metrics(ranks, (1, 5, 10, 40))
    assert result == pytest.approx({name: expected[name] for name in result})
    assert metrics(ranks, (1, 5, 10, 40), users=np.arange(80)) == pytest.approx(expected)


def rows_of(scores, histories, targets):
    """One row per target: its rank and its user, in any order."""
    users, columns = np.nonzero(targets)
    order = np.random.default_rng(0).permutation(len(users))
    users, columns = users[order], columns[order]
    return rank_from_scores(scores[users], targets[users, columns], histories[users]), users


@pytest.mark.parametrize("levels", [2, 6, 10**6])  # of the scores: nearly all tied, some, none
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_several_targets(seed, levels):
    scores, histories, targets = case(seed, num_targets=7, levels=levels)
    ranks, users = rows_of(scores, histories, targets)
    result = metrics(ranks, (1, 5, 20), users)
    assert list(result) == [f"{name}@{k}" for k in (1, 5, 20) for name in ("hr", "recall", "ndcg", "map", "mrr")]
    assert result == pytest.approx(reference(scores, histories, targets, (1, 5, 20)))
    assert levels == 2 or len(set(result.values())) > 8, "the metrics do not say the same"


def test_sets_by_hand():
    """User b has targets at places 2, 3 and 30 of the list, user a one at 7."""
    ranks, users = np.array([30, 7, 2, 3]), np.array(["b", "a", "b", "b"], dtype=object)
    result = metrics(ranks, (2, 3, 10), users)
    gains = {1: 1.0, 2: 1 / math.log2(3), 3: 0.5}
    assert (result["hr@2"], result["hr@10"]) == (0.5, 1.0)
    assert result["recall@2"] == pytest.approx(1 / 6) and result["recall@3"] == pytest.approx(2 / 6)
    assert result["ndcg@2"] == pytest.approx(gains[2] / (gains[1] + gains[2]) / 2)
    assert result["ndcg@3"] == pytest.approx((gains[2] + gains[3]) / sum(gains.values()) / 2)
    assert result["map@2"] == pytest.approx(1 / 2 / 2 / 2), "of three targets two can be among the first two"
    assert result["map@10"] == pytest.approx(((1 / 2 + 2 / 3) / 3 + 1 / 7) / 2)
    assert result["mrr@10"] == pytest.approx((1 / 2 + 1 / 7) / 2)
    np.testing.assert_allclose(per_user(ranks, "recall@3", users), [0, 2 / 3]), "users in sorted order"


def test_targets_of_a_user_that_tie_have_a_place_each():
    """Scores 5 5 3 of targets x, y and another item: x and y both rank 2, and stand first and second."""
    scores, history = np.array([[0, 5, 5, 3.0]]), np.array([[0]])
    ranks = np.concatenate([rank_from_scores(scores, np.array([target]), history) for target in (1, 2)])
    assert ranks.tolist() == [2, 2]
    result = metrics(ranks, (1, 2), users=np.array([7, 7]))
    assert (result["recall@1"], result["recall@2"], result["ndcg@2"], result["map@2"]) == (0.5, 1, 1, 1)
    others = metrics(ranks, (1, 2), users=np.array([7, 8]))
    assert others["recall@1"] == 0, "of two users each stays where it is"


@pytest.mark.parametrize("name", ["precision@10", "recall", "map@0"])
def test_an_unknown_metric_of_sets_names_the_choices(name):
    with pytest.raises(InputError, match="expected hr@K, recall@K, ndcg@K, map@K, mrr@K"):
        per_user(np.array([1]), name, np.array([0]))
