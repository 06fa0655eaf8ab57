"""How the tokens of a hidden state become one vector, or a few.

A new pooling is one file, which declares a `Pooling`, and one line here. A name that ends in `_` is followed by a
number of tokens, as in `merged_16`, and its entry makes the `Pooling` for that number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from lvlmrec.errors import ConfigError
from lvlmrec.features.poolings import means, merged, single
from lvlmrec.features.poolings.pooling import ANSWER, CLASS, Pooling

POOLINGS: dict[str, Pooling | Callable[[int], Pooling]] = {
    "visual_mean": means.VISUAL_MEAN,
    "all_mean": means.ALL_MEAN,
    "last_token": single.LAST_TOKEN,
    "new_mean": means.NEW_MEAN,
    "eos": single.EOS,
    "prompt_eos": single.PROMPT_EOS,
    "merged_": merged.merged,
    "new_merged_": merged.new_merged,
    "first_token": single.FIRST_TOKEN,
}


def find(name: str, choices: Sequence[str] = ()) -> Pooling:
    """The pooling of this name, among `choices` (keys of `POOLINGS`), none: all. Raises `ConfigError`."""
    choices = choices or [*POOLINGS]
    parts = re.fullmatch(r"(.*_)([1-9]\d*)", name)
    number = int(parts[2]) if parts and parts[1] in POOLINGS else 0
    key = parts[1] if parts and number else name
    entry = POOLINGS.get(key)
    if entry is None or key not in choices or isinstance(entry, Pooling) == bool(number):
        raise ConfigError(f"recipe.poolings: {name!r} is not one of {', '.join(listed(choices))}")
    return entry if isinstance(entry, Pooling) else entry(number)


def listed(keys: Iterable[str]) -> list[str]:
    """Keys of `POOLINGS` as messages show them."""
    return [f"{key}K such as {key}16" if key.endswith("_") else key for key in keys]


def of_decoder() -> tuple[str, ...]:
    """The keys of the poolings that a language model's tokens have; the others are an encoder's."""
    return tuple(key for key, entry in POOLINGS.items() if _reads(entry) != CLASS)


def of_answers() -> set[str]:
    """The keys of those that read the tokens of an answer, which a model that generates no text lacks."""
    return {key for key, entry in POOLINGS.items() if _reads(entry).startswith(ANSWER)}


def _reads(entry: Pooling | Callable[[int], Pooling]) -> str:
    return entry.reads if isinstance(entry, Pooling) else entry(1).reads
