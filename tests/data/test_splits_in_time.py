"""Splits at points in time, by a draw and as published: by hand, by property, and on real data with ties."""

from pathlib import Path

import numpy as np
import pytest

from lvlmrec.data import DatasetConfig, load, load_split
from lvlmrec.data.interactions import TEST, TRAINING, VALIDATION, Interactions, from_columns, k_core
from lvlmrec.data.split import SPLITS, Holdout, Split, global_time, leave_one_out, published_split, random
from lvlmrec.errors import ConfigError, InputError

# ten interactions: training ends at 8 (ties at 8 stay before it), validation at 9
ROWS = [
    ("u", "a", 1),
    ("u", "b", 2),
    ("u", "c", 8),
    ("u", "d", 9),
    ("u", "e", 10),
    ("v", "b", 3),
    ("v", "a", 4),
    ("v", "f", 8),
    ("w", "c", 5),
    ("x", "c", 6),
]


def timed(rows: list[tuple[str, str, int]]) -> Interactions:
    users, items, times = zip(*rows, strict=True)
    return from_columns(users, items, np.array(times))


def published(rows: list[tuple[str, str, int]]) -> Interactions:
    users, items, parts = zip(*rows, strict=True)
    return from_columns(users, items, parts=np.array(parts, dtype=np.int8))


def named(split: Split, indices: np.ndarray) -> list[str]:
    """Each row as a word, padding left out."""
    names = np.concatenate([[""], split.item_ids])
    return ["".join(names[row]) for row in np.atleast_2d(indices)]


def rows_of(split: Split, holdout: Holdout) -> list[tuple[str, str, str]]:
    """(input, target, history) of each row."""
    columns = holdout.inputs, holdout.targets[:, None], holdout.histories
    return list(zip(*(named(split, column) for column in columns), strict=True))


def test_two_points_in_time_by_hand() -> None:
    found = global_time(timed(ROWS), max_length=2, min_interactions=1)
    assert found.item_ids.tolist() == [*"abcdef"]
    assert named(found, found.training()) == ["abc", "baf", "c", "c"]
    assert rows_of(found, found.validation()) == [("bc", "d", "abc")]
    assert rows_of(found, found.test()) == [("cd", "e", "abcd")]
    assert (found.user_ids.tolist(), found.num_users) == (["u"], 4)
    assert found.is_cold(found.test().targets).tolist() == [True]
    nonzero = {reason: count for reason, count in found.report.items() if count}
    assert nonzero == {"users_without_validation_target": 3, "users_without_test_target": 3}


def test_ties_at_a_point_stay_before_it() -> None:
    rows = [(f"e{n}", "a", n) for n in range(12)] + [("u", "b", 12), ("v", "c", 13)]
    rows += [("u", "d", 20), ("v", "e", 20), ("e0", "f", 20)]  # the 15th to 17th of 20: training ends at the 16th
    rows += [("u", "g", 30), ("v", "h", 30), ("u", "i", 40)]  # validation ends at the 18th
    found = global_time(timed(rows), max_length=3, min_interactions=1)
    assert named(found, found.training()) == ["af", *["a"] * 11, "bd", "ce"]
    assert rows_of(found, found.validation()) == [("bd", "g", "bd"), ("ce", "h", "ce")]
    assert rows_of(found, found.test()) == [("bdg", "i", "bdg")]
    assert found.user_ids.tolist() == ["u"]


def test_a_period_without_targets_is_an_error() -> None:
    same = [(user, item, 7) for user, item, _ in ROWS]
    with pytest.raises(InputError, match="no user has a validation target with a history; of 4 users"):
        global_time(timed(same), 2, 1)


