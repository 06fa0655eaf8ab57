"""Video-LaVIT's clips: motion that is known beforehand, the published steps done plainly in torch, and named faults."""

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from lvlmrec.media import motion
from lvlmrec.media.file import VideoError
from lvlmrec.media.motion import MOTION_STD, choose_starts, motion_clips, motion_map
from tests.videos import write_video

LOSSLESS = {"preset": "ultrafast", "qp": "0"}


def write_pan(
    path: Path, num_frames: int, step: tuple[int, int], size: tuple[int, int] = (160, 96), **more: Any
) -> Path:
    """A window over a random texture at 6 frames per second, its content moving by `step` pixels (x, y) a frame."""
    width, height = size
    coarse = np.random.default_rng(0).uniform(0, 255, (60, 80, 3)).astype(np.uint8)
    texture = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=6, options=LOSSLESS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if "degrees" in more:
            stream.set_display_rotation(more["degrees"])
        for index in range(num_frames):
            x, y = 200 - step[0] * index, 150 - step[1] * index
            picture = np.ascontiguousarray(texture[y : y + height, x : x + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def encoded(path: Path) -> tuple[list[bool], list[Any], list[Any]]:
    """I frames, pictures and vectors (None where there are none) of the stream that `motion.encode` makes."""
    stream = io.BytesIO()
    is_start = motion.encode(path, stream)
    stream.seek(0)
    pictures, vectors = [], []
    with av.open(stream, format="m4v") as container:
        container.streams.video[0].codec_context.options = {"flags2": "+export_mvs"}
        for frame in container.decode(video=0):
            side: Any = frame.side_data.get("MOTION_VECTORS")
            pictures.append(frame.to_ndarray(format="rgb24"))
            vectors.append(None if side is None else side.to_ndarray())
    return is_start, pictures, vectors


def published_motion(vectors: list[Any], width: int, height: int) -> np.ndarray:
    """The published steps for one clip of 24 frames, every pixel of the map, as its code does them in torch."""
    maps = np.full((24, 2, height, width), -10000.0)
    for index, found in enumerate(vectors):
        for mv in found if found is not None else []:
            x, y = min(mv["dst_x"], width - 1), min(mv["dst_y"], height - 1)
            maps[index, 0, y, x] = mv["source"] * mv["motion_x"] / mv["motion_scale"] / width / 0.00993703
            maps[index, 1, y, x] = mv["source"] * mv["motion_y"] / mv["motion_scale"] / height / 0.01130276
    padded = functional.pad(torch.from_numpy(maps).float(), (0, -width % 16, 0, -height % 16), value=-10000)
    pooled = functional.max_pool2d(padded, kernel_size=16, stride=16)
    pooled[pooled < -1000] = 0
    around = torch.stack([pooled[11], pooled[13]], dim=1)[None]
    pooled[12] = functional.interpolate(around, scale_factor=(1.5, 1.0, 1.0), mode="trilinear")[0, :, 1]
    return functional.interpolate(pooled, size=(20, 36), mode="bicubic").permute(1, 0, 2, 3).numpy()


@pytest.mark.parametrize("step", [(4, 0), (0, -3), (-6, 2)])
def test_a_moving_picture_gives_its_motion(tmp_path: Path, step: tuple[int, int]) -> None:
    clips = motion_clips(write_pan(tmp_path / "v.mp4", 40, step))
    assert clips.motion.shape == (1, 2, 24, 20, 36) and clips.motion.dtype == np.float32
    inner = clips.motion[0, :, 1:, 6:-6, 8:-8].transpose(1, 0, 2, 3).reshape(23, 2, -1)
    expected = np.array(step) / (160, 96) / MOTION_STD
    np.testing.assert_allclose(np.median(inner, axis=-1), np.tile(expected, (23, 1)), atol=1e-5)
    np.testing.assert_array_equal(clips.motion[0, :, 0], 0)  # an I frame has no vectors
    np.testing.assert_allclose(clips.motion[:, :, 12], (clips.motion[:, :, 11] + clips.motion[:, :, 13]) / 2, atol=1e-5)


def test_a_turned_video_moves_upright(tmp_path: Path) -> None:
    clips = motion_clips(write_pan(tmp_path / "v.mp4", 14, (4, 0), degrees=-90))  # clockwise: right becomes down
    inner = clips.motion[0, :, 1:12, 6:-6, 8:-8].reshape(2, -1)
    np.testing.assert_allclose(np.median(inner, axis=-1), [0, 4 / 160 / MOTION_STD[1]], atol=1e-5)
    upright = motion_clips(write_pan(tmp_path / "u.mp4", 14, (4, 0)))
    turned = np.rot90(upright.keyframes[0], -1).astype(int)
    assert np.abs(clips.keyframes[0] - turned).mean() < 3


@pytest.mark.parametrize("size", [(160, 96), (150, 90), (64, 336)])
def test_clips_are_what_the_published_steps_give(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_pan(tmp_path / "v.mp4", 60, (2, 1), size)
    clips = motion_clips(path)
    is_start, pictures, vectors = encoded(path)
    assert np.flatnonzero(is_start).tolist() == [0, 12, 24, 36, 48]
    assert clips.num_frames == len(pictures) == 60
    assert clips.starts.tolist() == [12, 36]  # 0, 12, 24 and 36 have 24 frames left
    for row, start in enumerate(clips.starts):
        expected = published_motion(vectors[start : start + 24], *size)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(clips.motion[row], expected, atol=2e-5)
        picture = Image.fromarray(pictures[start]).resize((224, 224), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(clips.keyframes[row], np.asarray(picture))


def test_normalised_keyframes() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    mean, std = torch.tensor(motion.CLIP_MEAN), torch.tensor(motion.CLIP_STD)
    expected = ((torch.from_numpy(picture) / 255 - mean) / std).permute(0, 3, 1, 2)
    np.testing.assert_allclose(motion.normalise_keyframes(picture), expected.numpy(), atol=1e-6)


def test_bicubic_resize_is_torchs() -> None:
    grids = np.random.default_rng(0).normal(size=(24, 45, 80, 2)).astype(np.float32)
    grids[12] = (grids[11] + grids[13]) / 2
    tensor = torch.from_numpy(grids).permute(3, 0, 1, 2)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):  # float32 rounds the coordinates
        expected = functional.interpolate(tensor.to(dtype), size=(20, 36), mode="bicubic", antialias=False)
        np.testing.assert_allclose(motion_map(list(grids)), expected.numpy(), atol=tolerance)


@pytest.mark.parametrize("num_frames", [1, 5, 11, 13])
def test_a_short_video_is_one_clip_that_stands_still_at_its_end(tmp_path: Path, num_frames: int) -> None:
    path = write_pan(tmp_path / "v.mp4", num_frames, (4, 0))
    clips = motion_clips(path)
    assert (clips.num_frames, clips.starts.tolist()) == (num_frames, [0])
    assert clips.keyframes.shape == (1, 224, 224, 3)
    still = [k for k in range(num_frames, 24) if k != 12]
    np.testing.assert_array_equal(clips.motion[0, :, still], 0)
    if num_frames > 1:
        assert np.abs(clips.motion[0, :, 1]).max() > 1
    np.testing.assert_allclose(clips.motion[0], published_motion(encoded(path)[2], 160, 96), atol=2e-5)


def starts_at(indices: list[int], total: int) -> list[bool]:
    return [k in indices for k in range(total)]


def test_the_choice_of_clips() -> None:
    regular = list(range(0, 98, 12))
    assert choose_starts(starts_at(regular, 98), 16) == [12, 36, 60]  # 0, 12, ..., 72 are whole
    assert choose_starts(starts_at([0], 5), 16) == [0]
    assert choose_starts(starts_at([0, 12], 30), 16) == [0]  # one whole group: all I frames, every second from 0
    assert choose_starts(starts_at([0, 12, 20], 22), 16) == [12]  # none whole with 24 frames left: all, from the second
    assert choose_starts(starts_at([0, 7, 19, 31, 43], 60), 16) == [19]  # 7, 19 and 31 are whole
    many = starts_at(list(range(0, 1200, 12)), 1200)  # 0, ..., 1176 are whole: 12, 36, ..., 1164 are 49
    chosen = choose_starts(many, 16)
    assert len(chosen) == 16 and chosen[:3] == [12, 84, 156] and chosen[-1] == 1164
    assert choose_starts(many, 1) == [12]


def test_a_scene_that_changes_begins_a_group(tmp_path: Path) -> None:
    """The encoder puts an I frame where nothing can be predicted."""
    path = tmp_path / "v.mkv"
    rng = np.random.default_rng(0)
    scenes = [rng.integers(0, 256, (96, 96, 3), np.uint8) for _ in range(2)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=6)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for index in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scenes[index >= 17], format="rgb24")))
        container.mux(stream.encode())
    is_start, _, _ = encoded(path)
    assert 17 in np.flatnonzero(is_start)
    assert motion_clips(path).motion.shape[1:] == (2, 24, 20, 36)


