"""Does the extraction keep its accelerator fed, and does its memory stay flat as the catalogue grows?

    RAY_AUTH_MODE=disabled python benchmarks/pipeline.py [--part busy|memory|both] [--save]

Everything is the extract job's own pipeline, from manifest to commit; only the model is a stand-in: `extract` sleeps a
fixed time per batch, as waiting for a GPU is to the CPU, and returns zeros.

busy    336x336 clips of 2 s, 16 frames (5.4 MB each through the object store), 0.4 s per batch of 4: the 9 to 10
        videos/s that a 7B model could reach on a large GPU at half of its peak.
        busy_fraction             sum of the stand-in's seconds / (actors x seconds from its first call to its last)
        decode_videos_per_second  what one decoder manages alone: starved below bare_loop_videos_per_second
        throughput_vs_bare_loop   the same clips, already decoded, in a loop over the same stand-in: the upper bound
        job_busy_fraction         what the job itself reports: its wall time includes starting Ray's workers and actors
memory  32x32 clips of 8 frames, one run of 20,000 items, no sleep. Proportional set size (shared memory counted once)
        of this driver and everything Ray started, every second. rss_mb: the highest until 1,000 items were done, and
        until all were. One run, because two equal runs differ by more than their length does.

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from record import save

from lvlmrec import cluster
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.estimate import EstimateConfig
from lvlmrec.extraction.settings import ExtractConfig, PoolConfig
from lvlmrec.features.recipe import Recipe
from lvlmrec.features.recipe_config import LVLMInfo, RecipeConfig
from lvlmrec.lvlms import LVLMConfig
from lvlmrec.lvlms.protocol import Item, ModelConfig
from lvlmrec.media.sampling import sample_clip

WIDTH, BATCH = 1024, 4
NUM_DISTINCT_CLIPS = 16
T = TypeVar("T")
SECONDS_PER_BATCH, CALLS = "STAND_IN_SECONDS", "STAND_IN_CALLS"  # environment of the workers


class StandIn:
    """A model that takes a fixed time per batch and appends `start end` of each to a file."""

    def __init__(self, info: LVLMInfo, recipe: Recipe, seconds_per_batch: float, calls: Path) -> None:
        self.info, self.recipe, self.batch_size = info, recipe, BATCH
        self.seconds_per_batch, self.calls = seconds_per_batch, calls

    def prepare(self, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def extract(self, prepared: Sequence[Item]) -> dict[str, torch.Tensor | list[str]]:
        for _ in range(0, len(prepared), BATCH):
            started = time.time()
            time.sleep(self.seconds_per_batch)
            with self.calls.open("a") as file:
                file.write(f"{started} {time.time()}\n")
        return {str(name): torch.zeros(len(prepared), WIDTH) for name in self.recipe.feature_names}


class StandInFamily:
    """The entry of `LVLMS` that loads it."""

    name = "stand_in"

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        layers, width = {"llm": 28, "vision": 26}, {"llm": WIDTH, "vision": WIDTH}
        return LVLMInfo(self.name, "stand-in", config.dtype, layers, width)

    def load(self, config: ModelConfig, recipe: Recipe) -> StandIn:
        seconds, calls = float(os.environ[SECONDS_PER_BATCH]), Path(os.environ[CALLS])
        return StandIn(self.inspect(config), recipe, seconds, calls)

    def check_length(self, config: ModelConfig, recipe: Recipe, limit: int) -> None:
        """Nothing: no prompt is read."""

    def write_tiny(self, directory: Path, seed: int) -> None:
        raise NotImplementedError("a stand-in has no files")


def register() -> None:
    """Runs in this process and first thing in each of Ray's workers."""
    from lvlmrec import lvlms  # inside: a worker that unpickles this function must change its own table, not a copy

    lvlms.LVLMS["stand_in"] = StandInFamily()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["busy", "memory", "both"], default="both")
    parser.add_argument("--busy-items", type=int, default=400)
    parser.add_argument("--seconds-per-batch", type=float, default=0.4)
    parser.add_argument("--memory-items", type=int, nargs=2, default=[1_000, 20_000])
    parser.add_argument("--save", action="store_true", help="write a dated file under benchmarks/results/")
    arguments = parser.parse_args()
    register()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    if arguments.part != "memory":
        result |= busy(arguments.busy_items, arguments.seconds_per_batch)
    if arguments.part != "busy":
        result |= memory(*arguments.memory_items)
    if arguments.save:
        print(save("pipeline", __doc__ or "", f"```json\n{json.dumps(result, indent=1)}\n```"), file=sys.stderr)
    print(json.dumps(result))
    return 0


