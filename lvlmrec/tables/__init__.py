"""Users' tables: CSV, TSV or Parquet, read as Arrow columns whose ids are exact strings.

Every line that becomes no row is counted as malformed, also each line inside a quote that is never closed. Messages
begin with the `label` that the caller passes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from lvlmrec import storage
from lvlmrec.errors import InputError, one_line
from lvlmrec.storage.parquet import open_parquet, read_columns
from lvlmrec.tables import text_file

PARQUET = ".parquet"
BLOCK_BYTES = 16 << 20  # Arrow parses blocks of this size; a longer row is an error
# part-00000-<uuid>.snappy.parquet, 000000_0, data_12.parquet, train-00000-of-00002.parquet; not ml_100k.parquet
PART_NAME = re.compile(r"(\D*)\d+(?:[-_.].*)?")
HIDDEN = re.compile(r"(^|/)[_.]")  # readers of tables ignore such files
UNSUPPORTED_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi"}  # their folders also hold files that no longer count
Choose = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class Rows:
    """The rows of a table that could be read.

    table      the chosen columns; ids are strings, null where one is missing or empty
    malformed  number of lines that are in no row
    example    the first of them, with its line number
    """

    table: pa.Table
    malformed: int = 0
    example: str = ""


def parquet_files(uri: str) -> list[str]:
    """The files of the Parquet table at `uri`, a file or a folder; none if the folder is not one table."""
    if not storage.is_dir(uri):
        return [uri]
    return parts(uri, [file.uri for file in storage.list_files(uri, recursive=True)])


def parts(folder: str, uris: Sequence[str]) -> list[str]:
    """The files of a Parquet table among `uris`, the files in `folder`; none if the folder is not one table.

    A table is a folder of nothing but Parquet files that is called *.parquet, contains _SUCCESS, or whose files are
    numbered. Names that begin with `_` or `.` are ignored. Raises `InputError` for partitions and other formats.
    """
    kept = {}
    for uri in uris:
        name = below(uri, folder)
        if HIDDEN.search(name):
            continue
        if not name.lower().endswith(PARQUET) and "." in name.rpartition("/")[2]:
            return []  # the usual case, a folder of videos, ends here at once
        kept[uri] = name
    if not kept:
        return []
    names = [below(uri, folder) for uri in uris]
    is_marked = folder.rstrip("/").endswith(PARQUET) or "_SUCCESS" in names
    if not (is_marked or _are_numbered(kept.values())):
        return []
    without_suffix = [uri for uri, name in kept.items() if not name.lower().endswith(PARQUET)]  # as Hive names them
    if without_suffix and not _is_parquet(without_suffix[0]):
        return []
    for name in names:
        if other := UNSUPPORTED_FORMATS.get(name.split("/")[0]):
            raise InputError(f"{folder}: a {other} table, which is not read; write its rows as Parquet")
    for name in kept.values():
        if "=" in name.rpartition("/")[0]:
            raise InputError(f"{folder}: partitioned ({name}), which is not read; write it without partitions")
    return list(kept)


def below(uri: str, folder: str) -> str:
    """The path of a listed file relative to the listed folder; their schemes may be spelled differently."""
    path, root = (text.rpartition("://")[2] for text in (uri, folder))
    return path.removeprefix(root.rstrip("/") + "/")


def read_parquet(uris: Sequence[str], label: str, choose: Choose, ids: Sequence[str]) -> Rows:
    """The columns that `choose` picks from the names found, of one or several Parquet files; those in `ids` as ids.

    The index of a pandas frame is a column. Raises `InputError` for files that are unreadable or have different
    columns, and for ids that are neither strings nor integers.
    """
    found = [_read_part(uri, f"{label}: {uri}" if len(uris) > 1 else label, choose, ids) for uri in uris]
    try:
        return Rows(pa.concat_tables(found, promote_options="permissive"))
    except pa.ArrowException as error:
        raise InputError(f"{label}: its files do not fit each other: {one_line(error)}") from error


def read_csv(
    uri: str, label: str, choose: Choose, ids: Sequence[str], *, delimiter: str = ",", quoted: bool = True
) -> Rows:
    """The columns that `choose` picks from the header's names, as strings or null; those in `ids` trimmed.

    With `quoted` quotes are read as in `text_file.csv_rows`; without it they are ordinary characters. Raises
    `InputError`.
    """
    data = text_file.read_bytes(uri, label)
    head = re.split(text_file.LINE_END.encode(), data.lstrip(b"\r\n"), maxsplit=1)[0]
    has_quotes = quoted and b'"' in data
    if has_quotes and (head.count(b'"') % 2 or not text_file.is_strictly_quoted(data, delimiter)):
        rows = _parse_row_by_row(data, label, choose, delimiter)
    else:
        rows = _parse_with_arrow(data, head, label, choose, delimiter, quoted)
    if has_quotes:
        rows = _without_quotes(_without_line_ends(rows, ids), ids)
    columns = {
        name: _ids(pc.utf8_trim_whitespace(rows.table[name]), name, label) if name in ids else rows.table[name]
        for name in rows.table.column_names
    }
    return _without_headers(Rows(pa.table(columns), rows.malformed, rows.example), ids)


def texts(column: pa.ChunkedArray, name: str, label: str) -> pa.ChunkedArray:
    """A column as strings, integers with all their digits, null as the empty string. Raises `InputError`."""
    column = plain(column)
    if is_text(column.type) or pa.types.is_integer(column.type):
        return strings(column, name, label).fill_null("")
    if pa.types.is_nested(column.type):
        raise InputError(f"{label}: column {name} holds {column.type}; expected texts or numbers")
    series = pd.Series(column.to_pandas())
    return pa.chunked_array([pa.array(series.astype("str").where(series.notna(), ""), pa.large_string())])


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column, dictionary-decoded."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings or bytes."""
    binary = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary
    text = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    return any(is_kind(kind) for is_kind in (*text, *binary))


