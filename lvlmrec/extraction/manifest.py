"""Item manifests: which videos there are, from a table, a folder or a bucket prefix."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

import pandas as pd
import pyarrow as pa

from lvlmrec import storage
from lvlmrec.columns import COVER_URI, ITEM_ID, TEXT, TITLE, URI
from lvlmrec.errors import InputError

OPTIONAL = (TITLE, COVER_URI, TEXT)
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


def read_manifest(source: str) -> tuple[pa.Table, dict[str, int]]:
    """The catalogue at `source` as a table `item_id, uri[, title, cover_uri, text]`, and counts of what was left out.

    `source` is a Parquet or CSV file with those columns (relative URIs count from the file's folder), or a folder
    or prefix of videos, where the item id is the file's stem. Identical rows are dropped and counted.
    Raises `InputError` when nothing is there, columns are missing, or one id stands for two videos.
    """
    source = storage.absolute(source)
    if storage.is_dir(source):
        frame, report = _from_folder(source)
    elif storage.exists(source):
        frame, report = _from_table(source)
    else:
        raise InputError(f"input {source!r}: no such manifest, folder or prefix")
    rows = len(frame)
    frame = frame.drop_duplicates([ITEM_ID, URI])
    report["duplicate_rows"] = rows - len(frame)
    twice = frame[ITEM_ID].duplicated(keep=False)
    if twice.any():
        first = frame.loc[twice, ITEM_ID].iloc[0]
        uris = ", ".join(frame.loc[frame[ITEM_ID] == first, URI].head(3))
        raise InputError(
            f"input {source!r}: item_id {first!r} stands for several videos ({uris}); give each its own id"
        )
    if frame.empty:
        raise InputError(f"input {source!r}: holds no videos")
    return pa.Table.from_pandas(frame.reset_index(drop=True), preserve_index=False), {
        k: n for k, n in report.items() if n
    }


def _from_folder(source: str) -> tuple[pd.DataFrame, Counter[str]]:
    paths = [(PurePosixPath(file.uri), file.uri) for file in storage.list_files(source, recursive=True)]
    kept = [(path.stem, uri) for path, uri in paths if path.suffix.lower() not in NOT_VIDEOS]
    frame = pd.DataFrame(kept, columns=[ITEM_ID, URI], dtype="str")
    return frame, Counter(not_videos=len(paths) - len(kept))


def _from_table(source: str) -> tuple[pd.DataFrame, Counter[str]]:
    suffix = PurePosixPath(source).suffix.lower()
    try:
        with storage.open_read(source) as file:
            if suffix == ".parquet":
                frame = pd.read_parquet(file)
            elif suffix == ".csv":
                frame = pd.read_csv(file, dtype="str", keep_default_na=False, encoding="utf-8-sig")
            else:
                raise InputError(f"input {source!r}: a manifest is a .csv or .parquet file, a folder or a prefix")
    except InputError:
        raise
    except (ValueError, OSError, pa.ArrowException) as error:
        raise InputError(f"input {source!r}: unreadable manifest: {' '.join(str(error).split())}") from error
    missing = [column for column in (ITEM_ID, URI) if column not in frame.columns]
    if missing:
        raise InputError(
            f"input {source!r}: no column {missing[0]!r}; its columns: {', '.join(map(str, frame.columns))}"
        )
    frame = frame[[ITEM_ID, URI, *(c for c in OPTIONAL if c in frame.columns)]]
    frame = frame.fillna("").astype("str")
    incomplete = (frame[ITEM_ID] == "") | (frame[URI] == "")
    folder = source.rsplit("/", 1)[0]
    frame = frame[~incomplete].assign(**{URI: lambda rows: rows[URI].map(lambda uri: _resolve(folder, uri))})
    return frame, Counter(incomplete_rows=int(incomplete.sum()))


def _resolve(folder: str, uri: str) -> str:
    if "://" in uri or uri.startswith("/"):
        return uri
    return storage.join(folder, uri)
