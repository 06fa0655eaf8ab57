"""Videos: properties, and exact uniform sampling of frames.

The frames of a video are those that decoding all of its best stream yields, in the decoder's output order. Sampling
returns the same frames bit for bit, but decodes only a fraction of them where the stream allows: see `_sample_by_gop`.

Frames are 8-bit RGB, converted by swscale from the stream's own colour space and range (no tone mapping). Alpha is
dropped, not composited. The sample aspect ratio is not applied. Every frame has the size and orientation of the first;
frames of another size are scaled to it.

A file is an error when it has fewer bytes than its container declares (see `truncation`), or when reading or decoding
what the sampler needs fails: a clip of the readable part would be taken for one of the whole video. Frames with errors
that the decoder conceals are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from lvlmrec.media.bitstream import Picture, PictureReader, decode_plan, picture_reader, trusted_pictures
from lvlmrec.media.file import VideoError, decode_frames, demux, open_video, video_errors
from lvlmrec.media.orientation import Geometry, geometry_of, still_picture

DEFAULT_FPS = 25.0  # where neither timestamps nor the container have a rate
PROGRESSIVE = (0, 1)  # AVFieldOrder: unknown, progressive
TRUSTED_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
)  # timestamps of others are guessed or often wrong
MAX_KEPT_BYTES = 64 << 20  # packets of a stream up to this size stay in memory; a larger file is read twice


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video, from demuxing all of it and decoding its first frame.

    width, height  pixels, orientation applied
    num_frames     packets with a frame to show; codecs with hidden frames may decode to fewer
    duration       seconds from the first frame to the end of the last
    fps            frames per second, the mean over the video
    rotation       degrees clockwise (0, 90, 180, 270), after a horizontal flip if `mirrored`
    """

    codec: str
    width: int
    height: int
    num_frames: int
    duration: float
    fps: float
    rotation: int
    mirrored: bool


@dataclass(frozen=True)
class Clip:
    """Frames sampled from one video.

    frames            uint8 [F, H, W, 3], RGB, rotation applied
    timestamps        float64 [F], seconds since the first frame of the video
    frame_indices     int64 [F], position of each frame in display order among the video's frames
    num_source_frames number of frames of the video
    duration          seconds from the first frame to the end of the last
    """

    frames: np.ndarray
    timestamps: np.ndarray
    frame_indices: np.ndarray
    num_source_frames: int
    duration: float

    @property
    def num_distinct_frames(self) -> int:
        """Number of different source frames in the clip: less than F where the video has fewer than F frames."""
        return len(np.unique(self.frame_indices))


def sample_indices(num_source_frames: int, num_frames: int) -> np.ndarray:
    """Uniform positions, int64 [num_frames]: `arange(n) * total // n`, the rule of Hugging Face's video processors.

    Theirs raises when the video has fewer than `num_frames` frames; here the same formula then repeats frames.
    Raises `ValueError` unless both counts are positive.
    """
    if num_source_frames < 1 or num_frames < 1:
        raise ValueError(f"cannot sample {num_frames} of {num_source_frames} frames")
    return np.arange(num_frames, dtype=np.int64) * num_source_frames // num_frames


def probe(path: str | Path) -> VideoInfo:
    """Properties of the video at `path`. Raises `VideoError`."""
    with open_video(path) as (container, stream):
        packets = _read_packets(container, stream)
    with open_video(path) as (container, stream):
        codec = stream.codec_context.name
        frame = next(decode_frames(stream, demux(container, stream)), None)
        if frame is None:
            raise VideoError("decode", "no_frames", "no frame came out of the decoder")
        geometry = geometry_of(frame, max(frame.width, frame.height), still_picture(path, container.format.name))
    shown = sorted((pts is None, pts or 0, k) for k, pts in enumerate(packets.pts) if packets.shown[k])
    times = _seconds([packets.pts[k] for _, _, k in shown], packets.duration[shown[-1][2]], packets)
    width, height = geometry.width, geometry.height
    return VideoInfo(
        codec=codec,
        width=height if geometry.transpose else width,
        height=width if geometry.transpose else height,
        num_frames=len(shown),
        duration=float(times[-1]),
        fps=len(shown) / float(times[-1]),
        rotation=geometry.rotation,
        mirrored=geometry.mirrored,
    )


