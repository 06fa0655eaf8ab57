"""A contract for every baseline, each one's scores by hand, and the real numbers on MicroLens-50K."""

import numpy as np
import pytest

from lvlmrec.baselines import BASELINES
from lvlmrec.baselines.item_knn import ItemKNN
from lvlmrec.evaluation.metrics import metrics
from lvlmrec.evaluation.ranking import rank_from_scores

TRAIN = np.array([[0, 1, 2, 3], [0, 0, 1, 2], [0, 4, 1, 2], [0, 0, 5, 4], [0, 0, 0, 1]], dtype=np.int32)
HISTORIES = np.array([[0, 0, 1], [4, 5, 2], [0, 0, 6], [0, 0, 0]], dtype=np.int32)
NUM_ITEMS = 7  # 6 and 7 never occur in training


@pytest.mark.parametrize("name", BASELINES)
def test_scores_are_finite_float32_over_the_catalogue_and_padding_is_never_recommended(name):
    baseline = BASELINES[name]()
    assert baseline.fit(TRAIN, NUM_ITEMS) is baseline
    scores = baseline.score(HISTORIES)
    assert scores.shape == (4, NUM_ITEMS + 1) and scores.dtype == np.float32
    assert np.isneginf(scores[:, 0]).all() and np.isfinite(scores[:, 1:]).all()


@pytest.mark.parametrize("name", BASELINES)
def test_a_score_depends_on_its_own_history_alone_and_inputs_stay_as_they_are(name):
    train, histories = TRAIN.copy(), HISTORIES.copy()
    baseline = BASELINES[name]().fit(train, NUM_ITEMS)
    together = baseline.score(histories)
    for row in range(len(histories)):
        np.testing.assert_array_equal(baseline.score(histories[row : row + 1])[0], together[row])
    wider = np.pad(histories, ((0, 0), (3, 0)))
    np.testing.assert_array_equal(baseline.score(wider), together)
    np.testing.assert_array_equal(train, TRAIN)
    np.testing.assert_array_equal(histories, HISTORIES)


@pytest.mark.parametrize("name", BASELINES)
def test_what_everybody_does_next_ranks_first(name):
    train = np.array([[1, 2]] * 5 + [[3, 4]] + [[5, 6]], dtype=np.int32)
    scores = BASELINES[name]().fit(train, 6).score(np.array([[0, 1]], dtype=np.int32))
    assert rank_from_scores(scores, np.array([2]), np.array([[0, 1]])).tolist() == [1]


def test_popularity_counts_interactions():
    scores = BASELINES["popularity"]().fit(TRAIN, NUM_ITEMS).score(HISTORIES)
    np.testing.assert_array_equal(scores[:, 1:], [[4, 3, 1, 2, 1, 0, 0]] * 4)


def test_markov_counts_what_followed_the_last_item_and_breaks_ties_by_popularity():
    scores = BASELINES["markov"]().fit(TRAIN, NUM_ITEMS).score(HISTORIES)
    tie_break = np.array([4, 3, 1, 2, 1, 0, 0]) / 5
    np.testing.assert_allclose(
        scores[0, 1:], np.array([0, 3, 0, 0, 0, 0, 0]) + tie_break, rtol=1e-6
    )  # 1 -> 2 three times
    np.testing.assert_allclose(scores[1, 1:], np.array([0, 0, 1, 0, 0, 0, 0]) + tie_break, rtol=1e-6)  # 2 -> 3 once
    np.testing.assert_allclose(scores[2:, 1:], [tie_break, tie_break], rtol=1e-6)  # nothing known


def cosines(train):
    """Cosine of every two items' sets of users, 0 with itself, item by item."""
    users = [{u for u, row in enumerate(train) if item in row} for item in range(NUM_ITEMS + 1)]
    table = np.zeros((NUM_ITEMS + 1, NUM_ITEMS + 1))
    for one in range(1, NUM_ITEMS + 1):
        for other in range(1, NUM_ITEMS + 1):
            if one != other and users[one] and users[other]:
                table[one, other] = len(users[one] & users[other]) / np.sqrt(len(users[one]) * len(users[other]))
    return table


def test_item_knn_sums_the_cosines_of_the_history():
    train = np.vstack([TRAIN, [[0, 2, 3, 2]]]).astype(np.int32)  # item 2 twice: one user all the same
    table = cosines(train)
    scores = BASELINES["item_knn"]().fit(train, NUM_ITEMS).score(HISTORIES)
    expected = [table[1], table[4] + table[5] + table[2], table[6], np.zeros(NUM_ITEMS + 1)]
    np.testing.assert_allclose(scores[:, 1:], np.array(expected)[:, 1:], rtol=1e-6, atol=1e-7)


def test_item_knn_keeps_the_nearest_alone():
    table = cosines(TRAIN)
    scores = ItemKNN(num_neighbours=1).fit(TRAIN, NUM_ITEMS).score(np.array([[1]], dtype=np.int32))
    assert np.flatnonzero(scores[0] > 0).tolist() == [2] == [int(table[1].argmax())]


@pytest.fixture(scope="module")
def microlens(real_data):
    """The last 13 items of each user with at least 5, [U, 13] left-padded, items numbered from 1."""
    text = (real_data / "microlens_50k" / "MicroLens-50k_pairs.tsv").read_text()
    rows = [line.split("\t")[1].split() for line in text.splitlines()]
    rows = [row[-13:] for row in rows if len(row) >= 5]
    index = {item: i for i, item in enumerate(sorted({item for row in rows for item in row}), start=1)}
    sequences = np.zeros((len(rows), 13), dtype=np.int32)
    for user, row in enumerate(rows):
        sequences[user, 13 - len(row) :] = [index[item] for item in row]
    assert sequences.shape == (50_000, 13) and len(index) == 19_099
    return sequences


@pytest.mark.data
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "hit_rate", "ndcg"),
    [("popularity", 0.0028, 0.0015), ("markov", 0.0425, 0.0264), ("item_knn", 0.039, 0.0193)],
)
def test_real_numbers_on_the_microlens_50k_test_split(microlens, name, hit_rate, ndcg):
    baseline = BASELINES[name]().fit(microlens[:, :-2], int(microlens.max()))
    histories, targets = microlens[:, :-1], microlens[:, -1]
    ranks = [
        rank_from_scores(
            baseline.score(histories[start : start + 500, -10:]),
            targets[start : start + 500],
            histories[start : start + 500],
        )
        for start in range(0, len(targets), 500)
    ]
    result = metrics(np.concatenate(ranks))
    assert result["hr@10"] == pytest.approx(hit_rate, abs=1e-4)
    assert result["ndcg@10"] == pytest.approx(ndcg, abs=1e-4)
