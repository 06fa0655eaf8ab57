"""AV1's headers: units of a packet, sequence header, frame header up to the references.

Only the fields that determine where others lie are kept. `UnsupportedStream` is raised for scalability, still pictures,
S-frames, error resilience, frame ids, streams without order hints, references by order hint, and hidden key frames.

Source: AV1 Bitstream & Decoding Process Specification, version 1.0.0 with errata 1, sections named below.
"""

from __future__ import annotations

from dataclasses import dataclass

KEY, INTER, SWITCH = 0, 1, 3  # frame_type; 2 is intra-only
NUM_REFERENCES = 7
SELECT = 2  # value of the fields screen_content_tools and integer_mv: each frame has its own
HEADER_BYTES = 40  # more than a frame header has up to its references


class UnsupportedStream(Exception):
    """The stream uses something that is not read here, or is damaged."""


@dataclass(frozen=True)
class Sequence:
    """The fields of a sequence header that determine the layout of frame headers; bit widths, 0 for absent fields."""

    has_decoder_model: bool
    presentation_time_bits: int
    removal_time_bits: int
    screen_content_tools: int
    integer_mv: int
    order_hint_bits: int


@dataclass(frozen=True)
class FrameHeader:
    """A frame header up to its references (slots)."""

    shows_existing: bool
    is_key: bool
    is_shown: bool
    refreshes: int
    references: tuple[int, ...]


def units_of(data: bytes) -> list[tuple[int, int, int, int]]:
    """Kind, begin, begin of the payload and end of every unit (OBU)."""
    units = []
    offset = 0
    while offset < len(data):
        header, begin = data[offset], offset
        if header & 0b1000_0101:  # forbidden bit, extension (layers), reserved bit
            raise UnsupportedStream
        offset += 1
        size = len(data) - offset
        if header & 0b10:
            size = shift = 0
            while True:  # leb128
                if offset >= len(data) or shift > 28:
                    raise UnsupportedStream
                size |= (data[offset] & 0x7F) << shift
                shift, offset = shift + 7, offset + 1
                if not data[offset - 1] & 0x80:
                    break
        payload, offset = offset, offset + size
        if offset > len(data):
            raise UnsupportedStream
        units.append((header >> 3, begin, payload, offset))
    return units


def sequence_header(data: bytes) -> Sequence:
    """sequence_header_obu, 5.5.1"""
    bits = _Bits(data)
    bits.read(3)  # profile
    if bits.read(2):  # still_picture, reduced_still_picture_header
        raise UnsupportedStream
    has_model, delay_bits, removal_bits, presentation_bits = _timing(bits)
    has_display_delay = bits.read(1)
    if bits.read(5 + 12):  # one operating point, of all layers
        raise UnsupportedStream
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
        raise UnsupportedStream
    bits.read(3 + 4)  # 128x128 ... intra edge filter; interintra ... dual filter
    if not bits.read(1):  # enable_order_hint
        raise UnsupportedStream
    bits.read(2)
    screen_content_tools = SELECT if bits.read(1) else bits.read(1)
    integer_mv = SELECT
    if screen_content_tools and not bits.read(1):
        integer_mv = bits.read(1)
    return Sequence(
        has_decoder_model=has_model,
        presentation_time_bits=presentation_bits,
        removal_time_bits=removal_bits,
        screen_content_tools=screen_content_tools,
        integer_mv=integer_mv,
        order_hint_bits=bits.read(3) + 1,
    )


def _timing(bits: _Bits) -> tuple[bool, int, int, int]:
    """timing_info, 5.5.3, and decoder_model_info, 5.5.4: whether there is a model, and bit widths of its times."""
    if not bits.read(1):
        return False, 0, 0, 0
    bits.read(64)
    equal_intervals = bits.read(1)
    if equal_intervals:
        _skip_uvlc(bits)
    if not bits.read(1):
        return False, 0, 0, 0
    delay_bits = bits.read(5) + 1
    bits.read(32)
    removal_bits, presentation_bits = bits.read(5) + 1, bits.read(5) + 1
    return True, delay_bits, removal_bits, 0 if equal_intervals else presentation_bits


def _skip_uvlc(bits: _Bits) -> None:
    zeros = 0
    while not bits.read(1):
        zeros += 1
    if zeros > 31:
        raise UnsupportedStream
    bits.read(zeros)


def frame_header(data: bytes, sequence: Sequence) -> FrameHeader:
    """uncompressed_header, 5.9.2, up to ref_frame_idx"""
    bits = _Bits(data[:HEADER_BYTES])
    if bits.read(1):  # show_existing_frame
        return FrameHeader(shows_existing=True, is_key=False, is_shown=True, refreshes=0, references=(bits.read(3),))
    kind, is_shown = bits.read(2), bool(bits.read(1))
    is_key = kind == KEY
    if kind == SWITCH or (is_key and not is_shown):
        raise UnsupportedStream
    if is_shown:
        bits.read(sequence.presentation_time_bits)
    else:
        bits.read(1)  # showable
    if not is_key and bits.read(1):  # error_resilient_mode
        raise UnsupportedStream
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
        return FrameHeader(shows_existing=False, is_key=True, is_shown=True, refreshes=0xFF, references=())
    refreshes = bits.read(8)
    references: tuple[int, ...] = ()
    if kind == INTER:
        if bits.read(1):  # frame_refs_short_signaling
            raise UnsupportedStream
        references = tuple(bits.read(3) for _ in range(NUM_REFERENCES))
    return FrameHeader(False, is_key=False, is_shown=is_shown, refreshes=refreshes, references=references)


class _Bits:
    def __init__(self, data: bytes) -> None:
        self.value, self.remaining = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        self.remaining -= count
        if self.remaining < 0:
            raise UnsupportedStream
        return self.value >> self.remaining & ((1 << count) - 1)
