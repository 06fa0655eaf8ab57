"""Interactions: who met which item, oldest first, with an account of all that was dropped or repaired."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lvlmrec.errors import InputError

Ids = NDArray[np.object_]  # external ids, each a `str`


@dataclass(frozen=True)
class Interactions:
    """The interactions of U users with a vocabulary of V items, N in all.

    user_ids  [U] str, in natural order
    item_ids  [V] str, in natural order, each met at least once
    offsets   int64 [U+1]: user u has `items[offsets[u]:offsets[u + 1]]`
    items     int64 [N]: positions into `item_ids`, oldest first; a user meets an item once
    report    how many lines, users or interactions were dropped or repaired, by reason
    """

    user_ids: Ids
    item_ids: Ids
    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    report: dict[str, int]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Interactions per user, int64 [U]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Dataset:
    """Interactions, the titles known for their items (item_id -> title, may be empty), and one report of both."""

    interactions: Interactions
    titles: dict[str, str] = field(default_factory=dict)
    report: dict[str, int] = field(default_factory=dict)


def from_columns(
    user_ids: Iterable[str],
    item_ids: Iterable[str],
    timestamps: NDArray[Any] | None = None,
    report: Mapping[str, int] | None = None,
) -> Interactions:
    """Interactions from three columns of N rows: oldest first by timestamp, by row on ties or without timestamps.

    A second meeting of the same user and item is dropped and counted as `duplicate_interactions`: evaluation masks
    a user's history, so a repeated item could never be found. Raises `InputError` on columns without rows.
    """
    users, user_names = _number(user_ids)
    items, item_names = _number(item_ids)
    if len(users) != len(items) or (timestamps is not None and len(timestamps) != len(users)):
        raise ValueError("columns of different lengths")
    if not len(users):
        raise InputError("interactions: none; expected at least one user and item")
    # lexsort is stable, so ties keep the order of their rows
    order = np.lexsort((users,) if timestamps is None else (timestamps, users))
    users, items = users[order], items[order]
    _, first = np.unique(users * len(item_names) + items, return_index=True)
    first.sort()
    counts = np.bincount(users[first], minlength=len(user_names))
    return Interactions(
        user_ids=user_names,
        item_ids=item_names,
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        items=items[first],
        report={**(report or {}), "duplicate_interactions": len(users) - len(first)},
    )


def _number(ids: Iterable[str]) -> tuple[NDArray[np.int64], Ids]:
    """For each row its position among the distinct ids, int64 [N]; and these in natural order."""
    column = ids if isinstance(ids, np.ndarray) else np.array(list(ids), dtype=object)
    codes, distinct = pd.factorize(column.astype(object))
    names: list[str] = distinct.tolist()
    order = sorted(range(len(names)), key=lambda i: natural_key(names[i]))
    position = np.empty(len(names), dtype=np.int64)
    position[order] = np.arange(len(names))
    return position[codes], np.array(names, dtype=object)[order]


def natural_key(text: str) -> tuple[Any, ...]:
    """A sort key under which `u2` comes before `u10`, and which no two texts share.

    >>> sorted(["u10", "u2", "9", "010", "u"], key=natural_key)
    ['9', '010', 'u', 'u2', 'u10']
    """
    parts: list[Any] = re.split(r"([0-9]+)", text)
    # digits compare by length, then as text: no conversion, so no limit on their number
    parts[1::2] = [(len(digits.lstrip("0")), digits.lstrip("0")) for digits in parts[1::2]]
    return (parts, text)
