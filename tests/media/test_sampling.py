"""Sampling equals decoding everything, whatever the stream; every failure has a name."""

import pickle
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from lvlmrec.media import sampling
from lvlmrec.media.file import VideoError
from lvlmrec.media.sampling import probe, sample_clip, sample_indices
from tests.videos import decode_all, picture, write_video

X264 = {"preset": "veryfast", "bf": "3", "sc_threshold": "0"}


@pytest.fixture
def only_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding everything is out of bounds: the fast path must do."""

    def refuse(*_: Any) -> None:
        raise AssertionError("everything was decoded")

    monkeypatch.setattr(sampling, "_sample_all", refuse)


def assert_equals_reference(path: Path, num_frames: int) -> None:
    frames, total = decode_all(path, num_frames)
    clip = sample_clip(path, num_frames, max_side=10_000)
    assert clip.num_source_frames == total
    np.testing.assert_array_equal(clip.frames, frames)
    np.testing.assert_array_equal(clip.frame_indices, np.arange(num_frames) * total // num_frames)


def test_the_sampling_rule() -> None:
    assert sample_indices(10, 4).tolist() == [0, 2, 5, 7]  # 0/4, 10/4, 20/4, 30/4
    assert sample_indices(3, 5).tolist() == [0, 0, 1, 1, 2]  # 0/5, 3/5, 6/5, 9/5, 12/5
    with pytest.raises(ValueError, match="0 frames"):
        sample_indices(0, 4)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("num_frames", [1, 5, 8, 59, 60])
def test_h264_by_groups_of_pictures(tmp_path: Path, only_groups: None, suffix: str, num_frames: int) -> None:
    path = write_video(tmp_path / f"v.{suffix}", options=X264)
    assert_equals_reference(path, num_frames)


STREAMS = {
    "no B-frames": ("libx264", X264 | {"bf": "0"}),
    "pyramid": ("libx264", X264 | {"bf": "7", "b-pyramid": "normal", "b_strategy": "0"}),
    "open GOP": ("libx264", X264 | {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3"}),
    "intra refresh": ("libx264", X264 | {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "several slices": ("libx264", X264 | {"slices": "4"}),
    "hevc": ("libx265", {"preset": "superfast", "x265-params": "log-level=0:keyint=12:bframes=3:open-gop=0"}),
    "hevc open GOP": ("libx265", {"preset": "medium", "x265-params": "log-level=0:keyint=12:min-keyint=12:bframes=3"}),
    "hevc layers": ("libx265", {"preset": "medium", "x265-params": "log-level=0:keyint=12:temporal-layers=3"}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_that_need_care_by_groups_of_pictures(tmp_path: Path, only_groups: None, name: str) -> None:
    codec, options = STREAMS[name]
    path = write_video(tmp_path / "v.mp4", codec=codec, options=options)
    for num_frames in (1, 7, 13, 60):
        assert_equals_reference(path, num_frames)


EVERYTHING = {
    "interlaced": ("v.mp4", "libx264", X264 | {"x264-params": "tff=1:interlaced=1"}),
    "vp9 hidden frames": ("v.webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
    "vp8 hidden frames": ("v.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "16"}),
    "mpeg4 in avi": ("v.avi", "mpeg4", {"bf": "2"}),
    "transport stream": ("v.ts", "libx264", X264),
    "elementary stream": ("v.h264", "libx264", X264),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_streams_that_are_decoded_whole(tmp_path: Path, name: str) -> None:
    file, codec, options = EVERYTHING[name]
    path = write_video(tmp_path / file, codec=codec, options=options, num_frames=40)
    assert_equals_reference(path, 7)


def without_beginning(path: Path, gop: int) -> Path:
    """60 packets without the first five: those before the next key frame cannot be decoded."""
    source = write_video(path.with_suffix(".mp4"), options=X264, gop=gop)
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for k, packet in enumerate(reader.demux(video=0)):
            if k >= 5 and packet.size:
                packet.stream = stream
                writer.mux(packet)
    return path


def test_frames_are_counted_not_packets(tmp_path: Path) -> None:
    path = without_beginning(tmp_path / "v.mkv", gop=12)
    assert probe(path).num_frames == 55
    assert sample_clip(path, 4, 64).num_source_frames == 48
    assert_equals_reference(path, 4)


def test_a_skipped_reference_is_seen_and_everything_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "v.mp4", options=X264)
    frames, _ = decode_all(path, 6)
    plan = sampling.decode_plan

    def late(pts: Any, pictures: Any, wanted: Any) -> Any:
        selections, restarts = plan(pts, pictures, wanted)
        return [selection and not pictures[k].is_start for k, selection in enumerate(selections)], restarts

    monkeypatch.setattr(sampling, "decode_plan", late)
    np.testing.assert_array_equal(sample_clip(path, 6, 64).frames, frames)


def is_noticed(path: Path) -> bool:
    """Whether a decoder that is told to hide nothing finds damage."""
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        context.thread_count, context.options = 1, {"err_detect": "explode"}
        try:
            for _ in container.decode(video=0):
                pass
        except av.FFmpegError:
            return True
    return False


def test_damage_that_a_decoder_hides_is_hidden_as_in_the_whole(tmp_path: Path) -> None:
    """What HEVC puts in the place of damage depends on the pictures before, and no mark on it tells."""
    codec, options = STREAMS["hevc"]
    path = write_video(tmp_path / "v.mp4", codec=codec, options=options, size=(160, 128))
    with av.open(str(path)) as container:
        keys = [(p.pos, p.size) for p in container.demux(video=0) if p.size and p.is_keyframe]
    content, noticed = path.read_bytes(), 0
    for pos, size in keys[1:]:
        for kept in (size * share // 100 for share in (30, 50, 70)):
            path.write_bytes(content[: pos + kept] + b"\xff" * (size - kept) + content[pos + size :])
            if is_noticed(path):
                noticed += 1
                assert_equals_reference(path, 13)
    assert noticed


def test_less_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "v.mp4", options=X264, num_frames=120)
    selection: list[int] = []
    plan = sampling.decode_plan
    monkeypatch.setattr(sampling, "decode_plan", lambda *a: (selection.append(sum((result := plan(*a))[0])), result)[1])
    sample_clip(path, 5, 64)
    assert selection[0] <= 45  # of 120: five groups of 12, and about half of a group's pictures are referred to


def test_variable_frame_rate_and_a_late_start(tmp_path: Path, only_groups: None) -> None:
    pts = np.cumsum([24_000_000 + 20, *([20, 50, 10] * 8)]).tolist()  # units of 1/600 s; starts after 40,000 s
    path = write_video(tmp_path / "v.mkv", options=X264, num_frames=25, pts=pts)
    clip = sample_clip(path, 25, 64)
    np.testing.assert_allclose(clip.timestamps, (np.array(pts) - pts[0]) / 600, atol=1.1e-3)  # Matroska: 1 ms
    assert clip.duration == pytest.approx((pts[-1] - pts[0]) / 600, abs=0.1)
    assert clip.duration > clip.timestamps[-1]
    assert_equals_reference(path, 6)


def test_timestamps_of_constant_rate(tmp_path: Path) -> None:
    clip = sample_clip(write_video(tmp_path / "v.mp4", num_frames=30, options=X264), 3, 64)
    np.testing.assert_allclose(clip.timestamps, [0, 10 / 30, 20 / 30], atol=1e-4)
    assert clip.duration == pytest.approx(1.0, abs=1e-4)


def test_fewer_frames_than_asked_for_repeat(tmp_path: Path, only_groups: None) -> None:
    path = write_video(tmp_path / "v.mp4", num_frames=3, options=X264)
    clip = sample_clip(path, 5, 64)
    assert clip.frame_indices.tolist() == [0, 0, 1, 1, 2]
    assert (clip.num_source_frames, clip.num_distinct_frames) == (3, 3)
    assert_equals_reference(path, 5)


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirror", [False, True])
def test_orientation_is_applied(tmp_path: Path, degrees: int, mirror: bool) -> None:
    def rotate(_: Any, stream: Any) -> None:
        stream.set_display_rotation(degrees, hflip=mirror)  # counter-clockwise, then the flip

    path = write_video(tmp_path / "v.mp4", options=X264, num_frames=6, prepare=rotate)
    frames, _ = decode_all(path, 3)
    expected = np.rot90(frames, degrees // 90, axes=(1, 2))
    expected = expected[:, :, ::-1] if mirror else expected
    np.testing.assert_array_equal(sample_clip(path, 3, 64).frames, expected)
    info = probe(path)
    assert (info.height, info.width) == expected.shape[1:3]
    assert info.mirrored == mirror
    if not mirror:
        assert info.rotation == -degrees % 360


@pytest.mark.parametrize("matrix", [[0] * 9, [1 << 16] * 9, [46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30]])
def test_a_nonsense_orientation_is_ignored(tmp_path: Path, matrix: list[int]) -> None:
    path = write_video(tmp_path / "v.mp4", options=X264, prepare=lambda _, stream: stream.set_display_matrix(matrix))
    assert_equals_reference(path, 3)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "options"),
    [
        ("libx264", "yuv444p", X264),
        ("libx264", "yuv420p10le", X264),
        ("libx264", "yuvj420p", X264),
        ("ffv1", "yuva420p", {}),
        ("ffv1", "gray", {}),
        ("png", "rgba", {}),
    ],
)
def test_pixel_formats_and_odd_sizes(tmp_path: Path, codec: str, pix_fmt: str, options: dict[str, str]) -> None:
    size = (64, 48) if "420" in pix_fmt else (65, 47)
    path = write_video(tmp_path / "v.nut", codec=codec, pix_fmt=pix_fmt, size=size, num_frames=9, options=options)
    assert_equals_reference(path, 4)


def test_alpha_is_dropped_not_composited(tmp_path: Path) -> None:
    path = tmp_path / "v.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=30)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgba"
        transparent = np.full((16, 16, 4), (200, 100, 50, 0), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(transparent, format="rgba")))
        container.mux(stream.encode())
    assert sample_clip(path, 1, 64).frames[0, 8, 8].tolist() == [200, 100, 50]


def test_large_frames_are_scaled_down(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", options=X264, size=(128, 72), num_frames=6)
    clip = sample_clip(path, 2, 50)
    assert clip.frames.shape == (2, 28, 50, 3)  # 72 * 50 / 128 = 28.1
    full, _ = decode_all(path, 2)
    assert abs(clip.frames.mean() - full.mean()) < 3
    assert sample_clip(path, 2, 128).frames.shape == (2, 72, 128, 3)


def test_a_change_of_size_keeps_the_first(tmp_path: Path) -> None:
    parts = [
        write_video(tmp_path / f"{k}.h264", options=X264, size=size, num_frames=8)
        for k, size in enumerate([(64, 48), (96, 80)])
    ]
    path = tmp_path / "v.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = sample_clip(path, 16, 64)
    assert clip.frames.shape == (16, 48, 64, 3)
    assert clip.num_source_frames == 16
    expected = picture(7, 96, 80)[::5, ::3].astype(float)
    assert abs(clip.frames[-1].mean() - expected.mean()) < 12


def test_the_best_of_several_streams_and_no_cover_picture(tmp_path: Path) -> None:
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=30, options=X264) for _ in range(2)]
        for stream, size in zip(streams, [(32, 32), (128, 96)], strict=True):
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
        for index in range(10):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture(index, stream.width, stream.height), format="rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    frames, _ = decode_all(path, 4)
    np.testing.assert_array_equal(sample_clip(path, 4, 128).frames, frames)


def test_probe(tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "v.mp4", options=X264, size=(66, 48), num_frames=45))
    assert (info.codec, info.width, info.height, info.num_frames) == ("h264", 66, 48, 45)
    assert (info.duration, info.fps) == (pytest.approx(1.5, abs=1e-3), pytest.approx(30, abs=1e-2))
    assert (info.rotation, info.mirrored) == (0, False)


def sound(path: Path, cover: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        if cover:
            image = container.add_stream("png")
            image.width, image.height, image.pix_fmt = 16, 16, "rgb24"
            image.disposition = av.stream.Disposition.attached_pic
            packets = image.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24"))
            container.mux([*packets, *image.encode()])
        container.mux([*stream.encode(frame), *stream.encode()])
    return path


def truncated(path: Path) -> Path:
    write_video(path, options=X264, size=(256, 256), container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


FAULTY = {
    "missing": (lambda folder: folder / "v.mp4", "open", "not_found"),
    "folder": (lambda folder: folder, "open", "unreadable"),
    "empty": (lambda folder: written(folder / "v.mp4", b""), "open", "not_a_video"),
    "text": (lambda folder: written(folder / "v.mp4", b"no video at all" * 99), "open", "not_a_video"),
    "network": (lambda folder: "http://127.0.0.1:9/v.mp4", "open", "not_found"),
    "zero byte in the name": (lambda folder: f"{folder}/v\0.mp4", "open", "not_found"),
    "playlist": (
        lambda folder: written(folder / "v.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
        "open",
        "not_a_video",
    ),
    "sound only": (lambda folder: sound(folder / "v.flac"), "probe", "no_video_stream"),
    "cover picture": (lambda folder: sound(folder / "v.flac", cover=True), "probe", "no_video_stream"),
    "no frames": (lambda folder: without_beginning(folder / "v.mkv", gop=60), "decode", "no_frames"),
    "truncated": (lambda folder: truncated(folder / "v.mp4"), "demux", "truncated"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_has_a_stage_and_a_name(tmp_path: Path, name: str) -> None:
    make, stage, error = FAULTY[name]
    with pytest.raises(VideoError) as caught:
        sample_clip(make(tmp_path), 4, 64)
    assert (caught.value.stage, caught.value.error) == (stage, error), caught.value
    assert "\n" not in caught.value.message
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 (our own)
    assert (copy.stage, copy.error, copy.message) == (stage, error, caught.value.message)


@pytest.mark.parametrize("kind", [av.error.PermissionError, av.error.BlockingIOError, av.error.ArgumentError])
def test_odd_exceptions_of_a_decoder_are_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    path = write_video(tmp_path / "v.mp4", options=X264, num_frames=3)

    def fail(*_: Any, **__: Any) -> Any:
        with sampling.video_errors("decode"):
            raise kind(1, "odd\nindeed")
        yield

    monkeypatch.setattr(sampling, "decode_frames", fail)
    with pytest.raises(VideoError, match="odd indeed") as caught:
        sample_clip(path, 2, 64)
    assert (caught.value.stage, caught.value.error) == ("decode", "decode_failed")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    source = write_video(
        tmp_path / "v.mp4", options=X264, num_frames=3, prepare=lambda c, _: c.metadata.update(title="tiiitle")
    )
    data = source.read_bytes()
    assert b"tiiitle" in data
    path = tmp_path / "a:b \udcff%d.mp4"
    path.write_bytes(data.replace(b"tiiitle", b"t\xff\xfe\xfdtle"))
    assert sample_clip(path, 2, 64).frames.shape == (2, 48, 64, 3)
