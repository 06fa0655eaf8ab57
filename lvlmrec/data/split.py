"""Splits of interactions into training, validation and test.

    leave_one_out  each user's last item is the test target, the one before it the validation target
    global_time    one pair of points in time for all users
    random         a share of each user's items, drawn with a fixed seed
    given          the split that the dataset is published with

A split marks each interaction as TRAINING, VALIDATION or TEST; `_build` does the rest for all of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lvlmrec.data.interactions import TEST, TRAINING, VALIDATION, Ids, Interactions, restrict
from lvlmrec.errors import ConfigError, InputError

SEVERAL_TARGETS = ("random", "given")  # splits that may hold out several items of a user in one part
HELD_OUT = 0.1  # share of the interactions for validation, and as many for test
TRAINING_ENDS, VALIDATION_ENDS = 8, 9  # in tenths of the interactions, by time


@dataclass(frozen=True)
class Holdout:
    """T held-out targets, one per row; a user may have several rows or none. Item indices, 0 = padding on the left.

    inputs     int32 [T, L]: the last L items of the history, which a model reads
    targets    int32 [T]
    histories  int32 [T, H], H >= L the longest history: all items that the user has, which the ranking masks
    users      int64 [T], ascending: the user of each row, where users may have several; None: one row per user
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    histories: NDArray[np.int32]
    users: NDArray[np.int64] | None = None

    @property
    def first_rows(self) -> NDArray[np.int64]:
        """One row of each user, int64 [U]: a user's recommendations do not depend on the target."""
        return np.arange(len(self.targets)) if self.users is None else np.unique(self.users, return_index=True)[1]

    def share(self, worker: int, num_workers: int) -> Holdout:
        """Every `num_workers`-th row from row `worker` on."""
        return self._rows(slice(worker, None, num_workers))

    def sample(self, num_users: int) -> Holdout:
        """All rows of so many users, always the same ones of a holdout; all users where there are no more."""
        users = np.arange(len(self.targets)) if self.users is None else self.users
        every = np.unique(users)
        if num_users >= len(every):
            return self
        drawn = np.random.default_rng(0).choice(every, num_users, replace=False)
        return self._rows(np.flatnonzero(np.isin(users, drawn)))

    def _rows(self, rows: slice | NDArray[np.int64]) -> Holdout:
        users = None if self.users is None else self.users[rows]
        return Holdout(self.inputs[rows], self.targets[rows], self.histories[rows], users)


class UserItems(NamedTuple):
    """The training items of U users: user u has `items[offsets[u]:offsets[u + 1]]`, each once, oldest first.

    offsets int64 [U+1]; items int32 [N]: item indices
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int32]


@dataclass(frozen=True)
class Split:
    """Training sequences, and validation and test holdouts, of one catalogue.

    user_ids     [T] str: the user of each row of `test()`
    item_ids     [I] str: `item_ids[i]` is the id of item_index i + 1; item_index 0 is padding
    sequences    int32 [R, L+1]: training items of one user each, oldest first, padded on the left
    num_users    number of users with a sequence
    holdouts     validation, test
    report       numbers of what the split dropped, by reason
    owners       int64 [R]: the user of each sequence, as `user_items` numbers them
    user_items   all training items of each user, also those that are in no sequence
    dataset_ids  every item id of the dataset, also of items that the split drops
    """

    user_ids: Ids
    item_ids: Ids
    sequences: NDArray[np.int32]
    num_users: int
    holdouts: tuple[Holdout, Holdout]
    report: dict[str, int]
    owners: NDArray[np.int64]
    user_items: UserItems
    dataset_ids: Ids

    @property
    def max_length(self) -> int:
        """L, the number of items of a history that a model reads."""
        return self.sequences.shape[1] - 1

    def training(self) -> NDArray[np.int32]:
        """The training sequences, int32 [R, L+1]: the first L items are inputs, the last L their labels."""
        return self.sequences

    def training_histories(self) -> NDArray[np.int32]:
        """All training items of each user, int32 [U, H], H the longest: oldest first, padded on the left."""
        offsets, items = self.user_items
        return _windows(items, offsets[:-1], offsets[1:], int(np.diff(offsets).max()))

    def validation(self) -> Holdout:
        """The holdout by which epochs and settings are chosen."""
        return self.holdouts[0]

    def test(self) -> Holdout:
        """The holdout for the final metrics; its histories contain the validation items."""
        return self.holdouts[1]

    def train_counts(self) -> NDArray[np.int64]:
        """How often each item occurs in training, int64 [I+1] by item_index; 0 for padding."""
        counts = np.bincount(self.training().ravel(), minlength=len(self.item_ids) + 1)
        counts[0] = 0
        return counts

    def is_cold(self, targets: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether each item index of `targets` never occurs in training; same shape."""
        return self.train_counts()[targets] == 0

    def fingerprint(self) -> str:
        """Hash of the id maps, the training sequences and both holdouts: 16 hex digits."""
        arrays = [self.sequences]
        for holdout in self.holdouts:
            arrays += [holdout.inputs, holdout.targets, holdout.histories]
        ids = [self.user_ids.tolist(), self.item_ids.tolist(), [array.shape for array in arrays]]
        digest = hashlib.blake2b(json.dumps(ids).encode(), digest_size=8)
        for array in arrays:
            digest.update(array.astype("<i4").tobytes())
        return digest.hexdigest()


