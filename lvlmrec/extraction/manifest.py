"""Item manifests: which items there are, from a table, a folder or a bucket prefix, or the texts of a feature set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lvlmrec import storage, tables
from lvlmrec.columns import COVER_URI, ITEM_ID, URI
from lvlmrec.errors import InputError
from lvlmrec.features import store
from lvlmrec.features.index import are_distinct
from lvlmrec.features.sources import Reading
from lvlmrec.tables import text_file

ROWS_AT_ONCE = 10_000  # of a manifest, as Python objects
MEDIA_COLUMNS = {"video": URI, "cover": COVER_URI}
NOT_VIDEOS, KIND = "not_videos", "not_videos_"  # in reports: how many, and how many of a kind
# What lives beside videos. Whatever else a folder holds is tried, and rejected with a reason if it is none: animated
# .gif and .ogg may be videos.
SUFFIXES = {
    "images": "jpg jpeg png webp heic heif avif bmp tif tiff svg ico dng cr2 cr3 nef arw psd thm",
    "sound": "mp3 m4a m4b aac wav flac oga opus weba wma aif aiff amr mka mid midi",
    "texts": "txt md rst log json json5 yaml yml xml html htm url webloc description nfo pdf doc docx rtf "
    "srt vtt ass ssa lrc ttml srv1 srv2 srv3 sub idx mks aae xmp "
    "bim eaf prproj ppt pptx m3u m3u8 pls md5 sha1 sha256 sfv torrent",
    "tables": "csv tsv parquet jsonl ndjson xls xlsx ods feather arrow npy npz h5 hdf5 db sqlite pt pth pkl",
    "archives": "zip tar gz tgz bz2 xz 7z rar zst dmg",
    "unfinished_downloads": "part partial ytdl crdownload download opdownload aria2 tmp temp !ut !qb crswap",
    "previews": "lrf lrv",  # that cameras write beside a video
    "system_files": "ini lnk lock crc bak ifo bup",
}
KIND_OF = {f".{suffix}": kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes.split()}
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
SYSTEM_FILES = {"Thumbs.db", "_SUCCESS"}


def columns_for(reading: Reading) -> list[str]:
    """The columns, beside `item_id`, that a recipe needs: where its media lie, and what its prompts name."""
    return list(dict.fromkeys([*(MEDIA_COLUMNS[kind] for kind in reading.media), *reading.fields]))


def source_of(row: Mapping[str, str], reading: Reading, version: Callable[[str], str]) -> str:
    """16 hex digits that change with the texts of a manifest's row and, by `version`, with its files."""
    uris = [row[MEDIA_COLUMNS[kind]] for kind in reading.media]
    parts = [*(version(uri) if uri else "" for uri in uris), *(row[field] for field in reading.fields)]
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).hexdigest()


def texts_from(source: str) -> str:
    """The fingerprint of the feature set at `source`, whose generated texts are the manifest; empty for another."""
    return store.read_recipe(source).fingerprint if _is_feature_set(source) else ""


def read_manifest(source: str, columns: Sequence[str] = (URI,)) -> tuple[pa.Table, dict[str, int]]:
    """The catalogue at `source` as a table of texts, `item_id` and `columns`, and counts of what was left out.

    `source` is a Parquet or CSV file with those columns, or a folder of the parts of a Parquet table (relative URIs
    count from the folder that holds it); a folder or prefix of videos, where the item id is the file's stem; or a
    feature set with generated texts, whose columns are its prompts' names. Identical rows are dropped and counted, as
    are malformed lines and files that are no videos, by kind. Raises `InputError` when nothing is there, columns are
    missing, more than 1 % of the lines are malformed, or one id stands for two things.
    """
    if _is_feature_set(source):
        texts = pa.Table.from_pandas(store.read_texts(source), preserve_index=False)
        rows, report = _select(texts, source, columns), Counter[str]()
    elif storage.is_dir(source):
        rows, report = _from_folder(source, columns)
    elif storage.exists(source):
        rows, report = _from_table(source, [source], columns)
    else:
        raise InputError(f"input {source!r}: no such manifest, folder, prefix or feature set")
    rows, report["duplicate_rows"] = _each_once(rows, source, columns)
    found = {reason: count for reason, count in report.items() if count}
    if not len(rows):
        left_out = f"; left out: {describe(found)}" if found else ""
        raise InputError(f"input {source!r}: holds no items{left_out}")
    pa.default_memory_pool().release_unused()  # what reading took on the way, as much again as the rows
    return rows, found


def describe(report: Mapping[str, int]) -> str:
    """What was left out of a manifest, for a message: `5 not videos (4 texts, 1 images), 2 incomplete rows`."""
    kinds = [f"{report[key]} {key.removeprefix(KIND)}" for key in report if key.startswith(KIND)]
    counted = []
    for key, count in report.items():
        if not key.startswith(KIND):
            counted.append(f"{count} {key}" + (f" ({', '.join(kinds)})" if key == NOT_VIDEOS else ""))
    return ", ".join(counted).replace("_", " ")


