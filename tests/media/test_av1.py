"""AV1 by its frames: sampling equals decoding everything, decodes less, and damage never makes other pictures."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from lvlmrec.media import sampling
from lvlmrec.media.av1 import FrameReader, Selection
from lvlmrec.media.av1_headers import UnsupportedStream, units_of
from lvlmrec.media.file import VideoError, open_video
from lvlmrec.media.sampling import sample_clip
from tests.videos import decode_all, write_video

NUM_FRAMES = 40
SVT = {"preset": "12"}


def svt(parameters: str) -> dict[str, str]:
    return SVT | {"svtav1-params": parameters}


# name -> suffix, frames between key frames, what else is asked for
STREAMS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mp4": ("mp4", 12, {}),
    "webm": ("webm", 12, {}),
    "one key frame": ("mkv", 300, {}),
    "only key frames": ("mp4", 1, {}),
    "flat pyramid": ("mp4", 25, {"options": svt("hierarchical-levels=2")}),
    "deep pyramid": ("mkv", 33, {"options": svt("hierarchical-levels=5:lookahead=33")}),
    "low delay": ("mp4", 25, {"options": svt("pred-struct=1")}),
    "film grain": ("webm", 20, {"options": svt("film-grain=30")}),
    "screen content": ("mp4", 20, {"options": svt("scm=1")}),
    "super-resolution": ("mp4", 20, {"options": svt("superres-mode=1:superres-denom=12")}),
    "tiles": ("mp4", 20, {"options": svt("tile-columns=1:tile-rows=1"), "size": (256, 128)}),
    "odd size": ("mp4", 12, {"size": (67, 65)}),
    "10 bits": ("mkv", 12, {"pix_fmt": "yuv420p10le"}),
    "one frame": ("mp4", 12, {"num_frames": 1}),
    "three frames": ("webm", 12, {"num_frames": 3}),
    "HDR": ("mp4", 12, {"options": svt("content-light=1000,200")}),
}


def write_av1(path: Path, gop: int, **rest: Any) -> Path:
    return write_video(path, codec="libsvtav1", gop=gop, **{"options": SVT, "num_frames": NUM_FRAMES} | rest)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Selection]]]:
    """What was decoded of every packet, one list per clip; decoding everything is out of bounds."""
    seen: list[list[Selection]] = []
    plan = sampling.decode_plan

    def refuse(*_: Any) -> None:
        raise AssertionError("everything was decoded")

    monkeypatch.setattr(sampling, "_sample_all", refuse)
    monkeypatch.setattr(sampling, "decode_plan", lambda *a: (seen.append((result := plan(*a))[0]), result)[1])
    yield seen


@pytest.mark.parametrize("name", STREAMS)
def test_sampling_equals_decoding_everything(tmp_path: Path, plans: list[list[Selection]], name: str) -> None:
    suffix, gop, rest = STREAMS[name]
    path = write_av1(tmp_path / f"v.{suffix}", gop, **rest)
    every, total = decode_all(path, rest.get("num_frames", NUM_FRAMES))
    for num_frames in (1, 2, 3, 5, 8, 13, total):
        clip = sample_clip(path, num_frames, max_side=1000)
        assert clip.num_source_frames == total
        np.testing.assert_array_equal(clip.frames, every[np.arange(num_frames) * total // num_frames])
    assert len(plans) == 7
    assert all(plans[-1])  # every packet where every frame is wanted


def test_frames_that_no_sampled_one_needs_are_not_decoded(tmp_path: Path, plans: list[list[Selection]]) -> None:
    path = write_av1(tmp_path / "v.mp4", gop=40, num_frames=120)
    sample_clip(path, 3, 64)  # the three key frames
    assert [k for k, selection in enumerate(plans[0]) if selection] == [0, 40, 80]
    sample_clip(path, 5, 64)
    assert 5 < sum(map(bool, plans[1])) <= 20
    assert any(isinstance(selection, tuple) for selection in plans[1])  # packets of which a part suffices


def test_every_frame_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plans: list[list[Selection]]) -> None:
    path = write_av1(tmp_path / "v.mp4", gop=20)
    every, total = decode_all(path, NUM_FRAMES)
    for k in range(total):
        monkeypatch.setattr(sampling, "sample_indices", lambda *_, k=k: np.array([k]))
        np.testing.assert_array_equal(sample_clip(path, 1, 64).frames[0], every[k])


def test_s_frames_are_not_understood_and_everything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_av1(tmp_path / "v.mp4", gop=40, options=svt("pred-struct=1:sframe-dist=5:sframe-mode=1"))
    monkeypatch.setattr(sampling, "decode_plan", lambda *_: pytest.fail("was planned"))
    every, _ = decode_all(path, 7)
    np.testing.assert_array_equal(sample_clip(path, 7, 64).frames, every)


def test_units_that_do_not_add_up() -> None:
    assert units_of(b"\x1a\x01\xe8\x12\x00") == [(3, 0, 2, 3), (2, 3, 5, 5)]
    assert units_of(b"\x18\xe8\xe8") == [(3, 0, 1, 3)]  # without a size: to the end
    for data in (b"\x1a\x03\xe8", b"\x1a", b"\x1a\x80", b"\x9a\x00", b"\x1e\x00\x00", b"\x1a" + b"\xff" * 9):
        with pytest.raises(UnsupportedStream):
            units_of(data)


def packets_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def test_a_key_frame_with_other_parameters_is_not_understood(tmp_path: Path) -> None:
    first, *rest = packets_of(write_av1(tmp_path / "v.mp4", gop=4, num_frames=5))
    key = rest[-1]
    (kind, _, _, end), *_ = units_of(key)
    metadata = b"\x2a\x05\x01\x00\x01\x00\x80"
    assert kind == 1

    def last_answer(last: bytes) -> Any:
        reader = FrameReader()
        return [reader(packet) for packet in (first, *rest[:-1], last)][-1]

    assert last_answer(key)[0].is_key
    assert last_answer(key[end:]) is None
    assert last_answer(metadata + key) is None
    assert last_answer(key[: end - 1] + b"\xff" + key[end:]) is None
    assert FrameReader()(rest[0]) is None  # no sequence header yet


def pictures_despite_faults(path: Path) -> dict[int, np.ndarray]:
    """What the decoder makes of each packet by position, passing over those it refuses."""
    pictures = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        positions = {packet.pts: k for k, packet in enumerate(container.demux(stream)) if packet.size}
        container.seek(0)
        for packet in container.demux(stream):
            try:
                for frame in stream.codec_context.decode(packet) if packet.size else ():
                    pictures[positions[frame.pts]] = frame.to_ndarray(format="rgb24")
            except av.FFmpegError:
                continue
    return pictures


@pytest.mark.parametrize("seed", range(3))
def test_damaged_headers_never_make_other_pictures(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    options = svt("film-grain=30:scm=1") if seed == 1 else SVT
    path = write_av1(tmp_path / "v.mp4", gop=12, num_frames=20, options=options)
    data = path.read_bytes()
    intact, _ = decode_all(path, 20)
    places = []
    for packet in packets_of(path):
        if len(packet) > 8:  # found by its bytes
            at = data.index(packet)
            places += [
                at + k for _, begin, payload, end in units_of(packet) for k in range(begin, min(end, payload + 14))
            ]
    outcomes = {"decoded whole": 0, "equals whole": 0, "fault elsewhere": 0}
    for _ in range(40):
        damaged = bytearray(data)
        damaged[rng.choice(places)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        outcomes[outcome_of(path, intact)] += 1
    assert all(outcomes.values()), outcomes


def outcome_of(path: Path, intact: np.ndarray) -> str:
    with open_video(path) as (container, stream):
        packets = sampling._read_packets(container, stream)
        clip = sampling._sample_by_gop(stream, packets.kept, packets, 4, 1000)
    if clip is None:
        return "decoded whole"
    try:
        whole = sampling._sample_all(path, packets, 4, 1000)
    except VideoError:
        expected = pictures_despite_faults(path)
        for index, frame in zip(clip.frame_indices.tolist(), clip.frames, strict=True):
            # the decoder drops the rest of a packet behind a fault, though it may be in a frame that is not needed
            pictures = [intact[index], *([expected[index]] if index in expected else [])]
            assert any(np.array_equal(frame, picture) for picture in pictures)
        return "fault elsewhere"
    np.testing.assert_array_equal(clip.frames, whole.frames)
    np.testing.assert_array_equal(clip.timestamps, whole.timestamps)
    return "equals whole"
