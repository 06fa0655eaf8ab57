"""A file that hangs or crashes the decoder, or exhausts its memory, is rejected, and the next one works."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

import lvlmrec
from lvlmrec.media.file import VideoError
from lvlmrec.media.isolation import IsolatedDecoder
from lvlmrec.media.motion import motion_clips
from lvlmrec.media.sampling import sample_clip
from tests.videos import write_video

X264 = {"preset": "ultrafast"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "good.mp4", options=X264, num_frames=12)


@pytest.fixture
def decoder() -> Iterator[IsolatedDecoder]:
    with IsolatedDecoder() as decoder:
        yield decoder


def assert_works(decoder: IsolatedDecoder, good: Path) -> None:
    here, there = sample_clip(good, 4, 50), decoder.sample_clip(good, 4, 50, timeout_s=20)
    for name in ("frames", "timestamps", "frame_indices"):
        np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
        assert getattr(there, name).dtype == getattr(here, name).dtype
    assert (there.num_source_frames, there.duration) == (here.num_source_frames, here.duration)


def has_ended(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def signal_soon(decoder: IsolatedDecoder, act: int) -> threading.Thread:
    """Sends the signal `act` to the child half a second later, while it decodes."""

    def send() -> None:
        time.sleep(0.5)
        assert decoder.pid is not None
        os.kill(decoder.pid, act)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A named pipe without a writer: opening it never returns."""
    path = tmp_path / "endless.mp4"
    os.mkfifo(path)
    return path


def test_one_child_gives_the_same_clips(decoder: IsolatedDecoder, good: Path) -> None:
    assert_works(decoder, good)
    pid = decoder.pid
    assert pid not in (None, os.getpid())
    assert_works(decoder, good)
    assert decoder.pid == pid


def test_a_fault_of_a_file_arrives_as_it_is_and_the_child_stays(decoder: IsolatedDecoder, good: Path) -> None:
    assert_works(decoder, good)
    pid = decoder.pid
    for path in (Path("/nowhere\udcff.mp4"), Path(__file__)):
        with pytest.raises(VideoError) as here:
            sample_clip(path, 4, 50)
        with pytest.raises(VideoError) as there:
            decoder.sample_clip(path, 4, 50, timeout_s=20)
        assert there.value.args == here.value.args
    assert_works(decoder, good)
    assert decoder.pid == pid


def test_a_file_that_hangs(decoder: IsolatedDecoder, good: Path, endless: Path) -> None:
    assert_works(decoder, good)
    pid, started = decoder.pid, time.monotonic()
    with pytest.raises(VideoError, match=r"0\.3 s") as caught:
        decoder.sample_clip(endless, 4, 50, timeout_s=0.3)
    assert time.monotonic() - started < 5
    assert (caught.value.stage, caught.value.error) == ("decode", "timeout")
    assert pid is not None
    assert has_ended(pid)
    assert_works(decoder, good)


def test_a_child_that_is_stopped(decoder: IsolatedDecoder, good: Path) -> None:
    assert_works(decoder, good)
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGSTOP)
    with pytest.raises(VideoError) as caught:
        decoder.sample_clip(good, 4, 50, timeout_s=0.3)
    assert caught.value.error == "timeout"
    assert_works(decoder, good)


