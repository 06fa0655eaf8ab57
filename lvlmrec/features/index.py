"""The index of a feature set: which items have features, and where. It is a union of immutable segments.

    <feature set>/index/<generation>-<number>-<hash>.parquet   item_id, part, row, source, generation
    <feature set>/index.parquet                                the only segment of sets of earlier releases

Each segment is a commit: it is written once, whole, and costs what is new. Readers take the union; of several rows of
an item the last counts: that of the latest generation, then of the last segment. A generation is the number of the
lease of whoever wrote the part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lvlmrec import storage
from lvlmrec.columns import GENERATION, ITEM_ID, PART, ROW, SOURCE
from lvlmrec.features import provenance

FOLDER = "index"
EARLIER = "index.parquet"
COLUMNS = pa.schema(
    {
        ITEM_ID: pa.string(),
        PART: pa.dictionary(pa.int32(), pa.string()),
        ROW: pa.int64(),
        SOURCE: pa.string(),
        GENERATION: pa.int32(),
    }
)
SNAPSHOT = b"lvlmrec.snapshot"  # of a merged segment: the snapshot that it was made of
MERGED = b"lvlmrec.merged"  # of a merged segment: the names of those that it replaces, JSON
READ_AT_ONCE = 16  # small files of object storage: reading one is mostly waiting
IDS_AT_ONCE = 100_000  # as Python objects
IDS_LOOKED_UP = 1_000_000  # at once: Arrow's table of ten million takes more memory than they do
ATTEMPTS = 10  # to read segments that a vacuum merges meanwhile


@dataclass(frozen=True)
class Snapshot:
    """What a reader saw: the names of the segments, their rows as they lie there, and what tells it from others.

    rows    COLUMNS, several for an item where it was written more than once: see `latest`
    digest  16 hex digits that change with any row; those of a merged segment are of what it was merged from
    made_with  what its parts were made with, each once, see `provenance`
    merged     the names of segments that a merged one replaces and that are still there
    """

    segments: tuple[str, ...]
    rows: pa.Table
    digest: str
    made_with: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()

    def latest(self) -> pa.Table:
        """One row for each item, the last one."""
        if len(self.segments) < 2:
            return self.rows
        return last_of_each(self.rows, self.rows[GENERATION].to_numpy())


def read(uri: str) -> Snapshot:
    """The segments that are there now; none, when nothing is committed. Raises `FileNotFoundError` when all vanish."""
    for attempt in range(ATTEMPTS):
        names = segments(uri)
        try:
            with ThreadPoolExecutor(READ_AT_ONCE) as threads:
                tables = list(threads.map(lambda name: _read(uri, name), names))
        except FileNotFoundError:  # a vacuum merged it: the merged one is there by now
            if attempt == ATTEMPTS - 1:
                raise
            continue
        return _snapshot(dict(zip(names, tables, strict=True)))
    raise AssertionError("the last attempt returns or raises")


def segments(uri: str) -> list[str]:
    """The names of the segments, in their order."""
    files = storage.list_files(storage.join(uri, FOLDER))
    earlier = [EARLIER] if storage.exists(storage.join(uri, EARLIER)) else []
    return [*earlier, *(f"{FOLDER}/{file.uri.rsplit('/', 1)[-1]}" for file in files)]


def write(
    uri: str,
    rows: pa.Table,
    generation: int,
    made_with: Iterable[str] = (),
    snapshot: str = "",
    merged: Sequence[str] = (),
) -> str:
    """Commit `rows`, of COLUMNS and each item once; `made_with` as in `provenance`. Returns the segment's name.

    `snapshot` and `merged` are the digest and the names of the segments that this one replaces.
    """
    own = f"{generation:06d}-"
    number = sum(name.startswith(f"{FOLDER}/{own}") for name in segments(uri))
    metadata = provenance.metadata(made_with)
    metadata |= {SNAPSHOT: snapshot.encode(), MERGED: json.dumps(merged).encode()} if merged else {}
    table = rows.select(COLUMNS.names).cast(COLUMNS).replace_schema_metadata(metadata)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=[PART, GENERATION], write_statistics=False)
    data = memoryview(buffer.getvalue())
    name = f"{FOLDER}/{own}{number:06d}-{hashlib.blake2b(data, digest_size=8).hexdigest()}.parquet"
    storage.write_bytes(storage.join(uri, name), data)
    return name


def merge(uri: str, generation: int) -> Snapshot:
    """Replace all segments by one with the last row of each item. A reader meanwhile sees the same rows."""
    found = read(uri)
    replaced = found.merged
    if len(found.segments) > 1 or found.segments == (EARLIER,):
        replaced = (*found.merged, *found.segments)
        latest = found.latest()
        merged = write(uri, latest, generation, found.made_with, found.digest, replaced)
        found = replace(found, segments=(merged,), rows=latest)
    for name in replaced:
        storage.remove(storage.join(uri, name))
    return replace(found, merged=())


def rows_of(item_ids: pa.Array, parts: Sequence[str] | pa.Array, rows: pa.Array, sources: pa.Array) -> pa.Table:
    """Rows of COLUMNS; the generation is in a part's name."""
    encoded = pa.array(parts, pa.string()).dictionary_encode()
    generations = np.array([generation_of(part) for part in encoded.dictionary.to_pylist()], np.int32)
    of_row = generations[encoded.indices.to_numpy()]
    return pa.Table.from_arrays([item_ids, encoded, rows, sources, pa.array(of_row, pa.int32())], schema=COLUMNS)


