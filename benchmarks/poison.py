"""Claim: whatever lies in a folder of videos costs one item's time and memory, and ends as a clip or with a reason.

    python benchmarks/poison.py [--timeout 20] [--memory-mb 4096] [--videos DIR] [--save]

Every real clip (LVLMREC_DATA/videos, or --videos), many of them broken, and poison made here: noise, truncations, sizes
that headers only claim, extreme pictures and durations, playlists, what is no file at all. Each is sampled by the
extraction's isolated decoder, 16 frames of up to 448 pixels. Time is wall time of the item, with the start of a new
child where the last item cost the old one its life; memory is the child's peak resident size during the item. The exit
status is 1 where an item is unaccounted for or overstays. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream
from record import markdown_table, save

from lvlmrec.media.isolation import START_SECONDS, IsolatedDecoder
from lvlmrec.media.sampling import VideoError

NUM_FRAMES, MAX_SIDE = 16, 448
CLAIMED = (2**31 - 1).to_bytes(4, "big")
BOXES = (b"ftyp", b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"stts", b"stsz", b"stco", b"avcC", b"mdat")
TABLES = (b"stts", b"stsz", b"stsc", b"stco", b"stss", b"ctts")  # their entry counts follow 8 bytes behind the name
DURATIONS = {b"mvhd": (12, 16), b"mdhd": (12, 16), b"tkhd": (None, 20)}  # time scale and duration, behind the name


@dataclass(frozen=True)
class Item:
    """A file, what kind of poison it is, and what became of it."""

    group: str
    name: str
    outcome: str
    seconds: float
    peak_mb: int


def video(path: Path, size: tuple[int, int], pts: list[int], codec: str = "libx264", faststart: bool = False) -> bytes:
    """A video of noise of `size` pixels, with frames at `pts` in units of 1/600 second."""
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", container_options=options) as container:
        stream = container.add_stream(codec, rate=30, options={"preset": "ultrafast"} if codec == "libx264" else {})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv444p" if size[0] % 2 else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 600)
        stream.codec_context.thread_count = 1
        tile = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        picture = np.tile(tile, (size[1] // 64 + 1, size[0] // 64 + 1, 1))[: size[1], : size[0]]
        for time_ in pts:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = time_, Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def write_poison(root: Path) -> None:
    """Files of `root/<group>/<name>`."""
    rng, second = np.random.default_rng(0), [*range(0, 600, 20)]
    for group in ("noise", "truncated", "claimed sizes", "extreme", "playlists", "no files"):
        (root / group).mkdir()
    good = {
        "moov at the end.mp4": video(root / "a.mp4", (320, 240), second),
        "moov at the start.mp4": video(root / "b.mp4", (320, 240), second, faststart=True),
        "matroska.mkv": video(root / "c.mkv", (320, 240), second),
    }
    for size in (0, 1, 16, 1000, 100_000, 5_000_000):
        (root / "noise" / f"{size}.mp4").write_bytes(rng.bytes(size))
    for name, content in good.items():
        (root / "noise" / f"after the start of {name}").write_bytes(content[:64] + rng.bytes(200_000))
        for tenth in range(1, 10):
            (root / "truncated" / f"{tenth}0 % of {name}").write_bytes(content[: len(content) * tenth // 10])
    _write_claims(root / "claimed sizes", good["moov at the start.mp4"])
    _write_extremes(root / "extreme", good["moov at the start.mp4"])
    for name, text in {
        "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "itself.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nitself.m3u8\n",
        "concat.mp4": "ffconcat version 1.0\nfile /etc/passwd\n",
        "passwd.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    }.items():
        (root / "playlists" / name).write_text(text)
    (root / "no files" / "folder.mp4").mkdir()
    os.mkfifo(root / "no files" / "pipe.mp4")
    (root / "no files" / "endless.mp4").symlink_to("/dev/zero")
    (root / "no files" / "loop.mp4").symlink_to(root / "no files" / "loop.mp4")
    (root / "no files" / "missing.mp4").symlink_to("nowhere")


def _write_claims(folder: Path, good: bytes) -> None:
    for box in BOXES:
        at = good.find(box)
        (folder / f"{box.decode()} of 2 GB.mp4").write_bytes(good[: at - 4] + CLAIMED + good[at:])
    for table in TABLES:
        at = good.find(table)
        at += 12 if table == b"stsz" else 8
        (folder / f"{table.decode()} of 2^31 entries.mp4").write_bytes(good[:at] + CLAIMED + good[at + 4 :])
    with (folder / "sparse 2 GB.mp4").open("wb") as file:
        file.write(good[:32] + CLAIMED + b"mdat")
        file.truncate(2**31)
    (folder / "segment of 2^40 bytes.mkv").write_bytes(
        bytes.fromhex("1a45dfa3a3" + "42" * 35 + "18538067" + "04" + "f" * 14)
    )


def _write_extremes(folder: Path, good: bytes) -> None:
    video(folder / "1x1.mp4", (1, 1), [0, 20, 40])
    video(folder / "8K.mp4", (7680, 4320), [0, 20, 40])
    video(folder / "12000x12000.mkv", (12000, 12000), [0], codec="mjpeg")
    video(folder / "65500x16.mkv", (65500, 16), [0], codec="mjpeg")
    video(folder / "one frame.mp4", (320, 240), [0])
    video(folder / "two frames, 10 h apart.mp4", (320, 240), [0, 600 * 36_000])
    video(folder / "50,000 frames.mp4", (16, 16), [*range(0, 1_000_000, 20)])
    for name, hours in {"0 s claimed.mp4": 0.0, "10 h claimed.mp4": 10.0}.items():
        data = bytearray(good)
        for box, (scale_at, duration_at) in DURATIONS.items():
            at = data.find(box) + 4
            scale = int.from_bytes(data[at + scale_at : at + scale_at + 4], "big") if scale_at else 1000
            data[at + duration_at : at + duration_at + 4] = min(int(hours * 3600 * scale), 2**32 - 1).to_bytes(4, "big")
        (folder / name).write_bytes(data)


@contextmanager
def peak_watched(decoder: IsolatedDecoder, peaks: list[int]) -> Iterator[None]:
    """Puts the highest resident size of the decoder's children, in MB, into `peaks`."""
    done = threading.Event()
    if decoder.pid:
        Path(f"/proc/{decoder.pid}/clear_refs").write_text("5")  # proc(5): resets the peak

    def watch() -> None:
        while not done.wait(0.005):
            try:
                status = Path(f"/proc/{decoder.pid}/status").read_text()
                peaks.append(int(status.partition("VmHWM:")[2].split()[0]) >> 10)
            except (OSError, IndexError):
                continue  # between two children

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def run(files: list[tuple[str, Path]], timeout_s: float, memory_mb: int) -> list[Item]:
    """Samples every file and says what became of it."""
    items = []
    with IsolatedDecoder(memory_mb) as decoder:
        for group, path in files:
            peaks, started = [0], time.monotonic()
            with peak_watched(decoder, peaks):
                try:
                    clip = decoder.sample_clip(path, NUM_FRAMES, MAX_SIDE, timeout_s)
                    outcome = "clip" if clip.num_distinct_frames == NUM_FRAMES else "clip with repeated frames"
                except VideoError as error:
                    outcome = f"{error.stage}/{error.error}"
            items.append(Item(group, path.name, outcome, time.monotonic() - started, max(peaks)))
    return items


