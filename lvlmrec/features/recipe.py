"""The recipe of a feature set: everything that decides what its features are, and the fingerprint of that."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lvlmrec import taps
from lvlmrec.config import option
from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import recipe_keys
from lvlmrec.taps import FeatureName, Tap

# Of the prompt's own tokens; of what the model answered, `new`; of an end-of-sequence token put behind either.
POOLINGS = ("visual_mean", "all_mean", "last_token", "new_mean", "eos", "prompt_eos")
OF_VISUAL = ("visual_mean",)
OF_ANSWER = ("new_mean", "eos")
FIRST_TOKEN = "first_token"  # the class token of a text or vision encoder; no token of an LVLM is one
MERGED = "merged_"  # merged_16: the visual tokens merged down to 16, and how many each of them stands for
NEW_MERGED = "new_merged_"  # the same of the answer's tokens
SIZES = ".sizes"
PIXELS = "pixels"  # no pooling: the frames themselves, of `lvlm.name=frames`
DTYPES = ("float16", "bfloat16", "float32")
PIXEL_DTYPE = "uint8"
SIDE = "side"  # the video option that says how wide and high stored frames are
PLACES = ("after", "before")
MEDIA = ("video", "cover")
INPUTS = (*MEDIA, "text")
FRAMES, MOTION = "frames", "motion"  # what a model is shown of a video
ANSWER, FINISH = "text", "finish"  # last part of the names of the columns with what was generated, and why it ended
FORMAT = 3  # counted up when sampling, pooling or naming change what a feature is
NOISE = 2  # counted up when sampled answers draw other numbers; 1 was torch's generator, one for each item
FINGERPRINT = "fingerprint"


@dataclass(frozen=True)
class Prompt:
    """One entry of the prompt bank. With `max_new_tokens` the model answers, and the answer is stored."""

    text: str = option("Describe this video.", "what the model is asked; {title}, {text}, ... are columns of the input")
    place: str = option("after", "position of the text relative to the video or cover", choices=PLACES)
    input: str = option("video", "what the model is shown: the video, the cover image, or text alone", choices=INPUTS)
    max_new_tokens: int = option(
        0, "length limit of the answer in tokens; 0: the model only reads the prompt", minimum=0
    )
    stop: list[str] = option([], "strings that end an answer; they are not part of it")
    temperature: float = option(0.0, "of sampled answers, seeded for each item; 0: the likeliest token", minimum=0)
    top_p: float = option(
        1.0, "sample from the likeliest tokens whose probabilities add up to this", above=0, maximum=1
    )

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns of the manifest that the text names, `{title}`; other braces are text."""
        return tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", self.text)))


@dataclass(frozen=True)
class RecipeConfig:
    """What to extract, as a user writes it."""

    frames: int = option(
        8, "frames sampled uniformly from each video; of a model that sees motion, its clips at most", minimum=1
    )
    frame_max_side: int = option(
        1280, "larger frames are scaled down to this many pixels on the longer side", minimum=16
    )
    taps: list[str] = option(
        ["llm.0", "llm.2", "llm.4", "llm.-1"],
        "hidden states to read: llm.14, llm.-1, llm.* (all), llm.*/4 (0, 4, 8, ...; the last only if a multiple), "
        "llm.-1.pre_norm, vision.-1, projector",
        required=True,
    )
    prompts: dict[str, Prompt] = option({"describe": Prompt()}, "the prompt bank: name -> text, place", required=True)
    poolings: list[str] = option(
        ["visual_mean"],
        "how the tokens of a hidden state become one vector: visual_mean, all_mean, last_token, new_mean (of the "
        "answer), eos, prompt_eos, first_token (of an encoder); or a few: merged_16, new_merged_8",
        required=True,
    )
    dtype: str = option("float16", "dtype of the stored features; frames are uint8", choices=(*DTYPES, PIXEL_DTYPE))
    video_options: dict[str, int] = option(
        {}, "options of the family's video processor, such as packing of minicpm_v_4_5", minimum=0
    )


