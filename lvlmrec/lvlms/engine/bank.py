"""A bank of prompts through the decoder: one forward each, or together where they follow the same video.

Legend: B items, S sequence positions, C of what prompts share, Q of a prompt's own end, D hidden width; rows of a batch
of ends are R = P * B, prompt by prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.poolings import find
from lvlmrec.lvlms.engine import prefix
from lvlmrec.lvlms.engine.hooks import Hooks
from lvlmrec.lvlms.engine.layout import Layout
from lvlmrec.lvlms.engine.pooling import TokenMasks, pool_beginning, pool_columns, pool_ends, reads_text
from lvlmrec.taps import FeatureName, Tap


@dataclass(frozen=True)
class Reading:
    """A prompt as the base model takes it.

    tokens  input_ids, attention_mask [B, S], and what else the processor says of them
    layout  how the pixels lie, `Media.layout`
    media   modality -> encoded media; empty for text alone
    """

    tokens: Mapping[str, Tensor]
    masks: TokenMasks
    layout: Mapping[str, Any]
    media: Mapping[str, Any]


class Bank:
    """Reads prompts with the base model of a family."""

    def __init__(self, base: Any, hooks: Hooks, recipe: ModelRecipe, family: Layout) -> None:
        self._base, self._hooks, self._family = base, hooks, family
        self._poolings = {name: recipe.poolings_of(name) for name in recipe.prompts}
        may_share = {n for n, poolings in self._poolings.items() if all(find(p).shares_beginning for p in poolings)}
        self._groups = [
            [name for name, p in recipe.prompts.items() if (p.input, p.place) == (kind, "after") and name in may_share]
            for kind in recipe.media
        ]

    def read(self, bank: Mapping[str, Reading], batch_size: int) -> dict[str, Tensor]:
        """The pooled features of all prompts, those after the same video together.

        `batch_size` bounds the rows of a forward over ends.
        """
        pooled: dict[str, Tensor] = {}
        alone = list(bank)
        for group in self._groups:
            shared = [bank[name] for name in group]
            length = prefix.shared_length(shared) if len(shared) > 1 and self._may_share(shared) else 0
            if length:
                pooled |= self._read_together({name: bank[name] for name in group}, length, batch_size)
                alone = [name for name in alone if name not in group]
        for name in alone:
            pooled |= self._read_alone(name, bank[name])
        return pooled

    def _may_share(self, prompts: Sequence[Reading]) -> bool:
        lengths_PB = torch.stack([prompt.tokens["attention_mask"].sum(dim=1) for prompt in prompts])
        return self._family.shares_prefix(self._base, lengths_PB)

    def _read_alone(self, prompt: str, reading: Reading) -> dict[str, Tensor]:
        """One forward of the decoder: the pooled features of one prompt."""
        pooled: dict[str, Tensor] = {}

        def pool(tap: Tap, hidden_BSD: Tensor) -> None:
            for column, feature in pool_columns(self._poolings[prompt], hidden_BSD, reading.masks).items():
                pooled[str(FeatureName(prompt, tap, column))] = feature

        self._hooks.pool = pool
        self._forward(reading)
        return pooled

    def _read_together(self, bank: Mapping[str, Reading], length: int, batch_size: int) -> dict[str, Tensor]:
        """Prompts whose first `length` positions are the same: those once, then at most `batch_size` ends at once."""
        decoder, names = self._base.get_decoder(), list(bank)
        first = bank[names[0]].masks.cut(0, length)
        beginnings: dict[Tap, dict[str, Any]] = {}
        read = list(dict.fromkeys(pooling for name in names for pooling in self._poolings[name]))
        pooled: dict[str, Tensor] = {}

        def call_of(name: str) -> prefix.Call:
            # Not kept for all prompts at once: each holds the embedded video.
            return prefix.capture(decoder, functools.partial(self._forward, bank[name]))

        def pool_shared(tap: Tap, hidden_BCD: Tensor) -> None:
            beginnings[tap] = pool_beginning(read, hidden_BCD, first)
            visual = [p for p in self._poolings[names[0]] if not reads_text(p)]  # all of a group have the same
            for column, feature in pool_columns(visual, hidden_BCD, first).items():
                pooled.update({str(FeatureName(name, tap, column)): feature for name in names})

        self._hooks.pool = pool_shared
        cache = prefix.run_prefix(self._family, decoder, call_of(names[0]), length)
        names = [name for name in names if any(reads_text(pooling) for pooling in self._poolings[name])]
        at_once = max(1, batch_size // len(first.attended))
        for begin in range(0, len(names), at_once):
            group = names[begin : begin + at_once]
            masks = prefix.suffix_masks([bank[name].masks for name in group], length)
            self._hooks.pool = functools.partial(self._pool_ends, pooled, group, beginnings, masks)
            attended = [bank[name].tokens["attention_mask"] for name in group]
            prefix.run_suffixes(self._family, decoder, [call_of(name) for name in group], attended, length, cache)
        return pooled

    def _pool_ends(
        self,
        pooled: dict[str, Tensor],
        prompts: Sequence[str],
        beginnings: Mapping[Tap, Mapping[str, Any]],
        masks: TokenMasks,
        tap: Tap,
        hidden_RQD: Tensor,
    ) -> None:
        """Join the ends of `prompts` to what was pooled over their common beginning."""
        num_items = len(hidden_RQD) // len(prompts)
        for row, prompt in zip(range(0, len(hidden_RQD), num_items), prompts, strict=True):
            behind = row + num_items
            ends = pool_ends(self._poolings[prompt], beginnings[tap], hidden_RQD[row:behind], masks.rows(row, behind))
            pooled.update({str(FeatureName(prompt, tap, column)): feature for column, feature in ends.items()})

    def _forward(self, reading: Reading) -> None:
        """The base model from tokens and projected media on; hooks pool the taps on the way."""
        for name in self._family.state_attributes:
            setattr(self._base, name, None)
        self._base(**reading.tokens, **reading.layout, mm_encoder_outputs=dict(reading.media), use_cache=False)
