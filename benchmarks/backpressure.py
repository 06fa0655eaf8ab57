"""Claim: memory stays bounded whichever stage is slow, storage, model or decoder, and however many items there are.

    RAY_AUTH_MODE=disabled python benchmarks/backpressure.py [--items 150 600] [--save]

The extract job's own pipeline, from manifest to commit, with the stand-in model of `pipeline.py`. One stage at a time
is made slow in the process that runs it, by a sleep; the others do what they always do, the decoder included:

write    storage takes one part of 16 items a second, whoever writes it: the others wait
forward  every batch of 4 items takes 0.25 s in the model
decode   every video takes 0.08 s longer to decode, one at a time

An item is 8 frames of 224x224 (1.2 MB) before the model and 54 vectors of 1024 float32 (221 KB) behind it, and the
object store is given 100 MB: it holds neither all frames of 150 items nor all features of 600. Each run has
processes of its own. Every second: what Ray says is in use in the object store, and the proportional set size of this
job's driver and of all that Ray started. `ahead` is how many items were through the model and not yet written, at most.

Bounds, which the exit status tells: the store is never above its 100 MB and spills nothing, and with the larger number
of items neither the highest memory of the driver nor that of all processes is more than a tenth higher than with the
smaller. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pipeline as stand_in
import ray
import torch
from record import markdown_table, save
from soak import store_stats

from lvlmrec import cluster
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.settings import ExtractConfig

SLOW = {"write": 1.0, "forward": 0.25, "decode": 0.08}  # seconds of each sleep
STAGE, LOCK = "SLOW_STAGE", "SLOW_LOCK"  # environment of the workers
STORE_MB, PART, GROWTH = 100, 16, 1.1
MEASURED = ("driver_mb", "all_mb", "store_mb", "spilled_mb", "ahead")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs=2, default=[150, 600])
    parser.add_argument("--stages", nargs="+", choices=SLOW, default=[*SLOW])
    parser.add_argument("--one", action="store_true", help="a single run in this process: the first stage and number")
    parser.add_argument("--save", action="store_true", help="write a dated file under benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.stages[0], arguments.items[0])))
        return 0
    runs = [alone(stage, number) for stage in arguments.stages for number in arguments.items]
    broken = [problem for few, many in zip(runs[::2], runs[1::2], strict=True) for problem in problems(few, many)]
    if arguments.save:
        table = markdown_table([*runs[0]], [[*found.values()] for found in runs])
        print(
            save("backpressure", __doc__ or "", f"{table}\n\nBeyond the bounds: {broken or 'nothing'}"), file=sys.stderr
        )
    print(json.dumps({"runs": runs, "beyond_the_bounds": broken}))
    return 1 if broken else 0


def alone(stage: str, num_items: int) -> dict[str, Any]:
    """`run` in a process of its own: no driver inherits the memory of another."""
    command = [sys.executable, __file__, "--one", "--stages", stage, "--items", str(num_items), "0"]
    # Ray's workers import this file's neighbours before they know what the driver's path is
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    print(done.stdout.splitlines()[-1], file=sys.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def problems(few: dict[str, Any], many: dict[str, Any]) -> list[str]:
    """Which bounds two runs with the same slow stage do not keep."""
    found = []
    for one in (few, many):
        if one["store_mb"] > STORE_MB or one["spilled_mb"] > 0:
            found.append(
                f"{one['slow']}, {one['items']} items: store {one['store_mb']} MB, {one['spilled_mb']} spilled"
            )
    for name in ("driver_mb", "all_mb"):
        if many[name] > GROWTH * few[name]:
            found.append(
                f"{few['slow']}: {name} {few[name]} with {few['items']} items, {many[name]} with {many['items']}"
            )
    return found


def run(stage: str, num_items: int) -> dict[str, Any]:
    """One extraction with one slow stage, and the highest of what was seen while it ran."""
    torch.set_num_threads(1)
    stand_in.register()
    with stand_in.workspace() as folder:
        config = make_config(folder, num_items)
        environment = {
            STAGE: stage,
            LOCK: str(folder / "lock"),
            stand_in.SECONDS_PER_BATCH: str(SLOW["forward"] if stage == "forward" else 0.0),
            stand_in.CALLS: str(folder / "calls"),
        }
        runtime = {"worker_process_setup_hook": slow_down, "env_vars": environment}
        cluster.set_limits()
        ray.init(
            "local",
            _temp_dir=str(folder / "ray"),
            include_dashboard=False,
            object_store_memory=STORE_MB << 20,
            runtime_env=runtime,
            log_to_driver=False,
        )
        try:
            plan = pipeline.plan(config)
            address = ray.get_runtime_context().gcs_address
            with stand_in.sampled(lambda: measured(address, folder, plan.feature_set)) as samples:
                job = pipeline.run(plan, lambda metrics, step: None)
        finally:
            ray.shutdown()
    assert job["written"] == num_items, job
    told = {"slow": stage, "items": num_items, "seconds": round(job["seconds"])}
    highest = {name: round(max(sample[name] for _, sample in samples)) for name in MEASURED}
    return told | highest | {"load": round(os.getloadavg()[0], 1)}


def make_config(folder: Path, num_items: int) -> ExtractConfig:
    config = stand_in.make_input(folder, num_items, side=224, num_clip_frames=16, frames=8)
    return dataclasses.replace(
        config,
        recipe=dataclasses.replace(config.recipe, taps=["llm.*", "vision.*"], dtype="float32"),
        pool=dataclasses.replace(config.pool, decode_tasks=1, videos_per_part=PART),
    )


def slow_down() -> None:
    """Runs first thing in each of Ray's workers."""
    from lvlmrec.features import store
    from lvlmrec.media.isolation import IsolatedDecoder

    stand_in.register()
    decode, write = IsolatedDecoder.sample_clip, store.write_part

    def slow_decode(*arguments: Any) -> Any:
        time.sleep(SLOW["decode"])
        return decode(*arguments)

    def slow_write(*arguments: Any) -> str:
        with Path(os.environ[LOCK]).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            time.sleep(SLOW["write"])
            return write(*arguments)

    if os.environ[STAGE] == "decode":
        IsolatedDecoder.sample_clip = slow_decode  # type: ignore[assignment, method-assign]
    if os.environ[STAGE] == "write":
        store.write_part = slow_write  # type: ignore[assignment]


def measured(address: str, folder: Path, feature_set: str) -> dict[str, float]:
    """`MEASURED`, now."""
    parts, stats = stand_in.memory_by_part(), store_stats(address)
    return {
        "driver_mb": parts["driver"],
        "all_mb": sum(parts.values()),
        "store_mb": stats.object_store_bytes_used / 2**20,
        "spilled_mb": stats.spilled_bytes_total / 2**20,
        "ahead": items_ahead(folder / "calls", Path(feature_set) / "parts"),
    }


def items_ahead(calls: Path, parts: Path) -> int:
    """Through the model and not yet written; the last part may be smaller than the others."""
    written = len([*parts.glob("*.parquet")]) * PART
    return len(calls.read_text().splitlines()) * stand_in.BATCH - written if calls.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
