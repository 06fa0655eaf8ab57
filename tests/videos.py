"""Videos for tests, written and read back with PyAV alone."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def picture(index: int, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3]: a moving pattern in which every frame differs from every other."""
    y, x = np.mgrid[:height, :width]
    red = (x * 3 + index * 5) % 256
    green = (y * 5 + index * 11) % 256
    blue = np.where((x + index * 2) % 24 < 12, index * 7 % 256, 255 - y % 256)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def write_video(
    path: Path,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    num_frames: int = 60,
    gop: int = 12,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    prepare: Callable[[Any, Any], None] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """A video of `num_frames` pictures at 30 per second, or at `pts` in units of 1/600 second.

    `prepare(container, stream)` is called before the first frame.
    """
    with av.open(str(path), "w", container_options=container_options) as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 600)
        if prepare is not None:
            prepare(container, stream)
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[index], Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_all(path: Path, num_frames: int, total: int | None = None) -> tuple[np.ndarray, int]:
    """The reference: decode everything, count, keep `num_frames`. uint8 [F, H, W, 3] and the count.

    Frames are chosen for a video of `total`, by default counted in a pass of its own, so that a long video is never
    held in memory. With one thread, unrotated, in its own size.
    """
    chosen = sum(1 for _ in _frames(path)) if total is None else total
    indices = (np.arange(num_frames) * chosen // num_frames).tolist()
    kept, count = {}, 0
    for count, frame in enumerate(_frames(path), start=1):
        if count - 1 in indices:
            kept[count - 1] = frame.to_ndarray(format="rgb24")
    return np.stack([kept[i] for i in indices if i in kept]), count


def _frames(path: Path) -> Any:
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        assert stream is not None
        stream.codec_context.thread_count = 1
        yield from container.decode(stream)
