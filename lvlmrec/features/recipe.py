"""The recipe of a feature set: everything that decides what its features are, and the fingerprint of that."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lvlmrec import taps
from lvlmrec.config import option
from lvlmrec.errors import ConfigError
from lvlmrec.taps import FeatureName, Tap

POOLINGS = ("visual_mean", "all_mean", "last_token")
MERGED = "merged_"  # merged_16: the visual tokens merged down to 16, and how many each of them stands for
SIZES = ".sizes"
DTYPES = ("float16", "bfloat16", "float32")
PLACES = ("after", "before")
VISION_PROMPT = "video"  # the prompt part of a vision tap's name: no prompt reaches the vision tower
FORMAT = 1  # counted up when sampling, pooling or naming change what a feature is


@dataclass(frozen=True)
class Prompt:
    """One entry of the prompt bank."""

    text: str = option("Describe this video.", "what the model is asked; may be empty")
    place: str = option("after", "where the text stands relative to the video", choices=PLACES)


@dataclass(frozen=True)
class RecipeConfig:
    """What to extract, as a user writes it."""

    frames: int = option(8, "frames sampled uniformly from each video", minimum=1)
    frame_max_side: int = option(
        1280, "larger frames are scaled down to this many pixels on the longer side", minimum=16
    )
    taps: list[str] = option(
        ["llm.0", "llm.2", "llm.4", "llm.-1"],
        "hidden states to read: llm.14, llm.-1, llm.*, llm.-1.pre_norm, vision.-1, projector",
    )
    prompts: dict[str, Prompt] = option({"describe": Prompt()}, "the prompt bank: name -> text, place")
    poolings: list[str] = option(
        ["visual_mean"],
        "how the tokens of a hidden state become one vector: visual_mean, all_mean, last_token; or a few: merged_16",
    )
    dtype: str = option("float16", "dtype of the stored features", choices=DTYPES)


@dataclass(frozen=True)
class LVLMInfo:
    """What a model is, known from its files without loading its weights.

    `identity` names the weights by content (local directory) or by hub id and resolved commit, never by path.
    `num_layers` and `width` have one entry per tower, `llm` and `vision`.
    """

    family: str
    identity: str
    compute_dtype: str
    num_layers: Mapping[str, int]
    width: Mapping[str, int]


@dataclass(frozen=True)
class Recipe:
    """A recipe resolved against a model: taps counted from 0, the model named by its content."""

    family: str
    identity: str
    compute_dtype: str
    frames: int
    frame_max_side: int
    taps: tuple[Tap, ...]
    prompts: Mapping[str, Prompt]
    poolings: tuple[str, ...]
    dtype: str
    width: Mapping[str, int]

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """The feature columns, in order. Taps before the decoder appear once, pooled by mean, whatever the prompts."""
        video = [FeatureName(VISION_PROMPT, tap, "visual_mean") for tap in self.taps if tap.tower != "llm"]
        llm = [tap for tap in self.taps if tap.tower == "llm"]
        columns = [column for pooling in self.poolings for column in columns_of(pooling)]
        return (
            *video,
            *(FeatureName(prompt, tap, column) for prompt in self.prompts for tap in llm for column in columns),
        )

    @property
    def vector_names(self) -> tuple[FeatureName, ...]:
        """The feature columns that hold one vector, of the width of their tap."""
        return tuple(name for name in self.feature_names if num_merged(name.pooling) is None)

    def shape(self, name: FeatureName) -> tuple[int, ...]:
        """The shape of one item's value in a column: [D], of merged tokens [K, D], of their sizes [K]."""
        width = self.width["llm" if name.tap.tower == taps.PROJECTOR else name.tap.tower]
        num_tokens = num_merged(name.pooling)
        if num_tokens is None:
            return (width,)
        return (num_tokens,) if name.pooling.endswith(SIZES) else (num_tokens, width)

    @property
    def fingerprint(self) -> str:
        """16 hex digits: the hash of what changes a feature."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain values; `Recipe.from_json` reads them back."""
        return asdict(self) | {
            "taps": [str(tap) for tap in self.taps],
            "poolings": list(self.poolings),
            "format": FORMAT,
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote. Raises `ConfigError` on another format."""
        if tree.get("format") != FORMAT:
            raise ConfigError(f"recipe format {tree.get('format')!r}: this version reads format {FORMAT}")
        values = {key: value for key, value in tree.items() if key != "format"}
        values["taps"] = tuple(taps.parse(text) for text in tree["taps"])
        values["prompts"] = {name: Prompt(**prompt) for name, prompt in tree["prompts"].items()}
        values["poolings"] = tuple(tree["poolings"])
        return Recipe(**values)


def num_merged(pooling: str) -> int | None:
    """K of `merged_K` and `merged_K.sizes`; None for what makes one vector."""
    match = re.fullmatch(rf"{MERGED}([1-9]\d*)({re.escape(SIZES)})?", pooling)
    return None if match is None else int(match[1])


def columns_of(pooling: str) -> tuple[str, ...]:
    """The last part of the names of a pooling's columns."""
    return (pooling,) if num_merged(pooling) is None else (pooling, pooling + SIZES)


def resolve(config: RecipeConfig, info: LVLMInfo) -> Recipe:
    """The recipe of `config` for the model that `info` describes. Raises `ConfigError`."""
    if not config.prompts:
        raise ConfigError("recipe.prompts: empty; expected at least one prompt")
    for name in config.prompts:
        if "/" in name or name == VISION_PROMPT:
            raise ConfigError(f"recipe.prompts.{name}: a prompt's name has no '/' and is not {VISION_PROMPT!r}")
    if not config.taps or not config.poolings:
        raise ConfigError("recipe.taps and recipe.poolings: expected at least one of each")
    for pooling in config.poolings:
        if pooling not in POOLINGS and (num_merged(pooling) is None or pooling.endswith(SIZES)):
            choices = ", ".join(sorted(POOLINGS))
            raise ConfigError(f"recipe.poolings: {pooling!r} is not one of {choices}, {MERGED}K such as {MERGED}16")
    return Recipe(
        family=info.family,
        identity=info.identity,
        compute_dtype=info.compute_dtype,
        frames=config.frames,
        frame_max_side=config.frame_max_side,
        taps=taps.resolve(config.taps, info.num_layers),
        prompts=config.prompts,
        poolings=tuple(dict.fromkeys(config.poolings)),
        dtype=config.dtype,
        width=dict(info.width),
    )
