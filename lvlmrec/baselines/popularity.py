"""Every user gets the items that occur most often in training."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from lvlmrec.baselines.base import item_counts, without_padding


class Popularity:
    """Score = number of training interactions of the item."""

    def fit(self, sequences: NDArray[np.int32], num_items: int) -> Self:
        self.counts = item_counts(sequences, num_items)
        return self

    def score(self, histories: NDArray[np.int32]) -> NDArray[np.float32]:
        return without_padding(np.tile(self.counts, (len(histories), 1)))
