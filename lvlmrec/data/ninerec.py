"""NineRec (https://github.com/westlake-repl/NineRec): nine small sets of videos and news, and their large sources.

X_behaviour.tsv   no header; user, a tab, the user's items separated by spaces, oldest first
X_pair.csv        no header; user, item, timestamp; the source sets have item, user, timestamp; QB and TN no timestamp
X_item.csv        no header; item, Chinese text, English text

Users are called u14500, items v17551.
"""

from __future__ import annotations

import csv

import numpy as np

from lvlmrec import storage
from lvlmrec.data import files, sequences
from lvlmrec.data.interactions import Dataset, Interactions, from_columns
from lvlmrec.errors import InputError

BEHAVIOUR, PAIR, ITEM = "_behaviour.tsv", "_pair.csv", "_item.csv"


def load(path: str) -> Dataset:
    """The dataset of a behaviour or pair file, or of the folder that holds one; of both, behaviour. English titles.

    Raises `InputError`.
    """
    names = [file.uri for file in storage.list_files(path)] if storage.is_dir(path) else [path]
    has_behaviour = any(name.endswith(BEHAVIOUR) for name in names)
    file = files.find(path, (BEHAVIOUR,) if has_behaviour else (BEHAVIOUR, PAIR))
    interactions = sequences.read(file, "\t") if file.endswith(BEHAVIOUR) else _read_pairs(file)
    beside = file.removesuffix(BEHAVIOUR).removesuffix(PAIR) + ITEM
    if not storage.exists(beside):
        return Dataset(interactions, report=interactions.report)
    titles, report = _read_titles(beside)
    report["items_without_title"] = sum(item_id not in titles for item_id in interactions.item_ids)
    return Dataset(interactions, titles, interactions.report | report)


def _read_pairs(path: str) -> Interactions:
    """Rows of a user, an item and a time, or none of them with a time."""
    rows = _rows(path)
    timed = any(len(row) > 2 and row[2] for row in rows)
    is_usable = [len(row) in (2, 3) and all(row[:2]) and (not timed or _is_number(row[-1])) for row in rows]
    _check(path, rows, is_usable, "user,item,timestamp")
    usable = [row for row, good in zip(rows, is_usable, strict=True) if good]
    user, item = (1, 0) if usable[0][0].startswith("v") and usable[0][1].startswith("u") else (0, 1)
    times = np.array([float(row[2]) for row in usable]) if timed else None
    report = {"malformed_lines": len(rows) - len(usable)}
    return from_columns([row[user] for row in usable], [row[item] for row in usable], times, report)


def _read_titles(path: str) -> tuple[dict[str, str], dict[str, int]]:
    """The English text of each item, else the Chinese one."""
    rows = _rows(path)
    is_usable = [len(row) == 3 and row[0] != "" for row in rows]
    _check(path, rows, is_usable, "item,Chinese text,English text")
    usable = [row for row, good in zip(rows, is_usable, strict=True) if good]
    titles = {item: english or chinese for item, chinese, english in reversed(usable) if english or chinese}
    return titles, {"titles_malformed_lines": len(rows) - len(usable)}


def _check(path: str, rows: list[list[str]], is_usable: list[bool], expected: str) -> None:
    malformed = is_usable.count(False)
    example = f"{rows[is_usable.index(False)]!r}" if malformed else ""
    files.check_malformed(path, malformed, len(rows), example, expected)


def _rows(path: str) -> list[list[str]]:
    reader = csv.reader(files.decode(path, files.read_bytes(path)).splitlines(keepends=True))
    try:
        return [[field.strip() for field in row] for row in reader if any(row)]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
