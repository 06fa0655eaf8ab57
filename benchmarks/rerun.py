"""Claim: what is done is not done again, and finding out is quick: a rerun of 100,000 items, a resume at half.

    python benchmarks/rerun.py [--items 100000] [--titles 20000] [--rounds 3] [--save]

rerun   A finished feature set of `--items` items (random vectors, parts of 64, no model in it) and the whole command,
        `python rayjobs/extract.py`, that finds nothing to do, `--rounds` times: median of wall seconds with the start
        of Python, and the largest resident memory of it and its children. It ran once before, so that the tracking
        database is there. Then the same with the index gone, as a run leaves it that was killed at its very end: every
        part is read and adopted.
resume  The titles of `--titles` items through the tiny untrained text encoder on a Ray of its own. A run is killed
        (SIGKILL) when half of them are written, and the same command started again. The other side extracts, into an
        empty store, just the items that were then missing. Both take turns, `--rounds` times; their ratio is the cost
        of resuming.

The last line of stdout is JSON: seconds, MB, and the median ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from jobs import ROOT
from record import fenced, save

from lvlmrec import config, storage
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features import store
from lvlmrec.lvlms import LVLMS

PART = 64
LOOK_S = 0.5  # looking at processes takes time from what is timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--titles", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write a dated file under benchmarks/results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        LVLMS["text_encoder"].write_tiny(folder / "model", seed=0)
        result = {
            "rerun": reruns(folder, arguments.items, arguments.rounds),
            "resume": resumes(folder, arguments.titles, arguments.rounds),
        }
    if arguments.save:
        print(save("rerun", __doc__ or "", fenced(json.dumps(result, indent=1))), file=sys.stderr)
    print(json.dumps(result))


def overrides(folder: Path, name: str) -> list[str]:
    """The keys of a run of its own workspace."""
    return [
        f"workspace={folder / name}",
        f"input={folder / name}/items.csv",
        "lvlm.name=text_encoder",
        f"lvlm.model={folder / 'model'}",
        "lvlm.batch_size=64",
        "recipe.taps=[text.*]",
        "recipe.prompts={title: {input: text, text: '{title}'}}",
        "recipe.poolings=[all_mean]",
        f"pool.videos_per_part={PART}",
        f"pool.videos_per_block={PART}",
        "estimate.videos=0",
    ]


def write_items(folder: Path, name: str, numbers: Any) -> None:
    (folder / name).mkdir(exist_ok=True)
    items = pd.DataFrame({"item_id": [f"item{k}" for k in numbers], "title": [f"title number {k}" for k in numbers]})
    items.to_csv(folder / name / "items.csv", index=False)


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    """The command, in a session of its own."""
    command = [sys.executable, str(ROOT / "rayjobs" / "extract.py"), *overrides(folder, name)]
    with (folder / f"{name}.err").open("w") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], float]:
    """The JSON of its last line, and the largest resident memory in MB of it and its children together."""
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_S)
    assert process.stdout is not None
    assert process.returncode == 0
    return json.loads(process.stdout.read().splitlines()[-1]), round(peak / 1e6)


def resident(pid: int) -> float:
    """Bytes."""
    total = 0.0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:  # it ended meanwhile
        pass
    return total


def reruns(folder: Path, num_items: int, rounds: int) -> dict[str, Any]:
    """Seconds and memory of finding out that nothing is to do, with and without an index."""
    write_items(folder, "finished", range(num_items))
    plan = pipeline.plan(config.load(ExtractConfig, [], overrides(folder, "finished")))
    rng = torch.Generator().manual_seed(0)
    for begin in range(0, num_items, PART):
        items = [f"item{k}" for k in range(begin, min(begin + PART, num_items))]
        vectors = {
            str(column.name): torch.randn(len(items), *column.shape, generator=rng) for column in plan.recipe.columns
        }
        rows = store.feature_table(plan.recipe, items, [0] * len(items), vectors)
        store.write_part(plan.feature_set, plan.recipe, rows, generation=1)
    store.commit(plan.feature_set)
    finish(start(folder, "finished"))
    told: dict[str, Any] = {"items": num_items, "parts": len(storage.list_files(f"{plan.feature_set}/parts"))}
    for case in ("finished", "no_index"):
        seconds, peaks = [], []
        for _ in range(rounds):
            if case == "no_index":
                storage.remove(f"{plan.feature_set}/index")
                storage.remove(f"{plan.feature_set}/writers")
            started = time.perf_counter()
            result, peak = finish(start(folder, "finished"))
            seconds.append(round(time.perf_counter() - started, 1))
            peaks.append(peak)
            assert (result["written"], result["skipped"]) == (0, num_items), result
        told[case] = {"seconds": statistics.median(seconds), "each": seconds, "mb": max(peaks)}
    return told


def resumes(folder: Path, num_titles: int, rounds: int) -> dict[str, Any]:
    """Seconds of resuming and of doing the rest from nothing, in turns."""
    sides: dict[str, list[float]] = {"resume": [], "rest_alone": []}
    done = []
    for round_ in range(rounds):
        name, other = f"killed{round_}", f"rest{round_}"
        write_items(folder, name, range(num_titles))
        process = start(folder, name)
        uri = ""
        while not uri or PART * len(list((Path(uri) / "parts").glob("*.parquet"))) < num_titles / 2:
            uri = next(map(str, (folder / name / "features").glob("*-*")), "")
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(15)  # Ray's processes notice that their driver is gone
        store.commit(uri)
        there = set(store.read_index(uri)["item_id"].to_pylist())
        missing = [k for k in range(num_titles) if f"item{k}" not in there]
        done.append(len(there))
        write_items(folder, other, missing)
        for side in ("resume", "rest_alone") if round_ % 2 == 0 else ("rest_alone", "resume"):
            started = time.perf_counter()
            result, _ = finish(start(folder, name if side == "resume" else other))
            sides[side].append(round(time.perf_counter() - started, 1))
            assert result["written"] == len(missing), result
        index = store.read(uri).index
        assert len(index["item_id"].unique()) == len(index) == num_titles
    ratios = [a / b for a, b in zip(*sides.values(), strict=True)]
    return {
        **sides,
        "done_when_killed": done,
        "ratio": round(statistics.median(ratios), 3),
    }


if __name__ == "__main__":
    main()
