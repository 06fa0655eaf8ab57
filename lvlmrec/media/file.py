"""Video files through PyAV: opening, demuxing, decoding, every fault by name."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import av
import av.stream
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from lvlmrec.errors import one_line
from lvlmrec.media.av1 import Fed, part_of
from lvlmrec.media.truncation import promised_size

PYAV_ERRORS = (av.FFmpegError, ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, ValueError)


class VideoError(Exception):
    """One video could not be read.

    stage    open, probe (which stream), demux, decode, convert or encode
    error    a short stable reason: not_found, unreadable, not_a_video, no_video_stream, no_decoder, no_frames,
             encrypted, too_long, truncated, demux_failed, decode_failed, convert_failed, encode_failed, out_of_memory,
             timeout, decoder_died
    message  one line
    """

    def __init__(self, stage: str, error: str, message: str) -> None:
        super().__init__(stage, error, message)  # all of them, so that it can be pickled
        self.stage, self.error, self.message = stage, error, message

    def __str__(self) -> str:
        return f"{self.error} ({self.stage}): {self.message}"


@contextmanager
def faults_named(stage: str) -> Iterator[None]:
    """Turns whatever PyAV raises into a `VideoError`.

    FFmpeg's error numbers arrive as exceptions of many kinds: a decoder's AVERROR(EACCES) is a PermissionError.
    """
    try:
        yield
    except PYAV_ERRORS as e:
        reason = "not_a_video" if stage == "open" else f"{stage}_failed"
        if isinstance(e, MemoryError):
            reason = "out_of_memory"
        elif stage == "open" and isinstance(e, OSError):
            reason = "not_found" if isinstance(e, FileNotFoundError) else "unreadable"
        raise VideoError(stage, reason, f"{type(e).__name__}: {one_line(e)}") from e


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container at `path` and its best video stream. Raises `VideoError`."""
    with faults_named("open"):
        if "\0" in os.fspath(path):  # for FFmpeg the name of another file
            raise FileNotFoundError(f"no name of a file: {os.fspath(path)!r}")
        # a playlist or a name with a colon in it must not reach the network
        options = {"protocol_whitelist": "file"}
        container = av.open(f"file:{os.fspath(path)}", options=options, metadata_errors="replace")
        if container.format.name == "image2":  # a picture's name with % or ? was taken for the pattern of many names
            container.close()
            picture = io.BytesIO(Path(path).read_bytes())
            container = av.open(picture, mode="r", metadata_errors="replace")
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError("probe", "no_video_stream", "no video stream, cover pictures aside")
        if stream.codec_context is None:
            raise VideoError("probe", "no_decoder", "this FFmpeg has no decoder for the video stream")
        with faults_named("open"):
            promised = promised_size(path, container.format.name)
        if promised > container.size:
            message = f"the file has {container.size} of the {promised} bytes that its container tells of"
            raise VideoError("demux", "truncated", message)
        yield container, cast(VideoStream, stream)


def demux(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream in decode order. Raises `VideoError`."""
    is_cut = False
    with faults_named("demux"):
        for packet in container.demux(stream):
            if packet.size:  # an empty one would end the decoder's stream
                is_cut = packet.is_corrupt
                yield packet
    if is_cut and container.format.name == "flv":  # many a decoder conceals what is missing
        raise VideoError("demux", "truncated", "the file ends within a frame")


def decode_frames(
    stream: VideoStream,
    packets: Iterable[av.Packet],
    feed: Sequence[Fed] | None = None,
    restarts: frozenset[int] = frozenset(),
) -> Iterator[VideoFrame]:
    """Frames in output order, of the packets that `feed` names (all without it), begun anew before `restarts`.

    `packets` are all of the stream's. Decodes in one thread. Raises `VideoError`.
    """
    context = stream.codec_context
    context.thread_count = 1
    last = max(k for k, is_fed in enumerate(feed) if is_fed) if feed else -1
    for k, packet in enumerate(packets):
        if feed is not None and k > last:
            break
        fed = feed[k] if feed is not None else True
        if not fed and k not in restarts:
            continue
        with faults_named("decode"):
            if k in restarts:
                yield from context.decode(None)
                context.flush_buffers()
            if fed:
                yield from context.decode(part_of(packet, fed))
    with faults_named("decode"):
        yield from context.decode(None)
