"""Users' text files: bytes, lines and rows of CSV; errors name the line.

Messages begin with the `label` that the caller passes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

import numpy as np

from lvlmrec import storage
from lvlmrec.errors import InputError

MALFORMED_SHARE = 0.01  # of the lines; above it the file is taken to be of another format
BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
LINE_END = r"\r\n|\r|\n"
CHUNK_BYTES = 64 << 20  # searched for quotes at once, to bound memory


def read_bytes(uri: str, label: str = "") -> bytes:
    """The content of a text file, without byte order mark; `label` defaults to `uri`.

    Raises `InputError` if the file does not exist, is empty or UTF-16.
    """
    label = label or uri
    try:
        data = storage.read_bytes(uri)
    except (storage.StorageError, storage.StorageRefused):
        raise
    except OSError as error:
        raise InputError(f"{label}: cannot be read: {error.strerror or error}") from error
    data = data.removeprefix(BOM)
    if not data or data.isspace():
        raise InputError(f"{label}: empty file")
    if data.startswith(UTF_16):
        raise InputError(f"{label}: UTF-16; save it as UTF-8")
    if (offset := data.find(0)) >= 0:
        line = _line_number(data, offset)
        raise InputError(f"{label}, line {line}: a zero byte: the file is damaged or UTF-16; save it as UTF-8")
    return data


def decode(label: str, data: bytes) -> str:
    """UTF-8 text with `\\n` line ends. Raises `InputError` with the line of the first byte that is not UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{label}, {utf8_error(data)}") from error
    # where lines end in \n, a single \r is part of a line
    return text.replace("\r\n", "\n") if b"\n" in data else text.replace("\r", "\n")


def utf8_error(data: bytes) -> str:
    """The line and value of the first byte that is not UTF-8, for a message; empty if all are."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"line {_line_number(data, error.start)}: byte 0x{data[error.start]:02x} is not UTF-8"
    return ""


def csv_rows(text: str, delimiter: str = ",") -> Iterator[tuple[int, int, list[str] | None]]:
    """Rows of CSV text: number of the first line, number of lines, and the cells, None where a quote is broken.

    A field that begins with a quote may contain delimiters, line ends and doubled quotes (RFC 4180). Such a quote is
    broken if text follows the closing quote, or none closes. A quote inside another field is an ordinary character.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # Python's own limit is 128 kB for a cell
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        before = reader.line_num
        row: list[str] | None = None
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            pass
        yield before + 1, reader.line_num - before, row


def show_line(text: str, line: int, lines: int = 1) -> str:
    """A row of `csv_rows` for a message: number and beginning of its first line, and how many lines it has."""
    shown = re.split(LINE_END, text, maxsplit=line)[line - 1][:80]
    return f"line {line}: {shown!r}" + (f", whose quote takes in {lines} lines" if lines > 1 else "")


def check_malformed(label: str, malformed: int, lines: int, example: str, expected: str) -> None:
    """Raises `InputError` if more than 1 % of the lines are malformed, or there are no lines."""
    if not lines:
        raise InputError(f"{label}: no line of data; expected {expected}")
    if malformed > MALFORMED_SHARE * lines:
        raise InputError(f"{label}: {malformed} of {lines} lines malformed, such as {example}; expected {expected}")


def is_strictly_quoted(data: bytes, delimiter: str) -> bool:
    """Whether every quote opens or closes a whole field or is doubled inside one, so that all parsers agree."""
    content = np.frombuffer(data, np.uint8)
    is_edge = np.zeros(256, dtype=bool)
    is_edge[[*b'\r\n"', ord(delimiter)]] = True
    num_quotes = 0
    for start in range(0, len(content), CHUNK_BYTES):
        quotes = start + np.flatnonzero(content[start : start + CHUNK_BYTES] == ord('"'))
        first = num_quotes % 2
        opening, closing = quotes[first::2], quotes[1 - first :: 2]
        before, after = content[np.maximum(opening - 1, 0)], content[np.minimum(closing + 1, len(content) - 1)]
        if not ((is_edge[before] | (opening == 0)).all() and is_edge[after].all()):
            return False
        num_quotes += len(quotes)
    return num_quotes % 2 == 0


def _line_number(data: bytes, offset: int) -> int:
    return data.count(b"\n" if b"\n" in data else b"\r", 0, offset) + 1
