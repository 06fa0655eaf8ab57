"""Answers of a language model: generated in a batch, each item with random numbers of its own.

Legend: B items, S prompt positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlmrec.features.model_recipe import Prompt

# SplitMix64's numbers, as int64: products and sums overflow as they should
_GOLDEN, _FIRST, _SECOND = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Answers:
    """For each item: the token ids without an end-of-sequence token, the text, and what ended it: eos, stop, length."""

    ids: list[list[int]]
    texts: list[str]
    finishes: list[str]


def leave_to_recipe(model: Any) -> None:
    """Take out of a model what its files say of generation, but for the tokens that begin, end and pad.

    transformers would apply a repetition penalty, beams, ... of a checkpoint wherever a caller says nothing.
    """
    from transformers import GenerationConfig

    published = model.generation_config
    ids = {key: getattr(published, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)


def generate(
    model: Any, tokenizer: Any, prompt: Prompt, inputs: Mapping[str, Any], seeds: Sequence[int], specials: Sequence[str]
) -> Answers:
    """Answer `inputs` (left-padded [B, S] tokens and encoded media). The likeliest tokens, or sampled ones by `seeds`.

    The first token is never an end-of-sequence token: every answer has tokens to pool. Of `specials`, the tokenizer's
    special tokens, only those can occur: the answer is read again, and there a video without pixels would fail.
    """
    from transformers import GenerationConfig

    ends, vocabulary = _end_ids(model, tokenizer), tokenizer.get_vocab()
    config = GenerationConfig(
        max_new_tokens=prompt.max_new_tokens,
        min_new_tokens=1,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
        suppress_tokens=[vocabulary[token] for token in specials if vocabulary.get(token, ends[0]) not in ends],
        stop_strings=prompt.stop or None,
        use_cache=True,
    )
    sampler = [_Sampler(prompt.temperature, prompt.top_p, seeds)] if prompt.temperature > 0 else []
    ids_BS = model.generate(**inputs, generation_config=config, logits_processor=sampler, tokenizer=tokenizer)
    return _read(ids_BS[:, inputs["input_ids"].shape[1] :].tolist(), tokenizer, prompt, [*ends, config.pad_token_id])


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer, the tokenizer's own first."""
    others = model.generation_config.eos_token_id
    others = others if isinstance(others, list) else [others]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *others) if i is not None))


def seed_of(seed: int, prompt: str, item_id: str) -> int:
    """One number for each item and prompt, whatever the batch."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{prompt}\0{item_id}".encode(), digest_size=7).digest())


class _Sampler:
    """Turns the likeliest token into a sample: the maximum of logits with Gumbel noise is a draw from their softmax.

    Every row has noise of its own, so that neighbours and the size of the batch change nothing.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.seeds_B, self.step = torch.tensor(seeds), 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores.float() / self.temperature
        if self.top_p < 1:
            ordered_BV, order_BV = logits_BV.softmax(dim=-1).sort(dim=-1, descending=True)
            # a token stays while those likelier than it are less than top_p together
            dropped_BV = ordered_BV.cumsum(dim=-1) - ordered_BV >= self.top_p
            logits_BV = logits_BV.masked_fill(torch.empty_like(dropped_BV).scatter(1, order_BV, dropped_BV), -torch.inf)
        self.seeds_B = self.seeds_B.to(scores.device)
        noise_BV = gumbel_noise(self.seeds_B, self.step, scores.shape[1])
        self.step += 1
        return logits_BV + noise_BV


def gumbel_noise(seeds_B: Tensor, step: int, num_tokens: int) -> Tensor:
    """float32 [B, V]: standard Gumbel numbers of each seed's `step`, a function of these alone.

    They are computed where the int64 seeds lie, without a generator's state: on every device the same but for the last
    bits of a logarithm. Token v has the v-th number of SplitMix64 (Steele, Lea and Flood 2014,
    https://doi.org/10.1145/2714064.2660195) begun at a number made of seed and step in the same way.
    """
    begin_B1 = _mix(_mix(seeds_B) + torch.full_like(seeds_B, step + 1) * _GOLDEN)[:, None]
    bits_BV = _mix(begin_B1 + torch.arange(1, num_tokens + 1, device=seeds_B.device) * _GOLDEN)
    # 63 bits, so that the upper tail, of small numbers here, is as fine as float32; 1 itself would be minus infinity
    uniform_BV = _shifted(bits_BV, 1).float().mul_(2.0**-63).clamp_(2.0**-64, 1 - 2.0**-24)
    return uniform_BV.neg_().log1p_().neg_().log_().neg_()


def _mix(numbers: Tensor) -> Tensor:
    """SplitMix64's function of 64 bits: each bit that goes in changes half of those that come out."""
    mixed = (numbers ^ _shifted(numbers, 30)).mul_(_FIRST)
    mixed = mixed.bitwise_xor_(_shifted(mixed, 27)).mul_(_SECOND)
    return mixed.bitwise_xor_(_shifted(mixed, 31))


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: int64 has a sign, which `>>` repeats."""
    return (numbers >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _read(rows: Sequence[Sequence[int]], tokenizer: Any, prompt: Prompt, ends: Sequence[int]) -> Answers:
    answers = Answers([], [], [])
    for row in rows:
        length = next((i for i, token in enumerate(row) if token in ends), len(row))
        text = tokenizer.decode(row[:length], skip_special_tokens=True)
        cuts = [text.index(stop) for stop in prompt.stop if stop in text]
        answers.ids.append(list(row[:length]))
        answers.texts.append(text[: min(cuts, default=len(text))].strip())
        answers.finishes.append("stop" if cuts else "eos" if length < len(row) else "length")
    return answers
