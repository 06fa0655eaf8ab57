"""How the pictures of a file become upright: from the decoder's display matrix, or from EXIF where there is none."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import numpy as np
from av.sidedata.sidedata import SideData, Type
from av.video.frame import VideoFrame
from PIL import Image

Matrix = tuple[int, int, int, int]
UPRIGHT: Matrix = (1, 0, 0, 1)
EXIF_ORIENTATION = 0x0112  # its tag
EXIF_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
EXIF_MATRICES: dict[int, Matrix] = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def _kind_of_side_data(cls: type[Enum], value: object) -> Any:
    """A member for a kind of side data that FFmpeg has and PyAV's list lacks, lest a frame with it be an error."""
    if not isinstance(value, int):
        return None
    member = object.__new__(cls)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return member


Type._missing_ = classmethod(_kind_of_side_data)  # type: ignore[assignment]


@dataclass(frozen=True)
class Geometry:
    """How a decoded frame becomes a picture: scaled to width x height, then transposed, then flipped."""

    width: int
    height: int
    transpose: bool
    flip_x: bool
    flip_y: bool

    @property
    def mirrored(self) -> bool:
        return (self.transpose + self.flip_x + self.flip_y) % 2 == 1

    @property
    def rotation(self) -> int:
        flip_x, flip_y = self.flip_x, self.flip_y
        if self.mirrored:  # take the horizontal flip of the source off again
            flip_x, flip_y = (flip_x, not flip_y) if self.transpose else (not flip_x, flip_y)
        if self.transpose:
            return 90 if flip_x else 270
        return 180 if flip_x and flip_y else 0


def geometry_of(frame: VideoFrame, max_side: int, picture: str | Path | None = None) -> Geometry:
    """How the pictures of a file become upright ones of at most `max_side` pixels, from one of its frames.

    `picture` is the file where it is a still picture, see `still_picture`.
    """
    scale = min(1.0, max_side / max(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    matrix = cast("SideData | None", frame.side_data.get("DISPLAYMATRIX"))
    if matrix:
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    else:
        a, b, c, d = _exif_matrix(picture) if picture else UPRIGHT
    # x' = a x + c y, y' = b x + d y (libavutil/display.h); what is not a quarter turn or a flip is nonsense here
    if min(abs(a), abs(d)) > max(abs(b), abs(c)):
        return Geometry(width, height, transpose=False, flip_x=a < 0, flip_y=d < 0)
    if min(abs(b), abs(c)) > max(abs(a), abs(d)):
        return Geometry(width, height, transpose=True, flip_x=c < 0, flip_y=b < 0)
    return Geometry(width, height, transpose=False, flip_x=False, flip_y=False)


def still_picture(path: str | Path, container_format: str) -> str | Path | None:
    """`path` where FFmpeg opened it as a picture, None for videos."""
    return path if container_format.endswith("_pipe") or container_format == "image2" else None


def _exif_matrix(path: str | Path) -> Matrix:
    """a, b, c, d of the display matrix that a picture's EXIF or XMP data asks for, as Pillow reads it.

    FFmpeg makes one of sound EXIF data alone: none where an entry is damaged or the orientation is a long integer.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=EXIF_FORMATS) as picture:
            warnings.simplefilter("ignore")
            exif = Image.Image.getexif(picture)  # PNG's own method decodes the picture, for what may stand behind it
            return EXIF_MATRICES.get(exif.get(EXIF_ORIENTATION, 1), UPRIGHT)
    except Exception:  # whatever a damaged file makes Pillow raise; FFmpeg has read the picture itself
        return UPRIGHT
