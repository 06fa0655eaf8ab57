"""A decoder that does not keep what it read is an error, never a wrong feature; see also the contract's banks."""

from typing import Any

import pytest
import torch
from torch import nn

from lvlmrec.lvlms import prefix

CALL = {"inputs_embeds": torch.zeros(1, 5, 4), "attention_mask": None, "position_ids": None}


class Deaf(nn.Module):
    """A decoder that takes no notice of its cache."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(num_layers))
        self.seen: list[str] = []

    def forward(self, **call: Any) -> None:
        self.seen += [name for name in ("cache", "past_key_values") if call.get(name) is not None]


def test_an_empty_cache_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="Deaf kept 0 of 3 positions"):
        prefix.run_prefix(Deaf(2), CALL, 3)


def test_a_decoder_cut_above_its_embeddings_keeps_nothing() -> None:
    assert prefix.run_prefix(Deaf(0), CALL, 3).get_seq_length() == 0


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_call_has(name: str) -> None:
    decoder = Deaf(0)
    prefix.run_prefix(decoder, CALL | {name: None}, 3)
    assert decoder.seen == [name]
