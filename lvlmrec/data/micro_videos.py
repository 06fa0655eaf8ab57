"""The videos of the micro-world: one to four shapes of one colour that move on a background, in H.264.

Everything visible is a factor with few values. Colour, background, shape and count are so large and plain that even
pooled features of an untrained network contain them; motion and tempo show only across frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

# The values are a ring along which tastes drift.
COLOURS: dict[str, RGB] = {
    "red": (225, 30, 30),
    "orange": (250, 140, 0),
    "yellow": (250, 230, 30),
    "green": (30, 180, 50),
    "blue": (30, 80, 235),
    "purple": (150, 40, 190),
}
# two tones and their pattern
BACKGROUNDS: dict[str, tuple[RGB, RGB, str]] = {
    "snow": ((250, 250, 255), (225, 232, 245), "rows"),
    "beach": ((235, 212, 160), (215, 185, 125), "columns"),
    "meadow": ((130, 200, 110), (100, 170, 85), "checks"),
    "sea": ((110, 195, 220), (75, 160, 200), "rows"),
    "brick": ((140, 75, 60), (110, 55, 45), "checks"),
    "night": ((15, 15, 40), (35, 35, 70), "columns"),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
COUNTS = ("one", "two", "three", "four")
MOTIONS = ("sliding", "bouncing", "circling", "zigzagging")
TEMPI = ("slowly", "steadily", "fast")

# centres (x, y) of 1 to 4 objects, in shares of the frame's side
_CENTRES = (
    ((0.5, 0.5),),
    ((0.28, 0.5), (0.72, 0.5)),
    ((0.28, 0.7), (0.72, 0.7), (0.5, 0.28)),
    ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)),
)
_RADII = (0.36, 0.22, 0.21, 0.2)  # for 1 to 4 objects, in shares of the frame's side: about the same total area
_AMPLITUDE = 0.05  # of an object's motion, in shares of the frame's side
_SUPERSAMPLING = 4  # a shape is drawn this many times larger and scaled down


@dataclass(frozen=True)
class Scene:
    """The content of a video: positions in the tables above."""

    colour: int
    background: int
    shape: int
    count: int
    motion: int
    tempo: int
    phase: float  # of the motion's first frame, 0 to 1; not a factor


def write(path: Path, scene: Scene, side: int, fps: int, num_frames: int) -> None:
    """Encode `scene` as an MP4 of `num_frames` frames of side x side pixels; reproducible to the byte on a machine."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # one thread, as the bytes depend on the number of threads
        stream = container.add_stream("libx264", rate=fps, options={"preset": "superfast", "crf": "26", "threads": "1"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for index, image in enumerate(frames(scene, side, num_frames)):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def frames(scene: Scene, side: int, num_frames: int) -> Iterator[Image.Image]:
    """The frames of a video, RGB images of side x side pixels."""
    background, mask = _background(scene.background, side), _mask(scene.shape, round(2 * _RADII[scene.count] * side))
    colour = list(COLOURS.values())[scene.colour]
    edge = Image.new("RGB", mask.size, (0, 0, 0) if scene.background != len(BACKGROUNDS) - 1 else (255, 255, 255))
    inner = mask.resize((round(mask.width * 0.86),) * 2)
    cycles = scene.tempo + 1
    for index in range(num_frames):
        image = background.copy()
        dx, dy = _offset(scene.motion, 2 * math.pi * (scene.phase + cycles * index / num_frames))
        for x, y in _CENTRES[scene.count]:
            centre = (x + _AMPLITUDE * dx) * side, (y + _AMPLITUDE * dy) * side
            image.paste(edge, _corner(centre, mask), mask)
            image.paste(colour, _corner(centre, inner), inner)
        yield image


def _corner(centre: tuple[float, float], mask: Image.Image) -> tuple[int, int]:
    return round(centre[0] - mask.width / 2), round(centre[1] - mask.height / 2)


def _offset(motion: int, angle: float) -> tuple[float, float]:
    """Offset (x, y) of an object at `angle` (radians) of its path, each from -1 to 1."""
    return (
        (math.sin(angle), 0.0),
        (0.0, 1 - 2 * abs(math.sin(angle / 2))),
        (math.cos(angle), math.sin(angle)),
        (math.sin(angle), math.sin(2 * angle)),
    )[motion]


def _background(background: int, side: int) -> Image.Image:
    first, second, pattern = list(BACKGROUNDS.values())[background]
    band = np.arange(side) * 8 // side % 2
    rows, columns = band[:, None], band[None, :]
    is_second = {"rows": rows | 0 * columns, "columns": columns | 0 * rows, "checks": rows ^ columns}[pattern]
    return Image.fromarray(np.where(is_second[:, :, None] == 1, second, first).astype(np.uint8))


def _mask(shape: int, size: int) -> Image.Image:
    """The shape as an antialiased mask of size x size pixels."""
    r = size * _SUPERSAMPLING / 2
    image = Image.new("L", (size * _SUPERSAMPLING,) * 2, 0)
    draw = ImageDraw.Draw(image)
    name = SHAPES[shape]
    if name == "circle":
        draw.ellipse((0.1 * r, 0.1 * r, 1.9 * r, 1.9 * r), fill=255)
    elif name == "square":
        draw.rectangle((0.16 * r, 0.16 * r, 1.84 * r, 1.84 * r), fill=255)
    elif name == "cross":
        draw.rectangle((0.7 * r, 0, 1.3 * r, 2 * r), fill=255)
        draw.rectangle((0, 0.7 * r, 2 * r, 1.3 * r), fill=255)
    else:
        radii = (1.0,) * 3 if name == "triangle" else (1.0, 0.42) * 5
        angles = [2 * math.pi * k / len(radii) - math.pi / 2 for k in range(len(radii))]
        draw.polygon(
            [(r + r * q * math.cos(a), r + r * q * math.sin(a)) for q, a in zip(radii, angles, strict=True)], fill=255
        )
    return image.resize((size, size), Image.Resampling.BOX)