def leave_one_out(interactions: Interactions, max_length: int = 10, min_interactions: int = 5) -> Split:
    """The split of the micro-video protocol (MicroLens, https://arxiv.org/abs/2309.15379, section 4).

    Drops users with fewer than `min_interactions`, keeps the last `max_length + 3` items of each other user, then drops
    items that no longer occur. Raises `InputError` if no user is left, or if `min_interactions` is below 3.
    """
    _check_ordered(interactions, "leave_one_out")
    _check_min_interactions(min_interactions)
    long, report = _drop_short_users(interactions, max_length, min_interactions)
    kept = restrict(long, _positions_from_end(long) < max_length + 3)
    position_from_end = _positions_from_end(kept)
    parts = np.where(position_from_end == 0, TEST, np.where(position_from_end == 1, VALIDATION, TRAINING))
    report |= {
        "interactions_truncated": len(long.items) - len(kept.items),
        "items_dropped": len(interactions.item_ids) - len(kept.item_ids),
    }
    return _build(kept, parts, max_length, report, every_target=False)


def global_time(interactions: Interactions, max_length: int = 10, min_interactions: int = 5) -> Split:
    """Training ends for all users at one point in time, and validation at a later one.

    The points are the times that 80 % and 90 % of the interactions do not exceed, so ties at a point belong to the
    earlier period. A user's validation (or test) target is the last interaction in that period, and the history all
    interactions before it, also of the same period; models are not trained again between the periods. A user without an
    interaction in a period, or without one before its target, has no target in it.

    Leave-one-out, by contrast, trains on interactions that are later than other users' targets (Meng et al., 2020,
    https://arxiv.org/abs/2007.13237; Hidasi and Czapp, 2023, https://arxiv.org/abs/2307.14951). Of a period's possible
    targets the last fits the next-item task best: the first follows an unusual gap in time, and taking all is another
    task (Gusak et al., "Time to Split", 2025, https://arxiv.org/abs/2507.16289). Raises `ConfigError` without
    timestamps, `InputError` if no user is left.
    """
    _check_ordered(interactions, "global_time")
    if interactions.timestamps is None:
        raise ConfigError(
            "dataset.split: 'global_time' needs timestamps, and these interactions have none; choices: leave_one_out, "
            "random"
        )
    long, report = _drop_short_users(interactions, max_length, min_interactions)
    assert long.timestamps is not None
    times, number = np.sort(long.timestamps), len(long.items)
    ends = [times[-(-number * tenths // 10) - 1] for tenths in (TRAINING_ENDS, VALIDATION_ENDS)]  # rounded up
    parts = (long.timestamps > ends[0]).astype(np.int64) + (long.timestamps > ends[1])
    return _build(long, parts, max_length, report, every_target=False)


def random(interactions: Interactions, max_length: int = 10, min_interactions: int = 5) -> Split:
    """A tenth of each user's items, at least one, for validation and as many for test, drawn with a fixed seed.

    Graph recommenders are evaluated so (LightGCN and its successors). Targets may be earlier than training items. Each
    held-out item is a row; metrics are those of each user's set of targets. Raises `InputError` as `leave_one_out`.
    """
    _check_min_interactions(min_interactions)
    long, report = _drop_short_users(interactions, max_length, min_interactions)
    owners, starts = long.owners, long.offsets[:-1]
    drawn_position = np.empty(len(owners), dtype=np.int64)  # of an interaction in the random order of its user's
    drawn_position[np.lexsort((np.random.default_rng(0).random(len(owners)), owners))] = (
        np.arange(len(owners)) - starts[owners]
    )
    held_out = np.maximum(1, np.round(HELD_OUT * long.lengths).astype(np.int64))[owners]
    parts = np.where(drawn_position < held_out, TEST, np.where(drawn_position < 2 * held_out, VALIDATION, TRAINING))
    order = np.lexsort((parts, owners))  # stable: training items stay oldest first
    return _build(_reordered(long, order), parts[order], max_length, report, every_target=True)


def published_split(interactions: Interactions, max_length: int = 10, min_interactions: int = 5) -> Split:
    """The split that the dataset is published with; its items have no order in time. Each held-out item is a row.

    The history is the user's training items at validation, and these and the validation items at test; the ranking
    masks it. A target is ranked among all other candidates, the user's other targets of the same part included; metrics
    are those of each user's set of targets. A target whose user has no earlier item is dropped and counted. Raises
    `ConfigError` when the dataset is not published with a split.
    """
    if interactions.parts is None:
        raise ConfigError(
            "dataset.split: 'given': these interactions are not published split; choices: leave_one_out, global_time, "
            "random"
        )
    long, report = _drop_short_users(interactions, max_length, min_interactions)
    assert long.parts is not None
    return _build(long, long.parts, max_length, report, every_target=True)


SPLITS = {"leave_one_out": leave_one_out, "global_time": global_time, "random": random, "given": published_split}


def _check_ordered(interactions: Interactions, name: str) -> None:
    if interactions.parts is not None:
        raise ConfigError(
            f"dataset.split: {name!r}: this dataset is published split and its items have no order in time; choices: "
            "given, random"
        )


def _check_min_interactions(min_interactions: int) -> None:
    if min_interactions < 3:
        raise InputError(
            f"min_interactions: {min_interactions} is below 3: training, validation and test need one each"
        )


def _drop_short_users(
    interactions: Interactions, max_length: int, min_interactions: int
) -> tuple[Interactions, dict[str, int]]:
    """The interactions of users with at least `min_interactions`, and numbers of what was dropped, by reason."""
    if max_length < 1:
        raise InputError(f"max_length: {max_length} is below 1")
    lengths = interactions.lengths
    if lengths.max() < min_interactions:
        raise InputError(
            f"min_interactions: no user has {min_interactions} interactions; the longest of {len(lengths)} users"
            f" has {lengths.max()}"
        )
    long = restrict(interactions, (lengths >= min_interactions)[interactions.owners])
    return long, {
        "users_too_short": len(lengths) - len(long.user_ids),
        "interactions_of_short_users": len(interactions.items) - len(long.items),
        "items_dropped": len(interactions.item_ids) - len(long.item_ids),
    }


def _positions_from_end(interactions: Interactions) -> NDArray[np.int64]:
    """How many items of the same user follow each interaction, int64 [N]."""
    return interactions.offsets[1:][interactions.owners] - 1 - np.arange(len(interactions.items))


def _reordered(interactions: Interactions, order: NDArray[np.int64]) -> Interactions:
    """The same users with their items in another order."""
    columns = interactions.user_ids, interactions.item_ids, interactions.offsets
    return Interactions(*columns, interactions.items[order], interactions.report)


def _build(
    interactions: Interactions, parts: NDArray[np.integer], max_length: int, report: dict[str, int], every_target: bool
) -> Split:
    """The split of interactions whose `parts` [N] ascend within each user. Raises `InputError` if a part is empty.

    every_target  True, for items without an order in time: each held-out item is a row whose history is the items of
                  earlier parts, and all training items are trained on, long histories cut into several sequences.
                  False: a part's last item is its only target, with all items before it as history, and only the last
                  `max_length + 1` training items are trained on
    """
    owners, starts = interactions.owners, interactions.offsets[:-1]
    ends = [starts + np.bincount(owners[parts <= part], minlength=len(starts)) for part in (TRAINING, VALIDATION, TEST)]
    trained = np.flatnonzero(ends[TRAINING] > starts)
    sequence_users, sequence_ends = trained, ends[TRAINING][trained]
    if every_target:
        sequence_users, sequence_ends = _cut_into_sequences(starts, ends[TRAINING], max_length + 1)
    item_index = (interactions.items + 1).astype(np.int32)
    sequences = _windows(item_index, starts[sequence_users], sequence_ends, max_length + 1)
    dropped = {
        "training_interactions_truncated": int((parts == TRAINING).sum() - (sequences > 0).sum()),
        "users_without_training": len(starts) - len(trained),
    }
    holdouts, users = [], starts
    for part, name in ((VALIDATION, "validation"), (TEST, "test")):
        targets = np.flatnonzero(parts == part)
        if not every_target:
            targets = targets[targets == ends[part][owners[targets]] - 1]
        history_ends = ends[part - 1][owners[targets]] if every_target else targets
        has_history = history_ends > starts[owners[targets]]
        dropped[f"{name}_targets_without_history"] = int((~has_history).sum())
        targets, history_ends = targets[has_history], history_ends[has_history]
        users = owners[targets]
        dropped[f"users_without_{name}_target"] = len(starts) - len(np.unique(users))
        if not len(targets):
            raise InputError(f"dataset.split: no user has a {name} target with a history; of {len(starts)} users")
        width = max(max_length, int((history_ends - starts[users]).max()))
        histories = _windows(item_index, starts[users], history_ends, width)
        owned_by = users if every_target else None
        holdouts.append(Holdout(histories[:, -max_length:], item_index[targets], histories, owned_by))
    ids = interactions.user_ids[users], interactions.item_ids
    both, user_items = (holdouts[0], holdouts[1]), _training_items(interactions, item_index, parts)
    return Split(
        *ids, sequences, len(trained), both, report | dropped, sequence_users, user_items, interactions.item_ids
    )


def _training_items(interactions: Interactions, item_index: NDArray[np.int32], parts: NDArray[np.integer]) -> UserItems:
    in_training = parts == TRAINING
    offsets = np.concatenate(([0], np.cumsum(in_training)))[interactions.offsets]
    return UserItems(offsets, item_index[in_training])


def _cut_into_sequences(
    starts: NDArray[np.int64], ends: NDArray[np.int64], width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The spans `starts[u]:ends[u]`, cut from their ends into pieces of `width`: u and the end of each piece, [R]."""
    pieces = -(-(ends - starts) // width)
    sequence_users = np.repeat(np.arange(len(starts)), pieces)
    number = (
        np.arange(len(sequence_users)) - (np.cumsum(pieces) - pieces)[sequence_users]
    )  # within the user, from the last on
    return sequence_users, ends[sequence_users] - width * number


def _windows(
    item_index: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64], width: int
) -> NDArray[np.int32]:
    """The last `width` items of each span `item_index[starts[r]:ends[r]]`, int32 [R, width], padded on the left."""
    positions = ends[:, None] - width + np.arange(width)
    real = positions >= starts[:, None]
    windows = np.zeros(positions.shape, dtype=np.int32)
    windows[real] = item_index[positions[real]]
    return windows
