"""What MiniCPM-V 2.6 and 4.5 see and read of a video: frames resized to one area, cut into patches, named in a prompt.

The rules are those of the authors' published processors. Two things are ours: a frame's time is rounded to tenths of
a second (theirs is cut off, one tenth too early for one time in sixteen), and prompts are never cut off in silence.

Legend: F frames of a clip, R views (whole frames and their slices) of all clips, L patches of a view, P side of a
patch in pixels, G groups, B clips. Sizes are (width, height) in pixels as in Pillow, grids (rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from lvlmrec.lvlms.engine.conversation import joined_messages

Size = tuple[int, int]

PLACEHOLDER = "(<image>./</image>)"  # as the authors write a picture into a prompt; here it may be a whole video
UNKNOWN = "<unk>"  # at the position of every visual token
SPECIAL_TOKENS = (UNKNOWN, "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
MAX_GROUPS = 180  # frames, or packs of frames, that 4.5 was tuned to read
MAX_PACKING = 3  # frames per pack that its authors go up to; the model was tuned on up to 6
TICKS_PER_SECOND = 10
NO_TIME = -1


@dataclass(frozen=True)
class Views:
    """One frame as the tower sees it: the whole frame, then its slices row by row.

    `sizes` are the views' sizes, `grid` (columns, rows) how many slices there are; (0, 0) when the frame is whole.
    """

    sizes: tuple[Size, ...]
    grid: tuple[int, int]


class MiniCPMVProcessor:
    """Tensors and text of clips and pictures.

    reads_times       4.5: the time of each frame is shown, and frames may be packed
    scale_resolution  side in pixels of the square whose area every view is resized to
    max_slice_nums    a picture, a cover, may be cut into so many slices, seen beside the whole
    use_image_id      whether a picture's text begins with its number
    """

    video_token = image_token = PLACEHOLDER
    all_special_multimodal_tokens = (PLACEHOLDER, *SPECIAL_TOKENS)
    return_mm_token_type_ids = False

    def __init__(
        self,
        tokenizer: Any,
        reads_times: bool,
        num_queries: int = 64,
        patch: int = 14,
        scale_resolution: int = 448,
        max_slice_nums: int = 9,
        use_image_id: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.reads_times, self._max_slice_nums, self._use_image_id = reads_times, max_slice_nums, use_image_id
        self._num_queries, self._area_side, self._patch = num_queries, scale_resolution, patch

    @property
    def chat_template(self) -> str | None:
        """The published template."""
        return self.tokenizer.chat_template

    @property
    def visual_token_id(self) -> int:
        """The token at the positions of a video or picture."""
        return int(self.tokenizer.convert_tokens_to_ids(UNKNOWN))

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as text. Parts of a message stand on lines of their own; no thinking, as the authors ask."""
        messages = joined_messages(conversation, PLACEHOLDER)
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )
        return str(text)

    def __call__(
        self,
        text: Sequence[str],
        videos: Sequence[np.ndarray] = (),
        video_metadata: Sequence[Mapping[str, Any]] = (),
        images: Sequence[Sequence[np.ndarray]] = (),
        max_slice_nums: int = 1,
        packing: int = 0,
        **rest: Any,
    ) -> dict[str, Any]:
        """Tensors of clips (uint8 [F, H, W, 3] each) or of lists of one picture ([H, W, 3]); see `get_video_features`.

        max_slice_nums  that of the frames of a clip
        packing         frames that share one set of queries (4.5); 0 is the authors' rule for so many frames
        rest            what transformers' own processors are asked for beside; here it is always so

        `text_replacement_offsets` holds what replaces the place-holder of each.
        """
        seen = _Seen()
        for frames, metadata in zip(videos, video_metadata, strict=True):
            ticks = frame_ticks(metadata) if self.reads_times else [NO_TIME] * len(frames)
            size = pack_size(len(frames), packing) if self.reads_times else 1
            seen.texts.append("\n".join(self._show(seen, frames, ticks, size, max_slice_nums)))
        for (picture,) in images:
            (shown,) = self._show(seen, picture[None], [NO_TIME], 1, self._max_slice_nums)
            seen.texts.append(("<image_id>0</image_id>" if self._use_image_id else "") + shown)
        pixels, grid = pack_patches(seen.pictures, self._patch)
        return {
            "pixel_values": pixels,
            "grid_hw": grid,
            "temporal_ids": torch.tensor(seen.ticks),
            "group_sizes": torch.tensor(seen.group_sizes),
            "num_groups": torch.tensor(seen.num_groups),
            "text_replacement_offsets": [[{"replacement": text}] for text in seen.texts],
        }

    def _show(self, seen: _Seen, frames: np.ndarray, ticks: Sequence[int], pack: int, max_slice_nums: int) -> list[str]:
        """Add a clip to `seen`, pack by pack and in each view by view. Returns the text of each pack."""
        views = plan_views((frames.shape[2], frames.shape[1]), self._area_side, self._patch, max_slice_nums)
        pictures = [make_views(frame, views) for frame in frames]
        packs = [range(start, min(start + pack, len(frames))) for start in range(0, len(frames), pack)]
        for members in packs:
            for view in range(len(views.sizes)):
                seen.pictures += [pictures[frame][view] for frame in members]
                seen.ticks += [ticks[frame] for frame in members]
                seen.group_sizes.append(len(members))
        seen.num_groups.append(len(packs) * len(views.sizes))
        columns, rows = views.grid
        tokens = UNKNOWN * self._num_queries
        slices = "\n".join([f"<slice>{tokens}</slice>" * columns] * rows)
        return [f"<image>{tokens}</image>{slices}"] * len(packs)