@dataclass(frozen=True)
class LVLMInfo:
    """What a model is, known from its files without loading its weights.

    `identity` names the weights by content (local directory) or by hub id and resolved commit, never by path.
    `num_layers` and `width` have one entry per tower: `llm` and `vision` of an LVLM, `text` of a text encoder, `vision`
    of a video or image encoder. `width` may name single taps too, where layers differ. `inputs` are what its prompts
    can show and `places` where a prompt's text may stand, `poolings` what its taps can be pooled by. `frames` is the
    number it was made for, 0 for any; it reads them in groups of `frame_group`. `video_options` are those of its video
    processor, with their defaults. `video_form` is what it is shown of a video: `frames`, or key frames and the
    `motion` that `video_encoder` found. A model that `is_random` draws random numbers whenever it looks at a video.
    `dtypes` are those that its features can be stored in. `bos_written`: the chat template writes the
    beginning-of-text token that the tokenizer would add, so that the tokenizer adds no special tokens. `context` is the
    number of tokens that it reads at most, 0 where its files do not say. `generation` are settings of its files that
    would change an answer, such as a repetition penalty: a recipe says how answers are made, and they are not applied.
    """

    family: str
    identity: str
    compute_dtype: str
    num_layers: Mapping[str, int]
    width: Mapping[str, int]
    inputs: tuple[str, ...] = INPUTS
    poolings: tuple[str, ...] = (*POOLINGS, MERGED, NEW_MERGED)
    frames: int = 0
    frame_group: int = 1
    video_options: Mapping[str, int] = field(default_factory=dict)
    places: tuple[str, ...] = PLACES
    video_form: str = FRAMES
    video_encoder: str = ""
    is_random: bool = False
    dtypes: tuple[str, ...] = DTYPES
    bos_written: bool = False
    context: int = 0
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A recipe resolved against a model: taps counted from 0, the model named by its content.

    `generation_left_out`: of a recipe with answers, what the model's files say of generation and is not applied.
    Of a model that sees motion `frames` is the number of clips at most, and `frame_max_side` is 0: it has no effect.
    `noise` says where the numbers of sampled answers come from, 0 where none is sampled.
    """

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
    video_options: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    texts_from: str = ""
    video_form: str = FRAMES
    video_encoder: str = ""
    bos_written: bool = False
    generation_left_out: Mapping[str, Any] = field(default_factory=dict)
    noise: int = 0
    # as recipe.json has it; not of the constructor, so that a recipe made from this one has a fingerprint of its own
    _stored_fingerprint: str = field(default="", init=False, compare=False, repr=False)

    @property
    def media(self) -> tuple[str, ...]:
        """What has to be decoded: `video`, `cover`, both or neither."""
        shown = {prompt.input for prompt in self.prompts.values()}
        return tuple(kind for kind in MEDIA if kind in shown)

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns of the manifest that the prompts name."""
        return tuple(dict.fromkeys(field for prompt in self.prompts.values() for field in prompt.fields))

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """The feature columns, in order.

        Taps of a vision tower and of the projector appear once for what they see, whatever the prompts; those of an
        LVLM see the video and are pooled by mean.
        """
        is_lvlm = "llm" in self.width
        columns = ("visual_mean",) if is_lvlm else self.poolings
        seen = [
            FeatureName(kind, tap, column)
            for kind in (self.media[:1] if is_lvlm else self.media)
            for tap in self.taps
            if tap.tower not in taps.READS_TEXT
            for column in columns
        ]
        read = [tap for tap in self.taps if tap.tower in taps.READS_TEXT]
        return (
            *seen,
            *(
                FeatureName(name, tap, column)
                for name, prompt in self.prompts.items()
                for tap in read
                for pooling in poolings_of(prompt, self.poolings)
                for column in columns_of(pooling)
            ),
        )

    @property
    def text_names(self) -> tuple[str, ...]:
        """The columns of text: for each prompt that is answered, the answer and why it ended (eos, stop or length)."""
        answered = [name for name, prompt in self.prompts.items() if prompt.max_new_tokens]
        return tuple(f"{name}/{part}" for name in answered for part in (ANSWER, FINISH))

    @property
    def vector_names(self) -> tuple[FeatureName, ...]:
        """The feature columns that hold one vector, of the width of their tap, or all pixels of an item."""
        return tuple(name for name in self.feature_names if num_merged(name.pooling) is None)

    def shape(self, name: FeatureName) -> tuple[int, ...]:
        """The shape of one item's value in a column: [D], of merged tokens [K, D], of their sizes [K].

        Of pixels [F, 3, H, W].
        """
        if name.pooling == PIXELS:
            return (self.frames, 3, self.video_options[SIDE], self.video_options[SIDE])
        width = (
            self.width.get(str(name.tap)) or self.width["llm" if name.tap.tower == taps.PROJECTOR else name.tap.tower]
        )
        num_tokens = num_merged(name.pooling)
        if num_tokens is None:
            return (width,)
        return (num_tokens,) if name.pooling.endswith(SIZES) else (num_tokens, width)

    @property
    def fingerprint(self) -> str:
        """16 hex digits: the hash of what changes a feature; of a recipe that was read, the one that was stored."""
        if self._stored_fingerprint:
            return self._stored_fingerprint
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain values of the keys that count in the fingerprint; `Recipe.from_json` reads them back."""
        return recipe_keys.counting(self, recipe_keys.FORMAT_3) | {
            "taps": [str(tap) for tap in self.taps],
            "prompts": {
                name: recipe_keys.counting(prompt, recipe_keys.FORMAT_3_PROMPT) for name, prompt in self.prompts.items()
            },
            "poolings": list(self.poolings),
            "format": FORMAT,
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote, under the `fingerprint` that stands beside its keys, if one does.

        Unknown keys that are empty, false or 0 have no effect. Raises `ConfigError` on another format, `InputError` on
        unknown keys with any other value.
        """
        if tree.get("format") != FORMAT:
            raise ConfigError(
                f"recipe format {tree.get('format')!r}: this version of lvlmrec reads format {FORMAT}; "
                "read the set with the version that made it, or extract it again"
            )
        values = {key: value for key, value in tree.items() if key not in ("format", FINGERPRINT)}
        unknown = recipe_keys.unknown(Recipe, values, "")
        prompts: dict[str, Prompt] = {}
        for name, prompt in tree["prompts"].items():
            unknown += recipe_keys.unknown(Prompt, prompt, f"prompts.{name}.")
            prompts[name] = Prompt(**recipe_keys.known(Prompt, prompt))
        if unknown:
            raise InputError(
                f"recipe.json: made by a newer version of lvlmrec: unknown {', '.join(unknown)}; "
                "install that version to read this feature set"
            )
        values = recipe_keys.known(Recipe, values) | {
            "taps": tuple(taps.parse(text) for text in tree["taps"]),
            "prompts": prompts,
            "poolings": tuple(tree["poolings"]),
        }
        recipe = Recipe(**values)
        object.__setattr__(recipe, "_stored_fingerprint", tree.get(FINGERPRINT, ""))
        return recipe


