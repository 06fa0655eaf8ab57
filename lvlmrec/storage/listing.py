"""What a folder holds, on local disks and where fsspec alone knows; pages of S3 are in `s3`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a listing: its URI, its size in bytes, its modification time in seconds since 1970, its ETag on S3."""

    uri: str
    size: int
    modified: float
    etag: str = ""


def local_files(folder: str, recursive: bool) -> Iterator[StoredFile]:
    """In the order of their paths. Folders behind links are left out: they may lead back."""
    if not Path(folder).is_dir():
        return
    with os.scandir(folder) as scan:
        entries = [(entry.name + "/" * entry.is_dir(), entry) for entry in scan]
    for name, entry in sorted(entries, key=lambda named: named[0]):
        if not name.endswith("/"):
            try:
                status = entry.stat()
            except FileNotFoundError:  # a broken link is listed, a file that was renamed meanwhile is not
                if not entry.is_symlink():
                    continue
                status = entry.stat(follow_symlinks=False)
            yield StoredFile(entry.path, status.st_size, status.st_mtime)
        elif recursive and not entry.is_symlink():
            yield from local_files(entry.path, recursive)


def found_files(fs: Any, path: str, uri: str, recursive: bool) -> Iterator[StoredFile]:
    scheme = uri.split("://", 1)[0] + "://"
    found = fs.find(path, maxdepth=None if recursive else 1, detail=True) if fs.isdir(path) else {}
    for name, info in found.items():
        yield StoredFile(scheme + name.removeprefix(scheme), int(info["size"]), modified(info))


def modified(info: dict[str, Any]) -> float:
    stamp = info.get("mtime") or info.get("LastModified") or 0.0
    return float(stamp.timestamp() if hasattr(stamp, "timestamp") else stamp)
