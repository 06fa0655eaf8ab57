"""The pool's actor of an extraction: one frozen model, and what is done when it, its memory or its device fails."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from lvlmrec import cluster
from lvlmrec.columns import ERROR, ITEM_ID, MADE_WITH, MESSAGE, SOURCE, STAGE, URI
from lvlmrec.extraction import device, stages
from lvlmrec.extraction.failures import (
    DECODED_ON,
    EXTRACTED_ON,
    MAX_DEATHS,
    Attempts,
    DeviceFailed,
    SharedAttempts,
    end_process,
)
from lvlmrec.extraction.stages import DECODE_SECONDS, FORWARD_SECONDS, PREPARE_SECONDS
from lvlmrec.features import provenance, store
from lvlmrec.features.recipe import Recipe
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.files import authors_code
from lvlmrec.lvlms.protocol import Item

LESS_MEMORY = "fewer recipe.frames, a smaller recipe.frame_max_side or video_options, or lvlm.dtype=bfloat16 take less"


class Extractor:
    """A pool's actor: one frozen LVLM, clips in, features out. Called by several threads at once.

    While one batch is in the model's `extract`, the next is prepared and the one after it fetched. The seconds of the
    rows of a batch add up to what it spent in `prepare` and in `extract`, failed attempts included; waiting is not.
    `code` are the files of the repository that `lvlm.code` names. Items with which processes died before, as `attempts`
    knows, enter the model alone, and those with which it happened again and again not at all.

    Where memory runs out, forwards are of half as many items from then on, and the batch is tried again. Where the
    device is lost, the process ends: its items stay begun, and another process tries them again.
    """

    def __init__(
        self,
        lvlm: LVLMConfig,
        recipe: Recipe,
        code: Mapping[str, bytes] | None = None,
        attempts: SharedAttempts | None = None,
    ) -> None:
        self.recipe = recipe
        self.attempts = attempts or Attempts()
        self.place = cluster.place()
        self.worker = f"process {os.getpid()} on {self.place}"
        if code:
            lvlm = dataclasses.replace(lvlm, code=str(authors_code.unpack(code)))
        if lvlm.device == "auto":
            lvlm = dataclasses.replace(lvlm, device=cluster.device())
        self.lvlm = LVLMS[lvlm.name].load(lvlm, recipe.reading)
        self._made_with = {"device": device.name(lvlm.device), "attention": lvlm.attention, "compile": lvlm.compile}
        self._made_with |= provenance.versions()
        self._fitted = 0  # items of the largest forward that went through
        self._preparing, self._extracting, self._deciding = threading.RLock(), threading.RLock(), threading.Lock()

    def __call__(self, rows: pa.Table) -> pa.Table:
        spent = {PREPARE_SECONDS: 0.0, FORWARD_SECONDS: 0.0}
        kept = [ITEM_ID, URI, SOURCE, DECODED_ON, *stages.FAILURE, DECODE_SECONDS]
        failed = rows.filter(pc.is_valid(rows[ERROR])).select(kept)
        decoded = rows.filter(pc.is_null(rows[ERROR]))
        try:
            tables = self._in_parts(decoded, spent)
        except DeviceFailed as error:
            tables = [self._failed(decoded, stages.DEVICE, "device_failed", str(error))]
        table = pa.concat_tables([stages.extracted(self.recipe).empty_table(), *tables], promote_options="default")
        table = pa.concat_tables([stages.filled(table, EXTRACTED_ON, self.worker), failed], promote_options="default")
        for name, seconds in spent.items():
            table = stages.filled(table, name, seconds / max(len(rows), 1))
        return table

    def _in_parts(self, rows: pa.Table, spent: dict[str, float], part: int = 0) -> list[pa.Table]:
        """In parts of `part` rows; 0: of those of `stages.BATCHES_AT_ONCE` forwards, fewer once memory runs out."""
        tables, begin = [], 0
        while begin < len(rows):
            size = part or stages.BATCHES_AT_ONCE * self.lvlm.batch_size
            tables += self._features(rows.slice(begin, size), spent)
            begin += size
        return tables

    def _features(self, rows: pa.Table, spent: dict[str, float]) -> list[pa.Table]:
        """A batch at once; when that fails, or a process died of it, one by one: an item costs no neighbour."""
        item_ids, failure = rows[ITEM_ID].to_pylist(), None
        deaths = self.attempts.deaths(item_ids)
        if deaths and len(rows) > 1:
            return self._in_parts(rows, spent, 1)
        if deaths >= MAX_DEATHS:
            message = f"{deaths} processes died with this item in the model"
            return [self._failed(rows, *stages.DIED, message)]
        with self._nothing_else() if deaths else contextlib.nullcontext():
            self.attempts.begin(item_ids)
            batch_size = self.lvlm.batch_size
            try:
                tables = [self._extract(rows, spent)]
            except Exception as error:
                if device.is_lost(error):
                    self._end(error)
                stage = "cast" if isinstance(error, store.CastError) else "model"
                failure = stage, type(error).__name__, stages.message_of(error)
                ran_out = device.ran_out_of_memory(error)
            self.attempts.end(item_ids, self.place)
        if failure is None:
            self._fitted = max(self._fitted, min(batch_size, len(rows)))
            return tables
        if ran_out and batch_size > 1:
            self._halve(batch_size)
            return self._in_parts(rows, spent)
        if len(rows) > 1:
            return self._in_parts(rows, spent, 1)
        return [self._failed(rows, *(self._too_large(rows, failure[2]) if ran_out else failure))]

    def _end(self, error: Exception) -> NoReturn:
        """End this process, whose device is lost. Raises `DeviceFailed` when the device failed too often."""
        message = f"{type(error).__name__}: {stages.message_of(error)}"
        with self._deciding:  # the other threads see the same; one process is lost
            if self.attempts.lose(self.place):
                raise DeviceFailed(f"{self.place} failed again and again, the last time with {message}")
            print(f"extract: {self.worker} ends, its device is lost: {message}", file=sys.stderr, flush=True)
            end_process()

    def _halve(self, batch_size: int) -> None:
        """Memory did not suffice for forwards of `batch_size` items; another thread may have found out before."""
        device.free_memory()
        with self._deciding:
            if self.lvlm.batch_size < batch_size:
                return
            self.lvlm.batch_size = batch_size // 2
            self.attempts.resize(self.worker, self.lvlm.batch_size, ran_out=True)
        warning = f"{self.worker} ran out of memory with lvlm.batch_size={batch_size}; going on with {batch_size // 2}"
        print(f"extract: {warning}", file=sys.stderr, flush=True)

    def _too_large(self, row: pa.Table, message: str) -> tuple[str, str, str]:
        """Memory did not suffice for one item: no reason to keep forwards smaller than what went through before."""
        device.free_memory()
        with self._deciding:
            if self.lvlm.batch_size < self._fitted:
                self.lvlm.batch_size = self._fitted
                self.attempts.resize(self.worker, self._fitted, ran_out=False)
        (item,) = stages.items(row, self.recipe.reading)
        reason = f"alone in the model: {_sizes(item)}; {LESS_MEMORY}: {message}"
        return "model", "out_of_memory", stages.message_of(reason)

    def _failed(self, rows: pa.Table, stage: str, error: str, message: str) -> pa.Table:
        known = rows.select([ITEM_ID, URI, SOURCE, DECODED_ON, DECODE_SECONDS]).to_pylist()
        failure = {STAGE: stage, ERROR: error, MESSAGE: message}
        return pa.Table.from_pylist([row | failure for row in known], schema=stages.extracted(self.recipe))

    @contextlib.contextmanager
    def _nothing_else(self) -> Iterator[None]:
        """While this process may die, no other item is in its model."""
        with self._preparing, self._extracting:
            yield

    def _extract(self, rows: pa.Table, spent: dict[str, float]) -> pa.Table:
        items, known = stages.items(rows, self.recipe.reading), self._made_with | {"batch_size": self.lvlm.batch_size}
        with self._preparing, _timed(spent, PREPARE_SECONDS):
            prepared = self.lvlm.prepare(items)
        with self._extracting, _timed(spent, FORWARD_SECONDS):
            columns = self.lvlm.extract(prepared)
        num_frames = [stages.num_distinct_frames(item) for item in items]
        item_ids = [item.item_id for item in items]
        table = store.feature_table(self.recipe, item_ids, num_frames, columns, rows[SOURCE].to_pylist())
        for name in (URI, DECODED_ON, DECODE_SECONDS):
            table = table.append_column(name, rows[name])
        return table.append_column(MADE_WITH, pa.array([provenance.to_json(known)] * len(table), pa.string()))


@contextlib.contextmanager
def _timed(spent: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        spent[name] += time.perf_counter() - started


def _sizes(item: Item) -> str:
    """What an item shows, for messages: frames x height x width, key frames, letters."""
    clips = {"video": item.video, "cover": item.cover}
    parts = [
        f"{kind} of {len(clip.frames)} x {clip.frames.shape[1]} x {clip.frames.shape[2]} pixels"
        for kind, clip in clips.items()
        if clip is not None
    ]
    parts += [f"video of {len(item.motion.starts)} clips"] if item.motion is not None else []
    parts += [f"{name} of {len(text)} letters" for name, text in item.texts.items()]
    return ", ".join(parts)
