"""Key frames and motion vectors of a video, as Video-LaVIT (https://arxiv.org/abs/2402.03161) reads them.

The video is encoded again as MPEG-4 part 2 at 6 frames per second, each I frame followed by eleven P frames. Its motion
is that encoder's motion vectors, one for each block of 16 x 16 pixels. A clip is the picture of an I frame and the
vectors of the 24 frames (4 seconds) from there on. All of it runs in this process, without the ffmpeg program; a long
encoded stream goes to a temporary file.

The vectors change with the version of libavcodec's encoder: `ENCODER` must be part of the name of everything computed
from them. The encoder runs in one thread, as the stream depends on the number of threads too. Frames are timed by the
container, turned upright and scaled to the size of the first.

Shapes: N clips, T frames of a clip, H x W pixels, R x C blocks of a frame.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from lvlmrec.media.file import VideoError, decode_frames, demux, open_video, video_errors
from lvlmrec.media.orientation import geometry_of
from lvlmrec.media.sampling import DEFAULT_FPS

FPS = 6
GROUP = 12  # frames from one I frame to the next
BITS_PER_SECOND = 8_000_000
CLIP_FRAMES = 24
BLOCK = 16  # pixels
MAX_CLIPS = 16  # as in the published code for understanding tasks
MAX_SECONDS = 3600  # of a video; a damaged timestamp can be years ahead, and frames for all of them would be encoded
STREAM_MEMORY_BYTES = 64 * 2**20  # of the encoded stream; a longer one goes to a temporary file

# Standard deviation of a block's motion (x, y), in shares of width and height; the published code divides by 10 too.
MOTION_STD = np.array([0.0993703, 0.1130276]) / 10
MAP_SIZE = (20, 36)
KEYFRAME_SIZE = 224
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CUBIC = -0.75  # coefficient a of the cubic convolution kernel, as in torch

ENCODER = f"libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))} mpeg4"


@dataclass(frozen=True)
class MotionClips:
    """The input of Video-LaVIT for one video.

    keyframes   uint8 [N, 224, 224, 3], RGB, the aspect ratio not kept
    motion      float32 [N, 2, 24, 20, 36], x then y, in standard deviations
    starts      int64 [N], first frame of each clip, counted at 6 per second
    num_frames  number of frames of the video at 6 per second
    """

    keyframes: np.ndarray
    motion: np.ndarray
    starts: np.ndarray
    num_frames: int


def motion_clips(path: str | Path, max_clips: int = MAX_CLIPS) -> MotionClips:
    """Up to `max_clips` clips of the video at `path`. Raises `VideoError`.

    Keeps one frame, the chosen clips' vectors and up to 64 MiB of the encoded stream in memory.
    """
    with tempfile.SpooledTemporaryFile(max_size=STREAM_MEMORY_BYTES) as stream:
        is_start = encode(path, stream)
        starts = choose_starts(is_start, max_clips)
        stream.seek(0)
        keyframes: dict[int, np.ndarray] = {}
        vectors: dict[int, np.ndarray] = {}
        for index, frame in enumerate(decode(stream)):
            if index in starts:
                keyframes[index] = _keyframe(frame)
            if any(start <= index < start + CLIP_FRAMES for start in starts):
                vectors[index] = block_vectors(frame)
            num_decoded = index + 1
    if not is_start or num_decoded != len(is_start):
        raise VideoError("decode", "decode_failed", f"{len(is_start)} frames encoded, {num_decoded} decoded")
    clips = [[vectors[k] for k in range(start, start + CLIP_FRAMES) if k in vectors] for start in starts]
    return MotionClips(
        keyframes=np.stack([keyframes[start] for start in starts]),
        motion=np.stack([motion_map(clip) for clip in clips]),
        starts=np.array(starts, np.int64),
        num_frames=len(is_start),
    )


def normalise_keyframes(keyframes_NHW3: np.ndarray) -> np.ndarray:
    """Key frames uint8 [N, H, W, 3] normalised by CLIP's mean and standard deviation, float32 [N, 3, H, W]."""
    scaled = keyframes_NHW3.astype(np.float32) / np.float32(255)
    normal = (scaled - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))


