"""The leave-one-out split of the micro-video protocol (MicroLens, https://arxiv.org/abs/2309.15379, section 4)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lvlmrec.data.interactions import Ids, Interactions
from lvlmrec.errors import InputError


@dataclass(frozen=True)
class Holdout:
    """One target per user. Item indices, 0 = padding on the left.

    inputs     int32 [U, L]: the items right before the target
    targets    int32 [U]
    histories  int32 [U, L+1] or [U, L+2]: every kept item before the target, to be masked in the ranking
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    histories: NDArray[np.int32]


@dataclass(frozen=True)
class LeaveOneOut:
    """Each user's last item is the test target, the one before it the validation target, the rest is training.

    user_ids   [U] str
    item_ids   [I] str: item_index i+1 belongs to `item_ids[i]`, item_index 0 is padding
    sequences  int32 [U, L+3], oldest first, padded on the left
    report     what the split dropped
    """

    user_ids: Ids
    item_ids: Ids
    sequences: NDArray[np.int32]
    report: dict[str, int]

    @property
    def max_length(self) -> int:
        """L, the items of a history that a model reads."""
        return self.sequences.shape[1] - 3

    def training(self) -> NDArray[np.int32]:
        """int32 [U, L+1]: L inputs and the item after each of them."""
        return self.sequences[:, :-2]

    def validation(self) -> Holdout:
        """The last item but one, from the items before it."""
        return Holdout(self.sequences[:, 1:-2], self.sequences[:, -2], self.sequences[:, :-2])

    def test(self) -> Holdout:
        """The last item, from the items before it, the validation target among them."""
        return Holdout(self.sequences[:, 2:-1], self.sequences[:, -1], self.sequences[:, :-1])

    def train_counts(self) -> NDArray[np.int64]:
        """How often each item occurs in training, int64 [I+1] by item_index; 0 for padding."""
        counts = np.bincount(self.training().ravel(), minlength=len(self.item_ids) + 1)
        counts[0] = 0
        return counts

    def is_cold(self, targets: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether each item index of `targets` never occurs in training; same shape."""
        return self.train_counts()[targets] == 0

    def fingerprint(self) -> str:
        """16 hex digits: the hash of both id maps and of every sequence."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(json.dumps([self.user_ids.tolist(), self.item_ids.tolist(), self.sequences.shape]).encode())
        digest.update(self.sequences.astype("<i4").tobytes())
        return digest.hexdigest()


def leave_one_out(interactions: Interactions, max_length: int = 10, min_interactions: int = 5) -> LeaveOneOut:
    """Drop users with fewer than `min_interactions`, keep the last `max_length + 3` items of each of the others,
    then drop the items that no longer occur.

    Raises `InputError` if no user is left, or if a user could have no training item at all.
    """
    if max_length < 1:
        raise InputError(f"max_length: {max_length} is below 1")
    if min_interactions < 3:
        raise InputError(
            f"min_interactions: {min_interactions} is below 3: training, validation and test need one each"
        )
    lengths = interactions.lengths
    users = np.flatnonzero(lengths >= min_interactions)
    if not len(users):
        raise InputError(
            f"min_interactions: no user has {min_interactions} interactions; the longest of {len(lengths)} users"
            f" has {lengths.max()}"
        )
    width = max_length + 3
    ends = interactions.offsets[users + 1]
    positions = ends[:, None] - width + np.arange(width)  # [U, L+3] into items; before the user's first: padding
    kept = positions >= interactions.offsets[users][:, None]
    items = interactions.items[positions[kept]]
    occurring, dense = np.unique(items, return_inverse=True)
    sequences = np.zeros(kept.shape, dtype=np.int32)
    sequences[kept] = dense + 1
    return LeaveOneOut(
        user_ids=interactions.user_ids[users],
        item_ids=interactions.item_ids[occurring],
        sequences=sequences,
        report={
            "users_too_short": len(lengths) - len(users),
            "interactions_of_short_users": int(lengths.sum() - lengths[users].sum()),
            "interactions_truncated": int(lengths[users].sum() - len(items)),
            "items_dropped": len(interactions.item_ids) - len(occurring),
        },
    )