def busy(num_items: int, seconds_per_batch: float) -> dict[str, Any]:
    """How much of its time one stand-in works, once it has begun."""
    with workspace() as folder:
        config = make_input(folder, num_items, side=336, num_clip_frames=60, frames=16)
        plan, job, samples, _ = extract(config, folder, seconds_per_batch)
        calls = np.loadtxt(folder / "calls").reshape(-1, 2)
        wall = calls[:, 1].max() - calls[0, 0]
        gaps = np.maximum(calls[1:, 0] - calls[:-1, 1], 0)
        capacity, loop = bare_loops(plan.recipe, folder, seconds_per_batch)
    return {
        "busy_fraction": round(float((calls[:, 1] - calls[:, 0]).sum() / wall), 4),
        "throughput_vs_bare_loop": round(num_items / wall / loop, 4),
        "videos_per_second": round(num_items / wall, 2),
        "bare_loop_videos_per_second": round(loop, 2),
        "decode_videos_per_second": round(capacity, 2),
        "seconds_per_batch": seconds_per_batch,
        "gap_ms": {"median": round(1000 * float(np.median(gaps)), 1), "largest": round(1000 * float(gaps.max()), 1)},
        "job_busy_fraction": job["busy_fraction"],
        "job_seconds": job["seconds"],
        "seconds_before_first_batch": round(float(calls[0, 0]) - job["began"], 1),
        "seconds_after_last_batch": round(job["ended"] - float(calls[:, 1].max()), 1),
        "peak_mb": {part: round(max(sample[part] for _, sample in samples)) for part in sorted(samples[-1][1])},
        "busy_items": num_items,
    }


def bare_loops(recipe: Recipe, folder: Path, seconds_per_batch: float) -> tuple[float, float]:
    """Videos per second of one decoder alone, and of the stand-in alone over clips decoded before."""
    paths = sorted((folder / "clips").iterdir())
    started = time.perf_counter()
    clips = [sample_clip(path, recipe.reading.frames, recipe.reading.frame_max_side) for path in paths]
    decoding = time.perf_counter() - started
    stand_in = StandIn(StandInFamily().inspect(LVLMConfig()), recipe, seconds_per_batch, folder / "bare_calls")
    started = time.perf_counter()
    items = [Item(str(k), clip) for k, clip in enumerate(clips)]
    for k in range(0, len(items), BATCH):
        stand_in.extract(items[k : k + BATCH])
    return len(clips) / decoding, len(clips) / (time.perf_counter() - started)


def memory(early: int, num_items: int) -> dict[str, Any]:
    """Memory of one run, in MB, until `early` items were done and until all were."""
    with workspace() as folder:
        config = make_input(folder, num_items, side=32, num_clip_frames=8, frames=8)
        _, job, samples, done = extract(config, folder, seconds_per_batch=0.0)
    early_time = next(when for when, count in done if count >= early)
    totals = [(when, sum(parts.values())) for when, parts in samples]
    highest = max(samples, key=lambda sample: sum(sample[1].values()))[1]
    tenth = (samples[-1][0] - early_time) / 10
    by_tenth = [
        statistics.median(mb for when, mb in totals if early_time + k * tenth <= when <= early_time + (k + 1) * tenth)
        for k in range(10)
    ]
    return {
        "rss_mb": {
            str(early): round(max(mb for when, mb in totals if when <= early_time)),
            str(num_items): round(max(mb for _, mb in totals)),
        },
        "memory": {
            "peak_by_part": {name: round(mb) for name, mb in sorted(highest.items())},
            "median_of_each_tenth_after_the_first": [round(mb) for mb in by_tenth],
            "seconds": job["seconds"],
            "written": job["written"],
        },
    }