def _is_feature_set(source: str) -> bool:
    return storage.exists(storage.join(source, store.RECIPE))


def _each_once(rows: pa.Table, source: str, columns: Sequence[str]) -> tuple[pa.Table, int]:
    """`rows` without those that repeat another in all columns, and how many these were.

    Raises `InputError` when rows of one id differ.
    """
    if are_distinct(rows[ITEM_ID]):
        return rows, 0
    ids = rows[ITEM_ID].combine_chunks().dictionary_encode()
    codes = ids.indices.to_numpy()
    is_repeated = np.bincount(codes)[codes] > 1
    twice = rows.filter(pa.array(is_repeated)).to_pandas()
    distinct = twice.drop_duplicates()
    differs = distinct[ITEM_ID].duplicated(keep=False)
    if differs.any():
        first = distinct.loc[differs, ITEM_ID].iloc[0]
        same = distinct[distinct[ITEM_ID] == first]
        differing = next(column for column in columns if same[column].nunique() > 1)
        values = ", ".join(same[differing].unique()[:3])
        raise InputError(
            f"input {source!r}: item_id {first!r} has several values of {differing} ({values}); give each its own id "
            f"in a manifest, a .csv or .parquet file with {ITEM_ID} and {URI}"
        )
    _, first_places = np.unique(codes, return_index=True)
    return rows.take(pa.array(np.sort(first_places))), len(rows) - len(first_places)


def _select(rows: pa.Table, source: str, columns: Sequence[str]) -> pa.Table:
    """`item_id` and `columns` of `rows` as texts. Raises `InputError`."""
    chosen = rows.select(_choose(rows.column_names, source, columns))
    return pa.table({name: pc.fill_null(chosen[name].cast(pa.string()), "") for name in chosen.column_names})


def _choose(found: Sequence[str], source: str, columns: Sequence[str]) -> list[str]:
    """`item_id` and `columns`, each once. Raises `InputError` when one is not among those `found`."""
    for column in (ITEM_ID, *columns):
        if column not in found:
            names = ", ".join(map(str, found))
            raise InputError(f"input {source!r}: no column {column!r}; its columns: {names}")
    return [*dict.fromkeys([ITEM_ID, *columns])]


def _from_folder(source: str, columns: Sequence[str]) -> tuple[pa.Table, Counter[str]]:
    uris = [file.uri for file in storage.list_files(source, recursive=True)]
    if parts := tables.parts(source, uris):
        return _from_table(source, parts, columns)
    kept, report = [], Counter[str]()
    for uri in uris:
        path = PurePosixPath(tables.below(uri, source))
        if kind := _kind(path):
            report.update([NOT_VIDEOS, KIND + kind])
        elif not _is_utf8(uri):
            report["names_not_utf8"] += 1
        else:
            kept.append((path.stem, uri))
    ids, found = zip(*kept, strict=True) if kept else ((), ())
    rows = pa.table({ITEM_ID: pa.array(ids, pa.string()), URI: pa.array(found, pa.string())})
    return _select(rows, source, columns), report


def _kind(path: PurePosixPath) -> str:
    """What a file is whose name says that it is no video; else empty."""
    folders = path.parts[:-1]
    if path.name in SYSTEM_FILES or any(name in SYSTEM_FOLDERS or name.startswith(".") for name in folders):
        return "system_files"
    suffix = path.suffix.lower()
    return KIND_OF.get(".part" if suffix.startswith(".part-frag") else suffix, "")


def _is_utf8(uri: str) -> bool:
    """Whether a name is text; Linux allows any bytes, and the rest of the way, Arrow and Parquet, does not."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_table(source: str, files: Sequence[str], columns: Sequence[str]) -> tuple[pa.Table, Counter[str]]:
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
    read = pa.table({name: tables.texts(rows.table[name], name, label) for name in rows.table.column_names})
    incomplete = pc.equal(read[ITEM_ID], "")
    if URI in columns:
        incomplete = pc.or_(incomplete, pc.equal(read[URI], ""))
    num_incomplete = pc.sum(incomplete).as_py() or 0
    kept = read.filter(pc.invert(incomplete)) if num_incomplete else read
    folder = source.rpartition("/")[0] or "."
    for column in sorted({URI, COVER_URI} & {*columns}):
        resolved = [
            pa.array([_resolve(folder, uri) for uri in chunk.to_pylist()], pa.string())
            for chunk in _blocks(kept[column])
        ]
        kept = kept.set_column(kept.column_names.index(column), column, pa.chunked_array(resolved, pa.string()))
    return kept, Counter(malformed_lines=rows.malformed, incomplete_rows=num_incomplete)


def _blocks(column: pa.ChunkedArray) -> Iterator[pa.ChunkedArray]:
    """The column in blocks that Python may hold as objects."""
    return (column.slice(begin, ROWS_AT_ONCE) for begin in range(0, len(column), ROWS_AT_ONCE))


def _resolve(folder: str, uri: str) -> str:
    return uri if not uri or storage.is_absolute(uri) else storage.join(folder, uri)
