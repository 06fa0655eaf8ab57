"""Parquet by ranges of bytes: of a remote file only the footer and the chosen columns are fetched, several at once.

A *range* is (start, end) in bytes from the beginning of the file.

Where a row's vectors lie follows from the footer alone in files written with `one_page`: each column chunk of vectors
is one page, whose values are its last bytes. Of a few rows then little more is fetched than they hold. To every other
reader such files are ordinary Parquet.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.caching import BaseCache

Range = tuple[int, int]
MAGIC = b"PAR1"
TAIL = 12 << 10  # bytes that are fetched first: the footer of a part of some twenty features
GAP = 8 << 10  # ranges that are no more bytes apart are one request
ROW_GAP = 256 << 10  # the same of single rows, of which there may be thousands: what a store sends in a request's time
FEW = 0.25  # of a file's rows: of more of them whole columns are fetched
PIECE = 8 << 20  # bytes of one request at most
REQUESTS_AT_ONCE = 8
ONE_PAGE = {"data_page_size": 1 << 30, "max_rows_per_page": 1 << 30}
# Of a file's metadata: where its columns end. Other programs copy metadata; where they wrote other pages, it is wrong.
PAGES_KEY = "lvlmrec.one_page_columns_end"


class Ranges(BaseCache):
    """The cache of an fsspec file: it keeps what `prefetch` fetched; any other read fetches what it reads, no more."""

    name = "ranges"

    def __init__(self, cache: BaseCache) -> None:
        super().__init__(cache.blocksize, cache.fetcher, cache.size)
        self.kept: list[tuple[int, memoryview]] = []

    def _fetch(self, start: int | None, stop: int | None) -> bytes | memoryview:
        """Bytes `start` to `stop`."""
        start, stop = start or 0, self.size if stop is None else min(stop, self.size)
        first, data = self.kept[bisect.bisect_right(self.kept, start, key=itemgetter(0)) - 1] if self.kept else (0, b"")
        if first <= start and stop <= first + len(data):
            return data[start - first : stop - first]
        return bytes(self.fetcher(start, stop)) if start < stop else b""

    def prefetch(self, ranges: Iterable[Range], gap: int = GAP) -> None:
        """Fetch `ranges`, and keep them alone; those at most `gap` apart as one, long ones in pieces."""
        wanted = [(start, end, np.empty(end - start, np.uint8).data) for start, end in joined(ranges, gap)]
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
        self.kept = [(start, data) for start, _, data in wanted]


def joined(ranges: Iterable[Range], gap: int = GAP) -> list[Range]:
    """The ranges in order, those at most `gap` bytes apart as one."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start - found[-1][1] <= gap:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def read(file: BinaryIO, columns: Sequence[str] | None, rows: Sequence[int] | None) -> pa.Table:
    """Columns and rows of a Parquet file; None: all. Raises `pyarrow.ArrowInvalid`."""
    opened = open_parquet(file)
    return read_columns(file, opened, columns) if rows is None else read_rows(file, opened, rows, columns)


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


def read_rows(
    file: BinaryIO, parquet: pq.ParquetFile, rows: Sequence[int], columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows `rows` [N] of top-level columns, in this order; as `read_columns`. Raises `IndexError`.

    Of vectors whose places follow from a remote file's footer few rows are fetched alone.
    """
    names, cache = parquet.schema_arrow.names if columns is None else columns, getattr(file, "cache", None)
    if outside := [row for row in rows if not 0 <= row < parquet.metadata.num_rows]:
        raise IndexError(f"row {outside[0]} of {parquet.metadata.num_rows}")
    few = isinstance(cache, Ranges) and len(rows) < FEW * parquet.metadata.num_rows
    known = _vectors(parquet, names) if few else {}
    others = [name for name in names if name not in known]
    table = read_columns(file, parquet, others).take(pa.array(rows, pa.int64()))
    if not isinstance(cache, Ranges) or not known:
        return table
    cache.prefetch([each for vectors in known.values() for each in vectors.ranges(rows)], ROW_GAP)
    fields = [parquet.schema_arrow.field(name) for name in names]
    arrays = [known[name].read(cache, rows) if name in known else table[name].combine_chunks() for name in names]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, parquet.schema_arrow.metadata))


def write(table: pa.Table, sink: BinaryIO, one_page: bool = False, **options: Any) -> None:
    """Write a Parquet file; `options` go to `pyarrow.parquet.write_table`. Raises `ValueError`.

    one_page: as one row group, so that `read_rows` finds single rows; every row must have its vectors
    """
    if not one_page:
        pq.write_table(table, sink, **options)
        return
    if missing := [name for name in table.column_names if is_vectors(table[name].type) and table[name].null_count]:
        raise ValueError(f"column {missing[0]!r} has rows without a vector")
    with pq.ParquetWriter(sink, table.schema, **ONE_PAGE, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({PAGES_KEY: str(sink.tell())})


@dataclass(frozen=True)
class Vectors:
    """A column of fixed-size lists that is one page: where its values lie.

    start    in bytes, of the first value
    streams  1, or of BYTE_STREAM_SPLIT the bytes of a value: their first bytes, then their second ones, ...
    """

    type: pa.FixedSizeListType
    num_rows: int
    start: int
    streams: int

    def ranges(self, rows: Sequence[int]) -> list[Range]:
        """Of each row the range in each stream."""
        size = self.type.list_size * self.type.value_type.byte_width // self.streams  # bytes of a row in a stream
        places = [stream * self.num_rows + row for row in rows for stream in range(self.streams)]
        return [(self.start + place * size, self.start + (place + 1) * size) for place in places]

    def read(self, cache: Ranges, rows: Sequence[int]) -> pa.FixedSizeListArray:
        """The vectors of `rows` [N]."""
        data = b"".join(bytes(cache._fetch(start, end)) for start, end in self.ranges(rows))
        width = self.type.value_type.byte_width // self.streams
        values = np.frombuffer(data, np.uint8).reshape(len(rows), self.streams, self.type.list_size, width)
        whole = pa.py_buffer(np.ascontiguousarray(values.transpose(0, 2, 1, 3)))  # the bytes of a value together
        flat = pa.Array.from_buffers(self.type.value_type, len(rows) * self.type.list_size, [None, whole])
        return pa.FixedSizeListArray.from_arrays(flat, type=self.type)


def _vectors(parquet: pq.ParquetFile, names: Sequence[str]) -> dict[str, Vectors]:
    """Of the columns those whose rows' places follow from the footer."""
    metadata, schema = parquet.metadata, parquet.schema_arrow
    if metadata.num_row_groups != 1:
        return {}
    chunks = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    if (metadata.metadata or {}).get(PAGES_KEY.encode()) != str(max(_range(chunk)[1] for chunk in chunks)).encode():
        return {}
    at = {chunk.path_in_schema: chunk for chunk in chunks}
    found = {}
    for name in names:
        chunk = at.get(f"{name}.list.element")
        if chunk is None or not is_vectors(kind := schema.field(name).type) or chunk.compression != "UNCOMPRESSED":
            continue
        width = kind.value_type.byte_width
        encoding = {*chunk.encodings} - {"RLE"}  # of the lengths of lists
        if streams := {"PLAIN": 1, "BYTE_STREAM_SPLIT": width}.get("/".join(encoding)):
            start = _range(chunk)[1] - metadata.num_rows * kind.list_size * width
            found[name] = Vectors(kind, metadata.num_rows, start, streams)
    return found


def is_vectors(kind: pa.DataType) -> bool:
    """Whether a column holds a vector of floats in each row."""
    return pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)


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
