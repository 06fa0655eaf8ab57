"""What a model is asked for a feature set: frames, taps, prompts, poolings, and which model it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lvlmrec import taps
from lvlmrec.config import option
from lvlmrec.features import poolings
from lvlmrec.features.poolings import pooling as columns
from lvlmrec.taps import FeatureName, Tap

PLACES = ("after", "before")
MEDIA = ("video", "cover")
INPUTS = (*MEDIA, "text")
FRAMES, MOTION = "frames", "motion"  # what a model is shown of a video
ANSWER, FINISH = "text", "finish"  # last part of the names of the columns with what was generated, and why it ended
NOISE = 2  # counted up when sampled answers draw other numbers; 1 was torch's generator, one for each item


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
class ModelRecipe:
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
    width: Mapping[str, int]
    video_options: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    texts_from: str = ""
    video_form: str = FRAMES
    video_encoder: str = ""
    bos_written: bool = False
    generation_left_out: Mapping[str, Any] = field(default_factory=dict)
    noise: int = 0

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
    def shapes(self) -> dict[FeatureName, tuple[int, ...]]:
        """The feature columns, in order, and the shape of one item's value: [D], of merged tokens [K, D] and [K].

        Taps of a vision tower and of the projector appear once for what they see, whatever the prompts; those of an
        LVLM see the video and are pooled by mean.
        """
        is_lvlm = "llm" in self.width
        visual = [
            (kind, tap, ("visual_mean",) if is_lvlm else self.poolings)
            for kind in (self.media[:1] if is_lvlm else self.media)
            for tap in self.taps
            if tap.tower not in taps.READS_TEXT
        ]
        read = [
            (prompt, tap, self.poolings_of(prompt))
            for prompt in self.prompts
            for tap in self.taps
            if tap.tower in taps.READS_TEXT
        ]
        return {
            FeatureName(of, tap, pooling + end): columns.shape(symbolic, self._width_of(tap))
            for of, tap, names in (*visual, *read)
            for pooling in names
            for end, symbolic in poolings.find(pooling).columns.items()
        }

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """The feature columns, in order."""
        return tuple(self.shapes)

    @property
    def text_names(self) -> tuple[str, ...]:
        """The columns of text: for each prompt that is answered, the answer and why it ended (eos, stop or length)."""
        answered = [name for name, prompt in self.prompts.items() if prompt.max_new_tokens]
        return tuple(f"{name}/{part}" for name in answered for part in (ANSWER, FINISH))

    def poolings_of(self, prompt: str) -> tuple[str, ...]:
        """The poolings that a prompt has tokens for: visual ones, ones of an answer."""
        return applying(self.prompts[prompt], self.poolings)

    def _width_of(self, tap: Tap) -> int:
        return self.width.get(str(tap)) or self.width["llm" if tap.tower == taps.PROJECTOR else tap.tower]


def applying(prompt: Prompt, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the poolings `names` that a prompt has tokens for."""
    return tuple(name for name in names if poolings.find(name).applies(prompt.input, prompt.max_new_tokens))
