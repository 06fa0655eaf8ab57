"""Splits: what of each user is training, and what validation and test ask for.

    leave_one_out  the last item of each user is the test target, the one before it the validation target
    global_time    one pair of points in time for all users
    random         a share of each user's items, drawn once
    given          as the dataset is published

Each marks every interaction as TRAINING, VALIDATION or TEST; the rest is the same for all.
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
    """One target per row; a user may have several rows or none. Item indices, 0 = padding on the left.

    inputs     int32 [T, L]: the last items of the history
    targets    int32 [T]
    histories  int32 [T, H], H the longest, at least L: every item that the user is known to have, to be masked in the
               ranking
    users      int64 [T], the user of each row, ascending, where users may have several; None: one row per user
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    histories: NDArray[np.int32]
    users: NDArray[np.int64] | None = None

    @property
    def first_rows(self) -> NDArray[np.int64]:
        """One row of each user, int64 [U]: what is shown to a user does not depend on the target."""
        return np.arange(len(self.targets)) if self.users is None else np.unique(self.users, return_index=True)[1]

    def share(self, worker: int, num_workers: int) -> Holdout:
        """Every `num_workers`-th row from row `worker` on."""
        rows = slice(worker, None, num_workers)
        users = None if self.users is None else self.users[rows]
        return Holdout(self.inputs[rows], self.targets[rows], self.histories[rows], users)