def num_merged(pooling: str) -> int | None:
    """K of `merged_K`, `new_merged_K` and their `.sizes`; None for what makes one vector."""
    match = re.fullmatch(rf"(?:{NEW_MERGED}|{MERGED})([1-9]\d*)({re.escape(SIZES)})?", pooling)
    return None if match is None else int(match[1])


def columns_of(pooling: str) -> tuple[str, ...]:
    """The last part of the names of a pooling's columns."""
    return (pooling,) if num_merged(pooling) is None else (pooling, pooling + SIZES)


def poolings_of(prompt: Prompt, poolings: Sequence[str]) -> tuple[str, ...]:
    """Those of `poolings` that a prompt has tokens for: visual ones, ones of an answer."""

    def applies(pooling: str) -> bool:
        if pooling in OF_VISUAL or pooling.startswith(MERGED):
            return prompt.input != "text"
        if pooling in OF_ANSWER or pooling.startswith(NEW_MERGED):
            return prompt.max_new_tokens > 0
        return pooling != "prompt_eos" or prompt.max_new_tokens == 0

    return tuple(pooling for pooling in poolings if applies(pooling))


def resolve(config: RecipeConfig, info: LVLMInfo, seed: int = 0, texts_from: str = "") -> Recipe:
    """The recipe of `config` for the model that `info` describes. Raises `ConfigError`.

    `seed` draws the answers that are sampled, and what a random model draws; `texts_from` names the feature set whose
    generated texts prompts read.
    """
    if info.frames and config.frames != info.frames:
        raise ConfigError(f"recipe.frames: {config.frames}: this {info.family} reads exactly {info.frames} frames")
    if config.frames % info.frame_group:
        raise ConfigError(
            f"recipe.frames: {config.frames}: this {info.family} reads frames in groups of {info.frame_group}"
        )
    if config.dtype not in info.dtypes:
        raise ConfigError(f"recipe.dtype: {config.dtype!r}: {info.family} is stored as {', '.join(info.dtypes)}")
    resolved_taps = taps.resolve(config.taps, info.num_layers)
    _check_poolings(config, info)
    _check_prompts(config, info)
    if any(tap.tower == taps.PROJECTOR or tap.tower == "vision" for tap in resolved_taps):
        kinds = ["video"] if "llm" in info.num_layers else list(MEDIA)
        if not any(prompt.input in kinds for prompt in config.prompts.values()):
            raise ConfigError(f"recipe.taps: a vision tap sees the {' or '.join(kinds)}, and no prompt has it as input")
    is_sampled = any(prompt.temperature > 0 and prompt.max_new_tokens for prompt in config.prompts.values())
    return Recipe(
        family=info.family,
        identity=info.identity,
        compute_dtype=info.compute_dtype,
        frames=config.frames,
        frame_max_side=config.frame_max_side if info.video_form == FRAMES else 0,
        taps=resolved_taps,
        prompts=config.prompts,
        poolings=tuple(dict.fromkeys(config.poolings)),
        dtype=config.dtype,
        width=dict(info.width),
        video_options=_video_options(config, info),
        seed=seed if is_sampled or info.is_random else 0,
        texts_from=texts_from if any(prompt.fields for prompt in config.prompts.values()) else "",
        video_form=info.video_form,
        video_encoder=info.video_encoder,
        bos_written=info.bos_written,
        generation_left_out=dict(info.generation) if any(p.max_new_tokens for p in config.prompts.values()) else {},
        noise=NOISE if is_sampled else 0,
    )


