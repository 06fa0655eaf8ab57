"""What Phi-3.5-vision sees and reads of a video: every frame is a picture, cut into tiles, on a line of its own.

The rules are those of the authors' published processor: Pillow's bilinear resize, white borders, tiles of the tower's
own size, the whole picture once more at that size by torch's bicubic resize without antialiasing, and text between
pictures read piece by piece, each with its own beginning-of-text token. The model has no video format of its own;
frames are its pictures 1 to F. Only tiles that exist are kept, where the original fills up with zeros.

Legend: B clips, F frames of a clip, R views (whole frames and their tiles) of all clips; sizes are (width, height) in
pixels as in Pillow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lvlmrec.lvlms.engine.conversation import joined_messages
from lvlmrec.media.motion import CLIP_MEAN, CLIP_STD

PICTURE = "<|image|>"  # in a prompt it stands for a whole video or a cover, behind the processor for one visual token
VIDEO_CROPS = 1  # tiles per frame at most; the model card recommends 4 for several pictures,
COVER_CROPS = 16  # and this for a single one
WHITE = (255, 255, 255)


class PiecewiseTokenizer:
    """A tokenizer that reads the pieces of text around pictures separately, as the authors' processor does.

    In everything else it is the tokenizer that it is given.
    """

    def __init__(self, words: Any) -> None:
        self.words = words

    def __getattr__(self, name: str) -> Any:
        if name == "words" or name.startswith("__"):  # while it is copied
            raise AttributeError(name)
        return getattr(self.words, name)

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:
        """`input_ids` of each prompt. A single text is no prompt."""
        return self.words(text, **options) if isinstance(text, str) else {"input_ids": [self._ids(t) for t in text]}

    def _ids(self, text: str) -> list[int]:
        picture_id = self.words.convert_tokens_to_ids(PICTURE)
        ids: list[int] = []
        for piece in re.split(rf"((?:{re.escape(PICTURE)})+)", text):
            if piece.startswith(PICTURE):
                ids += [picture_id] * (len(piece) // len(PICTURE))
            else:
                ids += [self.words.bos_token_id, *self.words(piece, add_special_tokens=False)["input_ids"]]
        return ids


class Phi35VisionProcessor:
    """What an item's video or cover becomes. `side` is the tower's picture size, `patch` of its patches, in pixels."""

    video_token = image_token = PICTURE
    all_special_multimodal_tokens = (PICTURE,)
    return_mm_token_type_ids = False

    def __init__(self, words: Any, side: int = 336, patch: int = 14) -> None:
        self.tokenizer = PiecewiseTokenizer(words)
        self._side, self._grid = side, side // patch // 2

    @property
    def chat_template(self) -> str | None:
        """The published template."""
        template: str | None = self.tokenizer.chat_template
        return template

    @property
    def visual_token_id(self) -> int:
        """The token at visual positions, of videos and covers alike."""
        return int(self.tokenizer.convert_tokens_to_ids(PICTURE))

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as text. Parts of a message stand on lines of their own."""
        messages = joined_messages(conversation, PICTURE)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return str(text)

    def __call__(
        self,
        text: Sequence[str],
        videos: Sequence[np.ndarray] | None = None,
        images: Sequence[Sequence[np.ndarray]] | None = None,
        num_crops: int | None = None,
        **rest: Any,
    ) -> dict[str, Any]:
        """Tensors of clips (uint8 [F, H, W, 3] each) or of lists of pictures (uint8 [H, W, 3]), and their texts.

        The tensors are those of `Phi35Vision.get_video_features` and `get_image_features`.

        num_crops  a picture is cut into so many tiles at most; None is `VIDEO_CROPS` or `COVER_CROPS`
        rest       what transformers' own processors are asked for beside; here it is always so
        """
        clips = [np.stack(pictures) for pictures in images] if videos is None else videos  # type: ignore[union-attr]
        crops = num_crops or (COVER_CROPS if videos is None else VIDEO_CROPS)
        views, tiles, replacements = [], [], []
        for frames in clips:
            plan = plan_tiles((frames.shape[2], frames.shape[1]), self._side, crops)
            views += [make_views(frame, plan, self._side) for frame in frames]
            tiles.append((len(frames), *plan))
            replacements.append("\n".join([PICTURE * num_tokens(*plan, self._grid)] * len(frames)))
        pixels_key, tiles_key = (
            ("pixel_values", "image_tiles") if videos is None else ("pixel_values_videos", "video_tiles")
        )
        return {
            pixels_key: torch.cat(views),
            tiles_key: torch.tensor(tiles),
            "text_replacement_offsets": [[{"replacement": replacement}] for replacement in replacements],
        }


def num_tokens(rows: int, columns: int, grid: int = 12) -> int:
    """Tokens of a picture of `rows` x `columns` tiles: all tiles and the whole, a separator per row, one between."""
    return (rows * columns + 1) * grid * grid + (rows + 1) * grid + 1


def plan_tiles(size: tuple[int, int], side: int, num_crops: int) -> tuple[int, int]:
    """(rows, columns) of the tiles of a picture: as many along its longer side as keep their number in `num_crops`."""
    long, short = max(size), min(size)
    count = 1
    while (count + 1) * math.ceil((count + 1) / (long / short)) <= num_crops:
        count += 1
    other = math.ceil(_short_side(size, count * side) / side)
    return (other, count) if size[0] >= size[1] else (count, other)


def make_views(frame_HWC: np.ndarray, tiles: tuple[int, int], side: int) -> Tensor:
    """float32 [1 + tiles, 3, side, side]: the whole frame, then its tiles row by row."""
    rows, columns = tiles
    height, width = frame_HWC.shape[:2]
    is_portrait = width < height  # then resized and bordered lying on its side
    lying = Image.fromarray(frame_HWC.swapaxes(0, 1) if is_portrait else frame_HWC)
    long = max(tiles) * side
    lying = lying.resize((long, _short_side(lying.size, long)), Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (long, math.ceil(lying.height / side) * side), WHITE)
    padded.paste(lying, (0, (padded.height - lying.height) // 2))
    pixels_HWC = np.asarray(padded).swapaxes(0, 1) if is_portrait else np.asarray(padded)
    shares_3HW = torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1).float() / 255
    normal_3HW = (shares_3HW - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    whole = functional.interpolate(normal_3HW[None], size=(side, side), mode="bicubic")
    cut = normal_3HW.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return torch.cat([whole, cut])


def _short_side(size: tuple[int, int], long: int) -> int:
    """The shorter side of a picture of `size` whose longer side becomes `long`; one pixel at least."""
    return max(int(long / (max(size) / min(size))), 1)