def generation_of(part: str) -> int:
    """The generation in the name of a part."""
    return int(part.split("-")[1])


def last_of_each(table: pa.Table, order: np.ndarray | None = None) -> pa.Table:
    """The last row of each `item_id`, in the order in which they stand; with `order` [N], the last of the largest."""
    if are_distinct(table[ITEM_ID]):
        return table
    encoded = table[ITEM_ID].combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    by = np.arange(len(codes)) if order is None else np.argsort(order, kind="stable")
    last = np.empty(len(encoded.dictionary), np.int64)
    last[codes[by]] = by  # of several values for a place numpy keeps the last
    return table.take(pa.array(np.sort(last)))


def are_distinct(item_ids: pa.ChunkedArray) -> bool:
    """Whether no id occurs twice; of ten million distinct ones it says no once in 100,000 times."""
    found = np.sort(_hashes(item_ids))
    return not bool((found[1:] == found[:-1]).any())


def is_among(item_ids: pa.ChunkedArray, others: pa.ChunkedArray) -> pa.Array:
    """bool [N]: which of `item_ids` are among the others; what is looked up in is held by a part at a time."""
    others = others.cast(item_ids.type)
    num_parts = 1 + len(others) // IDS_LOOKED_UP
    if num_parts == 1:
        return pc.is_in(item_ids, value_set=others.combine_chunks()).combine_chunks()
    here, there = _hashes(item_ids) % num_parts, _hashes(others) % num_parts
    found = np.zeros(len(item_ids), bool)
    for part in range(num_parts):
        places = np.flatnonzero(here == part)
        looked_up = others.filter(pa.array(there == part)).combine_chunks()
        found[places] = pc.is_in(item_ids.take(pa.array(places)), value_set=looked_up).to_numpy()
    return pa.array(found)


def _hashes(item_ids: pa.ChunkedArray) -> np.ndarray:
    """uint64 [N]."""
    blocks = (item_ids.slice(begin, IDS_AT_ONCE) for begin in range(0, len(item_ids), IDS_AT_ONCE))
    hashed = [pd.util.hash_array(block.to_numpy().astype(object), categorize=False) for block in blocks]
    return np.concatenate([np.empty(0, np.uint64), *hashed])


def _snapshot(tables: dict[str, pa.Table]) -> Snapshot:
    """What segments, by name in their order, tell; whether a vacuum has removed what it merged makes no difference."""
    about = {name: table.schema.metadata or {} for name, table in tables.items()}
    merged = {name for each in about.values() for name in json.loads(each.get(MERGED, b"[]"))}
    names = [name for name in tables if name not in merged]
    plain = [tables[name].replace_schema_metadata() for name in names]
    rows = pa.concat_tables([COLUMNS.empty_table(), *plain]).unify_dictionaries()
    pa.default_memory_pool().release_unused()
    made_with = {each for name in names for each in provenance.read(about[name])}
    left = tuple(name for name in tables if name in merged)
    return Snapshot(tuple(names), rows, _digest(names, about), tuple(sorted(made_with)), left)


def _read(uri: str, name: str) -> pa.Table:
    table = storage.read_table(storage.join(uri, name))
    if name == EARLIER:
        return rows_of(*(table[column].combine_chunks() for column in (ITEM_ID, PART, ROW, SOURCE)))
    return table.cast(COLUMNS.with_metadata(table.schema.metadata))


def _digest(names: Sequence[str], about: Mapping[str, Mapping[bytes, bytes]]) -> str:
    """16 hex digits of the names, which have the segments' hashes; of a merged one alone, what it was merged from."""
    if len(names) == 1 and (before := about[names[0]].get(SNAPSHOT)):
        return before.decode()
    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
