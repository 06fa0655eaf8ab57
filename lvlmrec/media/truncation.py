"""How long a video file says it is, to tell one that was cut off: demuxers read what is left as if it were all.

MP4 and QuickTime tell the size of their media data (ISO/IEC 14496-12, 4.2), Matroska and WebM that of their segment
(RFC 8794, 6; RFC 9559, 5.1), AVI that of each list of frames (OpenDML AVI File Format Extensions 1.02). A live
recording leaves them unknown. FLV, MPEG and Ogg streams say nothing; what FLV's metadata claim is often another file's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

UNKNOWN = 0xFFFFFFFF  # in place of a size that was never written
EBML, SEGMENT = 0x1A45DFA3, 0x18538067


def promised_size(path: str | Path, container_format: str) -> int:
    """Bytes that a file should have by its own account; 0 where it does not say. The format is named as FFmpeg does."""
    read = {"mov,mp4,m4a,3gp,3g2,mj2": _end_of_mp4, "matroska,webm": _end_of_matroska, "avi": _end_of_avi}
    if container_format not in read:
        return 0
    with Path(path).open("rb") as file:
        return read[container_format](file)


def _end_of_mp4(file: BinaryIO) -> int:
    """Where the media data end. What stands behind them may be anything, some cameras' own."""
    end = at = 0
    while True:
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4])
        if size == 1:
            size = int.from_bytes(head[8:16])
        if len(head) < 8 or size < 8 or size == UNKNOWN:
            return end
        at += size
        if head[4:8] == b"mdat":
            end = at


def _end_of_matroska(file: BinaryIO) -> int:
    """Where the segment ends, which is all that follows the header."""
    head = _element(file)
    if head is None or head[0] != EBML or head[1] is None:
        return 0
    file.seek(head[1], os.SEEK_CUR)
    segment = _element(file)
    if segment is None or segment[0] != SEGMENT or segment[1] is None:
        return 0
    return file.tell() + segment[1]


def _element(file: BinaryIO) -> tuple[int, int | None] | None:
    """The id and the size of the element that begins here, None for one that is unknown; `file` is then at its data."""
    numbers = []
    for longest in (4, 8):
        first = file.read(1)
        length = 9 - first[0].bit_length() if first else 9  # leading zeros tell how many bytes follow
        if length > longest:
            return None
        numbers.append((length, int.from_bytes(first + file.read(length - 1))))
    (_, element_id), (length, marked) = numbers
    ones = (1 << 7 * length) - 1
    size = marked & ones
    return element_id, None if size == ones else size


def _end_of_avi(file: BinaryIO) -> int:
    """Where the last list of frames ends."""
    end = 0
    for name, at, size in _chunks(file, 0, None):
        if name != b"RIFF":
            break
        for inner, begin, length in _chunks(file, at + 4, at + size):
            file.seek(begin)
            if inner == b"LIST" and file.read(4) == b"movi":
                end = begin + length
    return end


def _chunks(file: BinaryIO, at: int, end: int | None) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a RIFF file from byte `at` to `end`: name, where the data begin, how many bytes they are."""
    while end is None or at < end:
        file.seek(at)
        head = file.read(8)
        size = int.from_bytes(head[4:], "little")
        if len(head) < 8 or size == UNKNOWN:
            return
        yield head[:4], at + 8, size
        at += 8 + size + size % 2
