"""The poolings of a language model's hidden state, inside the forward: whole sequences, or a shared beginning and ends.

Legend: B clips, S sequence positions, C of what prompts share, Q of a prompt's own end, P patch tokens of one clip,
D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlmrec.features import poolings as known
from lvlmrec.features.poolings.pooling import ALL, ANSWER, ANSWER_END, PROMPT_END, VISUAL, Pooling


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

    def read_by(self, pooling: Pooling) -> Tensor:
        """bool [B, S]: the tokens that a pooling reads."""
        masks = {ALL: self.attended, VISUAL: self.visual, ANSWER: self.new, ANSWER_END: self.end, PROMPT_END: self.end}
        return masks[pooling.reads]


def pool_columns(names: Sequence[str], hidden_BSD: Tensor, masks: TokenMasks) -> dict[str, Tensor]:
    """Column -> float32 [B, size]: the columns of every pooling, merged tokens [K, D] one after another."""
    columns: dict[str, Tensor] = {}
    for name in names:
        pooling = known.find(name)
        columns |= _named(name, pooling, pooling.pool(hidden_BSD, masks.read_by(pooling)))
    return columns


def pool_beginning(names: Sequence[str], hidden_BCD: Tensor, masks: TokenMasks) -> dict[str, Any]:
    """Pooling -> what it needs of a shared beginning; of those that read all tokens."""
    starts: dict[str, Any] = {}
    for name in names:
        pooling = known.find(name)
        if pooling.reads == ALL and pooling.begin:
            starts[name] = pooling.begin(hidden_BCD, masks.read_by(pooling))
    return starts


def pool_ends(
    names: Sequence[str], beginning: Mapping[str, Any], hidden_BQD: Tensor, masks: TokenMasks
) -> dict[str, Tensor]:
    """As `pool_columns` of whole sequences, for what `reads_text`: from beginning and end."""
    columns: dict[str, Tensor] = {}
    for name in names:
        pooling = known.find(name)
        if pooling.reads == ALL and pooling.join:
            values = pooling.join(beginning[name], hidden_BQD, masks.read_by(pooling))
            columns |= _named(name, pooling, values)
        elif reads_text(name):
            columns |= _named(name, pooling, pooling.pool(hidden_BQD, masks.read_by(pooling)))
    return columns


def reads_text(name: str) -> bool:
    """Whether a pooling reads more than visual tokens."""
    return known.find(name).reads != VISUAL


def pool_patches(patches: Sequence[Tensor]) -> Tensor:
    """float32 [B, D]: each clip's mean over its patch tokens [P, D] in the vision tower, accumulated in float32."""
    return torch.stack([clip_PD.float().mean(dim=0) for clip_PD in patches])


def _named(name: str, pooling: Pooling, values: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name + end: value for end, value in zip(pooling.columns, values, strict=True)}
