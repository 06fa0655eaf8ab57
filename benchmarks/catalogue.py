"""What the driver of an extraction costs on a large catalogue: the plan of a rerun, the anti-join, a commit.

    python benchmarks/catalogue.py [--items 1000000 10000000] [--save]

Titles of a synthetic catalogue, no model runs. 99 % of the items are in a feature set of four segments, 1 % are new.
Each size is measured in a process of its own; parts are named in the index and not there, for nothing reads them.

manifest   the job's plan: settings, the model's files, and the manifest, a Parquet file of item_id and title
index      the segments, and the last row of each item
anti-join  the rows of the manifest that are missing
commit     a segment of those, from the blocks that the write stage returns
result     the counts of the job's last line
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from record import save

from lvlmrec import config
from lvlmrec.columns import ITEM_ID, MADE_WITH, PART, ROW, SOURCE
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.commits import Commits
from lvlmrec.extraction.progress import Tally
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features import index, lease, store
from lvlmrec.lvlms import LVLMS
from lvlmrec.report.comparison import table

SEGMENTS, PART_ITEMS, NEW = 4, 64, 0.01
STEPS = ("manifest", "index", "anti-join", "commit", "result")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make, arguments.items[0])
        return 0
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return 0
    rows = []
    for items in arguments.items:
        with tempfile.TemporaryDirectory() as folder:
            # Both in processes of their own: a child's peak begins at what its parent holds.
            subprocess.run([sys.executable, __file__, "--make", folder, "--items", str(items)], check=True)
            command = [sys.executable, __file__, "--measure", folder]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rerun = found["manifest"] + found["index"] + found["anti-join"]
        seconds = [*(found[step] for step in STEPS), rerun]
        rows.append(
            [f"{items:,}", *(f"{value:.2f}" for value in seconds), f"{found['mb']:,}", f"{found['before_mb']:,}"]
        )
    head = ["items", *(f"{step} s" for step in STEPS), "rerun s", "peak MB", "peak MB before"]
    text = table(head, rows) + "\n\nrerun: manifest + index + anti-join. Before: when libraries were imported."
    print(text)
    if arguments.save:
        print(save("catalogue", __doc__ or "", text))
    return 0


def make(folder: Path, items: int) -> None:
    """A manifest, a tiny model, and a feature set that has all but the last of the items."""
    LVLMS["text_encoder"].write_tiny(folder / "model", seed=0)
    ids = pa.array((f"item{k:09d}" for k in range(items)), pa.string())
    titles = pa.array((f"A title of some words, number {k}" for k in range(items)), pa.string())
    pq.write_table(pa.table({ITEM_ID: ids, "title": titles}), folder / "items.parquet")
    uri = plan(folder).feature_set
    done = items - int(NEW * items)
    bounds = np.linspace(0, done, SEGMENTS + 1).astype(int)
    for generation, (begin, end) in enumerate(itertools.pairwise(bounds.tolist()), 1):
        index.write(uri, rows_of(ids.slice(begin, end - begin), generation), generation)


def rows_of(ids: pa.Array, generation: int) -> pa.Table:
    places = np.arange(len(ids))
    names = [f"part-{generation:06d}-{k:020x}.parquet" for k in range(-(-len(ids) // PART_ITEMS))]
    parts = pa.DictionaryArray.from_arrays(pa.array(places // PART_ITEMS, pa.int32()), pa.array(names))
    sources = pa.array((f"{k:016x}" for k in range(len(ids))), pa.string())
    return index.rows_of(ids, parts.cast(pa.string()), pa.array(places % PART_ITEMS, pa.int64()), sources)


def plan(folder: Path) -> pipeline.Plan:
    overrides = [
        f"workspace={folder}",
        f"input={folder}/items.parquet",
        "lvlm.name=text_encoder",
        f"lvlm.model={folder}/model",
        "recipe.taps=[text.*]",
        "recipe.prompts={title: {input: text, text: '{title}'}}",
        "recipe.poolings=[all_mean]",
    ]
    return pipeline.plan(config.load(ExtractConfig, [], overrides))


def measure(folder: Path) -> dict[str, Any]:
    """Seconds of each step, and this process's peak memory at its start and at its end."""
    spent: dict[str, Any] = {"before_mb": peak_mb()}

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[step] = round(time.perf_counter() - started, 3)

    with timed("manifest"):
        planned = plan(folder)
    with timed("index"):
        there = store.read_index(planned.feature_set)
    with timed("anti-join"):
        todo = pipeline.missing(planned, there)
    assert len(todo) == len(planned.manifest) - len(there)
    rows = rows_of(todo[ITEM_ID].combine_chunks(), SEGMENTS + 1).select([ITEM_ID, PART, ROW, SOURCE])
    rows = rows.set_column(1, PART, rows[PART].cast(pa.string()))
    rows = rows.append_column(MADE_WITH, pa.array(["{}"] * len(rows), pa.string()))
    blocks = [rows.slice(begin, PART_ITEMS) for begin in range(0, len(rows), PART_ITEMS)]
    with lease.hold(planned.feature_set) as held, timed("commit"), Commits(planned.feature_set, held) as commits:
        for block in blocks:
            commits.add(block)
    with timed("result"):
        result = pipeline._result(planned, Tally(0, {}, lambda *_: None), 0.0, there)
    assert result["items"] == len(planned.manifest)
    return spent | {"mb": peak_mb()}


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    sys.exit(main())
