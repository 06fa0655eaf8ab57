"""Finding the files of a dataset, and reading titles."""

from __future__ import annotations

from collections.abc import Sequence

from lvlmrec import storage
from lvlmrec.errors import InputError
from lvlmrec.tables import text_file

TITLE_ENDINGS = ("_titles.csv", "_title_en.csv")
HEADER = ["item", "title"]  # of the format with quotes


def find(path: str, endings: Sequence[str], without: Sequence[str] = ()) -> str:
    """`path` itself, or the one file in the folder `path` whose name ends in one of `endings`.

    Names that end in one of `without` are ignored. Raises `InputError` that names what was found instead.
    """
    expected = " or ".join(f"*{ending}" for ending in endings)
    if not storage.is_dir(path):
        if not path.endswith(tuple(endings)):
            raise InputError(f"dataset.path={path!r}: expected {expected}, or a folder that holds one")
        return path
    files = [file.uri for file in storage.list_files(path)]
    found = [file for file in files if file.endswith(tuple(endings)) and not file.endswith(tuple(without))]
    if len(found) != 1:
        listed = ", ".join(_name(file) for file in (found or files)[:10]) or "nothing"
        problem = "several files to choose from" if found else f"no {expected}; the folder holds"
        raise InputError(f"dataset.path={path!r}: {problem}: {listed}" + ("; name one of them" if found else ""))
    return found[0]


def find_titles(path: str, ending: str) -> str | None:
    """The titles file beside the interaction file `path`, None without one: `ending` replaced by a title ending.

    Raises `InputError` if there are several.
    """
    candidates = [path.removesuffix(ending) + title for title in TITLE_ENDINGS]
    folder = path.rpartition("/")[0]
    names = {_name(file.uri) for file in storage.list_files(folder or ".")}
    found = [file for file in candidates if _name(file) in names]
    if len(found) > 1:
        raise InputError(f"{path}: several titles files beside it: {', '.join(_name(file) for file in found)}")
    return found[0] if found else None


def read_titles(path: str) -> tuple[dict[str, str], dict[str, int]]:
    """Titles by item_id, and counts of what was dropped, by reason. Raises `InputError`.

    Two formats, distinguished by the first line: with the header `item,title` CSV with quotes; without it `id, title`,
    unquoted, split at the first comma. An item's first title counts; empty titles are dropped.
    """
    text = text_file.decode(path, text_file.read_bytes(path))
    _, _, first = next(text_file.csv_rows(text.partition("\n")[0]), (0, 0, None))
    header = [name.strip().lower() for name in first or []]
    if [name for name in header if name] == HEADER:  # all lines may end in a comma
        pairs, malformed, example = _quoted_pairs(text, header)
    else:
        pairs, malformed, example = _unquoted_pairs(text)
    text_file.check_malformed(path, malformed, len(pairs) + malformed, example, ",".join(HEADER))
    titles: dict[str, str] = {}
    for item_id, title in pairs:
        titles.setdefault(item_id, title)
    known = {item_id: title for item_id, title in titles.items() if title}
    return known, {
        "titles_malformed_lines": malformed,
        "titles_duplicate_items": len(pairs) - len(titles),
        "titles_empty": len(titles) - len(known),
    }


Pairs = tuple[list[tuple[str, str]], int, str]  # (item_id, title), number of malformed lines, the first of these


def _quoted_pairs(text: str, header: list[str]) -> Pairs:
    item, title = map(header.index, HEADER)
    pairs, malformed, example = [], 0, ""
    for line, lines, row in text_file.csv_rows(text):
        if row is not None and len(row) == len(header) and (item_id := row[item].strip()):
            if item_id.lower() != HEADER[0] or row[title].strip().lower() != HEADER[1]:
                pairs.append((item_id, row[title].strip()))
                continue
            if line == 1:
                continue
        elif row is not None and not any(cell.strip() for cell in row):
            continue
        malformed, example = malformed + lines, example or text_file.show_line(text, line, lines)
    return pairs, malformed, example


def _unquoted_pairs(text: str) -> Pairs:
    pairs, malformed, example = [], 0, ""
    for number, line in enumerate(text.split("\n"), 1):
        item, comma, title = line.partition(",")
        if comma and item.strip():
            pairs.append((item.strip(), title.strip()))
        elif line.strip():
            malformed, example = malformed + 1, example or f"line {number}: {line[:80]!r}"
    return pairs, malformed, example


def _name(path: str) -> str:
    return path.rpartition("/")[2]