def test_the_last_item_of_a_period_is_the_target_and_new_users_need_a_history() -> None:
    early = [(f"e{n}", "a", n) for n in range(16)]
    late = [("n", "b", 20), ("n", "c", 21), ("o", "d", 30), ("e0", "d", 31)]
    found = global_time(timed(early + late), max_length=2, min_interactions=1)
    assert rows_of(found, found.validation()) == [("b", "c", "b")]
    assert rows_of(found, found.test()) == [("a", "d", "a")]
    assert found.report["users_without_training"] == 2
    assert found.report["test_targets_without_history"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_nothing_of_later_is_known_before(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [(f"u{u}", f"i{i}", int(rng.integers(0, 60))) for u in range(40) for i in rng.permutation(50)[:12]]
    data, length = timed(rows), int(rng.integers(1, 6))
    time_of = {(user, item): time for user, item, time in rows}
    found = global_time(data, length)
    times = sorted(time for _, _, time in rows)
    first, second = times[int(0.8 * len(times)) - 1], times[int(0.9 * len(times)) - 1]
    names = np.concatenate([["-"], found.item_ids])
    trained = found.training()
    assert trained.shape[1] == length + 1
    for name, holdout, low, high in (
        ("validation", found.validation(), first, second),
        ("test", found.test(), second, times[-1]),
    ):
        users = found.user_ids if name == "test" else [None] * len(holdout.targets)
        for user, target, history, inputs in zip(
            users, holdout.targets, holdout.histories, holdout.inputs, strict=True
        ):
            assert target not in history and (history[-length:] == inputs).all()
            if user is not None:
                times_before = [time_of[user, names[i]] for i in history[history > 0]]
                assert low < time_of[user, names[target]] <= high
                assert max(times_before) <= time_of[user, names[target]]
                own = [item for item in time_of if item[0] == user]
                assert time_of[user, names[target]] == max(time_of[item] for item in own)
                assert len(times_before) == len(own) - 1  # everything is masked
    assert len(found.test().targets) + found.report["users_without_test_target"] == 40


def test_a_draw_holds_out_a_tenth_of_each_user_and_is_the_same_again() -> None:
    rows = [(f"u{u}", f"i{(7 * u + n) % 90}", n) for u in range(30) for n in range(3 + u)]
    data = timed(rows)
    found, again = random(data, 4, 3), random(data, 4, 3)
    assert found.fingerprint() == again.fingerprint()
    for u in range(30):
        expected = max(1, round((3 + u) / 10))
        assert (found.user_ids == f"u{u}").sum() == expected
    held_out = len(found.validation().targets) + len(found.test().targets)
    assert found.train_counts().sum() + held_out == len(rows)  # long histories are cut, not truncated
    for u in range(30):
        mine = found.user_ids == f"u{u}"
        targets, histories = found.test().targets[mine], found.test().histories[mine]
        assert not np.isin(targets, histories).any()  # other targets are not masked, and no target is
        assert {*named(found, targets[:, None])} | {*found.item_ids[histories[0][histories[0] > 0] - 1]} == {
            f"i{(7 * u + n) % 90}" for n in range(3 + u)
        }
    times = {(user, item): time for user, item, time in rows}
    for row in found.training()[-4:]:  # the last user's, cut from the end; within each oldest first
        kept = [times["u29", found.item_ids[i - 1]] for i in row if i]
        assert kept == sorted(kept)


# a: two validation targets; b: only held out; c: no target
PUBLISHED = [
    ("a", "p", TRAINING),
    ("a", "q", TRAINING),
    ("a", "r", TRAINING),
    ("a", "s", TEST),
    ("a", "t", VALIDATION),
    ("a", "u", VALIDATION),
    ("a", "q", TEST),
    ("b", "p", TEST),
    ("c", "v", TRAINING),
]


def test_as_published_by_hand() -> None:
    found = published_split(published(PUBLISHED), max_length=1, min_interactions=1)
    assert named(found, found.training()) == ["qr", "p", "v"]
    assert rows_of(found, found.validation()) == [("r", "t", "pqr"), ("r", "u", "pqr")]
    assert rows_of(found, found.test()) == [("u", "s", "pqrtu")]
    assert found.user_ids.tolist() == ["a"] and found.num_users == 2
    assert named(found, np.arange(1, 8)) == ["pqrstuv"]
    nonzero = {reason: count for reason, count in found.report.items() if count}
    assert nonzero == {
        "users_without_training": 1,
        "users_without_validation_target": 2,
        "test_targets_without_history": 1,
        "users_without_test_target": 2,
    }
    assert published(PUBLISHED).report == {"duplicate_interactions": 1}  # q is training already


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("global_time", from_columns("uuuuu", "abcde"), "needs timestamps.* choices: leave_one_out, random"),
        ("given", timed(ROWS), "not published split; choices: leave_one_out, global_time, random"),
        ("leave_one_out", published(PUBLISHED), "no order in time; choices: given, random"),
        ("global_time", published(PUBLISHED), "no order in time; choices: given, random"),
    ],
)
def test_what_a_dataset_does_not_have(name: str, data: Interactions, match: str) -> None:
    with pytest.raises(ConfigError, match=f"dataset.split: '{name}'.*{match}"):
        SPLITS[name](data)


