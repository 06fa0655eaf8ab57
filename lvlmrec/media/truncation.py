"""The size that a video file declares, to find truncated ones: demuxers read the rest as if it were the whole.

MP4 and QuickTime declare the size of their media data (ISO/IEC 14496-12, 4.2), Matroska and WebM that of their segment
(RFC 8794, 6; RFC 9559, 5.1), AVI that of each list of frames (OpenDML AVI File Format Extensions 1.02). Live recordings
leave it unknown. FLV, MPEG and Ogg streams declare none; FLV's metadata are often those of another file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

UNKNOWN = 0xFFFFFFFF  # in place of a size that was never written
EBML, SEGMENT = 0x1A45DFA3, 0x18538067


def declared_size(path: str | Path, container_format: str) -> int:
    """The number of bytes that a file declares, 0 if it declares none; `container_format` is FFmpeg's name."""
    read = {"mov,mp4,m4a,3gp,3g2,mj2": _end_of_mp4, "matroska,webm": _end_of_matroska, "avi": _end_of_avi}
    if container_format not in read:
        return 0
    with Path(path).open("rb") as file:
        return read[container_format](file)


def _end_of_mp4(file: BinaryIO) -> int:
    """Where the media data end, in bytes. Any data may follow them."""
    end = offset = 0
    while True:
        file.seek(offset)
        header = file.read(16)
        size = int.from_bytes(header[:4])
        if size == 1:
            size = int.from_bytes(header[8:16])
        if len(header) < 8 or size < 8 or size == UNKNOWN:
            return end
        offset += size
        if header[4:8] == b"mdat":
            end = offset


def _end_of_matroska(file: BinaryIO) -> int:
    """Where the segment ends, in bytes."""
    header = _element(file)
    if header is None or header[0] != EBML or header[1] is None:
        return 0
    file.seek(header[1], os.SEEK_CUR)
    segment = _element(file)
    if segment is None or segment[0] != SEGMENT or segment[1] is None:
        return 0
    return file.tell() + segment[1]


def _element(file: BinaryIO) -> tuple[int, int | None] | None:
    """Id and size of the element at the position of `file`, which moves to its data; size None if it is unknown."""
    numbers = []
    for max_length in (4, 8):
        first = file.read(1)
        length = 9 - first[0].bit_length() if first else 9  # leading zeros give the number of bytes that follow
        if length > max_length:
            return None
        numbers.append((length, int.from_bytes(first + file.read(length - 1))))
    (_, element_id), (length, value) = numbers
    unknown = (1 << 7 * length) - 1
    size = value & unknown
    return element_id, None if size == unknown else size


def _end_of_avi(file: BinaryIO) -> int:
    """Where the last list of frames ends, in bytes."""
    end = 0
    for name, offset, size in _chunks(file, 0, None):
        if name != b"RIFF":
            break
        for inner, begin, length in _chunks(file, offset + 4, offset + size):
            file.seek(begin)
            if inner == b"LIST" and file.read(4) == b"movi":
                end = begin + length
    return end


def _chunks(file: BinaryIO, offset: int, end: int | None) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a RIFF file from byte `offset` to `end`: name, where its data begin, and their size in bytes."""
    while end is None or offset < end:
        file.seek(offset)
        header = file.read(8)
        size = int.from_bytes(header[4:], "little")
        if len(header) < 8 or size == UNKNOWN:
            return
        yield header[:4], offset + 8, size
        offset += 8 + size + size % 2
