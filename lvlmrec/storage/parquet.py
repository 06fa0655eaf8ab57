"""Parquet by ranges of bytes: of a remote file only the footer and the chosen columns are fetched, several at once.

A *range* is (start, end) in bytes from the beginning of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.caching import BaseCache

Range = tuple[int, int]
MAGIC = b"PAR1"
TAIL = 12 << 10  # bytes that are fetched first: the footer of a part of some twenty features
GAP = 8 << 10  # ranges that are no more bytes apart are one request
PIECE = 8 << 20  # bytes of one request at most
REQUESTS_AT_ONCE = 8


class Ranges(BaseCache):
    """The cache of an fsspec file: it keeps what `prefetch` fetched; any other read fetches what it reads, no more."""

    name = "ranges"

    def __init__(self, cache: BaseCache) -> None:
        super().__init__(cache.blocksize, cache.fetcher, cache.size)
        self.kept: list[tuple[int, memoryview]] = []

    def _fetch(self, start: int | None, stop: int | None) -> bytes | memoryview:
        """Bytes `start` to `stop`."""
        start, stop = start or 0, self.size if stop is None else min(stop, self.size)
        for first, data in self.kept:
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        return bytes(self.fetcher(start, stop)) if start < stop else b""

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Fetch `ranges` and keep them; those that lie close together as one, long ones in pieces."""
        wanted = [(start, end, np.empty(end - start, np.uint8).data) for start, end in joined(ranges)]
        pieces = [
            (at, min(at + PIECE, end), data[at - start : at - start + PIECE])
            for start, end, data in wanted
            for at in range(start, end, PIECE)
        ]

        def fetch(piece: tuple[int, int, memoryview]) -> None:
            piece[2][:] = self.fetcher(piece[0], piece[1])

        if len(pieces) == 1:
            fetch(pieces[0])
        elif pieces:
            with ThreadPoolExecutor(min(REQUESTS_AT_ONCE, len(pieces))) as threads:
                list(threads.map(fetch, pieces))
        self.kept += [(start, data) for start, _, data in wanted]


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The ranges in order, those at most `GAP` apart as one."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start - found[-1][1] <= GAP:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def open_parquet(file: BinaryIO) -> pq.ParquetFile:
    """The local Parquet file, or that of `open_read(uri, ahead=False)`. Raises `pyarrow.ArrowInvalid`."""
    cache = getattr(file, "cache", None)
    return pq.ParquetFile(file, metadata=_footer(cache) if isinstance(cache, Ranges) else None)


def read_columns(
    file: BinaryIO, parquet: pq.ParquetFile, columns: Sequence[str] | None = None, use_threads: bool = False
) -> pa.Table:
    """Top-level columns of `parquet`, which `open_parquet(file)` gave, in the order of `columns`; None: all.

    use_threads: whether columns are decoded side by side; they are fetched so in any case

    Raises `pyarrow.ArrowInvalid`, also when there is no such column.
    """
    names = parquet.schema_arrow.names if columns is None else list(columns)
    if unknown := [name for name in names if name not in parquet.schema_arrow.names]:
        raise pa.ArrowInvalid(f"no column {unknown[0]!r}; columns: {', '.join(parquet.schema_arrow.names)}")
    if isinstance(cache := getattr(file, "cache", None), Ranges):
        cache.prefetch(_chunks(parquet.metadata, names))
    table = parquet.read(columns=names, use_threads=use_threads)
    return table if columns is None else table.select(names)


def _footer(cache: Ranges) -> pq.FileMetaData | None:
    """The metadata at the file's end; None where it is no Parquet file, which pyarrow says best."""
    size = cache.size
    tail = bytes(cache._fetch(max(0, size - TAIL), size))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != MAGIC or length > size:
        return None
    if length > len(tail):
        tail = bytes(cache._fetch(size - length, size - len(tail))) + tail
    return pq.read_metadata(pa.BufferReader(tail[-length:]))


def _chunks(metadata: pq.FileMetaData, names: Sequence[str]) -> list[Range]:
    """Where the values of columns lie, in every row group."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    chosen = [i for i, path in enumerate(paths) if any(path == name or path.startswith(f"{name}.") for name in names)]
    return [_range(metadata.row_group(group).column(i)) for group in range(metadata.num_row_groups) for i in chosen]


def _range(chunk: Any) -> Range:
    """Where a column chunk lies; its dictionary, if it has one, comes first."""
    start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    return start, start + chunk.total_compressed_size
