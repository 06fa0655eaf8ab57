"""Taps: which hidden states of a model are read, and the names of the features made from them.

`llm.k` is the language model's hidden state k in the count of Hugging Face's `output_hidden_states`: `llm.0`
is what enters the first layer, `llm.n` what leaves the last of n layers *after* the final norm.
`vision.k` counts the vision tower's layers likewise, `text.k` those of a text encoder. Negative numbers count from the
top: `llm.-1` = `llm.n`. `llm.*` is every hidden state of the language model, `llm.*/4` every fourth from `llm.0`; the
last one is among them only where n is a multiple of 4, add `llm.-1` for it. `vision.*` and `text.*` likewise.
`llm.-1.pre_norm` is the last one *before* the final norm; no other has one. `projector` is what the multimodal
projector makes of the video: the visual tokens of `llm.0`, read once per video instead of once per prompt.
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
            f"tap {text!r}: expected TOWER.LAYER such as llm.14, llm.-1, llm.*, llm.*/4; towers: {', '.join(TOWERS)}; "
            f"or llm.-1.pre_norm, or {PROJECTOR}"
        )
    return Tap(match[1], int(match[2]), match[3] is not None)


def resolve(texts: Iterable[str], num_layers: Mapping[str, int]) -> tuple[Tap, ...]:
    """Taps of a model with `num_layers[tower]` layers: negatives counted from the top, sorted, each once.

    Raises `ConfigError` when a tap lies outside the model, or its step is no positive number.
    """
    resolved: set[Tap] = set()
    for text in texts:
        if several := re.fullmatch(r"(\w+)\.\*(/.*)?", text):
            resolved.update(_every(text, several[1], several[2], num_layers))
            continue
        tap = parse(text)
        if tap.tower == PROJECTOR and "llm" in num_layers:
            resolved.add(tap)
            continue
        top = _top(text, tap.tower, num_layers)
        layer = tap.layer + top + 1 if tap.layer < 0 else tap.layer
        if not 0 <= layer <= top:
            raise ConfigError(
                f"tap {text!r}: out of range; choices: {tap.tower}.0 to {tap.tower}.{top} or -{top + 1} to -1"
            )
        if tap.pre_norm and layer != top:
            raise ConfigError(f"tap {text!r}: no norm follows; only llm.{top}.pre_norm (llm.-1.pre_norm) has one")
        resolved.add(Tap(tap.tower, layer, tap.pre_norm))
    return tuple(sorted(resolved))


def _every(text: str, tower: str, step: str | None, num_layers: Mapping[str, int]) -> list[Tap]:
    """The taps of `llm.*`, or of `llm.*/4` where `step` is `/4`. Raises `ConfigError`."""
    top = _top(text, tower, num_layers)
    if step is not None and not re.fullmatch(r"/0*[1-9][0-9]*", step):
        raise ConfigError(
            f"tap {text!r}: expected a step of 1 or more such as {tower}.*/4, every fourth state from {tower}.0 on; "
            f"choices: {tower}.*/1 to {tower}.*/{max(top, 1)}"
        )
    return [Tap(tower, layer) for layer in range(0, top + 1, int(step[1:]) if step else 1)]


def _top(text: str, tower: str, num_layers: Mapping[str, int]) -> int:
    if tower not in num_layers:
        raise ConfigError(f"tap {text!r}: this model has no such tower; towers: {', '.join(sorted(num_layers))}")
    return num_layers[tower]


def parse_feature(name: str) -> FeatureName:
    """The inverse of `str(FeatureName)`. Raises `ConfigError`."""
    parts = name.split("/")
    if len(parts) != 3:
        raise ConfigError(f"feature {name!r}: expected prompt/tap/pooling such as describe/llm.14/visual_mean")
    return FeatureName(parts[0], parse(parts[1]), parts[2])
