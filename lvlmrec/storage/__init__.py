"""Object storage and local files behind one set of functions; nothing else knows fsspec.

A URI is a local path, `file:///path` with percent-encoding, or `s3://bucket/key` (any protocol that fsspec knows).
Every character of a path or key is literal: none is a pattern, joins two URIs or begins a query. Endpoint, region,
profile and credentials come from the environment alone (AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE, ...). Writes are
atomic: a reader sees the whole file or none.

Requests to S3 are retried in two loops. botocore's `standard` mode waits up to 1, 2, 4, 8 s, at random, after
throttling, 5xx and broken or silent connections. s3fs retries what `s3.is_passing` accepts, throttling included, up to
five times, and reads a broken body again. After that `StorageError` or `StorageRefused` is raised.
"""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote

import fsspec
import pyarrow as pa
from botocore.exceptions import BotoCoreError, HTTPClientError
from botocore.parsers import ResponseParserError

from lvlmrec.errors import InputError, StorageError, StorageRefused, one_line, writing
from lvlmrec.storage import listing, parquet, s3
from lvlmrec.storage.listing import StoredFile as StoredFile

T = TypeVar("T")
ATTEMPTS = 5
WRITER = "lvlmrec-writer"  # key in an object's metadata
MAX_NAME_BYTES = 255  # of a file name on Linux; object names may have 1024
REMOTE = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
FILE = re.compile(r"file:(//(localhost(?=/))?|(?=/))")  # also the `file:/path` of Spark and Java


def is_remote(uri: str) -> bool:
    """Whether `uri` names something other than a local path."""
    return REMOTE.match(uri) is not None


def is_absolute(uri: str) -> bool:
    """Whether `uri` does not depend on the working directory: a path from the root, or a URI."""
    return uri.startswith("/") or is_remote(uri) or FILE.match(uri) is not None


def absolute(uri: str) -> str:
    """`uri` independent of the working directory: local paths absolute, remote ones without a trailing slash."""
    if is_remote(uri):
        return uri.rstrip("/")
    if found := FILE.match(uri):
        uri = unquote(uri[found.end() :], errors="surrogateescape")
    return str(Path(os.path.expanduser(uri)).absolute())  # noqa: PTH111 (Path's own raises for `~name` of no user)


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder exists at `uri`."""
    with _filesystem(uri) as (fs, path):
        return bool(fs.exists(path))


def is_dir(uri: str) -> bool:
    """Whether `uri` is a folder, or a prefix of some object."""
    with _filesystem(uri) as (fs, path):
        if not _is_s3(fs):
            return bool(fs.isdir(path))
        try:
            return any(True for page in _pages(fs, path, recursive=True, MaxKeys=1) for _ in page)
        except FileNotFoundError:  # no such bucket
            return False


def iter_files(uri: str, *, recursive: bool = False) -> Iterator[StoredFile]:
    """The files under a folder or prefix, streamed; hidden ones (a leading dot) are left out.

    S3 and local folders are listed page by page and folder by folder, in the order of the URIs.
    """
    with _filesystem(uri) as (fs, path):
        if not is_remote(uri):
            files = listing.local_files(path, recursive)
        elif _is_s3(fs):
            files = (file for page in _pages(fs, path, recursive) for file in page)
        else:
            files = listing.found_files(fs, path, uri, recursive)
        yield from (file for file in files if not file.uri.rsplit("/", 1)[-1].startswith("."))


def list_files(uri: str, *, recursive: bool = False) -> list[StoredFile]:
    """The files of `iter_files`, sorted by URI."""
    return sorted(iter_files(uri, recursive=recursive), key=lambda file: file.uri)


def list_folders(uri: str) -> list[str]:
    """The URIs of the folders right in a folder or prefix, sorted; hidden ones are left out, as is what lies deeper."""
    with _filesystem(uri) as (fs, path):
        try:
            names = [
                str(entry["name"]).rstrip("/") for entry in fs.ls(path, detail=True) if entry["type"] == "directory"
            ]
        except (FileNotFoundError, NotADirectoryError):
            return []
    folders = sorted(name.rsplit("/", 1)[-1] for name in names)
    return [join(uri, name) for name in folders if not name.startswith(".")]


def version(uri: str) -> str:
    """A string that changes when the file does: its ETag where the store has one, else size and modification time.

    Raises `FileNotFoundError`.
    """
    with _filesystem(uri) as (fs, path):
        info = fs.info(path)
    return str(info.get("ETag") or f"{info['size']}-{listing.modified(info)}").strip('"')


def open_read(uri: str, ahead: bool = True) -> BinaryIO:
    """A seekable binary file whose reads are never short. Raises `FileNotFoundError`.

    ahead: True: fetch a remote file in blocks of 50 MB, to read all of it; False: fetch only what is read
    """
    with _filesystem(uri) as (fs, path):
        file = fs.open(path, "rb")
    if cache := getattr(file, "cache", None):
        cache.fetcher = functools.partial(_fetch, uri, cache.fetcher)
        file.cache = cache if ahead else parquet.Ranges(cache)
    return cast(BinaryIO, file)


def read_bytes(uri: str) -> bytes:
    """The content of a file. Raises `FileNotFoundError`."""
    return _read(uri, lambda file: file.read())


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a file atomically: locally by renaming, remotely by a put or, above 100 MB, a multipart upload."""
    with _filesystem(uri) as (fs, path):
        if not is_remote(uri):
            with _whole_temporary(Path(path), data) as temporary:
                temporary.replace(path)
            return
        try:
            fs.pipe_file(path, bytes(data))
        except (
            FileNotFoundError
        ):  # the answer that completed a multipart upload was lost, and its retry finds no upload
            fs.pipe_file(path, bytes(data))


