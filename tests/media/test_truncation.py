"""A file that was cut off is rejected wherever its container tells; one that tells nothing is read as it is."""

import io
from pathlib import Path

import av
import pytest

from lvlmrec.media.file import VideoError
from lvlmrec.media.motion import motion_clips
from lvlmrec.media.sampling import probe, sample_clip
from lvlmrec.media.truncation import declared_size
from tests.videos import picture, write_video

MP4, AVI = "mov,mp4,m4a,3gp,3g2,mj2", "avi"
# Decoders that conceal what is missing: nothing but the container tells.
TELLING: dict[str, tuple[str, str, dict[str, str]]] = {
    "Matroska": ("v.mkv", "libx264", {}),
    "WebM": ("v.webm", "libvpx-vp9", {}),
    "AVI": ("v.avi", "mpeg4", {}),
    "MP4": ("v.mp4", "mpeg4", {"movflags": "faststart"}),
    "QuickTime": ("v.mov", "mjpeg", {"movflags": "faststart"}),
    "MP4 in fragments": ("v.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
}


def write(folder: Path, name: str) -> Path:
    file, codec, options = TELLING[name]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    cpu = {"cpu-used": "8"} if "vpx" in codec else None
    size = (192, 160)  # more bytes than a header has
    return write_video(folder / file, codec=codec, pix_fmt=pix_fmt, size=size, options=cpu, container_options=options)


@pytest.mark.parametrize("name", TELLING)
def test_a_file_that_was_cut_off_is_rejected(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    content = path.read_bytes()
    assert sample_clip(path, 4, 64).num_source_frames == 60
    for share in (0.5, 0.8):
        path.write_bytes(content[: int(len(content) * share)])
        for read in (lambda: sample_clip(path, 4, 64), lambda: probe(path), lambda: motion_clips(path)):
            with pytest.raises(VideoError) as caught:
                read()
            assert (caught.value.stage, caught.value.error) == ("demux", "truncated")
            assert f"has {path.stat().st_size} of the {promised_bytes(path)} bytes" in caught.value.message


def promised_bytes(path: Path) -> int:
    with av.open(str(path)) as container:
        return declared_size(path, container.format.name)


class Pipe(io.RawIOBase):
    """Where a live recording goes: it cannot go back and fill in how long it became."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.content += data
        return len(data)


def live(path: Path, file_format: str, codec: str) -> bytes:
    pipe = Pipe()
    with av.open(pipe, "w", format=file_format) as container:  # type: ignore[arg-type]
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = 64, 48, "yuv420p", 12
        for index in range(60):
            frame = av.VideoFrame.from_ndarray(picture(index, 64, 48), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path.write_bytes(pipe.content)
    return bytes(pipe.content)


@pytest.mark.parametrize(("suffix", "file_format", "codec"), [("mkv", "matroska", "libx264"), ("avi", "avi", "mpeg4")])
def test_a_live_recording_tells_nothing_and_is_read(tmp_path: Path, suffix: str, file_format: str, codec: str) -> None:
    """As before, as is a part of a transport stream."""
    path = tmp_path / f"v.{suffix}"
    content = live(path, file_format, codec)
    assert promised_bytes(path) <= len(content)
    assert sample_clip(path, 4, 64).num_source_frames == 60


def test_a_transport_stream_tells_nothing_and_is_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.ts", codec="mpeg2video")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 5 // 188 * 188])
    assert promised_bytes(path) == 0
    assert 10 < sample_clip(path, 4, 64).num_source_frames < 60


@pytest.mark.parametrize("codec", ["flv1", "libx264"])
def test_flash_video_that_ends_within_a_frame_is_rejected(tmp_path: Path, codec: str) -> None:
    path = write_video(tmp_path / "v.flv", codec=codec)
    content = path.read_bytes()
    with av.open(str(path)) as container:
        middle = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][30]
    assert sample_clip(path, 4, 64).num_source_frames == 60
    path.write_bytes(content[: middle[0] + middle[1] // 2])
    with pytest.raises(VideoError) as caught:
        sample_clip(path, 4, 64)
    assert (caught.value.stage, caught.value.error) == ("demux", "truncated")


def box(kind: bytes, size: int, content: bytes = b"") -> bytes:
    return size.to_bytes(4) + kind + content


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return name + (len(content) if size is None else size).to_bytes(4, "little") + content


FRAMES = b"movi" + bytes(96)
SIZES: dict[str, tuple[str, bytes, int]] = {
    "64-bit size": (MP4, box(b"ftyp", 8) + box(b"mdat", 1, (5 << 32).to_bytes(8)), 8 + (5 << 32)),
    "to the end of the file": (MP4, box(b"ftyp", 8) + box(b"mdat", 0, bytes(50)), 0),
    "size never written": (MP4, box(b"ftyp", 8) + box(b"mdat", 0xFFFFFFFF, bytes(50)), 0),
    "a camera's own data behind": (MP4, box(b"mdat", 16, bytes(8)) + b"\x7fSEFT\x99" * 20, 16),
    "AVI": (AVI, chunk(b"RIFF", b"AVI " + chunk(b"LIST", FRAMES)), 120),
    "index cut off": (AVI, chunk(b"RIFF", b"AVI " + chunk(b"LIST", FRAMES) + b"idx1", 5000), 120),
    "never finished": (AVI, chunk(b"RIFF", b"AVI " + chunk(b"LIST", FRAMES, 0), 0), 0),
    "second part cut off": (
        AVI,
        chunk(b"RIFF", b"AVI " + chunk(b"LIST", FRAMES)) + chunk(b"RIFF", b"AVIX" + chunk(b"LIST", FRAMES, 9000), 9012),
        120 + 12 + 8 + 9000,
    ),
    "no EBML": ("matroska,webm", bytes(80), 0),
    "EBML alone": ("matroska,webm", bytes.fromhex("1a45dfa380"), 0),
    "segment": ("matroska,webm", bytes.fromhex("1a45dfa3 80 18538067 4100"), 11 + 256),
    "segment of unknown size": ("matroska,webm", bytes.fromhex("1a45dfa3 80 18538067 01ffffffffffffff"), 0),
    "short unknown size": ("matroska,webm", bytes.fromhex("1a45dfa3 80 18538067 ff"), 0),
    "nothing": (MP4, b"", 0),
    "FLV": ("flv", b"FLV", 0),
}


@pytest.mark.parametrize("name", SIZES)
def test_what_a_container_tells_of_its_size(tmp_path: Path, name: str) -> None:
    container_format, content, expected = SIZES[name]
    (tmp_path / "v").write_bytes(content)
    assert declared_size(tmp_path / "v", container_format) == expected
