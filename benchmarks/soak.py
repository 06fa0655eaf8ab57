"""Claim: an extraction that runs for an hour needs no more memory at its end than when it was warm.

    RAY_AUTH_MODE=disabled python benchmarks/soak.py FOLDER [--minutes 60] [--items 200000] [--save]

`python rayjobs/extract.py`, as a user starts it, with the tiny untrained model of the sample and one actor, over a
catalogue that it cannot finish; after `--minutes` it is ended by SIGTERM. The catalogue is 16 clips made here, of
several sizes and lengths, named again and again under other item ids; one in 16 is half a file and is rejected.

Every 10 s, into FOLDER/samples.csv: of the job's process and of all its descendants the resident memory, the part of it
that is shared (mostly pages of Ray's object store, which are counted again in every process that maps them) and what
the process calls itself; of the object store Ray's own figure, as `ray memory --stats-only` gives it; the items done;
the machine's load. What is drawn and fitted is resident memory without its shared part, summed over the processes of a
role, and the object store. Slopes are of a least-squares line after `--warm-up` minutes, with its standard error, which
takes the samples as independent. `--minutes 0` reports again what FOLDER holds. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from jobs import ROOT
from matplotlib.figure import Figure
from pipeline import write_clip
from record import markdown_table, save

PERIOD_S = 10.0
SIDES, NUM_FRAMES = (64, 128, 240, 336), (24, 48, 90, 150)
STORE = "object store (Ray's figure)"
COLUMNS = ("seconds", "pid", "parent", "title", "resident_mb", "shared_mb", "items", "load")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what the run writes lies here and stays")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, default=10.0, help="minutes that the slopes leave out")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument(
        "--save", action="store_true", help="write a dated file and a picture under benchmarks/results/"
    )
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.minutes:
        write_catalogue(folder, arguments.items)
        run(folder, arguments.minutes * 60)
    samples = by_role(pd.read_csv(folder / "samples.csv"))
    result = summary(samples, arguments.warm_up * 60)
    figure = draw(samples, arguments.warm_up)
    figure.savefig(folder / "soak.png", dpi=80)
    if arguments.save:
        path = save("soak", __doc__ or "", text(result))
        figure.savefig(path.with_suffix(".png"), dpi=80)
        path.write_text(f"{path.read_text()}\n![memory over time]({path.stem}.png)\n")
        print(path, file=sys.stderr)
    print(json.dumps(result))
    return 0


def write_catalogue(folder: Path, num_items: int) -> None:
    """16 clips, one of them cut in half, and a manifest that names them `num_items` times."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [(side, length) for side in SIDES for length in NUM_FRAMES]
    clips = [write_clip(folder / "clips" / f"{k:02}.mp4", *size, k) for k, size in enumerate(sizes)]
    clips[5].write_bytes(clips[5].read_bytes()[: clips[5].stat().st_size // 2])
    rows = {
        "item_id": [f"item{i:07}" for i in range(num_items)],
        "uri": [str(clips[i % len(clips)]) for i in range(num_items)],
    }
    pq.write_table(pa.table(rows), folder / "items.parquet")


def run(folder: Path, seconds: float) -> None:
    """The job for so many seconds, sampled into samples.csv; it must not end before."""
    command = [sys.executable, str(ROOT / "rayjobs" / "extract.py"), f"workspace={folder / 'workspace'}"]
    environment = os.environ | {"RAY_ADDRESS": "local"}  # never somebody else's Ray
    started = time.monotonic()
    with (folder / "job.err").open("w") as errors, (folder / "samples.csv").open("w") as table:
        job = subprocess.Popen([*command, f"input={folder / 'items.parquet'}"], stderr=errors, env=environment)
        rows = csv.writer(table)
        rows.writerow(COLUMNS)
        try:
            while (elapsed := time.monotonic() - started) < seconds:
                assert job.poll() is None, (folder / "job.err").read_text()[-2000:]
                common = (items_done(folder / "job.err"), round(os.getloadavg()[0], 2))
                rows.writerows((round(elapsed, 1), *sample, *common) for sample in sampled(job.pid))
                table.flush()
                time.sleep(max(0.0, PERIOD_S - (time.monotonic() - started - elapsed)))
        finally:
            job.send_signal(signal.SIGTERM)
            job.wait(timeout=120)


def items_done(errors: Path) -> int:
    told = re.findall(r"extract: (\d+)/", errors.read_text())
    return int(told[-1]) if told else 0


def sampled(pid: int) -> Iterator[tuple[int, int, str, float, float]]:
    """Process id, parent, title, MB resident and MB of it shared, of a process and its descendants; the store last."""
    job, address = psutil.Process(pid), ""
    for process in [job, *job.children(recursive=True)]:
        try:
            command = " ".join(process.cmdline())
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes = dict(re.findall(r"(VmRSS|RssShmem):\s+(\d+) kB", status))
            resident, shared = (int(kilobytes[name]) / 1024 for name in ("VmRSS", "RssShmem"))
            parent = process.ppid()
        except (psutil.Error, OSError, KeyError):  # it ended meanwhile
            continue
        if "raylet/raylet" in command:
            address = re.findall(r"--gcs-address=(\S+)", command)[0]
        title = "driver" if process == job else title_of(command)
        yield process.pid, parent, title, round(resident, 2), round(shared, 2)
    try:
        if address:
            yield 0, 0, STORE, round(store_stats(address).object_store_bytes_used / 2**20, 2), 0.0
    except (AssertionError, OSError, RuntimeError):  # Ray is starting: it knows of no raylet yet
        pass


def title_of(command: str) -> str:
    """What a process of Ray's is, from its command line."""
    if "raylet/raylet" in command:  # first: its arguments name the worker's program too
        return "raylet"
    if "gcs_server" in command:
        return "gcs_server"
    if "extraction.isolation" in command:
        return "decoder"
    return command.strip() if command.startswith("ray::") else "rest of Ray"


def store_stats(address: str) -> Any:
    """Ray's figures of the object store, asked as its `ray memory --stats-only` does."""
    from ray._private.internal_api import get_memory_info_reply

    return get_memory_info_reply(ray_state(address)).store_stats


@functools.cache
def ray_state(address: str) -> Any:
    from ray._private.internal_api import get_state_from_address

    return get_state_from_address(address)


def by_role(samples: pd.DataFrame) -> pd.DataFrame:
    """With a column `role`: a worker is what it was seen doing, and its title is that of its present task."""
    titles = samples.groupby("pid")["title"].agg(lambda seen: " ".join(sorted({*seen})))
    decoding = {*samples.loc[samples["title"] == "decoder", "parent"]}

    def role(pid: int) -> str:
        seen = titles[pid]
        if "ray::" not in seen:
            return str(seen)
        if "MapWorker" in seen:
            return "model actor"
        return "decode and write tasks" if pid in decoding or "write" in seen else "rest of Ray"

    roles = {pid: role(pid) for pid in titles.index}
    return samples.assign(
        role=samples["pid"].map(roles),
        minutes=samples["seconds"] / 60,
        mb=samples["resident_mb"] - samples["shared_mb"],
    )


def totals(samples: pd.DataFrame) -> pd.DataFrame:
    """MB by minute (rows) and role (columns): resident without shared, summed over the processes of the role."""
    return samples.pivot_table(index="minutes", columns="role", values="mb", aggfunc="sum")


def slope(minutes: np.ndarray, mb: np.ndarray) -> tuple[float, float]:
    """MB per hour of the least-squares line, and its standard error."""
    hours = minutes / 60
    rate, level = np.polyfit(hours, mb, 1)
    residual = mb - rate * hours - level
    spread = np.sqrt((residual**2).sum() / (len(mb) - 2) / ((hours - hours.mean()) ** 2).sum())
    return float(rate), float(spread)


def summary(samples: pd.DataFrame, warm_up_s: float) -> dict[str, Any]:
    warm = samples[samples["seconds"] >= warm_up_s]
    table, counts = totals(warm), warm.pivot_table(index="minutes", columns="role", values="pid", aggfunc="nunique")
    roles = {}
    for role in map(str, table.columns):
        known = table[role].dropna()
        rate, error = slope(known.index.to_numpy(), known.to_numpy())
        tenth = max(len(known) // 10, 1)
        roles[role] = {
            "mb_per_hour": round(rate, 1),
            "standard_error": round(error, 1),
            "first_tenth_mb": round(float(known[:tenth].median()), 1),
            "last_tenth_mb": round(float(known[-tenth:].median()), 1),
            "highest_mb": round(float(known.max()), 1),
            "processes": [int(counts[role].min()), int(counts[role].max())],
        }
    return {
        "minutes": round(float(samples["minutes"].max()), 1),
        "items": int(samples["items"].max()),
        "load": {"median": float(samples["load"].median()), "highest": float(samples["load"].max())},
        "roles": roles,
        "processes_that_stayed": stayed(warm),
    }


def stayed(warm: pd.DataFrame) -> list[dict[str, Any]]:
    """The slope of each process that was there from the warm-up to the end, the store aside."""
    times = warm["seconds"].nunique()
    rows = []
    for pid, seen in warm[warm["pid"] > 0].groupby("pid"):
        if len(seen) >= 0.98 * times:
            rate, error = slope(seen["minutes"].to_numpy(), seen["mb"].to_numpy())
            role = seen["role"].iloc[0]
            rows.append({"role": role, "pid": pid, "mb_per_hour": round(rate, 2), "standard_error": round(error, 2)})
    return sorted(rows, key=lambda row: -row["mb_per_hour"])


def text(result: dict[str, Any]) -> str:
    """What `summary` gives, as Markdown."""
    header = ["role", "MB per hour", "standard error", "first tenth", "last tenth", "highest", "processes"]
    rows = [[role, *found.values()] for role, found in result["roles"].items()]
    single = [[*row.values()] for row in result["processes_that_stayed"]]
    about = f"{result['minutes']} minutes, {result['items']} items; load {json.dumps(result['load'])}"
    parts = [about, markdown_table(header, rows), "Processes that were there all the time:"]
    return "\n\n".join([*parts, markdown_table(["role", "pid", "MB per hour", "standard error"], single)])


def draw(samples: pd.DataFrame, warm_up: float) -> Figure:
    """A panel for each role: MB over minutes, and the fitted line."""
    table = totals(samples)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True).flatten()
    for axis, role in zip(axes, table, strict=False):
        known = table[role].dropna()
        axis.plot(known.index, known, linewidth=0.8)
        warm = known[known.index >= warm_up]
        if len(warm) > 2:
            rate, level = np.polyfit(warm.index, warm, 1)
            axis.plot(warm.index, rate * warm.index + level, color="black", linewidth=1, linestyle="--")
            axis.set_title(f"{role}: {rate * 60:+.1f} MB/h", fontsize=9)
        axis.set_ylim(0, 1.2 * known.max() + 1)
        axis.set_ylabel("MB", fontsize=8)
    rate = samples.groupby("minutes")["items"].max()
    last = axes[len(table.columns)]
    last.plot(rate.index, rate, linewidth=0.8)
    last.set_title("items done", fontsize=9)
    for axis in axes[-3:]:
        axis.set_xlabel("minutes", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
