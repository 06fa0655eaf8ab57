"""A loaded text encoder: every tap of every prompt pooled inside one forward per batch of texts of like length.

Legend: B texts, S sequence positions, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.poolings import find
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms.encoders import encoder
from lvlmrec.lvlms.engine import conversation
from lvlmrec.lvlms.engine.copies import to_device, to_host
from lvlmrec.lvlms.engine.hooks import Pool, ignore
from lvlmrec.lvlms.files import loading, source
from lvlmrec.lvlms.protocol import Item, ModelConfig
from lvlmrec.taps import FeatureName, Tap

UNLIMITED = 10**6  # tokenizers without a limit say 1e30
MAX_PADDING = 0.1  # share of a batch's shortest row; the tail of long texts would else pad its neighbours


@dataclass(frozen=True)
class Batch:
    """The texts of one forward, on the CPU: of one prompt, and of the items at `rows`; tensors [B, S]."""

    prompt: str
    rows: list[int]
    ids: Tensor
    attended: Tensor


def load(
    config: ModelConfig, recipe: ModelRecipe, info: LVLMInfo, model_config: Any, sentence_config: Mapping[str, Any]
) -> TextModel:
    """The model of `config`, ready for `recipe`; `sentence_config` is what sentence-transformers says of it.

    Raises `ConfigError`, also when the files are not the recipe's.
    """
    from transformers import AutoTokenizer

    folder = source.directory(config)
    with loading.reading(config):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ConfigError(f"lvlm.model: {config.model!r}: no tokenizer.json, and none can be made of its files")
    model_config.use_cache = False
    model = encoder.load(config, recipe, info, model_config)
    limit = max_tokens(model, tokenizer, sentence_config)
    return TextModel(model, encoder.find_layers(model, config), tokenizer, limit, recipe, info, config.batch_size)


def max_tokens(model: Any, tokenizer: Any, sentence_config: Mapping[str, Any]) -> int:
    """The length at which a text is cut: the least of what its files name and what it has positions for."""
    # RoBERTa and its kin count positions from behind the padding token
    offset = getattr(getattr(model, "embeddings", None), "padding_idx", -1) + 1
    positions = getattr(model.config, "max_position_embeddings", None) or UNLIMITED
    limits = (sentence_config.get("max_seq_length"), tokenizer.model_max_length, positions - offset)
    return min(int(limit) for limit in limits if limit and 0 < limit <= UNLIMITED)


class TextModel:
    """A loaded text encoder; see `protocol.LVLM`."""

    def __init__(
        self, model: Any, layers: Any, tokenizer: Any, limit: int, recipe: ModelRecipe, info: LVLMInfo, batch_size: int
    ) -> None:
        self.info, self.limit = info, limit
        self._model, self._tokenizer = model, tokenizer
        self._recipe, self.batch_size = recipe, batch_size
        added = tokenizer.added_tokens_decoder.values()
        self._specials = sorted({str(token) for token in added if token.special}, key=len, reverse=True)
        # The last state is what the model returns, behind a final norm where it has one.
        self._last = Tap("text", info.num_layers["text"])
        self._pool: Pool = ignore
        encoder.attach(
            layers, [tap for tap in recipe.taps if tap != self._last], lambda tap, hidden: self._pool(tap, hidden)
        )

    def prepare(self, items: Sequence[Item]) -> list[Batch]:
        """See `protocol.LVLM.prepare`. Texts longer than `limit` tokens are cut there, and counted on stderr.

        Raises `InputError` for an item without any text.
        """
        batches, num_cut = [], 0
        for name, prompt in self._recipe.prompts.items():
            for item in items:
                if prompt.fields and not any(item.texts.get(field, "").strip() for field in prompt.fields):
                    raise InputError(f"item {item.item_id!r}: {', '.join(prompt.fields)} empty, and nothing else shown")
            texts = [conversation.fill(prompt.text, prompt, item.texts, self._specials) for item in items]
            encoded = self._tokenizer(texts, truncation=True, max_length=self.limit)
            num_cut += sum(bool(encoding.overflowing) for encoding in encoded.encodings)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            if not all(lengths):
                raise InputError(f"item {items[lengths.index(0)].item_id!r}: its text has no token")
            for rows in group(lengths, self.batch_size):
                batches.append(self._batch(name, rows, [encoded["input_ids"][row] for row in rows]))
        if num_cut:
            print(f"{self.info.family}: {num_cut} texts cut to {self.limit} tokens", file=sys.stderr)
        return batches

    def extract(self, prepared: Sequence[Batch]) -> dict[str, Tensor | list[str]]:
        """See `protocol.LVLM.extract`."""
        first = next(iter(self._recipe.prompts))
        num_items = sum(len(batch.rows) for batch in prepared if batch.prompt == first)
        features = {str(name): torch.empty(num_items, *shape) for name, shape in self._recipe.shapes.items()}
        for batch in prepared:
            for name, pooled_BD in self._extract_batch(batch).items():
                features[name][batch.rows] = pooled_BD.cpu()
        return dict(features)

    @torch.inference_mode()
    def _extract_batch(self, batch: Batch) -> dict[str, Tensor]:
        device = self._model.device
        ids_BS, attended_BS = (to_device(part, device) for part in (batch.ids, batch.attended))
        pooled: dict[str, Tensor] = {}

        def pool(tap: Tap, hidden_BSD: Tensor) -> None:
            for pooling in self._recipe.poolings:
                (feature_BD,) = find(pooling).pool(hidden_BSD, attended_BS)
                pooled[str(FeatureName(batch.prompt, tap, pooling))] = feature_BD

        self._pool = pool
        output = self._model(input_ids=ids_BS, attention_mask=attended_BS.long())
        if self._last in self._recipe.taps:
            pool(self._last, output.last_hidden_state)
        return pooled

    def _batch(self, prompt: str, rows: list[int], tokens: Sequence[Sequence[int]]) -> Batch:
        """Tokens padded on the right: a causal model then never sees the padding, and positions count from 0."""
        ids_BS = torch.full((len(rows), max(map(len, tokens))), self._tokenizer.pad_token_id or 0)
        attended_BS = torch.zeros(ids_BS.shape, dtype=torch.bool)
        for row, ids in enumerate(tokens):
            ids_BS[row, : len(ids)] = torch.tensor(ids)
            attended_BS[row, : len(ids)] = True
        device = self._model.device
        return Batch(prompt, rows, to_host(ids_BS, device), to_host(attended_BS, device))


def group(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows in batches of at most `batch_size`, shortest texts first, of which no more than `MAX_PADDING` is padding."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batches and len(batches[-1]) < batch_size and lengths[row] * (1 - MAX_PADDING) <= lengths[batches[-1][0]]:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
