"""What AV1 packets say of their frames without decoding: which frames each refers to, and where its bytes lie.

A packet is a temporal unit: one frame that is shown and any number that only later ones refer to. What a frame's
pictures depend on lies in the reference slots that its header names (references, motion vectors, probabilities,
segmentation and film grain are all loaded from them), so the frames that a wanted one needs, directly or not, decode
to the same pictures without the others.

Streams that use anything beyond that are not understood: scalability, S-frames, error resilience, frame ids, hidden
key frames, references by order hint, sequence headers or metadata that change.

Source: AV1 Bitstream & Decoding Process Specification, version 1.0.0 with errata 1: 5.3-5.9, 7.20, 7.21; annex B is
not used by MP4 and Matroska.
"""

from __future__ import annotations

from dataclasses import dataclass

import av

SEQUENCE, DELIMITER, FRAME_HEADER, TILES, METADATA, FRAME, PADDING = 1, 2, 3, 4, 5, 6, 15
KEY, INTER, SWITCH = 0, 1, 3
NUM_SLOTS = 8
NUM_REFERENCES = 7
SELECT = 2  # of screen content tools, of integer motion vectors: each frame says
HEADER_BYTES = 40  # more than the longest header is up to its references

Fed = bool | tuple[tuple[int, int], ...]  # a packet is decoded, is not, or without these bytes (begin, end)