@pytest.mark.parametrize("act", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_dies_midway(decoder: IsolatedDecoder, good: Path, endless: Path, act: signal.Signals) -> None:
    assert_works(decoder, good)
    thread = signal_soon(decoder, act)
    with pytest.raises(VideoError, match=act.name) as caught:
        decoder.sample_clip(endless, 4, 50, timeout_s=20)
    thread.join()
    assert (caught.value.stage, caught.value.error) == ("decode", "decoder_died")
    assert_works(decoder, good)


def test_a_child_that_died_between_videos(decoder: IsolatedDecoder, good: Path) -> None:
    assert_works(decoder, good)
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    assert has_ended(decoder.pid)
    assert_works(decoder, good)


def test_an_interrupted_video_leaves_nothing_for_the_next(
    decoder: IsolatedDecoder, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_works(decoder, good)
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(decoder, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decoder.sample_clip(good, 2, 20, timeout_s=20)
    assert_works(decoder, good)


@pytest.mark.thorough
def test_a_file_that_wants_too_much_memory(tmp_path: Path, good: Path) -> None:
    path = tmp_path / "large.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=X264)
        stream.width, stream.height, stream.pix_fmt = 6144, 6144, "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame(6144, 6144, "yuv420p")))
        container.mux(stream.encode())
    with IsolatedDecoder(memory_mb=300) as decoder:
        with pytest.raises(VideoError) as caught:
            decoder.sample_clip(path, 2, 50, timeout_s=60)
        assert caught.value.error in ("out_of_memory", "decode_failed")
        assert re.search(r"memory|peaked at \d+ of 300 MB", caught.value.message)
        assert_works(decoder, good)
    with IsolatedDecoder() as decoder:  # the limit was the cause, not the file
        assert decoder.sample_clip(path, 2, 50, timeout_s=60).frames.shape == (2, 50, 50, 3)


def test_a_child_that_cannot_start_says_why(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "av.py").write_text("raise ImportError('a broken install')")
    with (
        IsolatedDecoder() as decoder,
        pytest.raises(RuntimeError, match=r"did not start.*exit status 1.*a broken install"),
    ):
        decoder.sample_clip(good, 4, 50, timeout_s=20)


def test_an_exception_in_the_child_is_named(decoder: IsolatedDecoder, good: Path) -> None:
    with pytest.raises(VideoError, match="ValueError: cannot sample 0 of 12 frames") as caught:
        decoder.sample_clip(good, 0, 50, timeout_s=20)
    assert (caught.value.stage, caught.value.error) == ("decode", "decode_failed")
    assert_works(decoder, good)


def test_close_ends_the_child_and_a_later_video_starts_another(good: Path) -> None:
    with IsolatedDecoder() as decoder:
        assert_works(decoder, good)
        pid = decoder.pid
    assert pid is not None
    assert has_ended(pid)
    assert decoder.pid is None
    assert_works(decoder, good)
    decoder.close()
    decoder.close()


def test_the_child_dies_with_its_parent_even_while_it_hangs(endless: Path) -> None:
    code = (
        "import sys, threading, time; from lvlmrec.media.isolation import IsolatedDecoder\n"
        "decoder = IsolatedDecoder(); decoder._start(); print(decoder.pid, flush=True)\n"
        "decoder.sample_clip(sys.argv[1], 4, 50, 60)"
    )
    root = str(Path(lvlmrec.__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(endless)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not has_ended(pid, within_s=0.3)
        parent.kill()
    assert has_ended(pid)


def test_the_child_imports_little() -> None:
    code = "import sys, lvlmrec.media.isolation; print(*sys.modules)"
    root = str(Path(lvlmrec.__file__).parent.parent)
    listed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}
    )
    heavy = {"ray", "torch", "transformers", "pandas", "pyarrow", "fsspec", "scipy", "omegaconf"}
    assert not heavy & set(listed.stdout.split())


@pytest.mark.data
@pytest.mark.parametrize("angle", [90, 180, 270])
def test_turned_videos_come_through_the_pipe(real_data: Path, angle: int) -> None:
    path = real_data / "videos" / f"decord__tests__test_data__video_{angle}.mov"
    expected = sample_clip(path, 4, 1280)
    with IsolatedDecoder() as decoder:
        clip = decoder.sample_clip(path, 4, 1280, timeout_s=30)
    assert expected.frames.flags.c_contiguous
    np.testing.assert_array_equal(clip.frames, expected.frames)


def test_motion_comes_from_the_same_child(decoder: IsolatedDecoder, tmp_path: Path, good: Path, endless: Path) -> None:
    path = write_video(tmp_path / "long.mp4", options=X264, num_frames=420, size=(96, 64))
    here, there = motion_clips(path, 16), decoder.motion_clips(path, 16, timeout_s=60)
    pid = decoder.pid
    for name in ("keyframes", "motion", "starts"):
        np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
        assert getattr(there, name).dtype == getattr(here, name).dtype
    assert (len(there.starts), there.num_frames) == (3, here.num_frames)
    assert_works(decoder, good)
    with pytest.raises(VideoError) as caught:
        decoder.motion_clips(Path(__file__), 16, timeout_s=20)
    assert caught.value.stage == "open"
    assert decoder.pid == pid
    with pytest.raises(VideoError, match=r"0\.3 s") as caught:
        decoder.motion_clips(endless, 16, timeout_s=0.3)
    assert caught.value.error == "timeout"
    assert len(decoder.motion_clips(path, 1, timeout_s=60).starts) == 1


@pytest.mark.thorough
def test_a_stream_that_outgrows_memory_goes_to_a_file(decoder: IsolatedDecoder, tmp_path: Path) -> None:
    """Noise does not compress: its stream is longer than `motion.STREAM_MEMORY_BYTES`."""
    path = tmp_path / "noise.mp4"
    rng = np.random.default_rng(0)
    noise = [av.VideoFrame.from_ndarray(rng.integers(0, 255, (480, 640, 3), dtype=np.uint8)) for _ in range(7)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.bit_rate = 640, 480, 6_000_000
        for index in range(600):
            frame = noise[index % 7]
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert decoder.motion_clips(path, 16, timeout_s=200).num_frames >= 598
