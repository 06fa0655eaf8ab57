"""The state of one token, in float32: the last of a prompt, an end-of-sequence token, the class token of an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lvlmrec.features.poolings.pooling import ALL, ANSWER_END, CLASS, PROMPT_END, VECTOR, Pooling

if TYPE_CHECKING:
    from torch import Tensor


def last_position(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """float32 [B, D]: the hidden state of the last position where `mask_BS` is true."""
    import torch

    positions_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    last_B = (mask_BS * positions_S).argmax(dim=1)
    return hidden_BSD[torch.arange(len(hidden_BSD), device=last_B.device), last_B].float()


def _pool_last(hidden_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor]:
    return (last_position(hidden_BSD, mask_BS),)


def _pool_first(hidden_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor]:
    return (hidden_BSD[:, 0].float(),)


def _begin(hidden_BCD: Tensor, mask_BC: Tensor) -> None:
    """Nothing: the last token stands in the rest."""


def _join(beginning: None, hidden_BQD: Tensor, mask_BQ: Tensor) -> tuple[Tensor]:
    return _pool_last(hidden_BQD, mask_BQ)


LAST_TOKEN = Pooling(ALL, _pool_last, VECTOR, _begin, _join)
EOS = Pooling(ANSWER_END, _pool_last, VECTOR)
PROMPT_EOS = Pooling(PROMPT_END, _pool_last, VECTOR)
FIRST_TOKEN = Pooling(CLASS, _pool_first, VECTOR)