@dataclass(frozen=True)
class CodedFrame:
    """One frame of a packet; or the showing of an earlier one, which is no frame to refer to.

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


@dataclass(frozen=True)
class _Sequence:
    """What a sequence header says of the layout of frame headers; bit widths are 0 where a field is absent."""

    has_decoder_model: bool
    presentation_time_bits: int
    removal_time_bits: int
    screen_content_tools: int
    integer_mv: int
    order_hint_bits: int


@dataclass(frozen=True)
class _Header:
    """A frame header up to its references (slots)."""

    shows_existing: bool
    is_key: bool
    is_shown: bool
    refreshes: int
    references: tuple[int, ...]


class _NotUnderstood(Exception):
    """The stream uses something that is not read here, or is damaged."""


class FrameReader:
    """Reads the packets of one stream, in decode order and without gaps."""

    def __init__(self) -> None:
        self.parameters = b""  # sequence header and metadata, as at the first key frame
        self.sequence: _Sequence | None = None
        self.slots: list[int] = []  # number of the frame in each
        self.keys: set[int] = set()
        self.count = 0

    def __call__(self, data: bytes) -> tuple[CodedFrame, ...] | None:
        """The frames of a packet; None where it is not understood, and then later packets are not either."""
        try:
            return self._frames(data)
        except _NotUnderstood:
            return None

    def _frames(self, data: bytes) -> tuple[CodedFrame, ...]:
        parameters = b""
        frames: list[CodedFrame] = []
        expects_tiles = may_have_tiles = False
        for kind, begin, payload, end in _units(data):
            if kind == TILES and may_have_tiles:
                expects_tiles = False
                frames[-1] = _longer(frames[-1], end)
                continue
            if expects_tiles:
                raise _NotUnderstood
            may_have_tiles = False
            if kind in (SEQUENCE, METADATA) and not frames:
                parameters += data[begin:end]
                if kind == SEQUENCE:
                    self.sequence = _sequence(data[payload:end])
            elif kind in (FRAME, FRAME_HEADER) and self.sequence:
                header = _frame_header(data[payload : min(end, payload + HEADER_BYTES)], self.sequence)
                if header.shows_existing and kind == FRAME:
                    raise _NotUnderstood
                expects_tiles = may_have_tiles = kind == FRAME_HEADER and not header.shows_existing
                frames.append(self._follow(header, begin, end))
            elif kind not in (DELIMITER, PADDING):
                raise _NotUnderstood
        self._check(frames, parameters, expects_tiles)
        return tuple(frames)

    def _follow(self, header: _Header, begin: int, end: int) -> CodedFrame:
        """The frame of `header`, which then lies in the slots it refreshes."""
        if not self.slots and not header.is_key:
            raise _NotUnderstood
        needs = frozenset(self.slots[slot] for slot in header.references)
        if header.shows_existing and needs & self.keys:
            raise _NotUnderstood  # a key frame that is shown late refreshes every slot
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

    def _check(self, frames: list[CodedFrame], parameters: bytes, expects_tiles: bool) -> None:
        if expects_tiles or [f.is_shown for f in frames].count(True) != 1 or not frames[-1].is_shown:
            raise _NotUnderstood
        if any(f.is_key for f in frames) != bool(parameters) or any(f.is_key for f in frames[1:]):
            raise _NotUnderstood  # decoding can begin at all key frames and the parameters are known to be in force
        if parameters:
            self.parameters = self.parameters or parameters
            if parameters != self.parameters:
                raise _NotUnderstood


def packets_to_decode(packets: list[tuple[CodedFrame, ...]], wanted: list[int]) -> list[Fed]:
    """What to decode of each packet so that the pictures of the packets `wanted` come out."""
    targets = set(wanted)
    needed: set[int] = set()
    fed: list[Fed] = [False] * len(packets)
    for k in range(len(packets) - 1, -1, -1):
        for frame in reversed(packets[k]):
            if frame.number in needed or (frame.is_shown and k in targets):
                needed.add(frame.number)
                needed |= frame.needs
        left_out = tuple((f.begin, f.end) for f in packets[k] if f.number not in needed)
        if len(left_out) < len(packets[k]):
            fed[k] = left_out or True
    return fed


def part_of(packet: av.Packet, fed: Fed) -> av.Packet:
    """What `fed` leaves of the packet."""
    if isinstance(fed, bool):
        return packet
    data = bytes(packet)
    for begin, end in reversed(fed):
        data = data[:begin] + data[end:]
    part = av.Packet(data)
    part.pts, part.dts, part.duration, part.time_base = packet.pts, packet.dts, packet.duration, packet.time_base
    return part


class _Bits:
    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise _NotUnderstood
        return self.value >> self.left & ((1 << count) - 1)


def _longer(frame: CodedFrame, end: int) -> CodedFrame:
    return CodedFrame(frame.number, frame.begin, end, frame.is_key, frame.is_shown, frame.needs)


def _units(data: bytes) -> list[tuple[int, int, int, int]]:
    """Kind, begin, begin of the payload and end of every unit (OBU)."""
    units = []
    at = 0
    while at < len(data):
        head, begin = data[at], at
        if head & 0b1000_0101:  # forbidden bit, extension (layers), reserved bit
            raise _NotUnderstood
        at += 1
        size = len(data) - at
        if head & 0b10:
            size = shift = 0
            while True:  # leb128
                if at >= len(data) or shift > 28:
                    raise _NotUnderstood
                size |= (data[at] & 0x7F) << shift
                shift, at = shift + 7, at + 1
                if not data[at - 1] & 0x80:
                    break
        payload, at = at, at + size
        if at > len(data):
            raise _NotUnderstood
        units.append((head >> 3, begin, payload, at))
    return units


def _sequence(data: bytes) -> _Sequence:
    """sequence_header_obu, 5.5.1"""
    bits = _Bits(data)
    bits.read(3)  # profile
    if bits.read(2):  # still_picture, reduced_still_picture_header
        raise _NotUnderstood
    has_model = equal_intervals = False
    delay_bits = removal_bits = presentation_bits = 0
    if bits.read(1):  # timing_info
        bits.read(64)
        equal_intervals = bool(bits.read(1))
        if equal_intervals:
            _skip_uvlc(bits)
        has_model = bool(bits.read(1))
        if has_model:
            delay_bits = bits.read(5) + 1
            bits.read(32)
            removal_bits, presentation_bits = bits.read(5) + 1, bits.read(5) + 1
    has_display_delay = bits.read(1)
    if bits.read(5 + 12):  # one operating point, of all layers
        raise _NotUnderstood
    if bits.read(5) > 7:  # level
        bits.read(1)
    if has_model and bits.read(1):
        bits.read(2 * delay_bits + 1)
    else:
        removal_bits = 0
    if has_display_delay and bits.read(1):
        bits.read(4)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    bits.read(width_bits + height_bits)
    if bits.read(1):  # frame_id_numbers_present
        raise _NotUnderstood
    bits.read(3 + 4)  # 128x128 ... intra edge filter; interintra ... dual filter
    if not bits.read(1):  # enable_order_hint
        raise _NotUnderstood
    bits.read(2)
    screen_content_tools = SELECT if bits.read(1) else bits.read(1)
    integer_mv = SELECT
    if screen_content_tools and not bits.read(1):
        integer_mv = bits.read(1)
    return _Sequence(
        has_decoder_model=has_model,
        presentation_time_bits=0 if equal_intervals else presentation_bits,
        removal_time_bits=removal_bits,
        screen_content_tools=screen_content_tools,
        integer_mv=integer_mv,
        order_hint_bits=bits.read(3) + 1,
    )


def _skip_uvlc(bits: _Bits) -> None:
    zeros = 0
    while not bits.read(1):
        zeros += 1
    if zeros > 31:
        raise _NotUnderstood
    bits.read(zeros)


def _frame_header(data: bytes, sequence: _Sequence) -> _Header:
    """uncompressed_header, 5.9.2, up to ref_frame_idx"""
    bits = _Bits(data)
    if bits.read(1):  # show_existing_frame
        return _Header(shows_existing=True, is_key=False, is_shown=True, refreshes=0, references=(bits.read(3),))
    kind, is_shown = bits.read(2), bool(bits.read(1))
    is_key = kind == KEY
    if kind == SWITCH or (is_key and not is_shown):
        raise _NotUnderstood
    if is_shown:
        bits.read(sequence.presentation_time_bits)
    else:
        bits.read(1)  # showable
    if not is_key and bits.read(1):  # error_resilient_mode
        raise _NotUnderstood
    bits.read(1)  # disable_cdf_update
    screen_content = bits.read(1) if sequence.screen_content_tools == SELECT else sequence.screen_content_tools
    if screen_content and sequence.integer_mv == SELECT:
        bits.read(1)
    bits.read(1 + sequence.order_hint_bits)  # frame_size_override
    if kind == INTER:
        bits.read(3)  # primary_ref_frame, one of the references
    if sequence.has_decoder_model and bits.read(1):
        bits.read(sequence.removal_time_bits)
    if is_key:
        return _Header(shows_existing=False, is_key=True, is_shown=True, refreshes=0xFF, references=())
    refreshes = bits.read(8)
    references: tuple[int, ...] = ()
    if kind == INTER:
        if bits.read(1):  # frame_refs_short_signaling
            raise _NotUnderstood
        references = tuple(bits.read(3) for _ in range(NUM_REFERENCES))
    return _Header(False, is_key=False, is_shown=is_shown, refreshes=refreshes, references=references)
