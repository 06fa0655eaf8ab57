"""Tokens merged into K, and how many each of them stands for: `merging` has the algorithm."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lvlmrec.features.poolings.pooling import ANSWER, SIZES, VISUAL, WIDTH, Pooling

if TYPE_CHECKING:
    from torch import Tensor


def merged(num_tokens: int) -> Pooling:
    """`merged_K`: the visual tokens."""
    return _merged(VISUAL, num_tokens)


def new_merged(num_tokens: int) -> Pooling:
    """`new_merged_K`: the tokens of the answer."""
    return _merged(ANSWER, num_tokens)


def _merged(reads: str, num_tokens: int) -> Pooling:
    return Pooling(reads, partial(_pool, num_tokens), {"": (num_tokens, WIDTH), SIZES: (num_tokens,)})


def _pool(num_tokens: int, hidden_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    from lvlmrec.features.poolings.merging import merge_tokens

    tokens_BKD, sizes_BK = merge_tokens(hidden_BSD, mask_BS, num_tokens)
    return tokens_BKD.flatten(1), sizes_BK
