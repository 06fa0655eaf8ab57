"""Claim: no bytes crash, hang or bloat the sampler, and its short cuts give what decoding everything gives.

    python benchmarks/fuzz_decoder.py --checkpoint FILE [--cases 20000] [--seconds 500] [--seed 0] [--save]

A case is a small video, real (LVLMREC_DATA, up to 60 kB) or generated, changed at random: bits, blocks, header fields,
length. A child process samples it as the extraction does and, where groups of pictures were skipped, by decoding
everything; both are compared. Every case follows from the seed and its number alone. A run of `--seconds` ends with
what it has in FILE, and the same command goes on there. The last line of stdout is JSON; the exit status is 1 where
an outcome is a bug.

outcomes
    equal      the short cut gave the frames and times of decoding everything
    whole      no short cut was taken; decoding everything gave a clip
    more       the short cut gave a clip where decoding everything fails: it does not decode the broken part
    counted    the short cut counted more frames: decoders drop some damaged HEVC pictures without a word
    concealed  other pixels: the decoder concealed damage without a word, from pictures that the short cut leaves out
    times      other times: the container's and the decoder's notion of a damaged duration
    differs    the short cut counted fewer frames: a bug
    exception  something else than `VideoError` was raised: a bug
    decoder_died, timeout, stage/error   the item would be rejected for it
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
from av.video.stream import VideoStream

from lvlmrec.media import isolation, sampling
from lvlmrec.media.isolation import IsolatedDecoder
from lvlmrec.media.sampling import Clip, VideoError, sample_clip

NUM_FRAMES, MAX_SIDE = 4, 64
MAX_BYTES = 60_000
TIMEOUT_S = 20.0
MEMORY_MB = 2048
CASES_PER_CHILD = 1000
BUGS = ("differs", "exception")
NOTED = (*BUGS, "concealed", "times", "decoder_died", "timeout")  # with the cases' numbers
GENERATED = {  # name: codec, options
    "h264.mp4": ("libx264", {"bf": "3"}),
    "h264_open.mkv": ("libx264", {"x264-params": "open-gop=1:bframes=3"}),
    "h264_refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:bframes=3"}),
    "hevc_open.mkv": ("libx265", {"x265-params": "log-level=none:open-gop=1:bframes=3"}),
    "av1.mp4": ("libsvtav1", {"preset": "12"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime"}),
    "mpeg4.avi": ("mpeg4", {}),
}
Rng = np.random.Generator


def clips(path: Path) -> tuple[Clip | None, Clip | VideoError]:
    """The clip by the sampler's short cut, None where it takes none; and by decoding everything."""
    with mock.patch.object(sampling, "_sample_all", lambda *arguments: None):
        short = sample_clip(path, NUM_FRAMES, MAX_SIDE)
    with mock.patch.object(sampling, "_sample_by_gop", lambda *arguments: None):
        try:
            return short, sample_clip(path, NUM_FRAMES, MAX_SIDE)
        except VideoError as error:
            return short, error


def outcome(path: Path) -> str:
    """What comes of the file at `path`: one of the outcomes above, or `stage/error`."""
    try:
        short, whole = clips(path)
    except VideoError as error:
        return f"{error.stage}/{error.error}"
    if isinstance(whole, VideoError):
        return "more" if short is not None else f"{whole.stage}/{whole.error}"
    if short is None:
        return "whole"
    if short.num_source_frames != whole.num_source_frames:
        return "counted" if short.num_source_frames > whole.num_source_frames else "differs"
    if not np.array_equal(short.frames, whole.frames):
        return "concealed"
    is_same = np.array_equal(short.timestamps, whole.timestamps) and short.duration == whole.duration
    return "equal" if is_same else "times"


class FuzzedDecoder(IsolatedDecoder):
    """The extraction's decoding process, which answers with outcomes."""

    program = Path(__file__).stem

    def outcome(self, path: Path) -> tuple[str, str]:
        """The outcome of one file, and a line about it."""
        try:
            request = {"path": os.fspath(path), "num_frames": NUM_FRAMES, "max_side": MAX_SIDE}
            return self._request(request, lambda answer, deadline: answer["outcome"], TIMEOUT_S), ""
        except VideoError as error:
            is_python = error.error == "decoder_died" and "exit status 1" in error.message
            return "exception" if is_python else error.error, error.message

    def peak_mb(self) -> int:
        """Peak resident memory of the child."""
        status = Path(f"/proc/{self.pid}/status").read_text() if self.pid else ""
        return int(status.partition("VmHWM:")[2].split()[0]) >> 10 if "VmHWM:" in status else 0


def write_generated(folder: Path) -> list[Path]:
    """Small videos of the codecs that have short cuts, and of some that have none."""
    for name, (codec, options) in GENERATED.items():
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=30, options=options)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.codec_context.gop_size = 8
            stream.codec_context.thread_count = 1
            scene = np.random.default_rng(0).integers(0, 256, (64, 160, 3), np.uint8).repeat(4, 0).repeat(4, 1)
            for index in range(40):
                shown = np.ascontiguousarray(scene[index : index + 64, index * 3 : index * 3 + 96])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
            container.mux(stream.encode())
    return [folder / name for name in GENERATED]


def real_videos() -> list[Path]:
    """The small ones of the real clips, none where they are not."""
    here = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("LVLMREC_DATA", here.parent / "shared" / "data")) / "videos"
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if file.suffix != ".csv" and file.stat().st_size <= MAX_BYTES]


def flip(data: bytearray, rng: Rng) -> None:
    for at in _places(data, rng, int(rng.integers(1, 33))):
        data[at] ^= 1 << int(rng.integers(8))


