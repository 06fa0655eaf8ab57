"""Object storage and local files behind one set of functions; nothing else knows fsspec.

A URI is a local path or `s3://bucket/key` (any protocol fsspec knows). Endpoint, region, profile and
credentials come from the environment alone (AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE, ...).
Writes are atomic: a reader sees the whole file or none.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from lvlmrec.errors import InputError

WRITER = "lvlmrec-writer"  # key of an object's metadata


@dataclass(frozen=True)
class StoredFile:
    """A file of a listing: its URI, its size in bytes, its modification time in seconds since 1970."""

    uri: str
    size: int
    modified: float


def is_remote(uri: str) -> bool:
    """Whether `uri` names something other than a local path."""
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """`uri` as every process understands it: local paths made absolute, remote ones without a trailing slash."""
    if is_remote(uri):
        return uri.rstrip("/")
    return str(Path(uri.removeprefix("file://")).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = _filesystem(uri)
    return bool(fs.exists(path))


def is_dir(uri: str) -> bool:
    """Whether `uri` is a folder or a prefix that holds something."""
    fs, path = _filesystem(uri)
    return bool(fs.isdir(path))


def list_files(uri: str, *, recursive: bool = False) -> list[StoredFile]:
    """The files under a folder or prefix, sorted by URI; hidden ones (a leading dot) are left out."""
    fs, path = _filesystem(uri)
    found = fs.find(path, maxdepth=None if recursive else 1, detail=True) if fs.isdir(path) else {}
    scheme = uri.split("://", 1)[0] + "://" if is_remote(uri) else ""
    files = [
        StoredFile(scheme + name.removeprefix(scheme), int(info["size"]), _modified(info))
        for name, info in found.items()
    ]
    return sorted((f for f in files if not f.uri.rsplit("/", 1)[-1].startswith(".")), key=lambda f: f.uri)


def version(uri: str) -> str:
    """What changes when a file does: its ETag where the store has such, else size and modification time.

    Raises `FileNotFoundError`.
    """
    fs, path = _filesystem(uri)
    return _version(fs.info(path))


def open_read(uri: str) -> BinaryIO:
    """A seekable binary file. Raises `FileNotFoundError`."""
    fs, path = _filesystem(uri)
    return cast(BinaryIO, fs.open(path, "rb"))


def read_bytes(uri: str) -> bytes:
    """The content of a file. Raises `FileNotFoundError`."""
    with open_read(uri) as file:
        return file.read()


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a file atomically: locally by renaming, remotely by a single put."""
    fs, path = _filesystem(uri)
    if is_remote(uri):
        fs.pipe_file(path, bytes(data))
        return
    with _whole_temporary(Path(path), data) as temporary:
        temporary.replace(path)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file where there is none, atomically; whether this call made it. Of many at once exactly one is told so.

    On S3 a conditional put (`If-None-Match: *`); its writer's mark in the object's metadata tells a put whose answer
    was lost from one that came second. A store that ignores the condition lets two win that come within one round
    trip; one that refuses it raises `OSError`.
    """
    if exists(uri):  # all that protects on a store that ignores the condition
        return False
    fs, path = _filesystem(uri)
    if not is_remote(uri):
        with _whole_temporary(Path(path), data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        return True
    is_s3, writer = "s3" in fs.protocol, uuid.uuid4().hex
    try:
        fs.pipe_file(path, data, mode="create", **({"Metadata": {WRITER: writer}} if is_s3 else {}))
    except OSError as error:
        if not isinstance(error, FileExistsError) and _http_status(error) != 412:
            raise
        return bool(is_s3 and fs.metadata(path).get(WRITER) == writer)
    return True


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns. Raises `FileNotFoundError`, `pyarrow.ArrowInvalid`."""
    with open_read(uri) as file:
        return pq.read_table(file, columns=list(columns) if columns is not None else None, use_threads=False)


def write_table(uri: str, table: pa.Table, **options: Any) -> None:
    """Write a Parquet file atomically; `options` go to `pyarrow.parquet.write_table`."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    write_bytes(uri, buffer.getbuffer())


def remove(uri: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens when it is not there."""
    fs, path = _filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path with the content of `uri`: the file itself, or a temporary copy of a remote one."""
    if not is_remote(uri):
        yield Path(absolute(uri))
        return
    folder = Path(tempfile.mkdtemp(prefix="lvlmrec-"))
    try:
        target = folder / uri.rsplit("/", 1)[-1]
        with open_read(uri) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, length=1 << 20)
        yield target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        # Listings are not cached: other processes write while we read.
        return cast(tuple[Any, str], fsspec.url_to_fs(absolute(uri), use_listings_cache=False))
    except (ValueError, ImportError) as error:
        raise InputError(f"{uri!r}: no such storage: {error}") from error


@contextmanager
def _whole_temporary(target: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A hidden file beside `target` with all of `data` on the disk; removed at the end unless renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _http_status(error: BaseException) -> int:
    """The status of the answer that s3fs turned into `error`, 0 where there was none."""
    response = getattr(error.__cause__ or error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _version(info: dict[str, Any]) -> str:
    return str(info.get("ETag") or f"{info['size']}-{_modified(info)}").strip('"')


def _modified(info: dict[str, Any]) -> float:
    stamp = info.get("mtime") or info.get("LastModified") or 0.0
    return float(stamp.timestamp() if hasattr(stamp, "timestamp") else stamp)
