"""Item manifests: which items there are, from a table, a folder or a bucket prefix, or the texts of a feature set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath

import pandas as pd
import pyarrow as pa

from lvlmrec import storage, tables, text_file
from lvlmrec.columns import COVER_URI, ITEM_ID, URI
from lvlmrec.errors import InputError
from lvlmrec.features import store
from lvlmrec.features.recipe import Recipe

MEDIA_COLUMNS = {"video": URI, "cover": COVER_URI}
# Files that live beside videos; whatever else a folder holds is tried, and rejected with a reason if it is none.
NOT_VIDEOS = {
    ".csv",
    ".tsv",
    ".txt",
    ".md",
    ".json",
    ".yaml",
    ".yml",
    ".parquet",
    ".jpg",
    ".jpeg",
    ".png",
    ".srt",
    ".vtt",
}


def columns_for(recipe: Recipe) -> list[str]:
    """The columns, beside `item_id`, that a recipe needs: where its media lie, and what its prompts name."""
    return list(dict.fromkeys([*(MEDIA_COLUMNS[kind] for kind in recipe.media), *recipe.fields]))


def source_of(row: Mapping[str, str], recipe: Recipe, version: Callable[[str], str]) -> str:
    """16 hex digits that change with the texts of a manifest's row and, by `version`, with its files."""
    uris = [row[MEDIA_COLUMNS[kind]] for kind in recipe.media]
    seen = [*(version(uri) if uri else "" for uri in uris), *(row[field] for field in recipe.fields)]
    return hashlib.blake2b("\x1f".join(seen).encode(), digest_size=8).hexdigest()


def texts_from(source: str) -> str:
    """The fingerprint of the feature set at `source`, whose generated texts are the manifest; empty for another."""
    source = storage.absolute(source)
    return store.read_recipe(source).fingerprint if _is_feature_set(source) else ""


def read_manifest(source: str, columns: Sequence[str] = (URI,)) -> tuple[pa.Table, dict[str, int]]:
    """The catalogue at `source` as a table of texts, `item_id` and `columns`, and counts of what was left out.

    `source` is a Parquet or CSV file with those columns, or a folder of the parts of a Parquet table (relative URIs
    count from the folder that holds it); a folder or prefix of videos, where the item id is the file's stem; or a
    feature set with generated texts, whose columns are its prompts' names. Identical rows are dropped and counted, as
    are malformed lines. Raises `InputError` when nothing is there, columns are
    missing, more than 1 % of the lines are malformed, or one id stands for two things.
    """
    source = storage.absolute(source)
    if _is_feature_set(source):
        frame, report = _select(store.read_texts(source), source, columns), Counter[str]()
    elif storage.is_dir(source):
        frame, report = _from_folder(source, columns)
    elif storage.exists(source):
        frame, report = _from_table(source, [source], columns)
    else:
        raise InputError(f"input {source!r}: no such manifest, folder, prefix or feature set")
    rows = len(frame)
    frame = frame.drop_duplicates()
    report["duplicate_rows"] = rows - len(frame)
    twice = frame[ITEM_ID].duplicated(keep=False)
    if twice.any():
        first = frame.loc[twice, ITEM_ID].iloc[0]
        same = frame[frame[ITEM_ID] == first]
        differing = next(column for column in columns if same[column].nunique() > 1)
        values = ", ".join(same[differing].unique()[:3])
        raise InputError(
            f"input {source!r}: item_id {first!r} has several values of {differing} ({values}); give each its own id "
            f"in a manifest, a .csv or .parquet file with {ITEM_ID} and {URI}"
        )
    found = {reason: count for reason, count in report.items() if count}
    if frame.empty:
        left_out = f"; left out: {describe(found)}" if found else ""
        raise InputError(f"input {source!r}: holds no items{left_out}")
    return pa.Table.from_pandas(frame.reset_index(drop=True), preserve_index=False), found


def describe(report: Mapping[str, int]) -> str:
    """The counts of what was left out of a manifest, for a message."""
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in report.items())


def _is_feature_set(source: str) -> bool:
    return storage.exists(storage.join(source, store.RECIPE))


def _select(frame: pd.DataFrame, source: str, columns: Sequence[str]) -> pd.DataFrame:
    """`item_id` and `columns` of `frame` as texts. Raises `InputError`."""
    return frame[_choose([*frame.columns], source, columns)].fillna("").astype("str")


def _choose(found: Sequence[str], source: str, columns: Sequence[str]) -> list[str]:
    """`item_id` and `columns`, each once. Raises `InputError` when one is not among those `found`."""
    for column in (ITEM_ID, *columns):
        if column not in found:
            names = ", ".join(map(str, found))
            raise InputError(f"input {source!r}: no column {column!r}; its columns: {names}")
    return [*dict.fromkeys([ITEM_ID, *columns])]


def _from_folder(source: str, columns: Sequence[str]) -> tuple[pd.DataFrame, Counter[str]]:
    uris = [file.uri for file in storage.list_files(source, recursive=True)]
    if parts := tables.parts(source, uris):
        return _from_table(source, parts, columns)
    paths = [(PurePosixPath(uri), uri) for uri in uris]
    kept = [(path.stem, uri) for path, uri in paths if path.suffix.lower() not in NOT_VIDEOS]
    frame = pd.DataFrame(kept, columns=[ITEM_ID, URI], dtype="str")
    return _select(frame, source, columns), Counter(not_videos=len(paths) - len(kept))


def _from_table(source: str, files: Sequence[str], columns: Sequence[str]) -> tuple[pd.DataFrame, Counter[str]]:
    """The rows of the table `source`, a CSV or Parquet file or the folder of its `files`."""
    label = f"input {source!r}"
    suffix = PurePosixPath(files[0]).suffix.lower()

    def choose(found: list[str]) -> list[str]:
        return _choose(found, source, columns)

    if suffix == ".csv":
        rows = tables.read_csv(files[0], f"{label}: unreadable manifest", choose, [ITEM_ID])
    elif suffix == tables.PARQUET or files[0] != source:
        rows = tables.read_parquet(files, f"{label}: unreadable manifest", choose, [ITEM_ID])
    else:
        raise InputError(f"{label}: a manifest is a .csv or .parquet file, a folder, a prefix or a feature set")
    if rows.malformed:
        lines = len(rows.table) + rows.malformed
        expected = "as many columns as in the first line, a text with a comma in quotes"
        text_file.check_malformed(label, rows.malformed, lines, rows.example, expected)
    read = {name: tables.texts(rows.table[name], name, label).to_pandas() for name in rows.table.column_names}
    frame = pd.DataFrame(read, dtype="str")
    incomplete = frame[ITEM_ID] == ""
    if URI in columns:
        incomplete |= frame[URI] == ""
    folder = source.rsplit("/", 1)[0]
    frame = frame[~incomplete].copy()
    for column in {URI, COVER_URI} & {*columns}:
        frame[column] = frame[column].map(lambda uri: _resolve(folder, uri))
    return frame, Counter(malformed_lines=rows.malformed, incomplete_rows=int(incomplete.sum()))


def _resolve(folder: str, uri: str) -> str:
    if not uri or "://" in uri or uri.startswith("/"):
        return uri
    return storage.join(folder, uri)
