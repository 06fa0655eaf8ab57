"""A recipe as a user writes it, resolved against what a model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lvlmrec import taps
from lvlmrec.config import option
from lvlmrec.errors import ConfigError
from lvlmrec.features import poolings
from lvlmrec.features.model_recipe import FRAMES, INPUTS, MEDIA, NOISE, PLACES, ModelRecipe, Prompt, applying
from lvlmrec.features.recipe import DTYPES, Recipe, make
from lvlmrec.features.sources import FRAMES_FAMILY, PIXEL_DTYPE, SIDE, FramesRecipe, Reading


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
        f"how the tokens of a hidden state become one vector, or K: {', '.join(poolings.listed(poolings.POOLINGS))}",
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
    can show and `places` where a prompt's text may stand, `poolings` the keys of `POOLINGS` that its taps can
    be pooled by, none: all of a decoder. `frames` is the
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
    poolings: tuple[str, ...] = ()
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


def resolve(config: RecipeConfig, info: LVLMInfo, seed: int = 0, texts_from: str = "") -> Recipe:
    """The recipe of `config` for the model that `info` describes, see `resolve_source`. Raises `ConfigError`."""
    if config.dtype not in info.dtypes:
        raise ConfigError(f"recipe.dtype: {config.dtype!r}: {info.family} is stored as {', '.join(info.dtypes)}")
    return make(resolve_source(config, info, seed, texts_from), config.dtype)


def resolve_source(config: RecipeConfig, info: LVLMInfo, seed: int = 0, texts_from: str = "") -> Reading:
    """What is asked of the model that `info` describes. Raises `ConfigError`.

    `seed` draws the answers that are sampled, and what a random model draws; `texts_from` names the feature set whose
    generated texts prompts read.
    """
    if info.frames and config.frames != info.frames:
        raise ConfigError(f"recipe.frames: {config.frames}: this {info.family} reads exactly {info.frames} frames")
    if config.frames % info.frame_group:
        raise ConfigError(
            f"recipe.frames: {config.frames}: this {info.family} reads frames in groups of {info.frame_group}"
        )
    if info.family == FRAMES_FAMILY:
        return _frames(config, info)
    resolved_taps = taps.resolve(config.taps, info.num_layers)
    _check_poolings(config, info)
    _check_prompts(config, info)
    if any(tap.tower == taps.PROJECTOR or tap.tower == "vision" for tap in resolved_taps):
        kinds = ["video"] if "llm" in info.num_layers else list(MEDIA)
        if not any(prompt.input in kinds for prompt in config.prompts.values()):
            raise ConfigError(f"recipe.taps: a vision tap sees the {' or '.join(kinds)}, and no prompt has it as input")
    is_sampled = any(prompt.temperature > 0 and prompt.max_new_tokens for prompt in config.prompts.values())
    return ModelRecipe(
        family=info.family,
        identity=info.identity,
        compute_dtype=info.compute_dtype,
        frames=config.frames,
        frame_max_side=config.frame_max_side if info.video_form == FRAMES else 0,
        taps=resolved_taps,
        prompts=config.prompts,
        poolings=tuple(dict.fromkeys(config.poolings)),
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


def _frames(config: RecipeConfig, info: LVLMInfo) -> FramesRecipe:
    """Frames as they are. Raises `ConfigError` on what would be asked of a model."""
    taps.resolve(config.taps, info.num_layers)  # there is one
    if config.poolings != [*info.poolings]:
        raise ConfigError(f"recipe.poolings: {config.poolings}: {info.family} has {', '.join(info.poolings)} alone")
    names = list(config.prompts)
    if [*config.prompts.values()] != [Prompt(text="")]:
        raise ConfigError(
            f"recipe.prompts: {', '.join(names)}: {info.family} asks nothing; "
            "expected one entry such as {frames: {text: '', input: video}}"
        )
    side = _video_options(config, info)[SIDE]
    return FramesRecipe(config.frames, config.frame_max_side, side, info.identity, names[0])


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
    for name in config.poolings:
        poolings.find(name, info.poolings or poolings.of_decoder())
        if not any(applying(prompt, [name]) for prompt in config.prompts.values()):
            raise ConfigError(
                f"recipe.poolings: {name!r} has no tokens in any prompt; visual ones need input=video or cover, "
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
        if not applying(prompt, config.poolings) and not prompt.max_new_tokens:
            raise ConfigError(f"{key}: none of recipe.poolings {config.poolings} has tokens in it")
        if prompt.text and not set(taps.READS_TEXT) & set(info.num_layers):
            raise ConfigError(f"{key}.text: {prompt.text!r}: {info.family} reads no text; leave it empty")
        if prompt.max_new_tokens and info.poolings and not poolings.of_answers() & {*info.poolings}:
            raise ConfigError(f"{key}.max_new_tokens: {prompt.max_new_tokens}: {info.family} generates no text")
