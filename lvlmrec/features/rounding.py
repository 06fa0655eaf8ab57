"""What a vector loses when it is stored in a narrower dtype: values too small for it become 0, or keep few digits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_FLUSHED = 0.5
MAX_ERROR = 0.01
WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32", "float32": "float32 of a multiple of the values"}


class Loss(NamedTuple):
    """The vector at `row` lost too much: the share of its nonzero values that became 0, and its relative error."""

    row: int
    flushed: float
    error: float

    def __str__(self) -> str:
        return f"{self.flushed:.0%} of its nonzero values are too small and become 0, it changes by {self.error:.2%}"


def first_loss(values: Tensor, stored: Tensor) -> Loss | None:
    """The first of the vectors `values` [N, D] that `stored`, the same in a narrower dtype, is not any more.

    It is refused when more than half of its nonzero values become 0, or when |stored - value| / |value|, over the whole
    vector, is above 1 %. Below float16's normal numbers, 6e-5, digits are lost, and below 3e-8 all of them; a vector
    that is well within has an error of 0.05 % at most, in bfloat16 of 0.4 %. So a few tiny values among others are
    rounded to 0 as they should be, whatever their number in a wide vector: what is lost is less than what rounding
    changes elsewhere. The error alone would let a vector pass whose few large values outweigh all that is gone.
    """
    if stored.dtype == values.dtype:
        return None
    # Where half of the values are normal numbers neither can be: one pass over what every item brings.
    normal = values.float().abs().ge_(torch.finfo(stored.dtype).tiny).sum(-1)
    suspects = (2 * normal < values.shape[-1]).nonzero()[:, 0]
    if not len(suspects):
        return None
    exact, rounded = values[suspects].double(), stored[suspects].double()
    nonzero = exact != 0
    flushed = (nonzero & (rounded == 0)).sum(-1) / nonzero.sum(-1).clamp_min(1)
    # Of a vector's own largest value, for squares of what is small enough are 0 in float64, too.
    peak = exact.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    error = ((rounded - exact) / peak).norm(dim=-1) / (exact / peak).norm(dim=-1).clamp_min(1.0)
    found = ((flushed > MAX_FLUSHED) | (error > MAX_ERROR)).nonzero()[:, 0]
    if not len(found):
        return None
    worst = int(found[0])
    return Loss(int(suspects[worst]), float(flushed[worst]), float(error[worst]))
