"""What AV1 packets reveal of their frames without decoding: which frames each refers to, and where its bytes lie.

A packet is a temporal unit: one frame that is shown and any number that only later ones refer to. Everything that a
frame depends on lies in the reference slots that its header names (references, motion vectors, probabilities,
segmentation and film grain are all loaded from them). So a frame decodes to the same picture when only the frames that
it refers to, directly or not, are decoded before it.

Not supported are sequence headers or metadata that change, key frames without a sequence header, key frames that are
shown late, and what `av1_headers` lists.

Source: AV1 Bitstream & Decoding Process Specification, version 1.0.0 with errata 1: 5.9.2, 7.20, 7.21.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import av

from lvlmrec.media.av1_headers import FrameHeader, Sequence, UnsupportedStream, frame_header, sequence_header, units_of

SEQUENCE, DELIMITER, FRAME_HEADER, TILES, METADATA, FRAME, PADDING = 1, 2, 3, 4, 5, 6, 15
NUM_SLOTS = 8

Selection = (
    bool | tuple[tuple[int, int], ...]
)  # True: decode the packet; False: skip it; else decode it without these bytes (begin, end)


@dataclass(frozen=True)
class CodedFrame:
    """One frame of a packet, or a header that shows an earlier frame.

    number      position among the frames of the stream, in decode order
    begin, end  its bytes in the packet
    needs       numbers of the frames that it refers to
    """

    number: int
    begin: int
    end: int
    is_key: bool
    is_shown: bool
    needs: frozenset[int]


class FrameReader:
    """Reads the packets of one stream, in decode order and without gaps."""

    def __init__(self) -> None:
        self.parameters = b""  # sequence header and metadata, as at the first key frame
        self.sequence: Sequence | None = None
        self.slots: list[int] = []  # number of the frame in each
        self.keys: set[int] = set()
        self.count = 0

    def __call__(self, data: bytes) -> tuple[CodedFrame, ...] | None:
        """The frames of a packet; None where the stream is not supported: later results are then meaningless."""
        try:
            return self._frames(data)
        except UnsupportedStream:
            return None

    def _frames(self, data: bytes) -> tuple[CodedFrame, ...]:
        parameters = b""
        frames: list[CodedFrame] = []
        num_tile_units: int | None = None  # since a frame header that comes without tiles
        for kind, begin, payload, end in units_of(data):
            if kind == TILES and num_tile_units is not None:
                num_tile_units += 1
                frames[-1] = replace(frames[-1], end=end)
                continue
            if num_tile_units == 0:
                raise UnsupportedStream
            num_tile_units = None
            if kind in (SEQUENCE, METADATA) and not frames:
                parameters += data[begin:end]
                if kind == SEQUENCE:
                    self.sequence = sequence_header(data[payload:end])
            elif kind in (FRAME, FRAME_HEADER) and self.sequence:
                header = frame_header(data[payload:end], self.sequence)
                if header.shows_existing and kind == FRAME:
                    raise UnsupportedStream
                num_tile_units = 0 if kind == FRAME_HEADER and not header.shows_existing else None
                frames.append(self._add_frame(header, begin, end))
            elif kind not in (DELIMITER, PADDING):
                raise UnsupportedStream
        if num_tile_units == 0:
            raise UnsupportedStream
        self._check_packet(frames, parameters)
        return tuple(frames)

    def _add_frame(self, header: FrameHeader, begin: int, end: int) -> CodedFrame:
        """The frame of `header`; puts it into the slots that it refreshes."""
        if not self.slots and not header.is_key:
            raise UnsupportedStream
        needs = frozenset(self.slots[slot] for slot in header.references)
        if header.shows_existing and needs & self.keys:
            raise UnsupportedStream  # a key frame that is shown late refreshes every slot
        if not header.references and not header.is_key:
            needs = frozenset({max(self.keys)})  # intra-only: for the sequence header
        number = self.count
        self.count += 1
        if header.is_key:
            self.keys.add(number)
            self.slots = [number] * NUM_SLOTS
        for slot in range(NUM_SLOTS):
            if header.refreshes >> slot & 1:
                self.slots[slot] = number
        return CodedFrame(number, begin, end, header.is_key, header.is_shown, needs)

    def _check_packet(self, frames: list[CodedFrame], parameters: bytes) -> None:
        if [f.is_shown for f in frames] != [False] * (len(frames) - 1) + [True]:
            raise UnsupportedStream
        if any(f.is_key for f in frames) != bool(parameters) or any(f.is_key for f in frames[1:]):
            raise UnsupportedStream  # decoding must be able to begin at every key frame, with its parameters
        if parameters:
            self.parameters = self.parameters or parameters
            if parameters != self.parameters:
                raise UnsupportedStream


def packets_to_decode(packets: list[tuple[CodedFrame, ...]], wanted: list[int]) -> list[Selection]:
    """What to decode of each packet so that the pictures of the packets at positions `wanted` come out."""
    targets = set(wanted)
    needed_frames: set[int] = set()
    selections: list[Selection] = [False] * len(packets)
    for k in range(len(packets) - 1, -1, -1):
        for frame in reversed(packets[k]):
            if frame.number in needed_frames or (frame.is_shown and k in targets):
                needed_frames.add(frame.number)
                needed_frames |= frame.needs
        skipped_ranges = tuple((f.begin, f.end) for f in packets[k] if f.number not in needed_frames)
        if len(skipped_ranges) < len(packets[k]):
            selections[k] = skipped_ranges or True
    return selections


def selected_part(packet: av.Packet, selection: Selection) -> av.Packet:
    """The packet without the bytes that `selection` leaves out."""
    if isinstance(selection, bool):
        return packet
    data = bytes(packet)
    for begin, end in reversed(selection):
        data = data[:begin] + data[end:]
    part = av.Packet(data)
    part.pts, part.dts, part.duration, part.time_base = packet.pts, packet.dts, packet.duration, packet.time_base
    return part