def report(items: list[Item]) -> str:
    """Tables in Markdown: outcomes by group, and the items that cost most."""
    grouped = defaultdict(list)
    for item in items:
        grouped[item.group, item.outcome].append(item)
    rows = [
        (*key, len(found), f"{max(i.seconds for i in found):.2f}", max(i.peak_mb for i in found), _names(found))
        for key, found in sorted(grouped.items())
    ]
    cost = ["group", "item", "outcome", "seconds", "peak MB"]
    slow = sorted(items, key=lambda i: -i.seconds)[:8]
    fat = sorted(items, key=lambda i: -i.peak_mb)[:8]
    tables = [markdown_table(["group", "outcome", "items", "worst seconds", "worst peak MB", "such as"], rows)]
    for title, worst in (("Slowest:", slow), ("Most memory:", fat)):
        lines = [(i.group, i.name, i.outcome, f"{i.seconds:.2f}", i.peak_mb) for i in worst]
        tables += [title, markdown_table(cost, lines)]
    return "\n\n".join(tables)


def _names(items: list[Item]) -> str:
    return "; ".join(item.name for item in items[:3]) + ("; ..." if len(items) > 3 else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent.parent
    data = Path(os.environ.get("LVLMREC_DATA", here.parent / "shared" / "data"))
    parser.add_argument("--videos", type=Path, default=data / "videos")
    parser.add_argument("--timeout", type=float, default=20.0)
    parser.add_argument("--memory-mb", type=int, default=4096)
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    real = sorted(p for p in arguments.videos.iterdir() if p.suffix != ".csv") if arguments.videos.is_dir() else []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_poison(root)
        made = [
            (group.name, path) for group in sorted(root.iterdir()) if group.is_dir() for path in sorted(group.iterdir())
        ]
        files = [*(("real clips", path) for path in real), *made]
        items = run(files, arguments.timeout, arguments.memory_mb)
    overstayed = [item for item in items if item.seconds > arguments.timeout + START_SECONDS]
    deaths = [item for item in items if item.outcome.endswith(("decoder_died", "timeout"))]
    summary = {
        "items": len(files),
        "accounted": len(items),
        "clips": sum(item.outcome.startswith("clip") for item in items),
        "deaths_and_timeouts": [f"{item.group}/{item.name}: {item.outcome}" for item in deaths],
        "seconds": round(sum(item.seconds for item in items), 1),
        "peak_mb": max(item.peak_mb for item in items),
    }
    text = f"{report(items)}\n\n{json.dumps(summary)}"
    print(text)
    if arguments.save:
        print(save("poison", __doc__ or "", text))
        print(json.dumps(summary))
    return 1 if overstayed or len(items) != len(files) else 0


if __name__ == "__main__":
    sys.exit(main())