@pytest.mark.parametrize("name", ["v.mp4", "v.avi", "v.h264", "v.ts"])
def test_every_sixth_of_a_second(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, codec="mpeg4" if name == "v.avi" else "libx264", num_frames=60)
    fps = 25 if name == "v.h264" else 30  # FFmpeg's guess where the stream does not say
    assert abs(motion_clips(path).num_frames - 60 * 6 / fps) <= 1


def test_a_long_pause_and_a_late_start(tmp_path: Path) -> None:
    pts = [6000 + 20 * k for k in range(10)] + [6000 + 1200 + 20 * k for k in range(10)]  # units of 1/600 s
    path = write_video(tmp_path / "v.mkv", num_frames=20, pts=pts)
    assert motion_clips(path).num_frames == 14  # 2.33 s


def test_pictures_of_another_size_are_scaled_to_the_first(tmp_path: Path) -> None:
    parts = [write_video(tmp_path / f"{k}.h264", size=size) for k, size in enumerate([(64, 48), (96, 80)])]
    path = tmp_path / "v.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    _, pictures, _ = encoded(path)
    assert {picture.shape for picture in pictures} == {(48, 64, 3)}
    assert len(motion_clips(path).starts) == 1


def test_the_stream_may_outgrow_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pan(tmp_path / "v.mp4", 30, (2, 1))
    expected = motion_clips(path)
    monkeypatch.setattr(motion, "STREAM_MEMORY_BYTES", 1000)
    again = motion_clips(path)
    np.testing.assert_array_equal(again.motion, expected.motion)
    np.testing.assert_array_equal(again.keyframes, expected.keyframes)


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    return path


