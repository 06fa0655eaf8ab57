"""Orientation of the pictures of a file: from the decoder's display matrix, or from EXIF where there is none."""

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


def _unknown_side_data(cls: type[Enum], value: object) -> Any:
    """An enum member for a kind of side data that PyAV does not know; without it such a frame is an error."""
    if not isinstance(value, int):
        return None
    member = object.__new__(cls)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return member


Type._missing_ = classmethod(_unknown_side_data)  # type: ignore[assignment]


@dataclass(frozen=True)
class Geometry:
    """How a decoded frame becomes upright: scaled to width x height pixels, then transposed, then flipped."""

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
    """The geometry that makes the frames of a file upright and their longer side at most `max_side` pixels.

    frame    any frame of the file
    picture  the file if it is a still picture, see `still_picture`
    """
    scale = min(1.0, max_side / max(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    matrix = cast("SideData | None", frame.side_data.get("DISPLAYMATRIX"))
    if matrix:
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    else:
        a, b, c, d = _exif_matrix(picture) if picture else UPRIGHT
    # x' = a x + c y, y' = b x + d y (libavutil/display.h); other angles are ignored
    if min(abs(a), abs(d)) > max(abs(b), abs(c)):
        return Geometry(width, height, transpose=False, flip_x=a < 0, flip_y=d < 0)
    if min(abs(b), abs(c)) > max(abs(a), abs(d)):
        return Geometry(width, height, transpose=True, flip_x=c < 0, flip_y=b < 0)
    return Geometry(width, height, transpose=False, flip_x=False, flip_y=False)


def still_picture(path: str | Path, container_format: str) -> str | Path | None:
    """`path` if FFmpeg opened it as a still picture, None for videos."""
    return path if container_format.endswith("_pipe") or container_format == "image2" else None


def _exif_matrix(path: str | Path) -> Matrix:
    """a, b, c, d of the display matrix for a picture's orientation in EXIF or XMP data, as Pillow reads them.

    FFmpeg itself has none if any EXIF entry is damaged or the orientation is a long integer.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=EXIF_FORMATS) as picture:
            warnings.simplefilter("ignore")
            exif = Image.Image.getexif(picture)  # PNG's own method would decode the whole picture
            return EXIF_MATRICES.get(exif.get(EXIF_ORIENTATION, 1), UPRIGHT)
    except Exception:  # a damaged file can make Pillow raise anything, and FFmpeg read the picture
        return UPRIGHT
