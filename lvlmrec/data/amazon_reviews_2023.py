"""Amazon Reviews 2023 (https://amazon-reviews-2023.github.io): `X.jsonl.gz` reviews and `meta_X.jsonl.gz` items.

X.jsonl.gz        one JSON object per line: user_id, parent_asin, timestamp (milliseconds), rating, text, ...
meta_X.jsonl.gz   one JSON object per line: parent_asin, title, ...

The item is the parent product. Every review is an interaction, whatever its rating; of a user's several reviews of an
item the first counts. The files contain all users and items: `dataset.core=5` gives the 5-core.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lvlmrec import storage
from lvlmrec.data import files, times
from lvlmrec.data.interactions import Dataset, from_columns
from lvlmrec.errors import InputError
from lvlmrec.tables import text_file

ENDINGS = (".jsonl.gz", ".jsonl")
META = "meta_"
EXPECTED = "user_id, parent_asin and timestamp"


def load(path: str) -> Dataset:
    """The dataset of a file of reviews, or of the folder that holds one, with the titles beside it.

    Raises `InputError`.
    """
    folder_files = storage.list_files(path) if storage.is_dir(path) else []
    file = files.find(path, ENDINGS, without=[each.uri for each in folder_files if META in each.uri.rpartition("/")[2]])
    users, items, times_ms, lines, example = [], [], [], 0, ""
    for number, line in _lines(file):
        lines += 1
        row = _parse(line)
        user, item, time = row.get("user_id"), row.get("parent_asin"), row.get("timestamp")
        if not (isinstance(user, str) and user and isinstance(item, str) and item) or not _is_int64(time):
            example = example or f"line {number}: {line[:80]!r}"
            continue
        users.append(user)
        items.append(item)
        times_ms.append(time)
    text_file.check_malformed(file, lines - len(users), lines, example, EXPECTED)
    report = {"malformed_lines": lines - len(users)}
    timestamps = np.array(times_ms, dtype=np.int64)
    times.check_units(timestamps, "timestamp", file)
    interactions = from_columns(users, items, timestamps, report)
    folder, slash, name = file.rpartition("/")
    meta = f"{folder}{slash}{META}{name}"
    if not storage.exists(meta):
        return Dataset(interactions, report=interactions.report)
    titles, title_counts = _read_titles(meta, {*interactions.item_ids})
    return Dataset(interactions, titles, interactions.report | title_counts)


def _read_titles(path: str, item_ids: set[str]) -> tuple[dict[str, str], dict[str, int]]:
    """Titles of `item_ids`, and counts of what was dropped."""
    titles: dict[str, str] = {}
    lines, malformed, example = 0, 0, ""
    for number, line in _lines(path):
        lines += 1
        row = _parse(line)
        item, title = row.get("parent_asin"), row.get("title") or ""
        if not isinstance(item, str) or not isinstance(title, str):
            malformed, example = malformed + 1, example or f"line {number}: {line[:80]!r}"
        elif item in item_ids and title.strip():
            titles.setdefault(item, title.strip())
    text_file.check_malformed(path, malformed, lines, example, "parent_asin and title")
    return titles, {"titles_malformed_lines": malformed, "items_without_title": len(item_ids) - len(titles)}


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers, streamed. Raises `InputError`."""
    try:
        with storage.open_read(path) as raw:
            file: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _is_int64(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 63


def _parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line, empty when the line is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