def truncated(path: Path) -> Path:
    write_video(path, size=(256, 256), container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def text(path: Path) -> Path:
    path.write_bytes(b"no video at all" * 99)
    return path


FAULTY = {
    "missing": (lambda folder: folder / "v.mp4", "open", "not_found"),
    "text": (lambda folder: text(folder / "v.mp4"), "open", "not_a_video"),
    "sound only": (lambda folder: sound(folder / "v.flac"), "probe", "no_video_stream"),
    "truncated": (lambda folder: truncated(folder / "v.mp4"), "demux", "truncated"),
    "too large": (
        lambda folder: write_video(folder / "v.mkv", codec="ffv1", size=(8400, 16), num_frames=6),
        "encode",
        "encode_failed",
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_has_a_stage_and_a_name(tmp_path: Path, name: str) -> None:
    make, stage, error = FAULTY[name]
    with pytest.raises(VideoError) as caught:
        motion_clips(make(tmp_path))
    assert (caught.value.stage, caught.value.error) == (stage, error), caught.value


def test_a_video_of_years_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "v.mkv", num_frames=3, pts=[0, 600, 600 * 86_400 * 3000])
    monkeypatch.setattr(motion, "MAX_SECONDS", 5)
    with pytest.raises(VideoError, match="longer than 5 seconds") as caught:
        motion_clips(path)
    assert (caught.value.stage, caught.value.error) == ("encode", "too_long")


@pytest.mark.thorough
@pytest.mark.data
def test_a_real_video(real_data: Path) -> None:
    path = real_data / "microlens_videos" / "1002.mp4"
    clips = motion_clips(path)
    is_start, _, vectors = encoded(path)
    assert (clips.num_frames, len(vectors)) == (98, 98)
    assert np.flatnonzero(is_start).tolist() == list(range(0, 98, 12))
    assert [found is None for found in vectors] == is_start
    for found in vectors:
        if found is not None:
            assert set(found["source"]) == {-1} and set(found["w"]) == set(found["h"]) == {16}
            assert set(found["motion_scale"]) == {2} and len(found) <= 45 * 80
    assert clips.starts.tolist() == [12, 36, 60]
    assert clips.motion.shape == (3, 2, 24, 20, 36)
    expected = published_motion(vectors[12:36], 1280, 720)
    np.testing.assert_allclose(clips.motion[0], expected, atol=5e-4)  # of up to 33: torch rounds coordinates
