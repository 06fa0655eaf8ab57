"""The leave-one-out split, by hand, by property, and on the real data."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lvlmrec.data import microlens
from lvlmrec.data.interactions import from_columns
from lvlmrec.data.split import Holdout, Split, leave_one_out
from lvlmrec.errors import InputError


def split(histories: dict[str, str], max_length: int = 2, min_interactions: int = 5) -> Split:
    users = [user for user, items in histories.items() for _ in items]
    return leave_one_out(from_columns(users, "".join(histories.values())), max_length, min_interactions)


def whole(found: Split) -> np.ndarray:
    """[U, L + 3]: what leave-one-out keeps of each user."""
    return np.column_stack([found.training(), found.validation().targets, found.test().targets])


# y occurs only in a history that is too short, x only in what is cut off; L = 2 keeps the last 5 items
BY_HAND = {"u": "xabcde", "v": "yab", "w": "edcbaf"}


def test_by_hand() -> None:
    found = split(BY_HAND)
    assert found.user_ids.tolist() == ["u", "w"]
    assert found.item_ids.tolist() == ["a", "b", "c", "d", "e", "f"]
    assert whole(found).tolist() == [[1, 2, 3, 4, 5], [4, 3, 2, 1, 6]]
    assert found.sequences.dtype == np.int32
    assert {reason: count for reason, count in found.report.items() if count} == {
        "users_too_short": 1,
        "interactions_of_short_users": 3,
        "interactions_truncated": 2,
        "items_dropped": 2,
    }
    assert found.max_length == 2
    assert found.training().tolist() == [[1, 2, 3], [4, 3, 2]]
    assert found.train_counts().tolist() == [0, 1, 2, 2, 1, 0, 0]
    validation, test = found.validation(), found.test()
    assert validation.targets.tolist() == [4, 1]
    assert validation.inputs.tolist() == [[2, 3], [3, 2]]
    assert validation.histories.tolist() == [[1, 2, 3], [4, 3, 2]]
    assert test.targets.tolist() == [5, 6]
    assert test.inputs.tolist() == [[3, 4], [2, 1]]
    assert test.histories.tolist() == [[1, 2, 3, 4], [4, 3, 2, 1]]
    assert found.is_cold(test.targets).tolist() == [True, True]
    assert found.is_cold(validation.targets).tolist() == [False, False]


def test_short_histories_are_padded_on_the_left() -> None:
    found = split({"u": "abcde"}, max_length=10)
    assert whole(found).tolist() == [[0] * 8 + [1, 2, 3, 4, 5]]
    assert found.training().shape == (1, 11)
    assert found.validation().inputs.tolist() == [[0] * 7 + [1, 2, 3]]
    assert found.test().inputs.tolist() == [[0] * 6 + [1, 2, 3, 4]]


def test_nobody_is_long_enough() -> None:
    with pytest.raises(InputError, match="no user has 7 interactions; the longest of 3 users has 6"):
        split(BY_HAND, min_interactions=7)


@pytest.mark.parametrize(("length", "least", "match"), [(0, 5, "max_length: 0"), (2, 2, "min_interactions: 2")])
def test_impossible_settings(length: int, least: int, match: str) -> None:
    with pytest.raises(InputError, match=match):
        split(BY_HAND, length, least)


def test_fingerprint_sees_ids_and_sequences() -> None:
    base = split(BY_HAND).fingerprint()
    assert base == split(BY_HAND).fingerprint()
    assert base == split(dict(reversed(BY_HAND.items()))).fingerprint()  # the order of the file's users is no fact
    others = [
        split({"u": "xabcde", "v": "yab", "w": "edcbfa"}),
        split({"u": "xabcde", "v": "yab", "z": "edcbaf"}),
        split({"u": "xabcdg", "v": "yab", "w": "gdcbaf"}),
        split(BY_HAND, max_length=3),
    ]
    assert len({base, *(other.fingerprint() for other in others)}) == 5


@pytest.mark.parametrize("seed", range(8))
def test_properties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length, least = int(rng.integers(1, 8)), int(rng.integers(3, 7))
    histories = {f"u{u}": [f"i{i}" for i in rng.permutation(50)[: rng.integers(1, 20)]] for u in range(40)}
    columns = [(user, item) for user, items in histories.items() for item in items]
    found = leave_one_out(from_columns(*map(list, zip(*columns, strict=True))), length, least)  # type: ignore[arg-type]
    names = np.concatenate([["-"], found.item_ids])
    assert set(found.user_ids) == {user for user, items in histories.items() if len(items) >= least}
    for user, sequence in zip(found.user_ids, whole(found), strict=True):
        kept = histories[user][-(length + 3) :]
        assert names[sequence[sequence > 0]].tolist() == kept
        assert not sequence[: len(sequence) - len(kept)].any()
    assert set(np.unique(whole(found))) - {0} == set(range(1, len(found.item_ids) + 1))
    for holdout in (found.validation(), found.test()):
        assert holdout.inputs.shape == (len(found.user_ids), length)
        assert not (holdout.histories == holdout.targets[:, None]).any()
        assert (holdout.histories[:, -length:] == holdout.inputs).all()
    in_training = set(np.unique(found.training()))
    targets = found.test().targets
    assert found.is_cold(targets).tolist() == [target not in in_training for target in targets]
    kept = [items[-(length + 3) : -2] for items in histories.values() if len(items) >= least]
    counts = Counter(item for items in kept for item in items)
    assert found.train_counts().tolist() == [0, *(counts[item] for item in found.item_ids)]


@pytest.mark.data
def test_microlens_50k(real_data: Path) -> None:
    interactions = microlens.load(str(real_data / "microlens_50k")).interactions
    found = leave_one_out(interactions)
    assert whole(found).shape == (50_000, 13)
    assert len(found.item_ids) == 19_099
    assert found.report["items_dropped"] == 121
    # 2,226 test targets are in nobody's training history; 35 more only in parts that the truncation cuts off
    assert int(found.is_cold(found.test().targets).sum()) == 2_261
    longer = leave_one_out(interactions, max_length=215)
    assert int(longer.is_cold(longer.test().targets).sum()) == 2_226


@pytest.mark.data
def test_amazon_beauty(real_data: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "Beauty_pairs.tsv"
    lines = (real_data / "amazon_beauty/Beauty.txt").read_text().splitlines()
    pairs.write_text("".join("\t".join(line.split(" ", 1)) + "\n" for line in lines))
    interactions = microlens.load(str(pairs)).interactions
    assert (len(interactions.user_ids), len(interactions.item_ids), len(interactions.items)) == (
        22_363,
        12_101,
        198_502,
    )
    found = leave_one_out(interactions)
    last = {line.split()[0]: line.split()[-1] for line in lines}
    assert found.item_ids[found.test().targets - 1].tolist() == [last[user] for user in found.user_ids]


@pytest.mark.parametrize("several", [False, True])
def test_a_sample_of_users_has_all_their_rows_and_is_always_the_same(several: bool) -> None:
    rows = np.arange(40, dtype=np.int32)
    users = np.repeat(np.arange(20), 2) if several else None
    holdout = Holdout(rows[:, None], rows, rows[:, None], users)
    drawn = holdout.sample(7)
    assert len(drawn.targets) == (14 if several else 7) and (np.diff(drawn.targets) > 0).all()
    np.testing.assert_array_equal(drawn.targets, holdout.sample(7).targets)
    np.testing.assert_array_equal(drawn.inputs[:, 0], drawn.targets)
    if several:
        np.testing.assert_array_equal(drawn.users, np.repeat(np.unique(drawn.users), 2))
        np.testing.assert_array_equal(drawn.users, drawn.targets // 2)
    assert set(holdout.sample(3).targets) != set(rows[: len(holdout.sample(3).targets)]), "drawn, not the first"
    assert holdout.sample(20 if several else 40) is holdout is holdout.sample(10**9)
