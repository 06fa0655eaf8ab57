"""CPU time of sampling 16 frames of a video: lvlmrec against the ways that others take.

    python benchmarks/decode.py [--rounds 5] [--clips DIR] [--content VIDEO] [--only h264 lvlmrec torchcodec] [--save]

Clips are made here: 60 s of 1280x720 at 30 frames per second, a panned textured scene with grain and moving squares
(or what `--content` shows, repeated and scaled to that size); h264 (x264's own defaults) with 12 and with 36 key
frames, HEVC and AV1. Per clip the methods take turns, in one process and one thread, for `--rounds` rounds after one
that does not count; the figure is the median of user + system time. Every round's frames are compared with those of
decoding everything; the exit status is 1 where lvlmrec's differ.

lvlmrec       lvlmrec.media.sampling.sample_clip
pictures      the same without converting pictures to RGB: FFmpeg decoding what cannot be left out, and finding it
decode all    PyAV, one thread: every frame decoded, 16 kept
transformers  transformers.video_utils.load_video, backend pyav, as its video processors call it (threads are its own)
torchcodec    VideoDecoder(num_ffmpeg_threads=1).get_frames_at, seek_mode exact (its default) and approximate

torchcodec is optional. It needs FFmpeg's shared libraries; those in PyAV's wheel do, linked under their usual names:
    ln -s .../av.libs/libavcodec-*.so.62.* links/libavcodec.so.62    (and avdevice, avfilter, avformat, avutil, ...)
    LD_LIBRARY_PATH=links:.../av.libs python benchmarks/decode.py
Then both decode with the very same FFmpeg, and the difference is what is decoded.

The last line of stdout is JSON: the worst ratio over the h264 clips, and the figures of each clip.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest import mock

import av
import numpy as np
from av.video.stream import VideoStream
from record import markdown_table, save

from lvlmrec.media.sampling import sample_clip, sample_indices

WIDTH, HEIGHT, FPS, SECONDS = 1280, 720, 30, 60
NUM_FRAMES = 16
WITHOUT_FRAMES = "pictures"  # the method whose frames are not compared
T = TypeVar("T")
Method = Callable[[str], np.ndarray]  # path -> uint8 [16, H, W, 3]


@dataclass(frozen=True)
class ClipKind:
    """One generated clip."""

    name: str
    codec: str
    num_keyframes: int
    options: dict[str, str]


CLIPS = (
    ClipKind("h264, 12 key frames", "libx264", 12, {"sc_threshold": "0"}),
    ClipKind("h264, 36 key frames", "libx264", 36, {"sc_threshold": "0"}),
    ClipKind("hevc, 12 key frames", "libx265", 12, {"preset": "ultrafast", "x265-params": "scenecut=0:log-level=0"}),
    ClipKind("av1, 12 key frames", "libsvtav1", 12, {"preset": "10"}),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=Path, default=Path(tempfile.gettempdir(), "lvlmrec-decode-clips"))
    parser.add_argument("--content", type=Path, help="a video, whose frames are encoded instead of the scene")
    parser.add_argument("--only", nargs="+", default=[], help="how the names of clips and methods begin that take part")
    parser.add_argument("--save", action="store_true", help="write a dated file under benchmarks/results/")
    arguments = parser.parse_args()
    methods = chosen(available_methods(), arguments.only)
    kinds = chosen({kind.name: kind for kind in CLIPS}, arguments.only)
    paths = {name: write_clip(kind, arguments.clips, arguments.content) for name, kind in kinds.items()}
    results = {name: measure(str(path), methods, arguments.rounds) for name, path in paths.items()}
    body = markdown_table(*rows_of(results, methods)) + f"\n\n{NUM_FRAMES} frames of each clip; CPU in ms, medians of "
    body += f"{arguments.rounds} rounds. Equal: bit-equal to decode all in every round, else the largest difference.\n"
    body += "\n".join(f"- {name}: {path.stat().st_size / 1e6:.1f} MB" for name, path in paths.items())
    print(body, file=sys.stderr)
    if arguments.save:
        print(save("decode", __doc__ or "", body), file=sys.stderr)
    print(json.dumps(summary(results)))
    return 0 if all(result["lvlmrec"]["max_difference"] == 0 for result in results.values()) else 1


def chosen(named: dict[str, T], beginnings: list[str]) -> dict[str, T]:
    """Those of `named` whose name begins with one of the words; all where none does."""
    found = {name: value for name, value in named.items() if name.startswith(tuple(beginnings))}
    return found or named


def available_methods() -> dict[str, Method]:
    methods: dict[str, Method] = {
        "lvlmrec": with_lvlmrec,
        WITHOUT_FRAMES: with_no_conversion,
        "decode all": with_pyav,
        "transformers": with_transformers,
    }
    try:
        import torch
        import torchcodec.decoders  # noqa: F401

        torch.set_num_threads(1)
        methods["torchcodec"] = lambda path: with_torchcodec(path, "exact")
        methods["torchcodec approximate"] = lambda path: with_torchcodec(path, "approximate")
    except (ImportError, RuntimeError, OSError) as error:  # it raises RuntimeError where it finds no FFmpeg
        print(f"torchcodec is absent ({type(error).__name__}): no comparison with it", file=sys.stderr)
    return methods


def with_lvlmrec(path: str) -> np.ndarray:
    return sample_clip(path, NUM_FRAMES, max_side=WIDTH).frames


def with_no_conversion(path: str) -> np.ndarray:
    """As `with_lvlmrec`, of pictures of one black pixel."""
    blank = np.zeros((1, 1, 3), np.uint8)
    with mock.patch("lvlmrec.media.sampling._render", lambda frame, geometry: blank):
        return with_lvlmrec(path)


def with_pyav(path: str) -> np.ndarray:
    wanted = set(sample_indices(FPS * SECONDS, NUM_FRAMES).tolist())
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = enumerate(container.decode(stream))
        return np.stack([frame.to_ndarray(format="rgb24") for i, frame in frames if i in wanted])


def with_transformers(path: str) -> np.ndarray:
    from lvlmrec.lvlms.files import torchvision_shim

    torchvision_shim.ensure_importable()
    from transformers.video_utils import load_video

    frames: np.ndarray = load_video(cast(Any, path), num_frames=NUM_FRAMES, backend="pyav")[0]
    return frames


def with_torchcodec(path: str, seek_mode: Any) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode)
    return decoder.get_frames_at(sample_indices(len(decoder), NUM_FRAMES).tolist()).data.numpy()


def measure(path: str, methods: dict[str, Method], rounds: int) -> dict[str, dict[str, float]]:
    """Per method `cpu_ms`, the median, and `max_difference` of any pixel of any round from decoding everything."""
    expected = with_pyav(path)
    milliseconds: dict[str, list[float]] = {name: [] for name in methods}
    difference = dict.fromkeys(methods, 0)
    for round_ in range(rounds + 1):
        for name, method in methods.items():
            before = cpu_seconds()
            frames = method(path)
            spent = cpu_seconds() - before
            if round_ > 0:
                milliseconds[name].append(spent * 1000)
            if name != WITHOUT_FRAMES:
                difference[name] = max(difference[name], largest_difference(frames, expected))
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    return {name: {"cpu_ms": round(medians[name], 1), "max_difference": difference[name]} for name in methods}


def cpu_seconds() -> float:
    """User + system time of this process, all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    return 0 if np.array_equal(a, b) else int(np.abs(a.astype(np.int16) - b).max())


