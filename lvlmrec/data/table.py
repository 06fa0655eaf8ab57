"""Any interaction table: CSV, TSV or Parquet with columns user_id, item_id and optionally timestamp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from lvlmrec import tables
from lvlmrec.columns import ITEM_ID, TIMESTAMP, USER_ID
from lvlmrec.data import files, times
from lvlmrec.data.interactions import Dataset, Interactions, from_columns
from lvlmrec.errors import InputError
from lvlmrec.tables import Rows, text_file

DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
ENDINGS = (".csv", ".tsv", tables.PARQUET)


def load(path: str) -> Dataset:
    """The dataset of a table, with titles of `<table>_titles.csv` beside it if there is one. Raises `InputError`.

    `path` is a file, a folder of the parts of one Parquet table, or a folder that holds exactly one file.
    """
    path = path.rstrip("/")
    is_folder_of_parts = tables.parquet_files(path) not in ([], [path])
    file = path if is_folder_of_parts else files.find(path, ENDINGS, without=files.TITLE_ENDINGS)
    ending = next((ending for ending in ENDINGS if file.endswith(ending)), "")
    return with_titles(read(file), file, ending)


def with_titles(interactions: Interactions, path: str, ending: str) -> Dataset:
    """The dataset of `interactions`, read from `path`, with the titles file beside it if there is one."""
    titles_file = files.find_titles(path, ending)
    if titles_file is None:
        return Dataset(interactions, {}, interactions.report)
    titles, report = files.read_titles(titles_file)
    report["items_without_title"] = sum(item_id not in titles for item_id in interactions.item_ids)
    return Dataset(interactions, titles, interactions.report | report)


@dataclass(frozen=True)
class Columns:
    """Users and items [N] str, sortable times [N] or None without any, and the number of malformed rows."""

    users: NDArray[np.object_]
    items: NDArray[np.object_]
    times: NDArray[Any] | None
    malformed: int


def read(path: str, names: Sequence[str] = (USER_ID, ITEM_ID, TIMESTAMP), *, quoted: bool = True) -> Interactions:
    """The interactions of one table whose columns have these names. Raises `InputError` as `read_columns`."""
    columns = read_columns(path, names, quoted=quoted)
    return from_columns(columns.users, columns.items, columns.times, {"malformed_lines": columns.malformed})


def read_columns(path: str, names: Sequence[str] = (USER_ID, ITEM_ID, TIMESTAMP), *, quoted: bool = True) -> Columns:
    """The rows of one table whose user, item and timestamp columns have these names.

    `path` is a file, or the folder of the parts of a Parquet table. `quoted`: text that begins with a quote is quoted.
    Timestamps are numbers in one unit, ISO 8601 dates or Arrow's temporal types. A row without user, item or readable
    timestamp is malformed; raises `InputError` if more than 1 % are.
    """
    rows = _rows(path, names, quoted)
    users, items = (rows.table[name] for name in names[:2])
    usable = pc.and_(pc.is_valid(users), pc.is_valid(items)).to_numpy(zero_copy_only=False)
    found = None
    if names[2] in rows.table.column_names:
        found, readable = times.read(rows.table[names[2]], names[2], path)
        usable &= readable
        found = found[usable]
    malformed = rows.malformed + int((~usable).sum())
    example = rows.example or (f"row {int(np.argmin(usable)) + 1}" if malformed else "")
    expected = f"{names[0]}, {names[1]} and a number or ISO date as {names[2]}"
    text_file.check_malformed(path, malformed, len(usable) + rows.malformed, example, expected)
    kept = [column.to_numpy(zero_copy_only=False)[usable] for column in (users, items)]
    return Columns(kept[0], kept[1], found, malformed)


def _rows(path: str, names: Sequence[str], quoted: bool) -> Rows:
    def choose(found: list[str]) -> list[str]:
        missing = [name for name in names[:2] if name not in found]
        if missing:
            raise InputError(f"{path}: no column {' and no column '.join(missing)}; columns found: {', '.join(found)}")
        return [name for name in names if name in found]

    delimiter = next((each for ending, each in DELIMITERS.items() if path.endswith(ending)), None)
    if delimiter is not None:
        return tables.read_csv(path, path, choose, names[:2], delimiter=delimiter, quoted=quoted)
    return tables.read_parquet(tables.parquet_files(path) or [path], path, choose, names[:2])
