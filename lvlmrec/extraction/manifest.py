"""Item manifests: which items there are, from a table, a folder or a bucket prefix, or the texts of a feature set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath

import pandas as pd
import pyarrow as pa

from lvlmrec import storage
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

    `source` is a Parquet or CSV file with those columns (relative URIs count from the file's folder); a folder or
    prefix of videos, where the item id is the file's stem; or a feature set with generated texts, whose columns are
    its prompts' names. Identical rows are dropped and counted. Raises `InputError` when nothing is there, columns are
    missing, or one id stands for two things.
    """
    source = storage.absolute(source)
    if _is_feature_set(source):
        frame, report = _select(store.read_texts(source), source, columns), Counter[str]()
    elif storage.is_dir(source):
        frame, report = _from_folder(source, columns)
    elif storage.exists(source):
        frame, report = _from_table(source, columns)
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
            f"input {source!r}: item_id {first!r} has several values of {differing} ({values}); give each its own id"
        )
    if frame.empty:
        raise InputError(f"input {source!r}: holds no items")
    return pa.Table.from_pandas(frame.reset_index(drop=True), preserve_index=False), {
        k: n for k, n in report.items() if n
    }


def _is_feature_set(source: str) -> bool:
    return storage.exists(storage.join(source, store.RECIPE))


def _select(frame: pd.DataFrame, source: str, columns: Sequence[str]) -> pd.DataFrame:
    """`item_id` and `columns` of `frame` as texts. Raises `InputError`."""
    for column in (ITEM_ID, *columns):
        if column not in frame.columns:
            names = ", ".join(map(str, frame.columns))
            raise InputError(f"input {source!r}: no column {column!r}; its columns: {names}")
    return frame[[ITEM_ID, *dict.fromkeys(columns)]].fillna("").astype("str")


def _from_folder(source: str, columns: Sequence[str]) -> tuple[pd.DataFrame, Counter[str]]:
    paths = [(PurePosixPath(file.uri), file.uri) for file in storage.list_files(source, recursive=True)]
    kept = [(path.stem, uri) for path, uri in paths if path.suffix.lower() not in NOT_VIDEOS]
    frame = pd.DataFrame(kept, columns=[ITEM_ID, URI], dtype="str")
    return _select(frame, source, columns), Counter(not_videos=len(paths) - len(kept))


def _from_table(source: str, columns: Sequence[str]) -> tuple[pd.DataFrame, Counter[str]]:
    frame = _select(_read_table(source), source, columns)
    incomplete = frame[ITEM_ID] == ""
    if URI in columns:
        incomplete |= frame[URI] == ""
    folder = source.rsplit("/", 1)[0]
    frame = frame[~incomplete].copy()
    for column in {URI, COVER_URI} & {*columns}:
        frame[column] = frame[column].map(lambda uri: _resolve(folder, uri))
    return frame, Counter(incomplete_rows=int(incomplete.sum()))


def _read_table(source: str) -> pd.DataFrame:
    suffix = PurePosixPath(source).suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise InputError(
            f"input {source!r}: a manifest is a .csv or .parquet file, a folder, a prefix or a feature set"
        )
    try:
        with storage.open_read(source) as file:
            if suffix == ".parquet":
                return pd.read_parquet(file)
            return pd.read_csv(file, dtype="str", keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, OSError, pa.ArrowException) as error:
        raise InputError(f"input {source!r}: unreadable manifest: {' '.join(str(error).split())}") from error


def _resolve(folder: str, uri: str) -> str:
    if not uri or "://" in uri or uri.startswith("/"):
        return uri
    return storage.join(folder, uri)
