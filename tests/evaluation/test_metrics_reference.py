"""The metrics on random rankings with ties, against the formulas written out one user and one place at a time.

The same rankings are given to another library by benchmarks/metrics_peers.py.
"""

import math

import numpy as np
import pytest

from lvlmrec.evaluation.lists import top_from_scores
from lvlmrec.evaluation.metrics import metrics, metrics_of_sets
from lvlmrec.evaluation.ranking import rank_from_scores


def ranking(row, history, relevant):
    """Candidates, best first; of tied ones the relevant last."""
    candidates = [item for item in range(1, len(row)) if item not in history]
    return sorted(candidates, key=lambda item: (-row[item], item in relevant))


def reference(scores, histories, targets, ks):
    """hr, recall, ndcg and mrr from their definitions, users averaged with equal weight."""
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
    assert all(expected[f"recall@{k}"] == expected[f"hr@{k}"] for k in (1, 5, 10, 40))
    lists = top_from_scores(scores, histories, 40, behind=targets)
    assert metrics_of_sets(lists, targets, (1, 5, 10, 40)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_several_targets(seed):
    scores, histories, targets = case(seed, num_targets=7)
    lists = top_from_scores(scores, histories, 20, behind=targets)
    result = metrics_of_sets(lists, targets, (1, 5, 20))
    assert result == pytest.approx(reference(scores, histories, targets, (1, 5, 20)))
    assert len(set(result.values())) > 8, "the metrics do not say the same"


def test_sets_by_hand():
    result = metrics_of_sets(np.array([[4, 1, 2], [5, 6, 0]]), np.array([[1, 2, 9], [7, 0, 0]]), ks=(2, 3))
    assert list(result) == [f"{name}@{k}" for k in (2, 3) for name in ("hr", "recall", "ndcg", "mrr")]
    gains = {1: 1.0, 2: 1 / math.log2(3), 3: 0.5}
    assert result["hr@2"] == 0.5 and result["mrr@3"] == pytest.approx(1 / 4)
    assert result["recall@2"] == pytest.approx(1 / 6) and result["recall@3"] == pytest.approx(2 / 6)
    assert result["ndcg@2"] == pytest.approx(gains[2] / (gains[1] + gains[2]) / 2)
    assert result["ndcg@3"] == pytest.approx((gains[2] + gains[3]) / sum(gains.values()) / 2)


def test_users_without_targets_and_short_lists_are_refused():
    with pytest.raises(ValueError, match="1 of 2 users have none"):
        metrics_of_sets(np.array([[1], [2]]), np.array([[1], [0]]), ks=(1,))
    with pytest.raises(ValueError, match="0 of 0 users"):
        metrics_of_sets(np.zeros((0, 1), int), np.zeros((0, 1), int), ks=(1,))
    with pytest.raises(ValueError, match="1 places, expected 5"):
        metrics_of_sets(np.array([[1]]), np.array([[1]]), ks=(1, 5))
