"""How the tokens of one hidden state become one vector; these functions run inside the forward.

Legend: B clips, S sequence positions, P patch tokens of one clip, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvlmrec.errors import ConfigError
from lvlmrec.features.recipe import MERGED, NEW_MERGED, OF_VISUAL, POOLINGS, columns_of, num_merged
from lvlmrec.lvlms.engine.merging import merge_tokens


@dataclass(frozen=True)
class TokenMasks:
    """bool [B, S] each, of disjoint `attended`, `new` and `end`: the rest is padding.

    `attended` is the prompt with its video, `visual` are the video's tokens in it; `new` are the tokens of the answer,
    `end` is the end-of-sequence token behind prompt or answer.
    """

    attended: Tensor
    visual: Tensor
    new: Tensor
    end: Tensor

    def cut(self, begin: int, behind: int) -> TokenMasks:
        """The masks of positions `begin` to `behind`."""
        parts = (self.attended, self.visual, self.new, self.end)
        return TokenMasks(*(mask[:, begin:behind] for mask in parts))

    def rows(self, begin: int, behind: int) -> TokenMasks:
        """The masks of rows `begin` to `behind`."""
        parts = (self.attended, self.visual, self.new, self.end)
        return TokenMasks(*(mask[begin:behind] for mask in parts))

    def to(self, device: torch.device) -> TokenMasks:
        """The same on `device`."""
        return TokenMasks(*(mask.to(device) for mask in (self.attended, self.visual, self.new, self.end)))


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
    if pooling == "new_mean":
        return masked_mean(hidden_BSD, masks.new)
    if pooling in ("eos", "prompt_eos"):
        return last_position(hidden_BSD, masks.end)
    raise ConfigError(f"recipe.poolings: {pooling!r} is not one of {', '.join(POOLINGS)}")


def pool_columns(poolings: Sequence[str], hidden_BSD: Tensor, masks: TokenMasks) -> dict[str, Tensor]:
    """Column -> float32 [B, size]: the columns of every pooling, merged tokens [K, D] one after another."""
    columns: dict[str, Tensor] = {}
    for pooling in poolings:
        num_kept = num_merged(pooling)
        if num_kept is None:
            columns[pooling] = pool_tokens(pooling, hidden_BSD, masks)
        else:
            merged_BS = masks.new if pooling.startswith(NEW_MERGED) else masks.visual
            tokens_BKD, sizes_BK = merge_tokens(hidden_BSD, merged_BS, num_kept)
            columns |= dict(zip(columns_of(pooling), (tokens_BKD.flatten(1), sizes_BK), strict=True))
    return columns


def reads_text(pooling: str) -> bool:
    """Whether a pooling reads more than visual tokens."""
    return pooling not in OF_VISUAL and not pooling.startswith(MERGED)


@dataclass(frozen=True)
class Start:
    """What the poolings of a whole sequence need of its start: float32 [B, D] mean, and [B, 1] how many it is of."""

    mean: Tensor
    count: Tensor


def pool_start(hidden_BCD: Tensor, attended_BC: Tensor) -> Start:
    """Pool the start of a sequence."""
    return Start(masked_mean(hidden_BCD, attended_BC), attended_BC.sum(dim=1, keepdim=True))


def pool_ends(poolings: Sequence[str], start: Start, hidden_BQD: Tensor, masks: TokenMasks) -> dict[str, Tensor]:
    """As `pool_columns` of a whole sequence, for what `reads_text`, from its start and the hidden state of its end."""
    columns = pool_columns([pooling for pooling in poolings if reads_text(pooling)], hidden_BQD, masks)
    if "all_mean" in columns:
        count_B1 = masks.attended.sum(dim=1, keepdim=True)
        columns["all_mean"] = start.mean.lerp(columns["all_mean"], count_B1 / (start.count + count_B1))
    return columns


def pool_patches(patches: Sequence[Tensor]) -> Tensor:
    """float32 [B, D]: each clip's mean over its patch tokens [P, D] in the vision tower, accumulated in float32."""
    return torch.stack([clip_PD.float().mean(dim=0) for clip_PD in patches])