def overwrite(data: bytearray, rng: Rng) -> None:
    for at in _places(data, rng, int(rng.integers(1, 5))):
        width = int(rng.choice([1, 2, 4, 8]))
        value = int(rng.choice([0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1])) % 2 ** (8 * width)
        data[at : at + width] = value.to_bytes(width, str(rng.choice(["big", "little"])))


def delete(data: bytearray, rng: Rng) -> None:
    start, stop = _block(data, rng)
    del data[start:stop]


def duplicate(data: bytearray, rng: Rng) -> None:
    start, stop = _block(data, rng)
    data[stop:stop] = data[start:stop] * int(rng.integers(1, 4))


def move(data: bytearray, rng: Rng) -> None:
    start, stop = _block(data, rng)
    block = data[start:stop]
    del data[start:stop]
    at = int(rng.integers(len(data) + 1))
    data[at:at] = block


def scramble(data: bytearray, rng: Rng) -> None:
    start, stop = _block(data, rng)
    data[start:stop] = rng.bytes(stop - start)


def truncate(data: bytearray, rng: Rng) -> None:
    del data[int(rng.integers(len(data))) :]


CHANGES: tuple[Callable[[bytearray, Rng], None], ...] = (flip, overwrite, delete, duplicate, move, scramble, truncate)


def mutated(files: list[Path], num_generated: int, seed: int, case: int) -> tuple[str, bytes]:
    """The bytes of a case, and what was done to which file. Half of the cases change a generated video."""
    rng = np.random.default_rng([seed, case])
    generated, real = files[:num_generated], files[num_generated:]
    pool = real if real and rng.random() < 0.5 else generated
    file = pool[int(rng.integers(len(pool)))]
    data = bytearray(file.read_bytes())
    chosen = [CHANGES[int(rng.integers(len(CHANGES)))] for _ in range(1 + int(rng.random() < 0.25))]
    for change in chosen:
        if data:
            change(data, rng)
    return f"{file.name}: {', '.join(change.__name__ for change in chosen)}", bytes(data[: 4 * MAX_BYTES])


def _places(data: bytearray, rng: Rng, count: int) -> list[int]:
    """Positions; in half of the cases among the headers, which in an MP4 may lie at the end."""
    header = data.find(b"moov") if rng.random() < 0.5 else None
    low = 0 if header is None else max(header, 0)
    high = len(data) if header is None else min(low + 2048, len(data))
    return [int(at) for at in rng.integers(low, high, count)]


def _block(data: bytearray, rng: Rng) -> tuple[int, int]:
    length = min(len(data), int(2 ** rng.uniform(0, 12)))
    start = int(rng.integers(len(data) - length + 1))
    return start, start + length


def fuzz(state: dict[str, Any], num_cases: int, seconds: float, save_state: Callable[[], None]) -> None:
    """Runs cases from `state["case"]` on and counts in `state`, until `num_cases` or for `seconds`."""
    started, before = time.monotonic(), state["seconds"]
    with tempfile.TemporaryDirectory() as scratch, closing(FuzzedDecoder(MEMORY_MB)) as decoder:
        generated = write_generated(Path(scratch))
        files, target = [*generated, *real_videos()], Path(scratch, "case.bin")
        while state["case"] < num_cases and time.monotonic() - started < seconds:
            case = state["case"]
            what, data = mutated(files, len(generated), state["seed"], case)
            target.write_bytes(data)
            result, line = decoder.outcome(target)
            state["outcomes"][result] = state["outcomes"].get(result, 0) + 1
            if result in NOTED:
                state["noted"].append([case, result, what, line])
            state["peak_mb"] = max(state["peak_mb"], decoder.peak_mb())
            state["case"] = case + 1
            if (case + 1) % CASES_PER_CHILD == 0:
                decoder.close()
            if (case + 1) % 100 == 0:
                state["seconds"] = before + time.monotonic() - started
                save_state()
    state["seconds"] = before + time.monotonic() - started
    save_state()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    state = {"seed": arguments.seed, "case": 0, "seconds": 0.0, "peak_mb": 0, "outcomes": {}, "noted": []}
    if arguments.checkpoint.exists():
        state = json.loads(arguments.checkpoint.read_text())
    fuzz(state, arguments.cases, arguments.seconds, lambda: _replace(arguments.checkpoint, json.dumps(state)))
    if arguments.save:
        _save(state)
    print(json.dumps(state))
    return 1 if set(BUGS) & set(state["outcomes"]) else 0


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


def _save(state: dict[str, Any]) -> None:
    from record import markdown_table, save

    counts = Counter(state["outcomes"]).most_common()
    noted = [[case, result, what, line[:160].replace("|", "/")] for case, result, what, line in state["noted"]]
    text = [
        f"{state['case']} cases, seed {state['seed']}, {state['seconds']:.0f} s of one process at nice "
        f"{os.nice(0)}; the child peaked at {state['peak_mb']} MB resident (address space limit {MEMORY_MB} MB; "
        f"time limit {TIMEOUT_S:g} s a case).",
        markdown_table(["outcome", "cases"], counts),
        "Cases of note:",
        markdown_table(["case", "outcome", "what was changed", "message"], noted),
    ]
    print(save("fuzz_decoder", __doc__ or "", "\n\n".join(text)))


def child(arguments: list[str]) -> None:
    """The decoding process, answering each request with its outcome."""
    isolation._read_clip = lambda request: ({"outcome": outcome(Path(request["path"]))}, [])
    isolation.main(arguments)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdigit():
        child(sys.argv[1:])
    else:
        sys.exit(main())
