"""What packets reveal of their pictures without decoding: where decoding can begin, and what can be skipped.

H.264 and HEVC are read here, AV1 in `av1`. Key frame flags of containers do not suffice: they also mark H.264 recovery
points, from which decoding is inexact, and HEVC pictures "not used for reference" may be used by higher temporal
layers.

Source: ITU-T H.264 (08/2021) 7.3.1, 7.4.1; H.265 (08/2021) 7.3.1, 7.4.2.2; ISO/IEC 14496-15 for length prefixes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from lvlmrec.media.av1 import CodedFrame, FrameReader, Selection, packets_to_decode

H264_SLICE, H264_IDR = 1, 5
H264_PARAMETERS = frozenset({7, 8})
H264_IGNORED = frozenset({6, 9, 12})  # SEI, delimiter, filler
HEVC_IRAP = range(16, 22)
HEVC_VCL = range(32)
HEVC_PARAMETERS = frozenset({32, 33, 34})
HEVC_IGNORED = frozenset({35, 38, 39, 40, 62, 63})  # delimiter, filler, SEI, Dolby Vision


@dataclass(frozen=True)
class Picture:
    """The one picture of a packet.

    is_start        decoding can begin here, and is exact for this picture and all that follow it in display order
    is_droppable    no picture of the same or a lower temporal layer refers to it
    has_parameters  the packet contains parameter sets
    temporal_id     its temporal layer; 0 in H.264 and AV1
    frames          AV1 only: the frames coded in the packet
    """

    is_start: bool
    is_droppable: bool
    has_parameters: bool
    temporal_id: int
    frames: tuple[CodedFrame, ...] = ()


PictureReader = Callable[[bytes], Picture | None]


def picture_reader(codec: str, extradata: bytes | None) -> PictureReader | None:
    """A function from a packet's bytes to its picture; None for an unsupported `codec`, as FFmpeg names it.

    `extradata` is the configuration record of MP4 and Matroska, whose units are prefixed by their length (H.264, HEVC);
    AV1's is not used, as its decoder only reads the sequence headers in packets. The function must be called with all
    packets in order. It returns None for a packet that has not exactly one whole picture, or that has anything but
    pictures, parameter sets, delimiters, filler and messages.
    """
    if codec == "libdav1d":
        read = FrameReader()
        return lambda data: _av1_picture(read(data))
    parse = {"h264": _h264_picture, "hevc": _hevc_picture}.get(codec)
    if parse is None:
        return None
    length_at = {"h264": 4, "hevc": 21}[codec]  # in the avcC, hvcC configuration record
    if extradata is None or len(extradata) <= length_at or extradata[0] != 1:
        return None
    split = partial(_unit_heads, length_size=(extradata[length_at] & 3) + 1)
    return lambda data: parse(split(data))


def trusted_pictures(pts: list[int | None], pictures: list[Picture | None], reorder_depth: int) -> list[Picture] | None:
    """The pictures, if each packet is one output frame and the output order is that of pts; else None.

    pts, pictures  of each packet, in decode order
    reorder_depth  from the decoder's context
    """
    readable = [p for p in pictures if p is not None]
    times = [t for t in pts if t is not None]
    if len(readable) < len(pts) or len(set(times)) < len(pts):
        return None
    if not readable[0].is_start or times[0] > min(times):
        return None  # decoders drop pictures whose references precede the stream
    if readable[0].frames:
        reorder_depth = 0  # AV1 shows frames in the order of packets
    if any(p.has_parameters and not p.is_start for p in readable):
        return None  # parameter sets in a packet that might be skipped
    with_parameters = any(p.has_parameters for p in readable)
    top_layer = max(p.temporal_id for p in readable)
    earlier: list[int] = []
    for time in times:  # FFmpeg's h264 decoder drops frames when reordering is deeper than `reorder_depth`
        insort(earlier, time)
        if len(earlier) > reorder_depth and time < earlier[-1 - reorder_depth]:
            return None
    return [
        replace(
            p,
            is_start=p.is_start and p.has_parameters == with_parameters,
            is_droppable=p.is_droppable and p.temporal_id == top_layer,
        )
        for p in readable
    ]


def decode_plan(
    pts: list[int | None], pictures: list[Picture], wanted: list[int]
) -> tuple[list[Selection], frozenset[int]]:
    """What to decode of each packet so that the pictures `wanted` come out, and before which packets to flush.

    A wanted picture that follows a start in decode order but precedes it in display order refers to pictures before
    that start, so its decoding begins one start earlier.
    """
    if pictures[0].frames:
        return packets_to_decode([picture.frames for picture in pictures], wanted), frozenset()
    starts = [k for k, picture in enumerate(pictures) if picture.is_start]
    spans = []
    for target in wanted:
        usable = (k for k in reversed(starts) if k <= target and (pts[k] or 0) <= (pts[target] or 0))
        spans.append((next(usable, 0), target))
    selections: list[Selection] = [False] * len(pts)
    restarts, end = set(), -1
    for begin, target in sorted(spans):
        if begin > end + 1:
            restarts.add(begin)
        for k in range(max(begin, end + 1), target + 1):
            selections[k] = not pictures[k].is_droppable
        end = max(end, target)
    for target in wanted:
        selections[target] = True
    return selections, frozenset(restarts)


def _av1_picture(frames: tuple[CodedFrame, ...] | None) -> Picture | None:
    if frames is None:
        return None
    is_key = frames[0].is_key
    return Picture(is_start=is_key, is_droppable=False, has_parameters=is_key, temporal_id=0, frames=frames)


def _unit_heads(data: bytes, length_size: int) -> list[bytes]:
    """The first three bytes of every length-prefixed unit; empty if the lengths do not add up."""
    heads = []
    offset = 0
    while offset < len(data):
        begin = offset + length_size
        heads.append(data[begin : begin + 3])
        offset = begin + int.from_bytes(data[offset:begin], "big")
    return heads if offset == len(data) else []


def _h264_picture(heads: list[bytes]) -> Picture | None:
    first_slices, is_start, is_reference, has_parameters = 0, False, False, False
    for head in heads:
        kind = head[0] & 0x1F if head else -1
        if kind in (H264_SLICE, H264_IDR) and len(head) > 1:
            first_slices += head[1] >> 7  # first_mb_in_slice = ue(v), and 0 is coded as a single 1
            is_start |= kind == H264_IDR
            is_reference |= bool(head[0] & 0x60)
        elif kind in H264_PARAMETERS:
            has_parameters = True
        elif kind not in H264_IGNORED:
            return None
    if first_slices != 1:
        return None
    return Picture(is_start, is_droppable=not is_reference, has_parameters=has_parameters, temporal_id=0)


def _hevc_picture(heads: list[bytes]) -> Picture | None:
    first_slices, is_start, is_reference, has_parameters, temporal_id = 0, False, False, False, 0
    for head in heads:
        if len(head) < 2 or ((head[0] & 1) << 5 | head[1] >> 3) != 0:  # nuh_layer_id: one layer only
            return None
        kind = head[0] >> 1 & 0x3F
        if kind in HEVC_VCL and len(head) > 2:
            first_slices += head[2] >> 7  # first_slice_segment_in_pic_flag
            is_start |= kind in HEVC_IRAP
            is_reference |= kind >= 16 or kind % 2 == 1
            temporal_id = (head[1] & 7) - 1
        elif kind in HEVC_PARAMETERS:
            has_parameters = True
        elif kind not in HEVC_IGNORED:
            return None
    if first_slices != 1:
        return None
    return Picture(is_start, is_droppable=not is_reference, has_parameters=has_parameters, temporal_id=temporal_id)
