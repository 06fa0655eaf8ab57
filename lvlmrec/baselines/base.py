"""The interface of baselines, and the counts they share.

Shapes: U training users, S sequence, B users to score, H history, I items; item index 0 is padding, on the left.
"""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


class Baseline(Protocol):
    """One entry of BASELINES, constructed with its own settings or without arguments."""

    def fit(self, sequences: NDArray[np.int32], num_items: int) -> Self:
        """Fit to each user's whole training history [U, S], item indices 1..num_items, oldest first; returns itself."""

    def score(self, histories: NDArray[np.int32]) -> NDArray[np.float32]:
        """Scores [B, I + 1] of all items after histories [B, H], oldest first; padding's column is -inf, no other."""


def item_counts(sequences: NDArray[np.int32], num_items: int) -> NDArray[np.float32]:
    """How often each item occurs in sequences [U, S], float32 [I + 1]; padding 0."""
    counts = np.bincount(sequences.ravel(), minlength=num_items + 1).astype(np.float32)
    counts[0] = 0
    return counts


def user_items(sequences: NDArray[np.int32], num_items: int) -> sparse.csr_matrix:
    """1 where a user has an item, sparse float32 [U, I + 1], from sequences [U, S]; padding left out."""
    users, steps = np.nonzero(sequences)
    ones = np.ones(len(users), dtype=np.float32)
    matrix = sparse.csr_matrix((ones, (users, sequences[users, steps])), shape=(len(sequences), num_items + 1))
    matrix.data[:] = 1  # the constructor adds up repeated items of a user
    return matrix


def without_padding(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """`scores` [B, I + 1] themselves, with the padding column set to -inf."""
    scores[:, 0] = -np.inf
    return scores
