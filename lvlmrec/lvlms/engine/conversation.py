"""A prompt as the model reads it: the chat template's text, filled for each item, and token ids in one tensor.

Legend: B items, S sequence positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lvlmrec.errors import ConfigError
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.lvlms.engine.inputs import content_type, placeholder
from lvlmrec.lvlms.engine.pooling import TokenMasks

_PROBE = "Where does this text stand?"


def render(processor: Any, name: str, prompt: Prompt) -> str:
    """The conversation as text, with one place-holder for the video or cover, before or after the prompt's text.

    Some chat templates put every video before every text; there the place-holder is written into the text. Columns
    of the manifest are still `{named}`.
    Raises `ConfigError` when the prompt holds a place-holder of its own or the model has no chat template.
    """
    if not processor.chat_template:
        raise ConfigError("lvlm.model: it has no chat template; expected a model tuned to follow instructions")
    if any(token in prompt.text for token in processor.all_special_multimodal_tokens):
        tokens = ", ".join(processor.all_special_multimodal_tokens)
        raise ConfigError(f"recipe.prompts.{name}.text: {prompt.text!r} holds a token of the model, one of {tokens}")
    if prompt.input == "text":
        return _apply(processor, [prompt.text])
    token = placeholder(processor, prompt.input)
    media = {"type": content_type(processor, prompt.input)}

    def in_order(shown: Any, text: str) -> list[Any]:
        parts = [shown, text] if prompt.place == "after" else [text, shown]
        return [part for part in parts if part]

    probe = _apply(processor, in_order(media, _PROBE))
    media_first = probe.index(token) < probe.index(_PROBE)
    if not prompt.text or media_first == (prompt.place == "after"):
        return _apply(processor, in_order(media, prompt.text))
    return _apply(processor, ["\n".join(in_order(token, prompt.text))])


def joined_messages(conversation: Sequence[Mapping[str, Any]], placeholder: str) -> list[dict[str, str]]:
    """Messages as one text each, their parts on lines of their own and `placeholder` for what is no text."""
    return [
        {
            "role": message["role"],
            "content": "\n".join(
                part["text"] if part["type"] == "text" else placeholder for part in message["content"]
            ),
        }
        for message in conversation
    ]


def adds_special_tokens(processor: Any, text: str) -> bool:
    """Whether the tokenizer adds its special tokens to a rendered conversation.

    The rule of transformers' `ProcessorMixin.apply_chat_template(tokenize=True)`: none where the chat template wrote
    the beginning-of-text token, else as the processor has it.
    """
    bos = processor.tokenizer.bos_token
    if bos is not None and text.startswith(bos):
        return False
    if not hasattr(processor, "_merge_kwargs"):  # a port
        return True
    options = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)["text_kwargs"]
    return bool(options.get("add_special_tokens", True))


def fill(text: str, prompt: Prompt, fields: Mapping[str, str], special_tokens: Sequence[str]) -> str:
    """The rendered text with an item's own words in it. A model's special tokens among them become spaces."""

    def value(match: re.Match[str]) -> str:
        words = fields.get(match[1], "")
        for token in special_tokens:
            words = words.replace(token, " ")
        return words

    return re.sub(rf"\{{({'|'.join(prompt.fields)})\}}", value, text) if prompt.fields else text


def token_ids(
    processor: Any, kind: str, texts: Sequence[str], shown: Sequence[str] | None, adds_special: bool
) -> list[list[int]]:
    """The tokens of conversations, one for each of `texts`; `shown` is what stands for each one's video or cover."""
    if shown is not None:
        token = placeholder(processor, kind)
        texts = [text.replace(token, own) for text, own in zip(texts, shown, strict=True)]
    ids: list[list[int]] = processor.tokenizer(list(texts), add_special_tokens=adds_special)["input_ids"]
    return ids


def special_tokens(processor: Any) -> list[str]:
    """The texts that tokenizer and processor do not read as words, longest first."""
    added = [str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *processor.all_special_multimodal_tokens}, key=lambda token: (-len(token), token))


def align(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    end: int | None,
    visual_token_id: int,
    padding_id: int,
) -> tuple[dict[str, torch.Tensor], TokenMasks]:
    """Prompts, each followed by its answer and by the token `end`, as `input_ids` and `attention_mask` [B, S].

    Rows are moved so that their last visual tokens stand in one column, of prompts without any their last tokens: a
    bank of prompts after the same videos then shares its columns up to there. The masks tell prompt, visual tokens,
    answer and end apart; the prompt's do not count the answer.
    """
    lasts = [
        max((i for i, token in enumerate(row) if token == visual_token_id), default=len(row) - 1) for row in prompts
    ]
    tails = [[*answer, *([] if end is None else [end])] for answer in answers]
    column = max(lasts)
    length = max(column - last + len(row) + len(tail) for last, row, tail in zip(lasts, prompts, tails, strict=True))
    ids_BS = torch.full((len(prompts), length), padding_id)
    masks = [torch.zeros(len(prompts), length, dtype=torch.bool) for _ in range(3)]
    attended_BS, new_BS, end_BS = masks
    for row, (last, prompt, tail) in enumerate(zip(lasts, prompts, tails, strict=True)):
        begin = column - last
        behind = begin + len(prompt)
        ids_BS[row, begin : behind + len(tail)] = torch.tensor([*prompt, *tail])
        attended_BS[row, begin:behind] = True
        new_BS[row, behind : behind + len(answers[row])] = True
        if end is not None:
            end_BS[row, behind + len(tail) - 1] = True
    tokens = {"input_ids": ids_BS, "attention_mask": (attended_BS | new_BS | end_BS).long()}
    return tokens, TokenMasks(attended_BS, (ids_BS == visual_token_id) & attended_BS, new_BS, end_BS)


def _apply(processor: Any, parts: Sequence[Any]) -> str:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