def encode(path: str | Path, stream: IO[bytes]) -> list[bool]:
    """Encode the video at `path` into `stream` as MPEG-4 part 2; returns for each frame whether it is an I frame.

    Raises `VideoError`.
    """
    is_start: list[bool] = []
    with av.open(stream, "w", format="m4v") as container:
        encoder: Any = None
        for frame in _frames_at_rate(path):
            if len(is_start) >= MAX_SECONDS * FPS:
                raise VideoError("encode", "too_long", f"the video is longer than {MAX_SECONDS} seconds")
            with video_errors("encode"):
                encoder = encoder or _add_encoder(container, frame)
                packets = encoder.encode(frame)
                is_start += [packet.is_keyframe for packet in packets]
                container.mux(packets)
        if encoder is None:
            raise VideoError("decode", "no_frames", "the video is empty or shorter than a twelfth of a second")
        with video_errors("encode"):
            packets = encoder.encode()
            is_start += [packet.is_keyframe for packet in packets]
            container.mux(packets)
    return is_start


def decode(stream: IO[bytes]) -> Iterator[VideoFrame]:
    """The frames of a stream that `encode` wrote, with their motion vectors. Raises `VideoError`."""
    with video_errors("open"):
        container = av.open(stream, "r", format="m4v")
    with container:
        video = container.streams.video[0]
        video.codec_context.options = {"flags2": "+export_mvs"}
        yield from decode_frames(video, demux(container, video))


