"""A decoder that does not keep what it read is an error, never a wrong feature; see also the contract's banks."""

from typing import Any

import pytest
import torch
from torch import nn

from lvlmrec.lvlms.engine import prefix
from lvlmrec.lvlms.engine.layout import Layout

PLAIN = Layout(name="plain", vision_layers="")
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
        prefix.run_prefix(PLAIN, Deaf(2), CALL, 3)


def test_a_decoder_cut_above_its_embeddings_keeps_nothing() -> None:
    assert prefix.run_prefix(PLAIN, Deaf(0), CALL, 3).get_seq_length() == 0


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_call_has(name: str) -> None:
    decoder = Deaf(0)
    prefix.run_prefix(PLAIN, decoder, CALL | {name: None}, 3)
    assert decoder.seen == [name]


class Attentive(nn.Module):
    """Two layers that put what they are given into the cache and keep what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(2))
        self.given: list[torch.Tensor] = []

    def forward(self, inputs_embeds: torch.Tensor, cache: Any, **call: Any) -> None:
        for layer in range(2):
            keys, _ = cache.update(inputs_embeds[:, None] + layer, -inputs_embeds[:, None], layer)
            self.given.append(keys)


@pytest.mark.parametrize("num_prompts", [1, 2, 3])
def test_ends_see_the_prefix_and_no_copy_of_it_is_kept(num_prompts: int) -> None:
    decoder, begin, end = Attentive(), torch.randn(2, 5, 4), torch.randn(num_prompts, 2, 3, 4)
    calls = [CALL | {"inputs_embeds": torch.cat([begin, one], dim=1), "cache": None} for one in end]
    cache = prefix.run_prefix(PLAIN, decoder, calls[0], 5)
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    storages = [keys.untyped_storage().data_ptr() for keys, _ in kept]
    shared = prefix._read_only(cache, num_prompts)
    assert [layer.keys.untyped_storage().data_ptr() for layer in shared.layers] == storages
    decoder.given.clear()
    prefix.run_suffixes(PLAIN, decoder, calls, [torch.ones(2, 8)] * num_prompts, 5, cache)
    for layer, keys in enumerate(decoder.given):
        whole = torch.cat([torch.cat([begin, one], dim=1) for one in end]) + layer
        assert torch.equal(keys[:, 0], whole)
    assert [layer.keys.shape[-2] for layer in shared.layers] == [5, 5]
    assert all(layer.keys is keys for layer, (keys, _) in zip(cache.layers, kept, strict=True))