def summary(results: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    h264 = [result for name, result in results.items() if name.startswith("h264")]

    def worst(other: str, method: str = "lvlmrec") -> float | None:
        return max(ratio(result, other, method) for result in h264) if {other, method} <= h264[0].keys() else None

    return {
        "cpu_vs_decode_all": worst("decode all"),
        "cpu_vs_transformers": worst("transformers"),
        "cpu_vs_torchcodec": worst("torchcodec"),
        "pictures_vs_torchcodec": worst("torchcodec", WITHOUT_FRAMES),
        "bit_equal": all(result["lvlmrec"]["max_difference"] == 0 for result in results.values()),
        "clips": results,
    }


def ratio(result: dict[str, dict[str, float]], other: str, method: str = "lvlmrec") -> float:
    return round(result[method]["cpu_ms"] / result[other]["cpu_ms"], 3)


def rows_of(
    results: dict[str, dict[str, dict[str, float]]], methods: dict[str, Method]
) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = []
    for clip, result in results.items():
        for name in methods:
            difference = result[name]["max_difference"]
            equal = "" if name == WITHOUT_FRAMES else "yes" if difference == 0 else f"no, {difference}"
            rows.append([clip, name, result[name]["cpu_ms"], f"{ratio(result, name):.2f}", equal])
    return ["clip", "method", "CPU ms", "lvlmrec takes", "equal"], rows


def write_clip(kind: ClipKind, folder: Path, content: Path | None) -> Path:
    """The clip in `folder`; made unless it is there."""
    stem = f"{content.stem}-{kind.name}" if content else kind.name
    path = folder / f"{stem.replace(', ', '-').replace(' ', '-')}.mp4"
    if path.exists():
        return path
    print(f"making {path.name}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    working = path.with_suffix(".tmp.mp4")
    with av.open(str(working), "w") as container:
        stream = cast(VideoStream, container.add_stream(kind.codec, rate=FPS, options=kind.options))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = FPS * SECONDS // kind.num_keyframes
        for picture in islice(repeated(content) if content else scene(), FPS * SECONDS):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return working.rename(path)


def repeated(content: Path) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] each: the frames of a video again and again, as many of them as there are."""
    while True:
        with av.open(str(content)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24", width=WIDTH, height=HEIGHT, interpolation="BICUBIC")


def scene() -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] each: texture at many scales, panned, with squares that move through and light grain."""
    rng = np.random.default_rng(0)
    height, width = HEIGHT + 256, WIDTH + 1024
    texture = np.zeros((height, width, 3))
    for cell in (128, 64, 32, 16, 8, 4):
        coarse = rng.normal(size=(height // cell + 1, width // cell + 1, 3)) * cell**0.5
        texture += np.kron(coarse, np.ones((cell, cell, 1)))[:height, :width]
    texture = np.clip(128 + texture * (45 / texture.std()), 8, 247).astype(np.int16)
    grain = rng.integers(-3, 4, size=(8, HEIGHT, WIDTH, 1), dtype=np.int16)
    for index in range(FPS * SECONDS):
        x = round(512 + 500 * np.sin(index / 90))
        y = round(128 + 120 * np.cos(index / 70))
        picture = texture[y : y + HEIGHT, x : x + WIDTH] + grain[index % 8]
        for k in range(4):
            left, top = (index * (3 + k) + 300 * k) % (WIDTH - 96), (index * (1 + k) + 150 * k) % (HEIGHT - 96)
            picture[top : top + 96, left : left + 96] = (60 * k, 255 - 50 * k, (index + 64 * k) % 256)
        yield picture.astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
