"""Video files through PyAV: opening, demuxing, decoding, every error as a `VideoError`."""

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
from lvlmrec.media.av1 import Selection, selected_part
from lvlmrec.media.truncation import declared_size

PYAV_ERRORS = (av.FFmpegError, ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, ValueError)


class VideoError(Exception):
    """A video could not be read.

    stage    open, probe (choice of the stream), demux, decode, convert or encode
    error    a short stable reason: not_found, unreadable, not_a_video, no_video_stream, no_decoder, no_frames,
             encrypted, too_long, truncated, demux_failed, decode_failed, convert_failed, encode_failed, out_of_memory,
             timeout, decoder_died
    message  one line
    """

    def __init__(self, stage: str, error: str, message: str) -> None:
        super().__init__(stage, error, message)  # all of them, or it could not be unpickled
        self.stage, self.error, self.message = stage, error, message

    def __str__(self) -> str:
        return f"{self.error} ({self.stage}): {self.message}"


@contextmanager
def video_errors(stage: str) -> Iterator[None]:
    """Turns every exception of PyAV into a `VideoError` of this stage.

    FFmpeg's error codes become exceptions of many types: a decoder's AVERROR(EACCES) is a PermissionError.
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
    with video_errors("open"):
        if "\0" in os.fspath(path):  # FFmpeg would open the file whose name ends there
            raise FileNotFoundError(f"no name of a file: {os.fspath(path)!r}")
        # a playlist, or a name with a colon, must not make requests over the network
        options = {"protocol_whitelist": "file"}
        container = av.open(f"file:{os.fspath(path)}", options=options, metadata_errors="replace")
        if container.format.name == "image2":  # a picture whose name has % or ? is read as a pattern
            container.close()
            picture = io.BytesIO(Path(path).read_bytes())
            container = av.open(picture, mode="r", metadata_errors="replace")
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError("probe", "no_video_stream", "no video stream, cover pictures aside")
        if stream.codec_context is None:
            raise VideoError("probe", "no_decoder", "this FFmpeg has no decoder for the video stream")
        with video_errors("open"):
            declared = declared_size(path, container.format.name)
        if declared > container.size:
            message = f"the file has {container.size} of the {declared} bytes that its container tells of"
            raise VideoError("demux", "truncated", message)
        yield container, cast(VideoStream, stream)


def demux(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream in decode order. Raises `VideoError`."""
    last_is_corrupt = False
    with video_errors("demux"):
        for packet in container.demux(stream):
            if packet.size:  # an empty packet would end the decoder's stream
                last_is_corrupt = packet.is_corrupt
                yield packet
    if last_is_corrupt and container.format.name == "flv":  # many decoders conceal a missing end
        raise VideoError("demux", "truncated", "the file ends within a frame")


def decode_frames(
    stream: VideoStream,
    packets: Iterable[av.Packet],
    selections: Sequence[Selection] | None = None,
    restarts: frozenset[int] = frozenset(),
) -> Iterator[VideoFrame]:
    """Frames in output order. Decodes in one thread. Raises `VideoError`.

    packets     all packets of the stream, in decode order
    selections  what to decode of each packet; None: everything
    restarts    positions of packets before which the decoder is flushed
    """
    context = stream.codec_context
    context.thread_count = 1
    last = max(k for k, selected in enumerate(selections) if selected) if selections else -1
    for k, packet in enumerate(packets):
        if selections is not None and k > last:
            break
        selection = selections[k] if selections is not None else True
        if not selection and k not in restarts:
            continue
        with video_errors("decode"):
            if k in restarts:
                yield from context.decode(None)
                context.flush_buffers()
            if selection:
                yield from context.decode(selected_part(packet, selection))
    with video_errors("decode"):
        yield from context.decode(None)