def sample_clip(path: str | Path, num_frames: int, max_side: int) -> Clip:
    """`num_frames` frames of the video at `path`, at `sample_indices`, bit-equal to decoding all of it.

    Frames whose longer side exceeds `max_side` pixels are scaled down to it (swscale, bicubic). Decodes in one
    thread. Raises `VideoError`.
    """
    with open_video(path) as (container, stream):
        packets = _read_packets(container, stream)
        clip = _sample_by_gop(stream, packets.kept, packets, num_frames, max_side) if packets.kept else None
    if not packets.kept:
        with open_video(path) as (container, stream):
            clip = _sample_by_gop(stream, demux(container, stream), packets, num_frames, max_side)
    return clip or _sample_all(path, packets, num_frames, max_side)


@dataclass(frozen=True)
class _Packets:
    """A stream's packets, in decode order, from demuxing it.

    pts, duration  in units of `time_base`
    shown          whether a packet's frame is shown
    pictures       of each packet; None unless every packet has exactly one: then pts are unique and complete
    fps            mean rate, from the container
    kept           the packets themselves, empty for a large file; usable while their file is open
    """

    pts: list[int | None]
    duration: list[int]
    shown: list[bool]
    pictures: list[Picture] | None
    time_base: Fraction
    fps: float
    kept: list[av.Packet]


def _read_packets(container: InputContainer, stream: VideoStream) -> _Packets:
    """Demux the whole stream; frame counts in stream headers are unreliable."""
    context = stream.codec_context
    is_supported = container.format.name in TRUSTED_CONTAINERS and context.field_order in PROGRESSIVE
    reader = picture_reader(context.name, context.extradata) if is_supported else None
    pts: list[int | None] = []
    kept: list[av.Packet] = []
    duration, shown, pictures, size = [], [], [], 0
    for packet in demux(container, stream):
        if not pts and packet.has_sidedata("encryption_info"):
            raise VideoError("demux", "encrypted", "the stream is encrypted and the key is not known")
        pts.append(packet.pts)
        duration.append(packet.duration or 0)
        shown.append(not packet.is_discard)
        pictures.append(_picture(reader, packet))
        size += packet.size
        if size <= MAX_KEPT_BYTES:
            kept.append(packet)
        else:
            kept.clear()
    if not any(shown):
        raise VideoError("demux", "no_frames", "the video stream has no frame to show")
    return _Packets(
        pts=pts,
        duration=duration,
        shown=shown,
        pictures=trusted_pictures(pts, pictures, context.reorder_depth),
        time_base=stream.time_base or Fraction(1, 1),
        fps=float(stream.average_rate or stream.guessed_rate or 0) or DEFAULT_FPS,
        kept=kept,
    )


def _picture(reader: PictureReader | None, packet: av.Packet) -> Picture | None:
    if reader is None or packet.is_corrupt or packet.has_sidedata("new_extradata"):
        return None
    return reader(bytes(packet))


def _sample_by_gop(
    stream: VideoStream, source: Iterable[av.Packet], packets: _Packets, num_frames: int, max_side: int
) -> Clip | None:
    """The clip, decoding only the groups of pictures (GOPs) of its frames, without unreferenced pictures.

    `source` yields the packets that `packets` describes. None where the result might differ from decoding everything.
    """
    pictures = packets.pictures
    if pictures is None:
        return None
    display = sorted((k for k in range(len(pictures)) if packets.shown[k]), key=lambda k: packets.pts[k] or 0)
    indices = sample_indices(len(display), num_frames)
    wanted = sorted({display[i] for i in indices})
    selections, restarts = decode_plan(packets.pts, pictures, wanted)
    index_of_pts = {packets.pts[display[i]]: i for i in indices.tolist()}
    frames = _Frames(indices, max_side)
    last_pts = None
    stream.codec_context.options = {"err_detect": "explode"}  # concealing errors would depend on all frames before
    try:
        for frame in decode_frames(stream, source, selections, restarts):
            is_late = last_pts is not None and (frame.pts is None or frame.pts <= last_pts)
            if is_late or frame.is_corrupt or frame.interlaced_frame:
                return None
            last_pts = frame.pts
            if last_pts in index_of_pts:
                frames.put(index_of_pts.pop(last_pts), frame)
    except VideoError:
        return None  # decoding everything shows whether the file is damaged
    if index_of_pts:
        return None
    return frames.clip(_seconds([packets.pts[k] for k in display], packets.duration[display[-1]], packets))