def strings(column: pa.ChunkedArray, name: str, label: str) -> pa.ChunkedArray:
    """A column of strings, bytes or integers as strings. Raises `InputError` for bytes that are not UTF-8."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column
    try:
        return column.cast(pa.large_string())
    except pa.ArrowInvalid as error:
        raise InputError(f"{label}: column {name} holds {column.type} that is not UTF-8") from error


def _are_numbered(names: Iterable[str]) -> bool:
    """Whether the file names are equal up to the first number in them."""
    found = [PART_NAME.fullmatch(name.rpartition("/")[2]) for name in names]
    prefixes = {each[1] if each else None for each in found}
    return len(prefixes) == 1 and None not in prefixes


def _read_part(uri: str, label: str, choose: Choose, ids: Sequence[str]) -> pa.Table:
    try:
        with storage.open_read(uri, ahead=False) as opened:
            file = open_parquet(opened)
            ranges = _range_indices(file.schema_arrow)
            chosen = _choose(choose, [*file.schema_arrow.names, *ranges], label)
            stored = [name for name in chosen if name not in ranges]
            table = read_columns(opened, file, stored, use_threads=True)
            table.validate(full=True)  # writers of Parquet need not write valid UTF-8
            rows = file.metadata.num_rows
    except (storage.StorageError, storage.StorageRefused):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{label}: no such file") from error
    except (OSError, pa.ArrowException) as error:
        cause = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{label}: not readable as Parquet: {cause}") from error
    columns = {}
    for name in chosen:
        column = pa.chunked_array([np.array(ranges[name], np.int64)]) if name in ranges else table[name]
        if len(column) != rows:
            raise InputError(f"{label}: {rows} rows, but its pandas index {name} has {len(column)}; reset the index")
        columns[name] = _ids(column, name, label) if name in ids else column
    return pa.table(columns)


def _range_indices(schema: pa.Schema) -> dict[str, range]:
    """The indices of a pandas frame that the file's metadata describe as a range instead of a column, by name."""
    described = (schema.pandas_metadata or {}).get("index_columns", [])
    ranges = [each for each in described if isinstance(each, dict) and each.get("kind") == "range"]
    return {
        each["name"]: range(each["start"], each["stop"], each["step"])
        for each in ranges
        if isinstance(each["name"], str) and each["name"] not in schema.names
    }


def _choose(choose: Choose, found: list[str], label: str) -> list[str]:
    chosen = choose(found)
    for name in chosen:
        if found.count(name) > 1:
            raise InputError(f"{label}: column {name} occurs twice; columns found: {', '.join(found)}")
    return chosen


