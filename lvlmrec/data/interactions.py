"""Interactions of users with items, oldest first, with counts of all that was dropped or repaired."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lvlmrec.errors import InputError

Ids = NDArray[np.object_]  # external ids, each a `str`
TRAINING, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class Interactions:
    """N interactions of U users with V items.

    user_ids    [U] str, in natural order
    item_ids    [V] str, in natural order, each with at least one interaction
    offsets     int64 [U+1]: user u has `items[offsets[u]:offsets[u + 1]]`
    items       int64 [N]: positions in `item_ids`, oldest first; a user has an item once
    report      numbers of lines, users and interactions that were dropped or repaired, by reason
    timestamps  [N], sortable, all in one unit; None where the dataset has none
    parts       int8 [N]: TRAINING, VALIDATION or TEST, ascending for each user, in a dataset that is published with
                its split; such items have no order in time. None in others
    """

    user_ids: Ids
    item_ids: Ids
    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    report: dict[str, int]
    timestamps: NDArray[Any] | None = None
    parts: NDArray[np.int8] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Interactions per user, int64 [U]."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> NDArray[np.int64]:
        """The user of each interaction, int64 [N]."""
        return np.repeat(np.arange(len(self.user_ids)), self.lengths)


@dataclass(frozen=True)
class Dataset:
    """Interactions, titles of their items, and one report of both.

    titles                by item_id; items may lack one
    item_ids_before_core  the item ids before `dataset.core` dropped rare items; None without `dataset.core`
    """

    interactions: Interactions
    titles: dict[str, str] = field(default_factory=dict)
    report: dict[str, int] = field(default_factory=dict)
    item_ids_before_core: Ids | None = None

    @property
    def item_ids(self) -> Ids:
        """Every item id with an interaction in the files."""
        return self.interactions.item_ids if self.item_ids_before_core is None else self.item_ids_before_core


def from_columns(
    user_ids: Iterable[str],
    item_ids: Iterable[str],
    timestamps: NDArray[Any] | None = None,
    report: Mapping[str, int] | None = None,
    parts: NDArray[np.int8] | None = None,
) -> Interactions:
    """Interactions from columns of N rows, sorted by timestamp; ties, or all without timestamps, in the rows' order.

    A repeated interaction of a user with an item is dropped and counted as `duplicate_interactions`: evaluation masks
    a user's history, so a repeated item could never be recommended. Raises `InputError` for columns without rows.
    """
    users, user_names = _encode_ids(user_ids)
    items, item_names = _encode_ids(item_ids)
    if len(users) != len(items) or (timestamps is not None and len(timestamps) != len(users)):
        raise ValueError("columns of different lengths")
    if not len(users):
        raise InputError("interactions: none; expected at least one user and item")
    # lexsort is stable, so ties keep the order of their rows
    order = np.lexsort([column for column in (timestamps, parts, users) if column is not None])
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
        timestamps=None if timestamps is None else timestamps[order][first],
        parts=None if parts is None else parts[order][first],
    )


def restrict(interactions: Interactions, kept: NDArray[np.bool_]) -> Interactions:
    """The interactions where `kept` [N] is True; users and items without any are dropped from the id maps."""
    users, counts = np.unique(interactions.owners[kept], return_counts=True)
    items, dense = np.unique(interactions.items[kept], return_inverse=True)
    return Interactions(
        user_ids=interactions.user_ids[users],
        item_ids=interactions.item_ids[items],
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        items=dense,
        report=interactions.report,
        timestamps=None if interactions.timestamps is None else interactions.timestamps[kept],
        parts=None if interactions.parts is None else interactions.parts[kept],
    )


def k_core(interactions: Interactions, k: int) -> Interactions:
    """The k-core: users and items with fewer than `k` interactions are dropped, repeatedly, until none are left.

    Raises `InputError` when it is empty.
    """
    owners, items = interactions.owners, interactions.items
    kept, num_kept = np.ones(len(items), dtype=bool), -1
    while kept.sum() != num_kept:
        num_kept = kept.sum()
        per_user = np.bincount(owners[kept], minlength=len(interactions.user_ids))
        per_item = np.bincount(items[kept], minlength=len(interactions.item_ids))
        kept &= (per_user[owners] >= k) & (per_item[items] >= k)
    if not num_kept:
        raise InputError(f"dataset.core: {k}: no users and items have {k} interactions with each other")
    found = restrict(interactions, kept)
    report = {
        "users_outside_core": len(interactions.user_ids) - len(found.user_ids),
        "items_outside_core": len(interactions.item_ids) - len(found.item_ids),
        "interactions_outside_core": len(items) - int(num_kept),
    }
    return replace(found, report={**interactions.report, **report})


def _encode_ids(ids: Iterable[str]) -> tuple[NDArray[np.int64], Ids]:
    """For each of N rows the position of its id among the distinct ids, int64 [N]; and these, in natural order."""
    column = ids if isinstance(ids, np.ndarray) else np.array(list(ids), dtype=object)
    codes, distinct = pd.factorize(column.astype(object))
    names: list[str] = distinct.tolist()
    order = sorted(range(len(names)), key=lambda i: natural_key(names[i]))
    position = np.empty(len(names), dtype=np.int64)
    position[order] = np.arange(len(names))
    return position[codes], np.array(names, dtype=object)[order]


def natural_key(text: str) -> tuple[Any, ...]:
    """A sort key under which `u2` comes before `u10`; different texts have different keys.

    >>> sorted(["u10", "u2", "9", "010", "u"], key=natural_key)
    ['9', '010', 'u', 'u2', 'u10']
    """
    parts: list[Any] = re.split(r"([0-9]+)", text)
    # digits compare by length, then as text: no conversion, so no limit on their number
    parts[1::2] = [(len(digits.lstrip("0")), digits.lstrip("0")) for digits in parts[1::2]]
    return (parts, text)