@pytest.mark.parametrize("name", SPLITS)
def test_the_fingerprint_sees_the_split_and_its_settings(name: str) -> None:
    rows = [(f"u{u}", f"i{(5 * u + n) % 40}", 10 * n + u) for u in range(20) for n in range(8)]
    data = published([(u, i, t // 10 % 3) for u, i, t in rows]) if name == "given" else timed(rows)
    base = SPLITS[name](data, 3)
    assert base.fingerprint() == SPLITS[name](data, 3).fingerprint() != SPLITS[name](data, 4).fingerprint()
    others = {other(timed(rows), 3).fingerprint() for other in (leave_one_out, global_time, random)}
    assert len(others | {base.fingerprint()}) == (4 if name == "given" else 3)
    assert base.max_length == 3 and base.validation().inputs.shape[1] == base.test().inputs.shape[1] == 3


def test_the_core_by_hand() -> None:
    pairs = ["ap", "aq", "ar", "bp", "bq", "cp", "cr", "dr", "ds"]  # d has s alone to itself; without it r has a and c
    found = k_core(from_columns(*zip(*pairs, strict=True), report={"malformed_lines": 1}), 2)
    assert (found.user_ids.tolist(), found.item_ids.tolist()) == ([*"abc"], [*"pqr"])
    assert found.lengths.tolist() == [3, 2, 2]
    assert found.report == {
        "malformed_lines": 1,
        "duplicate_interactions": 0,
        "users_outside_core": 1,
        "items_outside_core": 1,
        "interactions_outside_core": 2,
    }
    with pytest.raises(InputError, match=r"dataset\.core: 3"):
        k_core(from_columns(*zip(*pairs, strict=True)), 3)


@pytest.mark.data
def test_movielens_with_many_ties(real_data: Path) -> None:
    config = DatasetConfig(name="recbole", path=str(real_data / "ml_100k"), split="global_time", max_length=50)
    data = load(config).interactions
    found, report = load_split(config)
    assert data.timestamps is not None and len(np.unique(data.timestamps)) == 49_282
    times = np.sort(data.timestamps)
    ends = times[79_999], times[89_999]
    for end in ends:  # both points lie in ties
        assert (times == end).sum() > 1
    periods = [data.timestamps <= ends[0], data.timestamps > ends[1]]
    assert found.num_users == len(np.unique(data.owners[periods[0]]))
    with_target = np.unique(data.owners[periods[1]])
    assert len(found.test().targets) + report["test_targets_without_history"] == len(with_target)
    last = data.items[data.offsets[1:] - 1]
    by_user = dict(zip(data.user_ids, data.item_ids[last], strict=True))
    assert found.item_ids[found.test().targets - 1].tolist() == [by_user[user] for user in found.user_ids]
    assert ((found.test().histories > 0).sum(1) == data.lengths[np.isin(data.user_ids, found.user_ids)] - 1).all()


@pytest.mark.data
def test_five_core_of_beauty_is_itself(real_data: Path) -> None:
    plain = load(DatasetConfig(name="amazon_beauty", path=str(real_data / "amazon_beauty")))
    core = load(DatasetConfig(name="amazon_beauty", path=str(real_data / "amazon_beauty"), core=5))
    assert len(core.interactions.items) == len(plain.interactions.items) == 198_502
    assert core.report["interactions_outside_core"] == 0
