"""What a processor makes of videos and covers: the tower's tensors, and the text that stands for each in a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlmrec.errors import InputError
from lvlmrec.lvlms.engine.layout import Layout
from lvlmrec.media.sampling import Clip

UNKNOWN_FPS = 24.0  # transformers' own assumption about a video without a duration
FINEST_SECONDS = 0.1  # to which prompts name a time
_NOT_MEDIA = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "video_metadata")


@dataclass(frozen=True)
class Media:
    """The videos or the covers of a batch.

    inputs  the processor's tensors: pixels and what says how they lie
    texts   for each item the place-holder tokens, and timestamps where the model writes them
    """

    inputs: Mapping[str, Any]
    texts: Sequence[str]

    @property
    def layout(self) -> dict[str, Any]:
        """The inputs without the pixels: grids and sizes, which the language model reads too."""
        return {key: value for key, value in self.inputs.items() if not is_pixels(key)}


def content_type(processor: Any, kind: str) -> str:
    """What a chat template calls a video or a cover: frames are images to a processor that knows no videos."""
    return "video" if kind == "video" and hasattr(processor, "video_token") else "image"


def placeholder(processor: Any, kind: str) -> str:
    """The text that a chat template writes for a video or a cover; the processor replaces it."""
    return str(processor.video_token if content_type(processor, kind) == "video" else processor.image_token)


def process(
    family: Layout, processor: Any, kind: str, clips: Sequence[Clip], video_options: Mapping[str, Any]
) -> Media:
    """The videos, or the covers (`kind`), of a batch of items as the processor of `family` shows them."""
    token = placeholder(processor, kind)
    if content_type(processor, kind) == "video":
        options = family.processor_options(processor, video_options)
        arguments, text = _videos(clips, family.minimum_frames) | options, [token] * len(clips)
    else:
        images = [[*_at_least(clip.frames, 1)[: None if kind == "video" else 1]] for clip in clips]
        arguments, text = {"images": images}, [token * len(frames) for frames in images]
    inputs = processor(
        text=text,
        input_data_format="channels_last",
        return_text_replacement_offsets=True,
        return_tensors="pt",
        padding=True,
        **arguments,
    )
    replaced = inputs.pop("text_replacement_offsets")
    texts = ["".join(offset["replacement"] for offset in offsets) for offsets in replaced]
    return Media({key: value for key, value in inputs.items() if key not in _NOT_MEDIA}, texts)


def required(clip: Clip | None, item_id: str, kind: str) -> Clip:
    """Raises `InputError` when an item lacks what its recipe shows."""
    if clip is None:
        raise InputError(f"item {item_id!r} has no {kind}, and a prompt has input={kind}")
    return clip


def is_pixels(key: str) -> bool:
    """Whether a processor's output takes the model's dtype: the seconds between frames do not survive bfloat16."""
    return key.startswith("pixel_values")


def _videos(clips: Sequence[Clip], minimum_frames: int) -> dict[str, Any]:
    frames = [_at_least(clip.frames, minimum_frames) for clip in clips]
    return {
        "videos": frames,
        "video_metadata": [_metadata(clip, len(frames[row])) for row, clip in enumerate(clips)],
        "do_sample_frames": False,
    }


def _at_least(frames_FHWC: np.ndarray, num_frames: int) -> np.ndarray:
    """Frames as a writable array, the last repeated up to `num_frames`."""
    missing = max(num_frames - len(frames_FHWC), 0)
    frames_FHWC = np.concatenate([frames_FHWC, *[frames_FHWC[-1:]] * missing]) if missing else frames_FHWC
    return np.require(frames_FHWC, requirements=["C", "W"])


def _metadata(clip: Clip, num_frames: int) -> dict[str, Any]:
    """Transformers' VideoMetadata of a clip that is already sampled; processors name the times index / fps.

    Of a video of variable frame rate those are not its frames' times. Its clip is described as of one frame a second,
    with the seconds in place of the indices.
    """
    fps = clip.num_source_frames / clip.duration if clip.duration > 0 else UNKNOWN_FPS
    total: float = clip.num_source_frames
    places = clip.frame_indices.tolist()
    if not _is_constant(clip, fps):
        total, fps, places = clip.duration, 1.0, clip.timestamps.tolist()
    height, width = clip.frames.shape[1:3]
    return {
        "total_num_frames": total,
        "fps": fps,
        "duration": clip.duration,
        "height": height,
        "width": width,
        "frames_indices": places + places[-1:] * (num_frames - len(places)),
    }


def _is_constant(clip: Clip, fps: float) -> bool:
    """Whether each frame stands where the mean rate puts it, within a frame and within what a prompt tells apart.

    Containers round timestamps, and the last frame's duration, of which the rate is made, is often another.
    """
    return bool(np.abs(clip.timestamps - clip.frame_indices / fps).max() <= min(1 / fps, FINEST_SECONDS))
