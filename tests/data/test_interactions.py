"""Columns to interactions: order, ties, duplicates, natural order of ids."""

import doctest

import numpy as np
import pytest

from lvlmrec.data import interactions
from lvlmrec.data.interactions import from_columns
from lvlmrec.errors import InputError


def histories(found: interactions.Interactions) -> dict[str, list[str]]:
    bounds = zip(found.user_ids, found.offsets[:-1], found.offsets[1:], strict=True)
    return {user: found.item_ids[found.items[first:last]].tolist() for user, first, last in bounds}


def test_docstring_examples() -> None:
    result = doctest.testmod(interactions)
    assert result.attempted > 0
    assert result.failed == 0


def test_oldest_first_and_ties_in_order_of_rows() -> None:
    found = from_columns(
        ["u2", "u10", "u2", "u10", "u2", "u2"],
        ["c", "a", "b", "c", "a", "d"],
        np.array([5, 1, 3, 1, 5, 4]),
    )
    assert found.user_ids.tolist() == ["u2", "u10"]  # natural order, not that of the rows
    assert found.item_ids.tolist() == ["a", "b", "c", "d"]
    assert histories(found) == {"u2": ["b", "d", "c", "a"], "u10": ["a", "c"]}
    assert found.lengths.tolist() == [4, 2]


def test_without_timestamps_the_rows_are_the_order() -> None:
    found = from_columns(["1", "2", "1", "1"], ["9", "9", "10", "007"])
    assert histories(found) == {"1": ["9", "10", "007"], "2": ["9"]}
    assert found.item_ids.tolist() == ["007", "9", "10"]


def test_the_first_meeting_counts_and_the_others_are_reported() -> None:
    found = from_columns(["1", "1", "1", "1"], ["a", "b", "a", "b"], np.array([4, 3, 1, 9]), {"malformed_lines": 2})
    assert histories(found) == {"1": ["a", "b"]}
    assert found.report == {"malformed_lines": 2, "duplicate_interactions": 2}


def test_ids_stay_distinct_texts() -> None:
    found = from_columns(["1", "01", "1.0"], ["x", "x", "x"])
    assert len(found.user_ids) == 3


def test_no_rows() -> None:
    with pytest.raises(InputError, match="none"):
        from_columns([], [])


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 300
    users, items = rng.integers(12, size=n).astype(str).astype(object), rng.integers(40, size=n).astype(str)
    times = rng.integers(20, size=n)
    expected: dict[str, list[str]] = {}
    for row in sorted(range(n), key=lambda row: times[row]):
        history = expected.setdefault(users[row], [])
        if items[row] not in history:
            history.append(items[row])
    found = from_columns(users, items.astype(object), times)
    assert histories(found) == expected
    assert found.report["duplicate_interactions"] == n - len(found.items)
