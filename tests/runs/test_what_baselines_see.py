"""Baselines are fitted on each user's whole training history, in one row, and on nothing held out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlmrec import config
from lvlmrec.baselines import BASELINES
from lvlmrec.baselines.popularity import Popularity
from lvlmrec.data.interactions import TEST, TRAINING, VALIDATION, Interactions, from_columns
from lvlmrec.data.split import SPLITS, Split
from lvlmrec.runs import evaluating
from lvlmrec.runs.evaluating import EvaluateConfig
from tests.toy import ITEM_IDS, walks

LENGTH = 3  # of what a model reads: shorter than the histories
Fitted = list[list[str]]


def measured(split: Split, folder: Path, **values: Any) -> dict[str, Any]:
    """The baselines' part of an evaluation's result."""
    return evaluating._baselines(config.load(EvaluateConfig, [values]), split, split.validation(), str(folder), [10])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """Records the histories that a baseline is fitted on, and those that it scores."""
    found: dict[str, list[np.ndarray]] = {"fit": [], "score": []}

    class Watched(Popularity):
        def fit(self, sequences: np.ndarray, num_items: int) -> "Watched":
            found["fit"].append(sequences.copy())
            super().fit(sequences, num_items)
            return self

        def score(self, histories: np.ndarray) -> np.ndarray:
            found["score"].append(histories.copy())
            return super().score(histories)

    monkeypatch.setitem(BASELINES, "popularity", Watched)
    return found


def named(split: Split, rows: np.ndarray) -> Fitted:
    return [[str(split.item_ids[item - 1]) for item in row if item] for row in rows]


def long_histories() -> list[tuple[str, str, int]]:
    """20 users of 12 to 31 items in time: (user, item, time)."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(20):
        items = rng.choice(ITEM_IDS, 12 + user, replace=False)
        rows += [(f"u{user}", str(item), 100 * step + user) for step, item in enumerate(items)]
    return rows


def timed(rows: list[tuple[str, str, int]]) -> Interactions:
    users, items, times = zip(*rows, strict=True)
    return from_columns(users, items, np.array(times))


def test_leave_one_out_fits_all_that_the_protocol_keeps_but_the_last_two(
    seen: dict[str, list[np.ndarray]], tmp_path: Path
) -> None:
    split = SPLITS["leave_one_out"](timed(long_histories()), 10)
    measured(split, tmp_path, baselines=["popularity"])
    of_user = {f"u{user}": [item for name, item, _ in long_histories() if name == f"u{user}"] for user in range(20)}
    assert named(split, seen["fit"][0]) == [items[-13:-2] for items in of_user.values()]
    validation, test = seen["score"]
    assert named(split, validation) == [items[-13:-2] for items in of_user.values()]
    assert named(split, test) == [items[-13:-1] for items in of_user.values()], "all that is masked"


def test_two_points_in_time_fit_all_until_the_first(seen: dict[str, list[np.ndarray]], tmp_path: Path) -> None:
    rows = long_histories()
    split = SPLITS["global_time"](timed(rows), LENGTH)
    measured(split, tmp_path, baselines=["popularity"])
    times = sorted(time for _, _, time in rows)
    end = times[-(-8 * len(times) // 10) - 1]
    expected = [[item for user, item, time in rows if user == f"u{u}" and time <= end] for u in range(20)]
    assert named(split, seen["fit"][0]) == expected
    assert min(map(len, expected)) > LENGTH + 1


@pytest.mark.parametrize("name", ["random", "given"])
def test_a_drawn_or_published_split_fits_whole_users_not_pieces(
    seen: dict[str, list[np.ndarray]], tmp_path: Path, name: str
) -> None:
    rows = long_histories()
    if name == "given":
        parts = np.array([(TRAINING, TRAINING, TRAINING, VALIDATION, TEST)[step % 5] for step in range(len(rows))])
        data = from_columns([user for user, *_ in rows], [item for _, item, _ in rows], parts=parts.astype(np.int8))
    else:
        data = timed(rows)
    split = SPLITS[name](data, LENGTH)
    measured(split, tmp_path, baselines=["popularity"])
    held_out = set()
    for holdout in (split.validation(), split.test()):
        assert holdout.users is not None
        items = split.item_ids[holdout.targets - 1]
        held_out |= {(f"u{user}", item) for user, item in zip(holdout.users.tolist(), items, strict=True)}
    if name == "given":
        assert held_out == {(user, item) for (user, item, _), part in zip(rows, parts, strict=True) if part != TRAINING}
    fitted = named(split, seen["fit"][0])
    assert fitted == [
        [item for user, item, _ in rows if user == f"u{u}" and (user, item) not in held_out] for u in range(20)
    ]
    assert len(split.training()) > 20, "for models they are cut into pieces"
    validation, test = (np.concatenate(blocks) for blocks in (seen["score"][:1], seen["score"][1:]))
    assert {len(set(row)) for row in named(split, validation)} == set(map(len, fitted))
    known = {f"u{user}": set(items) for user, items in enumerate(fitted)}
    for user, row in zip(split.user_ids, named(split, test), strict=True):
        assert set(row) > known[user], "with its validation items"


def scored(rows: list[list[str]], folder: Path) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """For each baseline in leave-one-out: the scores of one history, and the metrics on validation."""
    users = [str(user) for user, row in enumerate(rows) for _ in row]
    split = SPLITS["leave_one_out"](from_columns(users, [item for row in rows for item in row]))
    assert split.item_ids.tolist() == ITEM_IDS
    one = np.array([[3, 4, 5]], dtype=np.int32)
    histories = split.training_histories()
    scores = {name: baseline().fit(histories, len(ITEM_IDS)).score(one) for name, baseline in BASELINES.items()}
    return scores, {name: result["validation"] for name, result in measured(split, folder).items()}


def test_baselines_know_training_and_neither_validation_nor_test(tmp_path: Path) -> None:
    def with_others(places: slice) -> list[list[str]]:
        """Walks whose items at some places are those of the next user."""
        rows = walks()
        changed = [list(row) for row in rows]
        for row, other in zip(changed, rows[1:] + rows[:1], strict=True):
            new = [item for item in other if item not in row]
            row[places] = new[: len(row[places])] if len(new) >= len(row[places]) else row[places]
        return changed

    base, validation = scored(walks(), tmp_path)
    other_test, same_validation = scored(with_others(slice(-1, None)), tmp_path)
    other_both, _ = scored(with_others(slice(-2, None)), tmp_path)
    other_training, another_validation = scored(with_others(slice(0, 2)), tmp_path)
    assert same_validation == validation
    for name, scores in base.items():
        np.testing.assert_array_equal(other_test[name], scores)
        np.testing.assert_array_equal(other_both[name], scores)
        assert (other_training[name] != scores).any(), name
        assert another_validation[name] != validation[name]


def test_the_number_of_neighbours_is_a_setting(tmp_path: Path) -> None:
    split = SPLITS["random"](timed(long_histories()), LENGTH)
    few, many = (
        measured(split, tmp_path, baselines=["item_knn"], item_knn_neighbours=number)["item_knn"] for number in (1, 500)
    )
    assert few["test"] != many["test"]
