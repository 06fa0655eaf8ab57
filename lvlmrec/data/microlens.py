"""MicroLens (https://github.com/westlake-repl/MicroLens): `*_pairs.tsv` or `*_pairs.csv`, and titles.

*_pairs.tsv   no header; user, a tab, the user's items separated by spaces, oldest first
*_pairs.csv   header user,item,timestamp (milliseconds)
"""

from __future__ import annotations

from lvlmrec.data import files, table
from lvlmrec.data.interactions import Dataset, Interactions, from_columns

ENDINGS = ("_pairs.tsv", "_pairs.csv")


def load(path: str) -> Dataset:
    """The dataset of a pairs file, or of the folder that holds exactly one, with the titles file beside it.

    Titles: `<prefix>_titles.csv` or `<prefix>_title_en.csv`, where the pairs file is `<prefix>_pairs.*`.
    Raises `InputError`.
    """
    file = files.find(path, ENDINGS)
    interactions = _read_tsv(file) if file.endswith(".tsv") else table.read(file, ("user", "item", "timestamp"))
    return table.with_titles(interactions, file, "_pairs" + file[-len(".tsv") :])


def _read_tsv(path: str) -> Interactions:
    """A user on several lines gets all their items, in the order of the lines."""
    users: list[str] = []
    items: list[str] = []
    seen: set[str] = set()
    lines = usable = 0
    example = ""
    for number, line in enumerate(files.decode(path, files.read_bytes(path)).split("\n"), 1):
        if not line.strip():
            continue
        lines += 1
        fields = line.split("\t")
        user, row = fields[0].strip(), fields[1].split() if len(fields) == 2 else []
        if not user or not row:
            example = example or f"line {number}: {line[:80]!r}"
            continue
        usable += 1
        seen.add(user)
        users += [user] * len(row)
        items += row
    files.check_malformed(path, lines - usable, lines, example, "user<TAB>item item ...")
    report = {"malformed_lines": lines - usable, "duplicate_users": usable - len(seen)}
    return from_columns(users, items, report=report)
