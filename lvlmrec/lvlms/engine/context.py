"""Whether a prompt, what it shows and its answer fit in what a model reads.

Nothing is cut off: an item that does not fit is rejected, and a recipe with which none can fit ends the job before its
run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lvlmrec.errors import ConfigError
from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.poolings import find
from lvlmrec.features.poolings.pooling import ANSWER_END, PROMPT_END
from lvlmrec.lvlms.engine import conversation, inputs
from lvlmrec.lvlms.engine.layout import Layout
from lvlmrec.lvlms.protocol import ModelConfig
from lvlmrec.media.sampling import Clip
from lvlmrec.taps import READS_TEXT

SMALL_SIDE = 64  # pixels; all black and still: no model shows fewer tokens of so many frames


def check(family: Layout, config: ModelConfig, recipe: ModelRecipe, processor: Any, limit: int) -> None:
    """Raises `ConfigError` when even the smallest video gives a prompt more than `limit` tokens."""
    if not recipe.text_names and not any(tap.tower in READS_TEXT for tap in recipe.taps):
        return
    for name, num_tokens in least_tokens(family, processor, recipe).items():
        if too_long := excess(recipe, name, num_tokens, limit):
            raise ConfigError(f"recipe.frames: {recipe.frames}: {too_long}; lvlm.model: {config.model!r}")


def least_tokens(family: Layout, processor: Any, recipe: ModelRecipe) -> dict[str, int]:
    """Prompt -> its tokens with the smallest video or cover and with empty columns of the manifest."""
    shown = {}
    for kind in recipe.media:
        clip = _black(recipe.frames if kind == "video" else 1)
        shown[kind] = inputs.process(family, processor, kind, [clip], recipe.video_options).texts
    least = {}
    for name, prompt in recipe.prompts.items():
        text = conversation.render(processor, name, prompt)
        adds = conversation.adds_special_tokens(processor, text)
        text = conversation.fill(text, prompt, {}, [])
        (ids,) = conversation.token_ids(processor, prompt.input, [text], shown.get(prompt.input), adds)
        least[name] = len(ids)
    return least


def excess(recipe: ModelRecipe, name: str, num_tokens: int, limit: int) -> str:
    """How a prompt of `num_tokens`, with its answer, is longer than `limit`; empty if it is not, or none is known."""
    prompt = recipe.prompts[name]
    whole = num_tokens + prompt.max_new_tokens + reads_end(recipe, name)
    if not limit or whole <= limit:
        return ""
    answer = f" and max_new_tokens={prompt.max_new_tokens}" if prompt.max_new_tokens else ""
    with_media = "" if prompt.input == "text" else f" with its {prompt.input}"
    return (
        f"prompt {name!r}{with_media} is {num_tokens} tokens{answer}, {whole} in all, and the model reads {limit} at "
        "most: fewer recipe.frames, a smaller recipe.frame_max_side or recipe.video_options, or a shorter prompt"
    )


def reads_end(recipe: ModelRecipe, name: str) -> bool:
    """Whether an end-of-sequence token is put behind a prompt or its answer, and read."""
    return any(find(pooling).reads in (ANSWER_END, PROMPT_END) for pooling in recipe.poolings_of(name))


def _black(num_frames: int) -> Clip:
    indices = np.arange(num_frames, dtype=np.int64)
    frames = np.zeros((num_frames, SMALL_SIDE, SMALL_SIDE, 3), np.uint8)
    return Clip(frames, indices / 25, indices, num_frames, num_frames / 25)
