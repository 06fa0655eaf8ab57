import math

import numpy as np
import pytest

from lvlmrec.errors import InputError
from lvlmrec.evaluation.metrics import metrics, per_user
from lvlmrec.evaluation.slices import by_coldness, slice_metrics

RANKS = np.array([1, 3, 10, 11, 500])


def test_means_over_users_by_hand():
    result = metrics(RANKS)
    assert list(result) == ["hr@10", "ndcg@10", "mrr@10", "hr@20", "ndcg@20", "mrr@20"]
    assert result["hr@10"] == pytest.approx(3 / 5)
    assert result["ndcg@10"] == pytest.approx((1 / 1 + 1 / 2 + 1 / math.log2(11)) / 5)
    assert result["mrr@10"] == pytest.approx((1 / 1 + 1 / 3 + 1 / 10) / 5)
    assert result["hr@20"] == pytest.approx(4 / 5)
    assert result["ndcg@20"] == pytest.approx((1 / 1 + 1 / 2 + 1 / math.log2(11) + 1 / math.log2(12)) / 5)
    assert result["mrr@20"] == pytest.approx((1 / 1 + 1 / 3 + 1 / 10 + 1 / 11) / 5)
    assert all(type(value) is float for value in result.values())


def test_other_cut_offs_and_single_users():
    assert metrics(RANKS, ks=(1,)) == {"hr@1": 0.2, "ndcg@1": 0.2, "mrr@1": 0.2}
    np.testing.assert_allclose(per_user(RANKS, "mrr@10"), [1, 1 / 3, 1 / 10, 0, 0])


@pytest.mark.parametrize("name", ["recall@10", "hr", "hr@", "hr@0", "hr@-1", "hr@1.5"])
def test_an_unknown_metric_names_the_choices(name):
    with pytest.raises(InputError, match=r"expected hr@K, ndcg@K, mrr@K"):
        per_user(RANKS, name)


def test_nobody_and_rank_zero_are_refused():
    with pytest.raises(ValueError, match="no users"):
        metrics(np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="count from 1"):
        metrics(np.array([0, 1]))


def test_slices_count_their_users_and_an_empty_one_has_no_metrics():
    cold = np.array([False, False, True, True, False])
    table = slice_metrics(RANKS, by_coldness(cold), ks=(10,))
    assert list(table) == ["overall", "warm", "cold"]
    assert table["overall"] == pytest.approx(
        {"users": 5, "hr@10": 3 / 5, "ndcg@10": (1 + 1 / 2 + 1 / math.log2(11)) / 5, "mrr@10": (1 + 1 / 3 + 1 / 10) / 5}
    )
    assert table["warm"] == pytest.approx(
        {"users": 3, "hr@10": 2 / 3, "ndcg@10": (1 + 1 / 2) / 3, "mrr@10": (1 + 1 / 3) / 3}
    )
    assert table["cold"] == pytest.approx(
        {"users": 2, "hr@10": 1 / 2, "ndcg@10": 1 / math.log2(11) / 2, "mrr@10": 1 / 10 / 2}
    )
    assert slice_metrics(RANKS, by_coldness(np.zeros(5, dtype=bool)))["cold"] == {"users": 0}