@dataclass
class _Seen:
    """All views of a batch, in order; see `MiniCPMV.get_video_features`."""

    pictures: list[np.ndarray] = field(default_factory=list)
    ticks: list[int] = field(default_factory=list)
    group_sizes: list[int] = field(default_factory=list)
    num_groups: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def plan_views(size: Size, area_side: int, patch: int, max_slice_nums: int) -> Views:
    """How a picture of `size` is seen."""
    whole, grid = fitted_size(size, area_side, patch), slice_grid(size, area_side, max_slice_nums)
    if grid is None:
        return Views((whole,), (0, 0))
    cell = (_multiple(size[0], grid[0]) / grid[0], _multiple(size[1], grid[1]) / grid[1])
    return Views((whole, *[fitted_size(cell, area_side, patch)] * (grid[0] * grid[1])), grid)


def fitted_size(size: tuple[float, float], area_side: int, patch: int) -> Size:
    """The size of about the area of `area_side` squared, larger or smaller than it was, sides rounded to patches."""
    ratio = size[0] / size[1]
    height = int(area_side / math.sqrt(ratio))
    return _multiple(int(height * ratio), patch), _multiple(height, patch)


def slice_grid(size: Size, area_side: int, max_slice_nums: int) -> tuple[int, int] | None:
    """(columns, rows) of the slices whose shape is nearest to the picture's; None when it stays whole."""
    width, height = size
    wanted = min(math.ceil(width * height / area_side**2), max_slice_nums)
    if wanted <= 1:
        return None
    counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= max_slice_nums]
    grids = [(columns, n // columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
    return min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[0] / grid[1])))


def make_views(frame_HWC: np.ndarray, views: Views) -> list[np.ndarray]:
    """uint8 [h, w, 3] of each of `views` of a frame."""
    picture = Image.fromarray(frame_HWC)
    seen = [np.asarray(picture.resize(views.sizes[0], Image.Resampling.BICUBIC))]
    columns, rows = views.grid
    if columns:
        width, height = views.sizes[1]
        large = np.asarray(picture.resize((width * columns, height * rows), Image.Resampling.BICUBIC))
        corners = [(row * height, column * width) for row in range(rows) for column in range(columns)]
        seen += [large[top : top + height, left : left + width] for top, left in corners]
    return seen


def pack_patches(pictures: Sequence[np.ndarray], patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [R, 3, P, L * P], values in -1 to 1, zeros behind a view's last patch; and its int64 grid [R, 2]."""
    grid = np.array([(picture.shape[0] // patch, picture.shape[1] // patch) for picture in pictures])
    packed = np.zeros((len(pictures), 3, patch, grid.prod(axis=1).max() * patch), np.float32)
    for row, (picture, (rows, columns)) in enumerate(zip(pictures, grid, strict=True)):
        pixels = (picture.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
        cells = pixels.reshape(rows, patch, columns, patch, 3).transpose(4, 1, 0, 2, 3)
        packed[row, ..., : rows * columns * patch] = cells.reshape(3, patch, -1)
    return torch.from_numpy(packed), torch.from_numpy(grid)


def frame_ticks(metadata: Mapping[str, Any]) -> list[int]:
    """Time of each frame in tenths of a second, never past the video's last whole tenth."""
    seconds = np.asarray(metadata["frames_indices"]) / metadata["fps"]
    num_ticks = math.ceil(metadata["total_num_frames"] / metadata["fps"] * TICKS_PER_SECOND)
    return [int(tick) for tick in np.rint(seconds * TICKS_PER_SECOND).clip(0, max(num_ticks - 1, 0))]


def pack_size(num_frames: int, packing: int) -> int:
    """Frames per pack: as asked, or as few as keep the number of packs within `MAX_GROUPS`, at most `MAX_PACKING`."""
    return packing or min(math.ceil(num_frames / MAX_GROUPS), MAX_PACKING)


def _multiple(length: float, divisor: int) -> int:
    return max(round(length / divisor) * divisor, divisor)
