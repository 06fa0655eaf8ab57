"""Where a feature set's values come from other than a model: sampled frames, and an array that was imported.

`ModelRecipe` is the third. Each says which columns its values are (`shapes`) and what it was in format 3 of recipe.json
(`in_format_3`), where everything was written as if a model had read prompts; fingerprints are the hashes of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lvlmrec.features.model_recipe import FRAMES, ModelRecipe, Prompt
from lvlmrec.taps import FeatureName, Tap

FRAMES_FAMILY = "frames"  # what `lvlm.name` and format 3 call it
PIXELS = "pixels"  # last part of the name of the column of frames
PIXEL_DTYPE = "uint8"
SIDE = "side"  # the video option that says how wide and high stored frames are
IMPORTED = "imported"  # last part of the names of imported columns
FRAMES_TAP = Tap("vision", 0)


@dataclass(frozen=True)
class FramesRecipe:
    """Frames as they were sampled, for encoders that are trained: no model.

    frames          how many of each video
    frame_max_side  larger frames are scaled down to this many pixels on the longer side when they are decoded
    side            width and height of the stored frames, pixels
    identity        names the way that they are resized to it
    name            of the one entry of `recipe.prompts`
    """

    frames: int
    frame_max_side: int
    side: int
    identity: str
    name: str
    media: ClassVar[tuple[str, ...]] = ("video",)
    fields: ClassVar[tuple[str, ...]] = ()
    text_names: ClassVar[tuple[str, ...]] = ()
    prompts: ClassVar[Mapping[str, Prompt]] = {}
    video_form: ClassVar[str] = FRAMES
    video_encoder: ClassVar[str] = ""

    @property
    def shapes(self) -> dict[FeatureName, tuple[int, ...]]:
        """One column of [frames, 3, side, side]."""
        return {FeatureName("video", FRAMES_TAP, PIXELS): (self.frames, 3, self.side, self.side)}

    def in_format_3(self) -> ModelRecipe:
        """As format 3 of recipe.json wrote it."""
        return ModelRecipe(
            family=FRAMES_FAMILY,
            identity=self.identity,
            compute_dtype=PIXEL_DTYPE,
            frames=self.frames,
            frame_max_side=self.frame_max_side,
            taps=(FRAMES_TAP,),
            prompts={self.name: Prompt(text="")},
            poolings=(PIXELS,),
            width={FRAMES_TAP.tower: 3},
            video_options={SIDE: self.side},
        )


@dataclass(frozen=True)
class ArrayRecipe:
    """An array that was imported. Nobody here knows what a model was asked, nor how tokens became one vector.

    identity  names the file, and by their hashes its content and the order of its items
    dtype     of the array in the file
    name      first part of the columns' names
    layers    what the user calls each layer of the array, as taps
    width     D
    """

    identity: str
    dtype: str
    name: str
    layers: tuple[Tap, ...]
    width: int
    text_names: ClassVar[tuple[str, ...]] = ()

    @property
    def shapes(self) -> dict[FeatureName, tuple[int, ...]]:
        """A column of [D] for each layer."""
        return {FeatureName(self.name, tap, IMPORTED): (self.width,) for tap in self.layers}

    def in_format_3(self) -> ModelRecipe:
        """As format 3 of recipe.json wrote it."""
        return ModelRecipe(
            family=IMPORTED,
            identity=self.identity,
            compute_dtype=self.dtype,
            frames=0,
            frame_max_side=0,
            taps=self.layers,
            prompts={self.name: Prompt(text="")},
            poolings=(IMPORTED,),
            width={self.layers[0].tower: self.width},
        )


Reading = ModelRecipe | FramesRecipe  # what an extraction reads of each item
Source = Reading | ArrayRecipe


def of_format_3(model: ModelRecipe) -> Source:
    """What format 3 wrote, under the family `frames` or `imported` where it was no model."""
    if model.family == FRAMES_FAMILY:
        return FramesRecipe(
            model.frames, model.frame_max_side, model.video_options[SIDE], model.identity, next(iter(model.prompts))
        )
    if model.family == IMPORTED:
        (width,) = model.width.values()
        return ArrayRecipe(model.identity, model.compute_dtype, next(iter(model.prompts)), model.taps, width)
    return model
