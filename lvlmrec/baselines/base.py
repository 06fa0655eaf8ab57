"""What every baseline offers, and the counts they share.

Shapes: U training users, S sequence, B users to score, H history, I items; index 0 is padding, on the left.
"""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


class Baseline(Protocol):
    """One entry of BASELINES, constructed with its own settings or without arguments."""

    def fit(self, sequences: NDArray[np.int32], num_items: int) -> Self:
        """Learn from each user's whole training history [U, S], oldest first, of items 1..num_items."""

    def score(self, histories: NDArray[np.int32]) -> NDArray[np.float32]:
        """Scores [B, I + 1] for histories [B, H], oldest first; the padding column is -inf, all others finite."""


def item_counts(sequences: NDArray[np.int32], num_items: int) -> NDArray[np.float32]:
    """How often each item occurs, [I + 1]; padding 0."""
    counts = np.bincount(sequences.ravel(), minlength=num_items + 1).astype(np.float32)
    counts[0] = 0
    return counts


def user_items(sequences: NDArray[np.int32], num_items: int) -> sparse.csr_matrix:
    """1 where a user has an item, [U, I + 1] float32; padding left out."""
    users, steps = np.nonzero(sequences)
    ones = np.ones(len(users), dtype=np.float32)
    matrix = sparse.csr_matrix((ones, (users, sequences[users, steps])), shape=(len(sequences), num_items + 1))
    matrix.data[:] = 1  # an item that a user has twice was added up
    return matrix


def without_padding(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same scores [B, I + 1], the padding column -inf."""
    scores[:, 0] = -np.inf
    return scores
