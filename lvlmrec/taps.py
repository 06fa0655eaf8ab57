"""Taps: which hidden states of a model are read, and the names of the features made from them.

`llm.k` is the language model's hidden state k in the count of Hugging Face's `output_hidden_states`: `llm.0`
is what enters the first layer, `llm.n` what leaves the last of n layers *after* the final norm.
`vision.k` counts the vision tower's layers likewise. Negative numbers count from the top: `llm.-1` = `llm.n`;
`llm.*` is every hidden state of the language model. `llm.-1.pre_norm` is the last one *before* the final norm; no
other has one. `projector` is what the multimodal projector makes of the video: the visual tokens of `llm.0`, read once
per video instead of once per prompt. `text.k` counts the layers of a text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lvlmrec.errors import ConfigError

TOWERS = ("llm", "vision", "text")
READS_TEXT = ("llm", "text")  # their states depend on the prompt
PROJECTOR = "projector"


@dataclass(frozen=True, order=True)
class Tap:
    """One hidden state: `tower` is `llm`, `vision` or `text`, `layer` counts from 0 (the input of layer 1).

    The projector is a tower of its own with the one state 0. `pre_norm` is the last state before the final norm.
    """

    tower: str
    layer: int
    pre_norm: bool = False

    def __str__(self) -> str:
        if self.tower == PROJECTOR:
            return PROJECTOR
        return f"{self.tower}.{self.layer}{'.pre_norm' if self.pre_norm else ''}"


@dataclass(frozen=True)
class FeatureName:
    """The name of a feature column: `prompt/tap/pooling`."""

    prompt: str
    tap: Tap
    pooling: str

    def __str__(self) -> str:
        return f"{self.prompt}/{self.tap}/{self.pooling}"


def parse(text: str) -> Tap:
    """`llm.14` or `vision.-1` as a tap that may still be negative. Raises `ConfigError`."""
    if text == PROJECTOR:
        return Tap(PROJECTOR, 0)
    match = re.fullmatch(r"(\w+)\.(-?\d+)(\.pre_norm)?", text)
    if match is None or match[1] not in TOWERS or (match[3] and match[1] != "llm"):
        raise ConfigError(
            f"tap {text!r}: expected TOWER.LAYER such as llm.14, llm.-1 or llm.*; towers: {', '.join(TOWERS)}; "
            f"or llm.-1.pre_norm, or {PROJECTOR}"
        )
    return Tap(match[1], int(match[2]), match[3] is not None)


def resolve(texts: Iterable[str], num_layers: Mapping[str, int]) -> tuple[Tap, ...]:
    """Taps of a model with `num_layers[tower]` layers: negatives counted from the top, sorted, each once.

    Raises `ConfigError` when a tap lies outside the model.
    """
    resolved: set[Tap] = set()
    for text in texts:
        if text.endswith(".*") and text[:-2] in num_layers:
            resolved.update(Tap(text[:-2], layer) for layer in range(num_layers[text[:-2]] + 1))
            continue
        tap = parse(text)
        if tap.tower == PROJECTOR and "llm" in num_layers:
            resolved.add(tap)
            continue
        top = num_layers.get(tap.tower)
        if top is None:
            raise ConfigError(f"tap {text!r}: this model has no such tower; towers: {', '.join(sorted(num_layers))}")
        layer = tap.layer + top + 1 if tap.layer < 0 else tap.layer
        if not 0 <= layer <= top:
            raise ConfigError(
                f"tap {text!r}: out of range; choices: {tap.tower}.0 to {tap.tower}.{top} or -{top + 1} to -1"
            )
        if tap.pre_norm and layer != top:
            raise ConfigError(f"tap {text!r}: no norm follows; only llm.{top}.pre_norm (llm.-1.pre_norm) has one")
        resolved.add(Tap(tap.tower, layer, tap.pre_norm))
    return tuple(sorted(resolved))


def parse_feature(name: str) -> FeatureName:
    """The inverse of `str(FeatureName)`. Raises `ConfigError`."""
    parts = name.split("/")
    if len(parts) != 3:
        raise ConfigError(f"feature {name!r}: expected prompt/tap/pooling such as describe/llm.14/visual_mean")
    return FeatureName(parts[0], parse(parts[1]), parts[2])
