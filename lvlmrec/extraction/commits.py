"""Commits of a running extraction: every few seconds a segment of what the write stage returned since."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc

from lvlmrec.columns import ITEM_ID, MADE_WITH, PART, ROW, SOURCE
from lvlmrec.errors import JobFailed
from lvlmrec.features import index
from lvlmrec.features.lease import Lease

SECONDS = 5.0  # between two commits, at first
GROWTH = 0.05  # of the time since the start: a long run makes a hundred segments, not thousands


class Commits:
    """Commits what it is given, of one writer: as time goes by, and what is left at its end, however that comes."""

    def __init__(self, uri: str, lease: Lease) -> None:
        self._uri, self._lease = uri, lease
        self._blocks: list[pa.Table] = []
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._commit()
        else:
            with suppress(OSError, JobFailed):  # what is not committed the next run adopts
                self._commit()

    def add(self, block: pa.Table) -> None:
        """Rows of `stages.WRITTEN`."""
        self._blocks.append(block.filter(pc.is_valid(block[PART])).select([ITEM_ID, PART, ROW, SOURCE, MADE_WITH]))
        now = time.monotonic()
        if now - self._last >= max(SECONDS, GROWTH * (now - self._started)):
            self._commit()

    def _commit(self) -> None:
        rows = pa.concat_tables(self._blocks) if self._blocks else pa.table({})
        if len(rows):
            self._lease.check()
            columns = (rows[name].combine_chunks() for name in (ITEM_ID, PART, ROW, SOURCE))
            made_with = rows[MADE_WITH].unique().to_pylist()
            index.write(self._uri, index.rows_of(*columns), self._lease.number, made_with)
        self._blocks, self._last = [], time.monotonic()
