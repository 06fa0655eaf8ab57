"""How the tokens of one hidden state become one vector; these functions run inside the forward.

Legend: B clips, S sequence positions, P patch tokens of one clip, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvlmrec.errors import ConfigError
from lvlmrec.features.recipe import POOLINGS


@dataclass(frozen=True)
class TokenMasks:
    """bool [B, S] each: `attended` is not padding, `visual` is a token of the video."""

    attended: Tensor
    visual: Tensor


def masked_mean(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """float32 [B, D]: the mean over the positions where `mask_BS` is true, accumulated in float32.

    Positions outside the mask are replaced, not multiplied by zero: padding may hold NaN.
    """
    kept_BSD = hidden_BSD.float().masked_fill(~mask_BS[..., None], 0.0)
    return kept_BSD.sum(dim=1) / mask_BS.sum(dim=1, keepdim=True)


def last_position(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """float32 [B, D]: the hidden state of the last position where `mask_BS` is true."""
    positions_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    last_B = (mask_BS * positions_S).argmax(dim=1)
    return hidden_BSD[torch.arange(len(hidden_BSD), device=last_B.device), last_B].float()


def pool_tokens(pooling: str, hidden_BSD: Tensor, masks: TokenMasks) -> Tensor:
    """float32 [B, D]: a language model's hidden state pooled by one of `POOLINGS`. Raises `ConfigError`."""
    if pooling == "visual_mean":
        return masked_mean(hidden_BSD, masks.visual)
    if pooling == "all_mean":
        return masked_mean(hidden_BSD, masks.attended)
    if pooling == "last_token":
        return last_position(hidden_BSD, masks.attended)
    raise ConfigError(f"recipe.poolings: {pooling!r} is not one of {', '.join(POOLINGS)}")


@dataclass(frozen=True)
class PooledPrefix:
    """What is known of a sequence after its start: pooling -> float32 [B, D], and the positions attended, [B, 1]."""

    pooled: Mapping[str, Tensor]
    num_attended: Tensor


def pool_prefix(poolings: Sequence[str], hidden_BCD: Tensor, masks: TokenMasks) -> PooledPrefix:
    """Pool the start of a sequence, which holds every visual token but not the last one."""
    pooled = {pooling: pool_tokens(pooling, hidden_BCD, masks) for pooling in poolings if pooling != "last_token"}
    return PooledPrefix(pooled, masks.attended.sum(dim=1, keepdim=True))


def pool_suffix(pooling: str, prefix: PooledPrefix, hidden_BQD: Tensor, attended_BQ: Tensor) -> Tensor:
    """As `pool_tokens` of the whole sequence, from its pooled start and the hidden state [B, Q, D] of its end."""
    if pooling == "last_token":
        return last_position(hidden_BQD, attended_BQ)
    if pooling == "all_mean":
        num_suffix_B1 = attended_BQ.sum(dim=1, keepdim=True)
        share_B1 = num_suffix_B1 / (prefix.num_attended + num_suffix_B1)
        return prefix.pooled[pooling].lerp(masked_mean(hidden_BQD, attended_BQ), share_B1)
    return prefix.pooled[pooling]  # of visual tokens alone


def pool_patches(patches: Sequence[Tensor]) -> Tensor:
    """float32 [B, D]: each clip's mean over its patch tokens [P, D] in the vision tower, accumulated in float32."""
    return torch.stack([clip_PD.float().mean(dim=0) for clip_PD in patches])
