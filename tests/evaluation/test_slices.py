import numpy as np
import pytest

from lvlmrec.evaluation.slices import (
    by_coldness,
    by_history_length,
    by_occurrences,
    by_popularity,
    slice_metrics,
    slices_of,
)

COUNTS = np.array([0, 9, 9, 6, 6, 3, 2, 1, 0])  # 36 interactions: a third is 12


def test_head_mid_and_tail_hold_a_third_of_the_interactions_each():
    slices = by_popularity(np.arange(1, 9), COUNTS)
    items = {name: (1 + np.flatnonzero(mask)).tolist() for name, mask in slices.items()}
    # Above items 3 and 4 stand 18 of 36: half. Above item 5 stand 30: more than two thirds.
    assert items == {"head": [1, 2], "mid": [3, 4], "tail": [5, 6, 7]}


def test_a_share_of_exactly_a_third_above_is_no_longer_head():
    slices = by_popularity(np.array([1, 2, 3]), np.array([0, 4, 4, 4]))
    assert slices["head"].all(), "nothing stands above any of them"
    slices = by_popularity(np.array([1, 2, 3, 4]), np.array([0, 4, 3, 3, 2]))
    assert [int(np.argmax([slices[name][i] for name in slices])) for i in range(4)] == [0, 1, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_every_user_is_head_mid_tail_or_cold(seed):
    rng = np.random.default_rng(seed)
    counts = np.append(0, rng.geometric(0.1, 50) - 1)
    targets = rng.integers(1, 51, 200)
    slices = by_popularity(targets, counts)
    cold = by_coldness(counts[targets] == 0)["cold"]
    np.testing.assert_array_equal(sum(mask.astype(int) for mask in slices.values()) + cold, np.ones(200))
    assert counts[targets][slices["head"]].min() > counts[targets][slices["mid"]].max()
    assert counts[targets][slices["mid"]].min() > counts[targets][slices["tail"]].max()


def test_history_lengths_leave_padding_out():
    histories = np.zeros((6, 12), dtype=np.int32)
    for user, length in enumerate((0, 4, 5, 6, 10, 11)):
        histories[user, 12 - length :] = 7
    slices = by_history_length(histories)
    assert {name: np.flatnonzero(mask).tolist() for name, mask in slices.items()} == {
        "history_upto_5": [0, 1, 2],
        "history_6_to_10": [3, 4],
        "history_over_10": [5],
    }


def test_how_often_a_target_occurs_in_training():
    counts = np.array([0, 1, 3, 4, 10, 11, 30, 31, 500])
    slices = by_occurrences(counts)
    assert {name: counts[mask].tolist() for name, mask in slices.items()} == {
        "occurs_1_to_3": [1, 3],
        "occurs_4_to_10": [4, 10],
        "occurs_11_to_30": [11, 30],
        "occurs_over_30": [31, 500],
    }


def test_slices_of_the_same_kind_share_out_the_targets():
    rng = np.random.default_rng(3)
    counts = np.append(0, rng.geometric(0.05, 80) - 1)
    targets, histories = rng.integers(1, 81, 300), rng.integers(0, 2, (300, 14))
    slices = slices_of(targets, counts, histories)
    for kind in ("occurs_", "head mid tail", "history_"):
        of_kind = [mask for name, mask in slices.items() if name.startswith(kind) or name in kind.split()]
        with_cold = [*of_kind, slices["cold"]] if kind != "history_" else of_kind
        np.testing.assert_array_equal(np.sum(with_cold, axis=0), 1, err_msg=kind)
    np.testing.assert_array_equal(slices["cold"], counts[targets] == 0)
    assert slices["overall"].all() and not (slices["warm"] & slices["cold"]).any()


def slices_by_hand(count: int, counts: list[int], history: list[int]) -> set[str]:
    """The slices of one target, from what docs/evaluate.md says; `count` is its own."""
    length = sum(item != 0 for item in history)
    found = {"overall", "history_upto_5" if length < 6 else "history_6_to_10" if length < 11 else "history_over_10"}
    if count == 0:
        return found | {"cold"}
    often = 0 if count < 4 else 1 if count < 11 else 2 if count < 31 else 3
    above = sum(other for other in counts if other > count)
    part = "head" if 3 * above < sum(counts) else "mid" if 3 * above < 2 * sum(counts) else "tail"
    names = ("occurs_1_to_3", "occurs_4_to_10", "occurs_11_to_30", "occurs_over_30")
    return found | {"warm", names[often], part}


@pytest.mark.parametrize("seed", range(5))
def test_every_slice_is_that_of_a_plain_loop_over_the_targets(seed):
    rng = np.random.default_rng(seed)
    counts = np.append(0, rng.geometric(0.05, 60) - 1)
    counts[1:14] = 0, 1, 3, 4, 10, 11, 30, 31, 2, 5, 9, 29, 32
    targets, filled = np.arange(1, 61), rng.integers(1, 14, 60)
    histories = np.where(np.arange(13) < 13 - filled[:, None], 0, rng.integers(1, 4, (60, 13)))
    slices = slices_of(targets, counts, histories)
    expected = [
        slices_by_hand(count, counts.tolist(), history)
        for count, history in zip(counts[targets].tolist(), histories.tolist(), strict=True)
    ]
    for name, mask in slices.items():
        assert mask.tolist() == [name in found for found in expected], name
    assert set().union(*expected) == set(slices)


def test_a_users_targets_in_a_slice_are_its_set_there():
    ranks, users = np.array([1, 4, 30, 2]), np.array([0, 0, 0, 1])
    table = slice_metrics(ranks, {"a": np.array([True, False, True, True]), "b": np.zeros(4, dtype=bool)}, (3,), users)
    assert table["b"] == {"users": 0, "targets": 0}
    assert (table["a"]["users"], table["a"]["targets"]) == (2, 3)
    assert table["a"]["recall@3"] == (1 / 2 + 1) / 2 and table["a"]["hr@3"] == 1