def _sample_all(path: str | Path, packets: _Packets, num_frames: int, max_side: int) -> Clip:
    """The clip, decoding everything; the first pass expects one frame per shown packet."""
    expected = sum(packets.shown)
    while True:
        indices = sample_indices(expected, num_frames)
        wanted = set(indices.tolist())
        pts: list[int | None] = []
        last_duration = 0
        with open_video(path) as (container, stream):
            frames = _Frames(indices, max_side, still_picture(path, container.format.name))
            for frame in decode_frames(stream, demux(container, stream)):
                if len(pts) in wanted:
                    frames.put(len(pts), frame)
                pts.append(frame.pts)
                last_duration = frame.duration or 0
        if not pts:
            raise VideoError("decode", "no_frames", "no frame came out of the decoder")
        if len(pts) == expected:
            return frames.clip(_seconds(pts, last_duration, packets))
        expected = len(pts)  # hidden, dropped or repeated frames: decode again with the right number


class _Frames:
    """Collects the frames of a clip; `indices` [F] are their positions among the video's frames.

    Each is written directly into the clip's array: allocating memory costs as much as converting a frame. All have the
    geometry of the first.
    """

    def __init__(self, indices: np.ndarray, max_side: int, picture: str | Path | None = None) -> None:
        self._indices, self._max_side, self._picture = indices, max_side, picture
        self._rows: dict[int, list[int]] = {}
        for row, index in enumerate(indices.tolist()):
            self._rows.setdefault(index, []).append(row)
        self._geometry: Geometry | None = None
        self._frames = np.zeros(0, np.uint8)

    def put(self, index: int, frame: VideoFrame) -> None:
        """Convert the video's frame at `index` and store it. Raises `VideoError`."""
        self._geometry = self._geometry or geometry_of(frame, self._max_side, self._picture)
        picture = _render(frame, self._geometry)
        if not self._frames.size:
            self._frames = np.empty((len(self._indices), *picture.shape), np.uint8)
        for row in self._rows[index]:
            self._frames[row] = picture

    def clip(self, times: np.ndarray) -> Clip:
        """The clip, after all frames were put; `times` [N + 1] as `_seconds` returns them."""
        return Clip(self._frames, times[self._indices], self._indices, len(times) - 1, float(times[-1]))


def _render(frame: VideoFrame, geometry: Geometry) -> np.ndarray:
    """A decoded frame as upright RGB, uint8 [H, W, 3]. Raises `VideoError`."""
    target: dict[str, Any] = {}
    if (frame.width, frame.height) != (geometry.width, geometry.height):
        target = {"width": geometry.width, "height": geometry.height, "interpolation": "BICUBIC"}
    with video_errors("convert"):
        picture = frame.to_ndarray(format="rgb24", threads=1, **target)
    if geometry.transpose:
        picture = picture.swapaxes(0, 1)
    return picture[:: -1 if geometry.flip_y else 1, :: -1 if geometry.flip_x else 1]


def _seconds(pts: Sequence[int | None], last_duration: int, packets: _Packets) -> np.ndarray:
    """Start of each of N frames and end of the last one, in seconds since the first frame, float64 [N + 1].

    If any timestamp is missing or runs backwards, all are computed from the container's mean rate.
    """
    known = [t for t in pts if t is not None]
    if len(known) < len(pts) or any(b < a for a, b in pairwise(known)):
        return np.arange(len(pts) + 1) / packets.fps
    unit = packets.time_base
    times = [(t - known[0]) * unit.numerator / unit.denominator for t in known]
    last = float(last_duration * packets.time_base)
    if last <= 0:
        last = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return np.array([*times, times[-1] + (last if last > 0 else 1 / packets.fps)])