def create_bytes(uri: str, data: bytes) -> bool:
    """Create a file atomically unless it exists; returns whether this call did. Of concurrent calls exactly one does.

    On S3 by a conditional put (`If-None-Match: *`); a writer's id in the object's metadata distinguishes a successful
    put whose answer was lost from one that came second. On a store that ignores the condition two calls within one
    round trip may both return True; a store that refuses it raises `OSError`.
    """
    if exists(uri):  # the only protection on a store that ignores the condition
        return False
    with _filesystem(uri) as (fs, path):
        if not is_remote(uri):
            with _whole_temporary(Path(path), data) as temporary:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            return True
        writer = uuid.uuid4().hex
        try:
            fs.pipe_file(path, data, mode="create", **({"Metadata": {WRITER: writer}} if _is_s3(fs) else {}))
        except OSError as error:
            if not isinstance(error, FileExistsError) and s3.http_status(error) != 412:
                raise
            return bool(_is_s3(fs) and fs.metadata(path).get(WRITER) == writer)
        return True


def check_writable(folder: str) -> None:
    """Raises `StorageRefused` or `StorageError` when the folder cannot be written; creates and removes a small file."""
    folder = absolute(folder)
    was_there = exists(folder)
    probe = join(folder, f".probe-{uuid.uuid4().hex}")
    write_bytes(probe, b"")
    remove(probe)
    if not was_there and not is_remote(folder):
        with suppress(OSError):  # another process writes there by now
            Path(folder).rmdir()


def read_table(uri: str, columns: Sequence[str] | None = None, rows: Sequence[int] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns and rows. Raises `FileNotFoundError`, `pyarrow.ArrowInvalid`."""
    return _read(uri, lambda file: parquet.read(file, columns, rows), ahead=False)


def write_table(uri: str, table: pa.Table, **options: Any) -> None:
    """Write a Parquet file atomically; `options` as `parquet.write`'s."""
    buffer = io.BytesIO()
    parquet.write(table, buffer, **options)
    write_bytes(uri, buffer.getbuffer())


def remove(uri: str) -> None:
    """Remove a file, or a folder with everything in it, if it exists."""
    with _filesystem(uri) as (fs, path):
        for attempt in range(ATTEMPTS):
            if not fs.exists(path):
                return
            time.sleep(attempt)  # S3's answer to a bulk deletion, which lists failures by key, is not read
            _remove_all(fs, path)
        if fs.exists(path):
            raise OSError(f"still there after {ATTEMPTS} deletions")


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path with the content of `uri`: the file itself, or a temporary copy of a remote one."""
    if not is_remote(uri):
        yield Path(absolute(uri))
        return
    folder = Path(tempfile.mkdtemp(prefix="lvlmrec-"))
    try:
        name = os.fsencode(uri.rsplit("/", 1)[-1])[-MAX_NAME_BYTES:]  # FFmpeg guesses formats by the ending
        target = folder / name.decode(errors="ignore")
        with writing(str(folder)):
            _read(uri, functools.partial(_copy, target))
        yield target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _filesystem(uri: str) -> Iterator[tuple[Any, str]]:
    """The filesystem of `uri`, one per process for all threads, and the path in it; errors as `_one_line_errors`."""
    options = _s3_options() if uri.startswith(("s3://", "s3a://")) else {}
    try:
        # Listings are not cached, as other processes write meanwhile.
        fs, path = _opened(absolute(uri), use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        raise InputError(f"{uri!r}: no such storage: {error}") from error
    with _one_line_errors(uri):
        yield fs, path


def _opened(uri: str, **options: Any) -> tuple[Any, str]:
    """The filesystem and the path of an absolute URI; fsspec's own function splits one that has `::` in it."""
    protocol = uri.split("://", 1)[0].lower() if is_remote(uri) else "file"
    kind = fsspec.get_filesystem_class(protocol)
    return fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(uri), **options), kind._strip_protocol(uri)