def _parse_with_arrow(data: bytes, head: bytes, label: str, choose: Choose, delimiter: str, quoted: bool) -> Rows:
    """Parse text without quotes, or whose quotes Arrow reads like every other parser."""
    text = text_file.decode(label, head)
    header = _header(next(text_file.csv_rows(text, delimiter))[2] if quoted else text.split(delimiter), label)
    chosen = _choose(choose, header, label)
    malformed, example = 0, ""

    def skip(row: Any) -> str:
        nonlocal malformed, example
        if row.text.strip():
            malformed += 1 + row.text.count("\n")
            example = example or f"row {row.number - 1}: {row.text[:80]!r}"
        return "skip"

    try:
        table = pa.csv.read_csv(
            pa.BufferReader(data.lstrip(b"\r\n")),
            # one thread, because only then pyarrow knows the number of an invalid row
            read_options=pa.csv.ReadOptions(
                column_names=header, skip_rows=1, use_threads=False, block_size=BLOCK_BYTES
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted and b'"' in data,
                invalid_row_handler=skip,
            ),
            convert_options=pa.csv.ConvertOptions(
                include_columns=chosen,
                column_types=dict.fromkeys(chosen, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as error:
        cause = text_file.utf8_error(data) or one_line(error)
        raise InputError(f"{label}: not readable as a table: {cause}") from error
    return Rows(table, malformed, example)


def _parse_row_by_row(data: bytes, label: str, choose: Choose, delimiter: str) -> Rows:
    """Parse text with quotes that are ordinary characters, or broken: row by row, which takes longer."""
    text = data.decode("utf-8", "surrogateescape")  # bytes that are not UTF-8 are errors only in chosen columns
    records = text_file.csv_rows(text, delimiter)
    header = _header(next(row for _, _, row in records if row != []), label)
    chosen = _choose(choose, header, label)
    positions = [header.index(name) for name in chosen]
    columns: list[list[str | None]] = [[] for _ in chosen]
    malformed, example = 0, ""
    for line, lines, row in records:
        if row is not None and len(row) == len(header):
            for column, position in zip(columns, positions, strict=True):
                column.append(row[position] or None)
        elif row is None or len(row) > 1 or (row and row[0].strip()):
            malformed, example = malformed + lines, example or text_file.show_line(text, line, lines)
    try:
        arrays = [pa.chunked_array([pa.array(column, pa.string())]) for column in columns]
    except UnicodeEncodeError as error:
        raise InputError(f"{label}: not readable as a table: {text_file.utf8_error(data)}") from error
    return Rows(pa.table(arrays, chosen), malformed, example)


def _header(row: list[str] | None, label: str) -> list[str]:
    if row is None:
        raise InputError(f"{label}: a quote in the first line is not closed")
    return [name.strip() for name in row]


def _without_headers(rows: Rows, ids: Sequence[str]) -> Rows:
    """Without rows that repeat the header, as in files that were concatenated."""
    table = rows.table
    repeats = pc.equal(table[ids[-1]], ids[-1]).fill_null(False)
    if not pc.any(repeats).as_py():
        return rows
    for name in table.column_names:
        cells = pc.utf8_trim_whitespace(pc.utf8_ltrim(table[name], "\ufeff"))
        repeats = pc.and_(repeats, pc.equal(cells, name).fill_null(False))
    count = pc.sum(repeats).as_py() or 0
    example = rows.example or (f"row {pc.index(repeats, True).as_py() + 1}: the header once more" if count else "")
    return Rows(table.filter(pc.invert(repeats)), rows.malformed + count, example)


def _without_line_ends(rows: Rows, ids: Sequence[str]) -> Rows:
    """Without rows whose id contains line ends: its quote is closed on a later line."""
    table, malformed, example = rows.table, rows.malformed, rows.example
    for name in ids:
        num_line_ends = pc.count_substring_regex(
            pc.utf8_rtrim_whitespace(table[name].fill_null("")), text_file.LINE_END
        )
        if total := pc.sum(num_line_ends).as_py():
            is_bad = pc.greater(num_line_ends, 0)
            malformed += total + pc.sum(is_bad).as_py()
            row = pc.index(is_bad, True).as_py()
            example = example or f"row {row + 1} with {name} {table[name][row].as_py()[:80]!r}"
            table = table.filter(pc.invert(is_bad))
    return Rows(table, malformed, example)


def _without_quotes(rows: Rows, ids: Sequence[str]) -> Rows:
    """Without rows whose id is still in quotes, as a blank comes between the delimiter and the quote."""
    table, malformed, example = rows.table, rows.malformed, rows.example
    for name in ids:
        is_bad = pc.match_substring_regex(table[name].fill_null(""), r'^\s*".*"\s*$')
        if count := pc.sum(is_bad).as_py():
            row = pc.index(is_bad, True).as_py()
            example = example or f"row {row + 1} with {name} {table[name][row].as_py()[:80]!r}, blank before quote"
            malformed, table = malformed + count, table.filter(pc.invert(is_bad))
    return Rows(table, malformed, example)


def _ids(column: pa.ChunkedArray, name: str, label: str) -> pa.ChunkedArray:
    """Ids as strings, null where one is missing or empty. Raises `InputError` for other types than text and integer."""
    expected = "ids are strings or integers"
    column = plain(column)
    if pa.types.is_decimal(column.type):
        try:
            column = column.cast(pa.decimal256(76, 0)).cast(pa.large_string())
        except pa.ArrowInvalid as error:
            raise InputError(f"{label}: column {name} holds {column.type} with fractions; {expected}") from error
    elif not (is_text(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise InputError(f"{label}: column {name} holds {column.type}; {expected}")
    found = strings(column, name, label)
    return pc.if_else(pc.equal(found, ""), None, found)


def _is_parquet(uri: str) -> bool:
    try:
        with storage.open_read(uri, ahead=False) as file:
            return file.read(4) == b"PAR1"
    except (FileNotFoundError, PermissionError):  # such as a broken link
        return False