def block_vectors(frame: VideoFrame) -> np.ndarray:
    """The motion vector (x, y) of each block, in standard deviations `MOTION_STD`, float32 [R, C, 2].

    0 for blocks without a vector: intra-coded ones, and all of an I frame.
    """
    grid_RC2 = np.zeros((-(-frame.height // BLOCK), -(-frame.width // BLOCK), 2), np.float32)
    side_data: Any = frame.side_data.get("MOTION_VECTORS")
    if side_data is not None:
        motion_vectors = side_data.to_ndarray()
        pixels = [
            motion_vectors["source"] * motion_vectors[axis] / motion_vectors["motion_scale"]
            for axis in ("motion_x", "motion_y")
        ]
        scaled = np.stack(pixels, axis=-1) / (frame.width, frame.height)
        grid_RC2[motion_vectors["dst_y"] // BLOCK, motion_vectors["dst_x"] // BLOCK] = scaled / MOTION_STD
    return grid_RC2


def choose_starts(is_start: list[bool], max_clips: int) -> list[int]:
    """First frames of the clips, at most `max_clips`, all different; is_start: whether each frame is an I frame.

    Candidates are the I frames with a whole group after them and 24 frames to the end; if there are fewer than two of
    these, all I frames. Of the candidates every second one from the second on is chosen, and these are thinned out
    evenly (transform.py, LaVITEvalVideoProcessor, of https://github.com/jy0205/LaVIT).
    """
    starts = np.flatnonzero(is_start)
    whole = starts[:-1][np.diff(starts) == GROUP] if len(starts) > 1 else starts
    whole = whole[whole + CLIP_FRAMES <= len(is_start)]
    if len(whole) >= 2:
        starts = whole
    chosen = starts[1::2] if len(starts) > 2 else starts[0::2]
    if len(chosen) > max_clips:
        chosen = chosen[np.linspace(0, len(chosen) - 1, max_clips, dtype=int)]
    return [int(start) for start in chosen]


def motion_map(vectors_TRC2: Iterable[np.ndarray]) -> np.ndarray:
    """Block vectors [R, C, 2] of a clip's frames, at most 24, resized for the tokeniser: float32 [2, 24, 20, 36].

    Missing frames at the end have zero motion. The I frame in the middle has the mean motion of its neighbours. Resized
    as by torch's bicubic interpolation without antialiasing.
    """
    grid_TRC2 = np.stack(list(vectors_TRC2))
    missing = CLIP_FRAMES - len(grid_TRC2)
    grid_TRC2 = np.concatenate([grid_TRC2, np.zeros((missing, *grid_TRC2.shape[1:]), np.float32)])
    grid_TRC2[GROUP] = (grid_TRC2[GROUP - 1] + grid_TRC2[GROUP + 1]) / 2
    rows, columns = (
        _cubic_weights(size, target_size) for size, target_size in zip(grid_TRC2.shape[1:3], MAP_SIZE, strict=True)
    )
    return np.einsum("hr,wc,trcx->xthw", rows, columns, grid_TRC2, optimize=True).astype(np.float32)


def _frames_at_rate(path: str | Path) -> Iterator[VideoFrame]:
    """The upright frames of a video at 6 per second, yuv420p, by FFmpeg's fps filter on the container's timestamps."""
    filters = None
    with open_video(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or Fraction(DEFAULT_FPS)
        time_base = stream.time_base or 1 / Fraction(rate)
        origin = round(Fraction(container.start_time or 0, av.time_base) / time_base)
        next_pts = origin
        for frame in decode_frames(stream, demux(container, stream)):
            filters = filters or _Filters(frame, time_base)
            pts = next_pts if frame.pts is None else frame.pts
            next_pts = pts + max(1, round(1 / (rate * time_base)))
            yield from filters.push(frame, pts - origin)
    if filters is not None:
        yield from filters.finish()


class _Filters:
    """FFmpeg's filters that turn decoded frames of one video into those to be encoded."""

    def __init__(self, first: VideoFrame, time_base: Fraction) -> None:
        self._size, self._format, self._time_base = (first.width, first.height), first.format.name, time_base
        geometry = geometry_of(first, max(first.width, first.height))
        # transpose=0 transposes, without a rotation
        transforms = [
            ("transpose", "0", geometry.transpose),
            ("hflip", "", geometry.flip_x),
            ("vflip", "", geometry.flip_y),
        ]
        with video_errors("convert"):
            self._graph = av.filter.Graph()
            self._graph.link_nodes(
                self._graph.add_buffer(
                    width=first.width, height=first.height, format=first.format, time_base=time_base
                ),
                self._graph.add("fps", f"fps={FPS}"),
                *(self._graph.add(name, arguments) for name, arguments, is_used in transforms if is_used),
                self._graph.add("format", "pix_fmts=yuv420p"),
                self._graph.add("buffersink"),
            ).configure()

    def push(self, frame: VideoFrame, pts: int) -> Iterator[VideoFrame]:
        """Add a frame with this timestamp; yields the output frames that it completes."""
        with video_errors("convert"):
            if (frame.width, frame.height, frame.format.name) != (*self._size, self._format):
                frame = frame.reformat(*self._size, format=self._format)
            frame.pts, frame.time_base = pts, self._time_base
            self._graph.vpush(frame)
        yield from self._pull()

    def finish(self) -> Iterator[VideoFrame]:
        """End the video; yields the last output frames."""
        with video_errors("convert"):
            self._graph.vpush(None)
        yield from self._pull()

    def _pull(self) -> Iterator[VideoFrame]:
        while True:
            with video_errors("convert"):
                try:
                    frame = self._graph.vpull()
                except (av.BlockingIOError, av.EOFError):
                    return
            assert isinstance(frame, VideoFrame)
            frame.pict_type = 0  # else the encoder would use the source's picture type
            yield frame


def _add_encoder(container: Any, frame: VideoFrame) -> Any:
    encoder = container.add_stream("mpeg4", rate=FPS)
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "yuv420p"
    encoder.bit_rate = BITS_PER_SECOND
    context = encoder.codec_context
    context.gop_size, context.max_b_frames, context.thread_count = GROUP, 0, 1
    return encoder


def _keyframe(frame: VideoFrame) -> np.ndarray:
    """A frame as RGB uint8 [224, 224, 3], resized without keeping the aspect ratio."""
    with video_errors("convert"):
        picture = Image.fromarray(frame.to_ndarray(format="rgb24", threads=1))
        return np.asarray(picture.resize((KEYFRAME_SIZE, KEYFRAME_SIZE), Image.Resampling.BICUBIC))


def _cubic_weights(size: int, target_size: int) -> np.ndarray:
    """Bicubic interpolation along one axis, float64 [target_size, size]; corners not aligned, borders repeated."""
    centres = (np.arange(target_size) + 0.5) * size / target_size - 0.5
    weights = np.zeros((target_size, size))
    for offset in (-1, 0, 1, 2):
        taps = np.floor(centres) + offset
        x = np.abs(centres - taps)
        inner = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
        outer = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
        np.add.at(weights, (np.arange(target_size), taps.astype(int).clip(0, size - 1)), np.where(x <= 1, inner, outer))
    return weights