def make_input(folder: Path, num_items: int, side: int, num_clip_frames: int, frames: int) -> ExtractConfig:
    """A manifest of `num_items` over a few clips made here, and the configuration that extracts it."""
    clips = [write_clip(folder / "clips" / f"{k:02}.mp4", side, num_clip_frames, k) for k in range(NUM_DISTINCT_CLIPS)]
    rows = {
        "item_id": [f"item{i:07}" for i in range(num_items)],
        "uri": [str(clips[i % len(clips)]) for i in range(num_items)],
    }
    pq.write_table(pa.table(rows), folder / "manifest.parquet")
    return ExtractConfig(
        workspace=str(folder),
        input=str(folder / "manifest.parquet"),
        store=str(folder / "features"),
        lvlm=LVLMConfig(name="stand_in", model="", batch_size=BATCH),
        recipe=RecipeConfig(frames=frames, taps=["llm.14", "llm.-1"]),
        pool=PoolConfig(decode_tasks=2),
        estimate=EstimateConfig(videos=0),
    )


def write_clip(path: Path, side: int, num_frames: int, seed: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    scene = np.kron(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for k in range(num_frames):
            picture = np.ascontiguousarray(scene[k % side : k % side + side, :side])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def extract(
    config: ExtractConfig, folder: Path, seconds_per_batch: float
) -> tuple[pipeline.Plan, dict[str, Any], list[tuple[float, Counter[str]]], list[tuple[float, int]]]:
    """The job's own pipeline on a Ray of its own.

    Returns the plan, the job's result, the memory while it ran, and when how many items were done.
    """
    environment = {SECONDS_PER_BATCH: str(seconds_per_batch), CALLS: str(folder / "calls")}
    runtime = {"worker_process_setup_hook": register, "env_vars": environment}
    cluster.set_limits()
    ray.init(_temp_dir=str(folder / "ray"), include_dashboard=False, runtime_env=runtime, log_to_driver=False)
    done: list[tuple[float, int]] = []
    try:
        began = time.time()
        plan = pipeline.plan(config)
        with sampled(memory_by_part) as samples:
            job = pipeline.run(plan, lambda metrics, step: done.append((time.time(), step)))
            ended = time.time()
    finally:
        ray.shutdown()
    assert job["written"] == len(plan.manifest), job
    return plan, job | {"began": began, "ended": ended}, samples, done


@contextmanager
def sampled(measure: Callable[[], T]) -> Iterator[list[tuple[float, T]]]:
    """Fills the list with times and what was measured, every second, until the block ends."""
    samples: list[tuple[float, T]] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(1.0):
            samples.append((time.time(), measure()))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


def memory_by_part() -> Counter[str]:
    """MB of proportional set size of this process and its descendants."""
    this = psutil.Process()
    parts: Counter[str] = Counter()
    for process in [this, *this.children(recursive=True)]:
        try:
            megabytes = process.memory_full_info().pss / 2**20
            command = " ".join(process.cmdline())
        except psutil.Error:  # ended meanwhile
            continue
        parts["driver" if process == this else part_of(command)] += megabytes
    return parts


def part_of(command: str) -> str:
    if "raylet/raylet" in command:  # first: its arguments name the worker's program too
        return "raylet and object store"
    if "ray::" in command or "default_worker" in command:
        return "workers"
    return "decoders" if "extraction.isolation" in command else "rest of Ray"


@contextmanager
def workspace() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="bp-"))  # short: Ray's sockets live below it
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
