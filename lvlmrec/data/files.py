"""Finding and reading the files of a dataset, and the rule for lines that cannot be read."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from lvlmrec import storage
from lvlmrec.errors import InputError

MALFORMED_SHARE = 0.01  # above it, what was read is not the dataset that was meant
TITLE_ENDINGS = ("_titles.csv", "_title_en.csv")
BOM = b"\xef\xbb\xbf"


def read_bytes(path: str) -> bytes:
    """The content of a file, without a byte order mark. Raises `InputError` if there is none, or it is empty."""
    try:
        data = storage.read_bytes(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    data = data.removeprefix(BOM)
    if not data.strip():
        raise InputError(f"{path}: empty file")
    return data


def find(path: str, endings: Sequence[str], without: Sequence[str] = ()) -> str:
    """`path` itself, or the one file in the folder `path` whose name ends in one of `endings`.

    Names that end in one of `without` do not count. Raises `InputError` naming what was found instead.
    """
    expected = " or ".join(f"*{ending}" for ending in endings)
    if not storage.is_dir(path):
        if not path.endswith(tuple(endings)):
            raise InputError(f"dataset.path={path!r}: expected {expected}, or a folder that holds one")
        return path
    files = [file.uri for file in storage.list_files(path)]
    found = [file for file in files if file.endswith(tuple(endings)) and not file.endswith(tuple(without))]
    if len(found) != 1:
        shown = ", ".join(_name(file) for file in (found or files)[:10]) or "nothing"
        what = "several files to choose from" if found else f"no {expected}; the folder holds"
        raise InputError(f"dataset.path={path!r}: {what}: {shown}" + ("; name one of them" if found else ""))
    return found[0]


def titles_beside(path: str, ending: str) -> str | None:
    """The titles file in the folder of the interaction file `path`: same name, a title ending in place of `ending`."""
    wanted = [path.removesuffix(ending) + title for title in TITLE_ENDINGS]
    folder = path.rpartition("/")[0]
    names = {_name(file.uri) for file in storage.list_files(folder or ".")}
    found = [file for file in wanted if _name(file) in names]
    if len(found) > 1:
        raise InputError(f"{path}: several titles files beside it: {', '.join(_name(file) for file in found)}")
    return found[0] if found else None


def read_titles(path: str) -> tuple[dict[str, str], dict[str, int]]:
    """Titles by item_id, and counts of what was dropped.

    Two formats, told apart by the first line: with the header `item,title` a CSV with quotes; without it `id, title`
    unquoted and split at the first comma. The first title of an item counts, an empty one is none. Raises `InputError`.
    """
    lines = decode(path, read_bytes(path)).split("\n")
    if [name.strip().lower() for name in lines[0].split(",")] == ["item", "title"]:
        rows = _quoted_rows(path, lines)
    else:
        rows = [line.split(",", 1) for line in lines if line.strip()]
    pairs = [[field.strip() for field in row] for row in rows]
    usable = [pair for pair in pairs if len(pair) == 2 and pair[0]]
    malformed = [pair for pair in pairs if not (len(pair) == 2 and pair[0])]
    check_malformed(path, len(malformed), len(pairs), f"{malformed[0]!r}" if malformed else "", "item,title")
    titles: dict[str, str] = {}
    for item_id, title in usable:
        titles.setdefault(item_id, title)
    told = {item_id: title for item_id, title in titles.items() if title}
    return told, {
        "titles_malformed_lines": len(malformed),
        "titles_duplicate_items": len(usable) - len(titles),
        "titles_empty": len(titles) - len(told),
    }


def _quoted_rows(path: str, lines: list[str]) -> list[list[str]]:
    reader = csv.reader(line + "\n" for line in lines[1:])
    try:
        return [row for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num + 1}: {error}") from error


def decode(path: str, data: bytes) -> str:
    """UTF-8 text with `\\n` line ends. Raises `InputError` with the line of the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8") from error


def check_malformed(path: str, malformed: int, lines: int, example: str, expected: str) -> None:
    """Raises `InputError` if more than 1 % of the lines are malformed, or there is none."""
    if not lines:
        raise InputError(f"{path}: no line of data; expected {expected}")
    if malformed > MALFORMED_SHARE * lines:
        raise InputError(f"{path}: {malformed} of {lines} lines malformed, such as {example}; expected {expected}")


def _name(path: str) -> str:
    return path.rpartition("/")[2]
