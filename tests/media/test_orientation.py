"""Pictures are turned as their EXIF data says, and side data that PyAV has no name for costs nothing."""

import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.sidedata.sidedata import Type
from PIL import Image, ImageOps

from lvlmrec.media.isolation import IsolatedDecoder
from lvlmrec.media.motion import motion_clips
from lvlmrec.media.sampling import probe, sample_clip
from tests.videos import write_video

ORIENTATION, SHORT, LONG, TEXT, SUB_DIRECTORY = 0x0112, 3, 4, 2, 0x8769
SAVED: dict[str, dict[str, Any]] = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}, "tiff": {}}


def quarters() -> Image.Image:
    """A picture whose quarters differ, wider than high."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def exif(*entries: tuple[int, int, int, bytes], order: str = ">") -> bytes:
    """EXIF data of (tag, type, count, value) entries."""
    head = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    body = b"".join(struct.pack(f"{order}HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0" + head + body + bytes(4)


def oriented(orientation: int, order: str = ">") -> bytes:
    return exif((ORIENTATION, SHORT, 1, struct.pack(f"{order}HH", orientation, 0)), order=order)


def assert_upright(path: Path) -> None:
    """The picture is Pillow's, but for the losses of a codec."""
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    frames = sample_clip(path, 1, 64).frames
    assert frames.shape == (1, *expected.shape)
    assert np.abs(frames[0].astype(int) - expected).mean() < 8  # of 255; a wrong turn is beyond 60
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]


@pytest.mark.parametrize("suffix", SAVED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    data = Image.Exif()
    data[ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    quarters().save(path, exif=data, **SAVED[suffix])
    assert_upright(path)


ODD = {
    "little endian": oriented(6, "<"),
    "no such orientation": oriented(9),
    "a long integer": exif((ORIENTATION, LONG, 1, struct.pack(">I", 6))),
    "a directory beyond the end": exif(
        (ORIENTATION, SHORT, 1, struct.pack(">HH", 6, 0)), (SUB_DIRECTORY, LONG, 1, struct.pack(">I", 99_999))
    ),
    "a text beyond the end": exif(
        (0x010F, TEXT, 400, struct.pack(">I", 99_999)), (ORIENTATION, SHORT, 1, struct.pack(">HH", 8, 0))
    ),
}


@pytest.mark.parametrize("suffix", ["jpg", "webp"])  # FFmpeg refuses a PNG with damaged EXIF data
@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_odd_and_damaged_exif_data_are_read_as_pillow_reads_them(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    quarters().save(path, exif=ODD[name], **SAVED[suffix])
    assert_upright(path)


def test_what_pillow_makes_of_no_exif_data_is_no_fault_of_the_picture(tmp_path: Path) -> None:
    """FFmpeg alone always took it; Pillow, asked beside it, raises SyntaxError."""
    path = tmp_path / "a.jpg"
    quarters().save(path, exif=b"Exif\0\0rubbish")
    assert sample_clip(path, 1, 64).frames.shape == (1, 32, 48, 3)


@pytest.mark.parametrize("suffix", ["mov", "mkv", "avi"])
def test_a_video_of_pictures_with_exif_data(tmp_path: Path, suffix: str) -> None:
    picture = io.BytesIO()
    quarters().save(picture, "JPEG", quality=95, exif=oriented(6))
    path = tmp_path / f"v.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        for index in range(9):
            packet = av.Packet(picture.getvalue())
            packet.pts = packet.dts = index
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 10), stream, True
            container.mux(packet)
    frames = sample_clip(path, 2, 64).frames
    expected = np.asarray(quarters().transpose(Image.Transpose.ROTATE_270))
    assert np.abs(frames[1].astype(int) - expected).mean() < 8
    assert len(motion_clips(path).starts) == 1


def with_low_complexity_enhancement(path: Path) -> Path:
    """An H.264 video with a message of LCEVC (MPEG-5 part 2) in each packet: side data that PyAV 18 has no name for."""
    message = bytes([4, 13]) + b"\xb4\x00\x50\x00\x01" + bytes(range(1, 9)) + b"\x80"  # registered in the UK by V-Nova
    unit = bytes([6]) + message.replace(b"\x00\x00", b"\x00\x00\x03")
    source = write_video(path.with_name("plain.mp4"), num_frames=12)
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.size:
                marked = av.Packet(len(unit).to_bytes(4, "big") + unit + bytes(packet))
                marked.pts, marked.dts, marked.time_base = packet.pts, packet.dts, packet.time_base
                marked.duration, marked.is_keyframe, marked.stream = packet.duration, packet.is_keyframe, stream
                writer.mux(marked)
    return path


def test_side_data_without_a_name(tmp_path: Path) -> None:
    path = with_low_complexity_enhancement(tmp_path / "v.mp4")
    with av.open(str(path)) as container:
        assert next(data.type.value for data in next(container.decode(video=0)).side_data) == 28
    with IsolatedDecoder() as decoder:
        clip = decoder.sample_clip(path, 3, 64, timeout_s=60)
    np.testing.assert_array_equal(clip.frames, sample_clip(tmp_path / "plain.mp4", 3, 64).frames)
    assert len(motion_clips(path).starts) == 1


@pytest.mark.parametrize("kind", range(28, 40))  # 29: the view of a spatial video
def test_a_kind_of_side_data_is_never_an_error(kind: int) -> None:
    assert Type(kind).value == kind
    assert Type(6) is Type.DISPLAYMATRIX
    with pytest.raises(ValueError, match="no kind"):
        Type("no kind")


@pytest.mark.parametrize("name", ["what?.jpg", "x*.png", "{a,b}.webp", "a%d.jpg", "100%d off.jpg", "seq%03d.jpg"])
def test_a_pictures_name_is_no_pattern_of_other_names(tmp_path: Path, name: str) -> None:
    for other in ("seq001.jpg", "seq002.jpg", "xy.png", "a.webp"):
        Image.new("RGB", (48, 32), (0, 0, 250)).save(tmp_path / other)
    Image.new("RGB", (48, 32), (200, 10, 10)).save(tmp_path / name)
    (frame,) = sample_clip(tmp_path / name, 1, 64).frames
    assert abs(frame[16, 24].astype(int) - (200, 10, 10)).max() < 8
