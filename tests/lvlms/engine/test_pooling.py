"""Poolings against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lvlmrec.errors import ConfigError
from lvlmrec.lvlms.engine.pooling import TokenMasks, pool_columns, pool_patches

NAN = float("nan")


def pool_tokens(pooling: str, hidden: torch.Tensor, masks: TokenMasks) -> torch.Tensor:
    return pool_columns([pooling], hidden, masks)[pooling]


HIDDEN = torch.tensor(
    [[[NAN, NAN], [1.0, 2.0], [3.0, 6.0], [5.0, 1.0]], [[2.0, 2.0], [4.0, 0.0], [6.0, 4.0], [0.0, 2.0]]]
)
MASKS = TokenMasks(
    attended=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool(),
    visual=torch.tensor([[0, 1, 1, 0], [0, 1, 0, 1]]).bool(),
    new=torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0]]).bool(),
    end=torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]]).bool(),
)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("visual_mean", [[(1 + 3) / 2, (2 + 6) / 2], [(4 + 0) / 2, (0 + 2) / 2]]),
        ("all_mean", [[(1 + 3 + 5) / 3, (2 + 6 + 1) / 3], [(2 + 4 + 6 + 0) / 4, (2 + 0 + 4 + 2) / 4]]),
        ("last_token", [[5, 1], [0, 2]]),
        ("new_mean", [[(3 + 5) / 2, (6 + 1) / 2], [2, 2]]),
        ("eos", [[1, 2], [6, 4]]),
        ("prompt_eos", [[1, 2], [6, 4]]),
    ],
)
def test_padding_never_enters(pooling, expected) -> None:
    assert torch.equal(pool_tokens(pooling, HIDDEN, MASKS), torch.tensor(expected, dtype=torch.float32))


def test_last_token_with_padding_on_the_right() -> None:
    masks = dataclasses.replace(MASKS, attended=torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]).bool())
    assert pool_tokens("last_token", HIDDEN, masks).tolist() == [[3.0, 6.0], [2.0, 2.0]]


def test_bfloat16_means_are_accumulated_in_float32() -> None:
    tokens = 4096  # a bfloat16 sum of ones stops growing at 256
    hidden = torch.ones(1, tokens, 1, dtype=torch.bfloat16)
    hidden[0, 0] = 3.0
    everywhere = torch.ones(1, tokens, dtype=torch.bool)
    pooled = pool_tokens("visual_mean", hidden, TokenMasks(everywhere, everywhere, everywhere, everywhere))
    assert pooled.dtype == torch.float32
    assert pooled.item() == 1 + 2 / tokens
    assert pool_patches([hidden[0]]).item() == 1 + 2 / tokens


def test_patches_of_clips_of_different_length() -> None:
    clips = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[7.0, 8.0]])]
    assert pool_patches(clips).tolist() == [[2.0, 3.0], [7.0, 8.0]]


def test_an_unknown_pooling_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="'median' is not one of visual_mean, all_mean, last_token"):
        pool_tokens("median", HIDDEN, MASKS)