def _video_options(config: RecipeConfig, info: LVLMInfo) -> dict[str, int]:
    for name, value in config.video_options.items():
        if name not in info.video_options:
            choices = ", ".join(info.video_options) or "none"
            raise ConfigError(
                f"recipe.video_options.{name}={value}: not an option of {info.family}; choices: {choices}"
            )
        default = info.video_options[name]
        if value < 1 <= default and not isinstance(default, bool):  # one that may be off has 0 as default
            raise ConfigError(f"recipe.video_options.{name}: {value} is below 1")
    return dict(info.video_options) | config.video_options


def _check_poolings(config: RecipeConfig, info: LVLMInfo) -> None:
    for pooling in config.poolings:
        merged = pooling.rstrip("0123456789") if num_merged(pooling) is not None else ""
        if (merged or pooling) not in info.poolings or (pooling.endswith("_") and not merged):
            choices = ", ".join(f"{name}K such as {name}16" if name.endswith("_") else name for name in info.poolings)
            raise ConfigError(f"recipe.poolings: {pooling!r} is not one of {choices}")
        if not any(pooling in poolings_of(prompt, [pooling]) for prompt in config.prompts.values()):
            raise ConfigError(
                f"recipe.poolings: {pooling!r} has no tokens in any prompt; visual ones need input=video or cover, "
                f"those of an answer max_new_tokens, prompt_eos a prompt without an answer"
            )


def _check_prompts(config: RecipeConfig, info: LVLMInfo) -> None:
    for name, prompt in config.prompts.items():
        key = f"recipe.prompts.{name}"
        if "/" in name or name in MEDIA:  # those name the columns of vision taps
            raise ConfigError(f"{key}: a prompt's name has no '/' and is not one of {', '.join(MEDIA)}")
        if prompt.input not in info.inputs:
            raise ConfigError(f"{key}.input: {prompt.input!r}: {info.family} reads {', '.join(info.inputs)}")
        if prompt.place not in info.places:
            raise ConfigError(
                f"{key}.place: {prompt.place!r}: {info.family} reads a prompt {' or '.join(info.places)} the video"
            )
        if prompt.input == "text" and not prompt.text:
            raise ConfigError(f"{key}.text: empty, and input=text shows nothing else; name a column such as {{title}}")
        if not poolings_of(prompt, config.poolings) and not prompt.max_new_tokens:
            raise ConfigError(f"{key}: none of recipe.poolings {config.poolings} has tokens in it")
        if prompt.text and not set(taps.READS_TEXT) & set(info.num_layers):
            raise ConfigError(f"{key}.text: {prompt.text!r}: {info.family} reads no text; leave it empty")
        if prompt.max_new_tokens and not {*OF_ANSWER} & {*info.poolings}:
            raise ConfigError(f"{key}.max_new_tokens: {prompt.max_new_tokens}: {info.family} generates no text")
