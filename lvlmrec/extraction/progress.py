"""What a running extraction tells: progress on stderr, and at the end where the time went."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lvlmrec.columns import ERROR, ITEM_ID, MESSAGE, STAGE
from lvlmrec.errors import one_line
from lvlmrec.extraction import stages

PROGRESS_SECONDS = 5.0
REJECTED_SHOWN = 5  # items, of the first REJECTED_READ
REJECTED_READ = 1000
REASON_CHARACTERS = 200
LIMITING = 0.5  # share of its workers' time that a stage is busy where it sets the pace
REMEDY = {
    "decode": "more pool.decode_tasks, or nodes with CPUs, would help",
    "prepare": "the processor of the model is the limit: more CPUs beside each actor, or more actors",
    "forward": "the accelerator is the limit: more pool.max_actors, fewer frames, lower taps",
}


class Tally:
    """Counts and seconds of a running extraction, shown every few seconds on stderr and to `log`."""

    def __init__(self, total: int, workers: dict[str, int], log: Callable[[dict[str, float], int], None]) -> None:
        self.total, self.workers, self.log = total, workers, log
        self.written = 0
        self.seconds = dict.fromkeys(stages.SECONDS, 0.0)
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.messages: dict[tuple[str, str], str] = {}
        self.started = self.printed_at = time.perf_counter()

    def add(self, block: pa.Table) -> None:
        """Rows of `stages.WRITTEN`."""
        bad = block.filter(pc.is_valid(block[ERROR])).to_pylist()
        self.written += len(block) - len(bad)
        self.reasons.update((row[STAGE], row[ERROR]) for row in bad)
        self.messages |= {(row[STAGE], row[ERROR]): row[MESSAGE] for row in bad}
        for name in stages.SECONDS:
            self.seconds[name] += pc.sum(block[name]).as_py() or 0.0
        done = self.written + sum(self.reasons.values())
        now = time.perf_counter()
        if now - self.printed_at >= PROGRESS_SECONDS or done == self.total:
            self.printed_at = now
            self._print(done, now - self.started)

    def busy(self, stage: str, seconds: float) -> float:
        """Share of the stage's workers' time, `seconds` of wall time each, that it worked."""
        return self.seconds[f"{stage}_seconds"] / (self.workers[stage] * seconds) if seconds else 0.0

    def report(self, seconds: float) -> dict[str, Any]:
        """Seconds and busy share of each stage, and the one that set the pace."""
        shares = {stage: self.busy(stage, seconds) for stage in self.workers}
        slowest = max(shares, key=lambda stage: shares[stage])
        stages = {name.removesuffix("_seconds"): {"seconds": round(spent, 3)} for name, spent in self.seconds.items()}
        for stage, share in shares.items():
            stages[stage]["busy"] = round(share, 4)
        return {"stages": stages, "slowest_stage": f"{slowest}: {self._advice(slowest, shares[slowest])}"}

    def _advice(self, slowest: str, share: float) -> str:
        busy = f"{share:.0%} busy with {self.workers[slowest]}; "
        if share >= LIMITING:
            return busy + REMEDY[slowest]
        return busy + "no stage was the limit: most of the time went to starting processes, loading the model, storage"

    def _print(self, done: int, seconds: float) -> None:
        rate, busy = done / seconds, self.busy("forward", seconds)
        print(
            f"extract: {done}/{self.total} videos, {done - self.written} rejected, {rate:.2f} videos/s, "
            f"model busy {busy:.0%}, {(self.total - done) / rate:.0f} s left",
            file=sys.stderr,
        )
        metrics = {"videos": done, "rejected": done - self.written, "videos_per_second": rate, "busy_fraction": busy}
        self.log(metrics, done)


def tell_rejected(rejected: pa.Table, folder: str) -> None:
    """On stderr a few rejected items with their reasons, each reason once before any twice, and where all of them are.

    `rejected`: rows of `store.REJECTED_SCHEMA`, which lie in `folder`.
    """
    rows, repeats = rejected.slice(0, REJECTED_READ).to_pylist(), Counter[tuple[str, str]]()
    ranked = []
    for row in rows:
        reason = (row[STAGE], row[ERROR])
        ranked.append((repeats[reason], row))
        repeats[reason] += 1
    for _, row in sorted(ranked, key=lambda each: each[0])[:REJECTED_SHOWN]:
        message = one_line(row[MESSAGE], REASON_CHARACTERS)
        print(f"extract: rejected {row[ITEM_ID]!r}: {row[STAGE]}/{row[ERROR]}: {message}", file=sys.stderr)
    if more := max(0, len(rejected) - REJECTED_SHOWN):
        print(f"extract: {more} more are rejected; all of them, with reasons: {folder}/*.parquet", file=sys.stderr)
    elif rows:
        print(f"extract: rejected items, with reasons: {folder}/*.parquet", file=sys.stderr)