@contextmanager
def _one_line_errors(uri: str) -> Iterator[None]:
    """Turns errors of s3fs and botocore into `FileNotFoundError`, `StorageRefused` or `StorageError` of one line."""
    try:
        yield
    except (StorageError, StorageRefused):
        raise
    except (OSError, BotoCoreError, ResponseParserError) as error:
        if not is_remote(uri):
            raise
        text = one_line(error) or type(error).__name__
        cause = f"{uri}: {text}"
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{uri}: no such file" if text in uri else cause) from error
        is_broken = isinstance(error, (OSError, HTTPClientError, *s3.GARBLED)) and not isinstance(
            error, PermissionError
        )
        raise (StorageError if is_broken else StorageRefused)(cause) from error


def _read(uri: str, read: Callable[[BinaryIO], T], ahead: bool = True) -> T:
    """`read(file)` of the opened file, repeated when another process replaces it meanwhile."""
    for attempt in range(ATTEMPTS):
        try:
            with open_read(uri, ahead) as file:
                return read(file)
        except StorageError as error:
            if attempt == ATTEMPTS - 1 or s3.http_status(error) != 412:
                raise
    raise AssertionError("the last attempt returns or raises")


def _fetch(uri: str, fetch: Callable[[int, int], bytes], start: int, end: int) -> bytes:
    """Bytes `start` to `end` by `fetch`, repeated when a proxy or store returns fewer. Raises as `_one_line_errors`."""
    with _one_line_errors(uri):
        for _ in range(ATTEMPTS):
            data = fetch(start, end)
            if len(data) == end - start:
                return data
        raise OSError(f"gave {len(data)} of {end - start} bytes, {ATTEMPTS} times")


def _copy(target: Path, source: BinaryIO) -> None:
    with target.open("wb") as sink:
        shutil.copyfileobj(source, sink, length=1 << 20)


@contextmanager
def _whole_temporary(target: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A hidden file beside `target` with all of `data`, synced to disk; removed at the end unless renamed."""
    temporary = target.with_name(f".{uuid.uuid4().hex}")  # without the target's name, which may have the maximal length
    with writing(str(target)):
        with suppress(FileExistsError):  # the parent is a file, for which opening raises below
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _s3_options() -> dict[str, Any]:
    """Arguments of `s3fs.S3FileSystem`."""
    from s3fs import core  # takes a second

    # botocore retries these; s3fs would do so 5 times more, and 25 times while reading a body
    core.S3_RETRYABLE_ERRORS = tuple(kind for kind in core.S3_RETRYABLE_ERRORS if kind is not HTTPClientError)
    core.set_custom_error_handler(s3.is_passing)
    region = os.environ.get("AWS_REGION")  # botocore only reads AWS_DEFAULT_REGION
    return {
        "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": ATTEMPTS}},
        "client_kwargs": {"region_name": region} if region else {},
    }


def _is_s3(fs: Any) -> bool:
    return "s3" in fs.protocol


def _pages(fs: Any, path: str, recursive: bool, **options: Any) -> Iterator[list[StoredFile]]:
    """The objects under a prefix, up to 1000 at a time, in the order of their keys. Raises `FileNotFoundError`."""
    bucket, _, _ = fs.split_path(path)
    for page in s3.list_pages(fs, path, recursive, **options):
        yield [
            StoredFile(
                f"s3://{bucket}/{item['Key']}",
                item["Size"],
                item["LastModified"].timestamp(),
                item.get("ETag", "").strip('"'),
            )
            for item in page
            if not item["Key"].endswith("/")  # S3 consoles create such objects for folders
        ]


def _remove_all(fs: Any, path: str) -> None:
    """Remove a file, or a folder with everything in it. A remote `fs.rm` would take the name for a pattern."""
    if "file" in fs.protocol:
        fs.rm(path, recursive=True)
    elif _is_s3(fs):
        s3.delete_all(fs, path)
    else:
        found = fs.find(path, withdirs=True, detail=True)
        for name in sorted(found, reverse=True):  # content before its folder, which may vanish with it
            with suppress(FileNotFoundError):
                (fs.rmdir if found[name]["type"] == "directory" else fs.rm_file)(name)
