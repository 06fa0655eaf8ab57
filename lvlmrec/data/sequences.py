"""Files with one history per line: a user and the user's items, oldest first."""

from __future__ import annotations

from lvlmrec.data.interactions import Interactions, from_columns
from lvlmrec.tables import text_file


def read(path: str, separator: str) -> Interactions:
    """Read lines of a user, `separator`, and the user's items separated by spaces, without header or quotes.

    `separator` is a tab or a space; instead of a space there may be tabs. A user on several lines has the items of all
    of them, in the order of the lines. Raises `InputError`.
    """
    users: list[str] = []
    items: list[str] = []
    seen: set[str] = set()
    lines = usable = 0
    example = ""
    for number, line in enumerate(text_file.decode(path, text_file.read_bytes(path)).split("\n"), 1):
        if not line.strip():
            continue
        lines += 1
        user, _, rest = (
            line.partition(separator) if separator == "\t" else line.replace("\t", " ").strip().partition(" ")
        )
        user, row = user.strip(), rest.split()
        if not user or not row or "\t" in rest:
            example = example or f"line {number}: {line[:80]!r}"
            continue
        usable += 1
        seen.add(user)
        users += [user] * len(row)
        items += row
    shown = {"\t": "<TAB>", " ": " "}[separator]
    text_file.check_malformed(path, lines - usable, lines, example, f"user{shown}item item ...")
    report = {"malformed_lines": lines - usable, "duplicate_users": usable - len(seen)}
    return from_columns(users, items, report=report)