class UserItems(NamedTuple):
    """The training items of U users: user u has `items[offsets[u]:offsets[u + 1]]`, each once, oldest first.

    offsets int64 [U+1]; items int32 [N], item indices
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int32]


@dataclass(frozen=True)
class Split:
    """Training sequences and two holdouts of one catalogue.

    user_ids   [T] str: the user of each row of `test()`
    item_ids   [I] str: item_index i+1 belongs to `item_ids[i]`, item_index 0 is padding
    sequences  int32 [R, L+1]: training items of one user each, oldest first, padded on the left
    num_users  how many users they are of
    report     what the split dropped
    owners     int64 [R]: the user of each sequence, a number of `user_items`
    user_items every training item of each user, also those that no sequence holds
    dataset_ids every item id of the dataset, also of items that the split drops
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
        """L, the items of a history that a model reads."""
        return self.sequences.shape[1] - 1

    def training(self) -> NDArray[np.int32]:
        """int32 [R, L+1]: L inputs and the item after each of them."""
        return self.sequences

    def training_histories(self) -> NDArray[np.int32]:
        """int32 [U, H], H the longest: all training items of each user in one row, oldest first, padded on the left."""
        offsets, items = self.user_items
        return _windows(items, offsets[:-1], offsets[1:], int(np.diff(offsets).max()))

    def validation(self) -> Holdout:
        """What a run is chosen by."""
        return self.holdouts[0]

    def test(self) -> Holdout:
        """What a run is judged by; its histories hold the validation items."""
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
        """16 hex digits: the hash of the id maps, of the training sequences and of both holdouts."""
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

    Drop users with fewer than `min_interactions`, keep the last `max_length + 3` items of each of the others, then drop
    the items that no longer occur. Raises `InputError` if no user is left, or one could have no training item at all.
    """
    _check_ordered(interactions, "leave_one_out")
    _check_three(min_interactions)
    long, report = _of_long_users(interactions, max_length, min_interactions)
    kept = restrict(long, _from_the_end(long) < max_length + 3)
    from_the_end = _from_the_end(kept)
    parts = np.where(from_the_end == 0, TEST, np.where(from_the_end == 1, VALIDATION, TRAINING))
    report |= {
        "interactions_truncated": len(long.items) - len(kept.items),
        "items_dropped": len(interactions.item_ids) - len(kept.item_ids),
    }
    return _build(kept, parts, max_length, report, every_target=False)


def global_time(interactions: Interactions, max_length: int = 10, min_interactions: int = 5) -> Split:
    """Training ends for everybody at one point in time, and validation at a later one.

    The points are the times that 80 % and 90 % of the interactions do not exceed, so that ties at a point stay before
    it. The target of a user is the last interaction in the period of validation, or of test, and the history all
    before it, that of the same period included; nothing is trained again in between. Users without an interaction in a
    period, or without one before its target, have no target in it.

    Leave-one-out trains on interactions that are later than others' targets (Meng et al., 2020,
    https://arxiv.org/abs/2007.13237; Hidasi and Czapp, 2023, https://arxiv.org/abs/2307.14951). Of the targets that a
    period offers, the last fits the next-item task best: the first follows an unusual gap in time, and all of them are
    another task (Gusak et al., "Time to Split", 2025, https://arxiv.org/abs/2507.16289). Raises `ConfigError` without
    timestamps, `InputError` as `leave_one_out`.
    """
    _check_ordered(interactions, "global_time")
    if interactions.timestamps is None:
        raise ConfigError(
            "dataset.split: 'global_time' needs timestamps, and these interactions have none; choices: leave_one_out, "
            "random"
        )
    long, report = _of_long_users(interactions, max_length, min_interactions)
    assert long.timestamps is not None
    times, number = np.sort(long.timestamps), len(long.items)
    ends = [times[-(-number * tenths // 10) - 1] for tenths in (TRAINING_ENDS, VALIDATION_ENDS)]  # rounded up
    parts = (long.timestamps > ends[0]).astype(np.int64) + (long.timestamps > ends[1])
    return _build(long, parts, max_length, report, every_target=False)


def random(interactions: Interactions, max_length: int = 10, min_interactions: int = 5) -> Split:
    """A tenth of each user's items, at least one, for validation and as many for test: the same draw every time.

    As graph recommenders are evaluated (LightGCN and what follows it). What is later may be trained on and what is
    earlier asked for. Each held-out item is a row; metrics are those of each user's set of them. Raises `InputError` as
    `leave_one_out`.
    """
    _check_three(min_interactions)
    long, report = _of_long_users(interactions, max_length, min_interactions)
    owners, starts = long.owners, long.offsets[:-1]
    place = np.empty(len(owners), dtype=np.int64)  # of each interaction in its user's drawn order
    place[np.lexsort((np.random.default_rng(0).random(len(owners)), owners))] = np.arange(len(owners)) - starts[owners]
    held_out = np.maximum(1, np.round(HELD_OUT * long.lengths).astype(np.int64))[owners]
    parts = np.where(place < held_out, TEST, np.where(place < 2 * held_out, VALIDATION, TRAINING))
    order = np.lexsort((parts, owners))  # stable: training items stay oldest first
    return _build(_reordered(long, order), parts[order], max_length, report, every_target=True)


def given(interactions: Interactions, max_length: int = 10, min_interactions: int = 5) -> Split:
    """As the dataset is published; its items have no order in time. Each held-out item is a row.

    The history at validation is the user's training items, at test those of validation too: both are masked. The
    targets of a user in the same part are ranked among all candidates, each other too; metrics are those of the user's
    set. A target whose user has no earlier item is dropped and counted. Raises `ConfigError` when the dataset is not
    published split.
    """
    if interactions.parts is None:
        raise ConfigError(
            "dataset.split: 'given': these interactions are not published split; choices: leave_one_out, global_time, "
            "random"
        )
    long, report = _of_long_users(interactions, max_length, min_interactions)
    assert long.parts is not None
    return _build(long, long.parts, max_length, report, every_target=True)


SPLITS = {"leave_one_out": leave_one_out, "global_time": global_time, "random": random, "given": given}


def _check_ordered(interactions: Interactions, name: str) -> None:
    if interactions.parts is not None:
        raise ConfigError(
            f"dataset.split: {name!r}: this dataset is published split and its items have no order in time; choices: "
            "given, random"
        )


def _check_three(min_interactions: int) -> None:
    if min_interactions < 3:
        raise InputError(
            f"min_interactions: {min_interactions} is below 3: training, validation and test need one each"
        )


def _of_long_users(
    interactions: Interactions, max_length: int, min_interactions: int
) -> tuple[Interactions, dict[str, int]]:
    """The users with at least `min_interactions`, the items that they leave, and what was dropped."""
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


def _from_the_end(interactions: Interactions) -> NDArray[np.int64]:
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

    With `every_target`, for items without an order in time, each held-out item is a row after the items of earlier
    parts, and training is all items, long histories cut into sequences. Without, the last item of a part is the only
    target, after all that stand before it, and training is the last `max_length + 1` items.
    """
    owners, starts = interactions.owners, interactions.offsets[:-1]
    ends = [starts + np.bincount(owners[parts <= part], minlength=len(starts)) for part in (TRAINING, VALIDATION, TEST)]
    trained = np.flatnonzero(ends[TRAINING] > starts)
    of_user, sequence_ends = trained, ends[TRAINING][trained]
    if every_target:
        of_user, sequence_ends = _cut(starts, ends[TRAINING], max_length + 1)
    item_index = (interactions.items + 1).astype(np.int32)
    sequences = _windows(item_index, starts[of_user], sequence_ends, max_length + 1)
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
        known = history_ends > starts[owners[targets]]
        dropped[f"{name}_targets_without_history"] = int((~known).sum())
        targets, history_ends = targets[known], history_ends[known]
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
    return Split(*ids, sequences, len(trained), both, report | dropped, of_user, user_items, interactions.item_ids)


def _training_items(interactions: Interactions, item_index: NDArray[np.int32], parts: NDArray[np.integer]) -> UserItems:
    in_training = parts == TRAINING
    offsets = np.concatenate(([0], np.cumsum(in_training)))[interactions.offsets]
    return UserItems(offsets, item_index[in_training])


def _cut(starts: NDArray[np.int64], ends: NDArray[np.int64], width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The spans `starts[u]:ends[u]` cut from their ends into pieces of `width`: u and the end of each piece."""
    pieces = -(-(ends - starts) // width)
    of_user = np.repeat(np.arange(len(starts)), pieces)
    number = np.arange(len(of_user)) - (np.cumsum(pieces) - pieces)[of_user]  # within the user, from the last on
    return of_user, ends[of_user] - width * number


def _windows(
    item_index: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64], width: int
) -> NDArray[np.int32]:
    """int32 [R, width]: the last of `item_index[starts[r]:ends[r]]`, padded on the left."""
    positions = ends[:, None] - width + np.arange(width)
    real = positions >= starts[:, None]
    windows = np.zeros(positions.shape, dtype=np.int32)
    windows[real] = item_index[positions[real]]
    return windows
