"""NineRec (https://github.com/westlake-repl/NineRec): nine small sets of videos and news, and their large sources.

X_behaviour.tsv   no header; user, a tab, the user's items separated by spaces, oldest first
X_pair.csv        no header; user, item, timestamp; the source sets have item, user, timestamp; QB and TN no timestamp
X_item.csv        no header; item, Chinese text, English text

Users are called u14500, items v17551.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lvlmrec import storage
from lvlmrec.data import files, sequences, times
from lvlmrec.data.interactions import Dataset, Interactions, from_columns
from lvlmrec.tables import text_file

BEHAVIOUR, PAIR, ITEM = "_behaviour.tsv", "_pair.csv", "_item.csv"


def load(path: str) -> Dataset:
    """The dataset of a behaviour or pair file, or of the folder that holds one; of both, the behaviour file.

    Titles are English where there are any, else Chinese. Raises `InputError`.
    """
    names = [file.uri for file in storage.list_files(path)] if storage.is_dir(path) else [path]
    has_behaviour = any(name.endswith(BEHAVIOUR) for name in names)
    file = files.find(path, (BEHAVIOUR,) if has_behaviour else (BEHAVIOUR, PAIR))
    interactions = sequences.read(file, "\t") if file.endswith(BEHAVIOUR) else _read_pairs(file)
    item_file = file.removesuffix(BEHAVIOUR).removesuffix(PAIR) + ITEM
    if not storage.exists(item_file):
        return Dataset(interactions, report=interactions.report)
    titles, report = _read_titles(item_file)
    report["items_without_title"] = sum(item_id not in titles for item_id in interactions.item_ids)
    return Dataset(interactions, titles, interactions.report | report)


def _read_pairs(path: str) -> Interactions:
    """Rows of user, item and time; a file without any time may have rows of user and item."""
    rows, num_broken, example = _rows(path)
    has_times = any(len(row) > 2 and row[2] for row in rows)
    widths = (3,) if has_times else (2, 3)
    is_usable = np.array([len(row) in widths and all(row[:2]) for row in rows], dtype=bool)
    timestamps = None
    if has_times:
        texts = [row[2] if is_good else None for row, is_good in zip(rows, is_usable, strict=True)]
        timestamps, readable = times.read(pa.chunked_array([pa.array(texts, pa.string())]), "timestamp", path)
        is_usable &= readable
        timestamps = timestamps[is_usable]
    malformed = _check(path, rows, is_usable, num_broken, example, "user,item,timestamp")
    usable = [row for row, is_good in zip(rows, is_usable, strict=True) if is_good]
    user, item = (1, 0) if usable[0][0].startswith("v") and usable[0][1].startswith("u") else (0, 1)
    report = {"malformed_lines": malformed}
    return from_columns([row[user] for row in usable], [row[item] for row in usable], timestamps, report)


def _read_titles(path: str) -> tuple[dict[str, str], dict[str, int]]:
    """The English text of each item, else the Chinese one."""
    rows, num_broken, example = _rows(path)
    is_usable = np.array([len(row) == 3 and row[0] != "" for row in rows], dtype=bool)
    malformed = _check(path, rows, is_usable, num_broken, example, "item,Chinese text,English text")
    usable = [row for row, is_good in zip(rows, is_usable, strict=True) if is_good]
    titles = {item: english or chinese for item, chinese, english in reversed(usable) if english or chinese}
    return titles, {"titles_malformed_lines": malformed}


def _rows(path: str) -> tuple[list[list[str]], int, str]:
    """Rows without broken quotes, the number of lines that are in none of them, and the first of these lines."""
    text = text_file.decode(path, text_file.read_bytes(path))
    rows, num_broken, example = [], 0, ""
    for line, lines, row in text_file.csv_rows(text):
        if row is None:
            num_broken, example = num_broken + lines, example or text_file.show_line(text, line, lines)
        elif any(cells := [cell.strip() for cell in row]):
            rows.append(cells)
    return rows, num_broken, example


def _check(
    path: str, rows: list[list[str]], is_usable: NDArray[np.bool_], num_broken: int, example: str, expected: str
) -> int:
    """The number of malformed lines. Raises `InputError` if these are too many."""
    malformed = num_broken + int((~is_usable).sum())
    if malformed > num_broken:
        example = example or f"{rows[int(np.argmin(is_usable))]!r}"
    text_file.check_malformed(path, malformed, len(rows) + num_broken, example, expected)
    return malformed
