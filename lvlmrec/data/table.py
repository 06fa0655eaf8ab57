"""Any interaction table: CSV, TSV or Parquet with user_id, item_id and, if there is one, timestamp."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from lvlmrec.columns import ITEM_ID, TIMESTAMP, USER_ID
from lvlmrec.data import files
from lvlmrec.data.interactions import Dataset, Interactions, from_columns
from lvlmrec.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
ENDINGS = (".csv", ".tsv", ".parquet")


def load(path: str) -> Dataset:
    """The dataset of a table, or of the folder that holds exactly one, with `<table>_titles.csv` if it is there.

    Raises `InputError`.
    """
    file = files.find(path, ENDINGS, without=files.TITLE_ENDINGS)
    return with_titles(read(file), file, "." + file.rpartition(".")[2])


def with_titles(interactions: Interactions, path: str, ending: str) -> Dataset:
    """The dataset of `interactions`, read from `path`, with the titles file beside it if there is one."""
    beside = files.titles_beside(path, ending)
    if beside is None:
        return Dataset(interactions, {}, interactions.report)
    titles, report = files.read_titles(beside)
    report["items_without_title"] = sum(item_id not in titles for item_id in interactions.item_ids)
    return Dataset(interactions, titles, interactions.report | report)


@dataclass(frozen=True)
class Columns:
    """Users and items [N] str, sortable times [N] if there are some, and how many rows were malformed."""

    users: NDArray[np.object_]
    items: NDArray[np.object_]
    times: NDArray[Any] | None
    malformed: int


def read(path: str, names: Sequence[str] = (USER_ID, ITEM_ID, TIMESTAMP)) -> Interactions:
    """The interactions of one table whose columns have these names. Raises `InputError` as `read_columns`."""
    columns = read_columns(path, names)
    return from_columns(columns.users, columns.items, columns.times, {"malformed_lines": columns.malformed})


def read_columns(path: str, names: Sequence[str] = (USER_ID, ITEM_ID, TIMESTAMP)) -> Columns:
    """The rows of one table whose user, item and timestamp columns have these names.

    Timestamps are numbers of any one unit or ISO 8601 dates. A row without user, item or readable timestamp is
    malformed; more than 1 % of them is an `InputError`.
    """
    data = files.read_bytes(path)
    rows = _read_parquet(path, data, names) if path.endswith(".parquet") else _read_csv(path, data, names)
    users, items = (_ids(rows.table[name], path, name) for name in names[:2])
    usable = pc.and_(pc.is_valid(users), pc.is_valid(items)).to_numpy(zero_copy_only=False)
    times = None
    if names[2] in rows.table.column_names:
        times, readable = _times(rows.table[names[2]], path, names[2])
        usable &= readable
        times = times[usable]
    malformed = rows.malformed + int((~usable).sum())
    example = rows.example or (f"row {int(np.argmin(usable)) + 1}" if malformed else "")
    expected = f"{names[0]}, {names[1]} and a number or ISO date as {names[2]}"
    files.check_malformed(path, malformed, len(usable) + rows.malformed, example, expected)
    kept = [column.to_numpy(zero_copy_only=False)[usable] for column in (users, items)]
    return Columns(kept[0], kept[1], times, malformed)


@dataclass(frozen=True)
class _Rows:
    """The rows of a table that could be parsed, and how many could not."""

    table: pa.Table
    malformed: int
    example: str


def _read_csv(path: str, data: bytes, names: Sequence[str]) -> _Rows:
    delimiter = DELIMITERS["." + path.rpartition(".")[2]]
    head = files.decode(path, data[: data.find(b"\n") + 1] or data)
    header = [name.strip() for name in next(csv.reader([head], delimiter=delimiter))]
    wanted = _wanted(path, header, names)
    skipped: list[str] = []

    def skip(row: Any) -> str:
        skipped.append(f"row {row.number - 1}: {row.text[:80]!r}")
        return "skip"

    try:
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            # one thread, because only then pyarrow knows the number of an invalid row
            read_options=pa.csv.ReadOptions(column_names=header, skip_rows=1, use_threads=False),
            parse_options=pa.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=b'"' in data, invalid_row_handler=skip
            ),
            convert_options=pa.csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not readable as a table: {' '.join(str(error).split())}") from error
    trimmed = [pc.utf8_trim_whitespace(table[name]) for name in wanted]
    return _Rows(pa.table(trimmed, wanted), len(skipped), skipped[0] if skipped else "")


def _read_parquet(path: str, data: bytes, names: Sequence[str]) -> _Rows:
    try:
        file = pa.parquet.ParquetFile(pa.BufferReader(data))
        return _Rows(file.read(columns=_wanted(path, file.schema_arrow.names, names)), 0, "")
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not readable as Parquet: {' '.join(str(error).split())}") from error


def _wanted(path: str, found: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns to read; the timestamp is optional."""
    missing = [name for name in names[:2] if name not in found]
    if missing:
        raise InputError(f"{path}: no column {' and no column '.join(missing)}; columns found: {', '.join(found)}")
    repeated = [name for name in names if list(found).count(name) > 1]
    if repeated:
        raise InputError(f"{path}: column {repeated[0]} occurs twice; columns found: {', '.join(found)}")
    return [name for name in names if name in found]


def _ids(column: pa.ChunkedArray, path: str, name: str) -> pa.ChunkedArray:
    """Ids as strings, null where one is missing or empty."""
    if pa.types.is_floating(column.type):
        raise InputError(f"{path}: column {name} holds {column.type}; ids are strings or integers")
    try:
        texts = column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{path}: column {name} holds {column.type}; ids are strings or integers") from error
    return pc.if_else(pc.equal(texts, ""), None, texts)


def _times(column: pa.ChunkedArray, path: str, name: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Sortable times [N] and whether each could be read [N]. Unit and origin do not matter, only the order."""
    if pa.types.is_temporal(column.type):
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        return column.cast(pa.timestamp("us")).cast(pa.int64()).fill_null(0).to_numpy(), valid
    series = pd.Series(column.to_pandas())
    numbers = pd.to_numeric(series, errors="coerce")
    dates = pd.to_datetime(series, errors="coerce", utc=True, format="ISO8601") if numbers.isna().all() else None
    valid = np.array(numbers.notna() if dates is None else dates.notna())
    if dates is not None:
        return dates.astype("int64").to_numpy(), valid
    # parsed again without the unreadable ones, which would force nanoseconds into float64
    times = pd.to_numeric(series[valid]).to_numpy()
    filled = np.zeros(len(series), dtype=times.dtype)
    filled[valid] = times
    return filled, valid & np.isfinite(filled.astype(np.float64))
