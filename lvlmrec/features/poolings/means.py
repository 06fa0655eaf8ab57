"""The mean over tokens, accumulated and returned in float32 whatever the compute dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lvlmrec.features.poolings.pooling import ALL, ANSWER, VECTOR, VISUAL, Pooling

if TYPE_CHECKING:
    from torch import Tensor


def masked_mean(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """float32 [B, D]: the mean over the positions where `mask_BS` is true, accumulated in float32.

    Positions outside the mask are replaced, not multiplied by zero: padding may hold NaN.
    """
    kept_BSD = hidden_BSD.float().masked_fill(~mask_BS[..., None], 0.0)
    return kept_BSD.sum(dim=1) / mask_BS.sum(dim=1, keepdim=True)


def _pool(hidden_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor]:
    return (masked_mean(hidden_BSD, mask_BS),)


def _begin(hidden_BCD: Tensor, mask_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [B, D] of the beginning, and [B, 1] of how many tokens."""
    return masked_mean(hidden_BCD, mask_BC), mask_BC.sum(dim=1, keepdim=True)


def _join(beginning: tuple[Tensor, Tensor], hidden_BQD: Tensor, mask_BQ: Tensor) -> tuple[Tensor]:
    mean_BD, before_B1 = beginning
    count_B1 = mask_BQ.sum(dim=1, keepdim=True)
    return (mean_BD.lerp(masked_mean(hidden_BQD, mask_BQ), count_B1 / (before_B1 + count_B1)),)


VISUAL_MEAN = Pooling(VISUAL, _pool, VECTOR)
ALL_MEAN = Pooling(ALL, _pool, VECTOR, _begin, _join)
NEW_MEAN = Pooling(ANSWER, _pool, VECTOR)
