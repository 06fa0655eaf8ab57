"""First-order Markov chain: the items that followed the user's last item in training."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lvlmrec.baselines.base import item_counts, without_padding


class Markov:
    """Score = training transitions from the last item of the history to the item, ties broken by popularity.

    The tie-break is the item's count over one more than the largest count, below 1, so that it never outweighs a
    transition. It is the whole score of items that never followed the last one, and for users without a history.
    """

    def fit(self, sequences: NDArray[np.int32], num_items: int) -> Self:
        previous, following = sequences[:, :-1].ravel(), sequences[:, 1:].ravel()
        real = previous > 0
        ones = np.ones(int(real.sum()), dtype=np.float32)
        shape = (num_items + 1, num_items + 1)
        self.transitions = sparse.csr_matrix((ones, (previous[real], following[real])), shape=shape)
        counts = item_counts(sequences, num_items)
        self.tie_break = counts / (1 + counts.max())
        return self

    def score(self, histories: NDArray[np.int32]) -> NDArray[np.float32]:
        return without_padding(self.transitions[histories[:, -1]].toarray() + self.tie_break)
