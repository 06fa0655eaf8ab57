"""The local cache that features are memory-mapped from: entries that all processes of a machine share.

    <cache>/<key>/about.json   what the entry was made of; each process that uses the entry holds a shared lock on it
    <cache>/<key>/...          its content
    <cache>/.<key>.<random>/   an entry that is being made

An entry is whole or absent, and never changes; its key says what it holds. When there is a limit, the entries that were
used least recently and that no living process uses make room for new ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lvlmrec.errors import InputError, writing

ABOUT = "about.json"
ARRAY = "features.npy"
GB = 1e9


def key_of(*texts: str) -> str:
    """16 hex digits that name an entry."""
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()


def digest_of(item_index: np.ndarray) -> str:
    """16 hex digits of some items [N]."""
    return hashlib.blake2b(np.asarray(item_index, dtype=np.int64).tobytes(), digest_size=8).hexdigest()


class InUse:
    """A shared lock on an entry for as long as this object lives; after unpickling in another process, its own lock."""

    def __init__(self, about: Path) -> None:
        self.about, self.is_held = about, False
        with suppress(OSError):
            descriptor = os.open(about, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            with suppress(OSError):  # a network folder without a lock service: nothing is removed there
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            # It may have been removed before the lock was there.
            self.is_held = about.exists() and os.path.samestat(os.fstat(descriptor), about.stat())

    def __reduce__(self) -> tuple[type[InUse], tuple[Path]]:
        return InUse, (self.about,)


class NewArray(NamedTuple):
    """An array to be made: its entry's key and its element type and shape."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Cache:
    """The cache in `folder`; `limit` is the bytes that its entries may take, 0: any number."""

    folder: Path
    limit: int = 0

    def entry(self, key: str) -> Path:
        return self.folder / key

    def use(self, key: str) -> InUse | None:
        """Lock an entry against removal, as the one used most recently; None when it is not there."""
        in_use = InUse(self.entry(key) / ABOUT)
        if not in_use.is_held:
            return None
        with suppress(OSError):  # a cache that others filled may be read-only
            os.utime(in_use.about)
        return in_use

    @contextmanager
    def publishing(self, key: str, about: Mapping[str, Any]) -> Iterator[Path]:
        """A working folder that becomes the entry `key` when its content is whole: others see all of it or nothing."""
        folder = self.entry(key)
        working = folder.with_name(f".{key}.{uuid.uuid4().hex}")
        try:
            with writing(str(folder)):
                with suppress(FileExistsError):  # a file, which the next line says
                    self.folder.mkdir(parents=True, exist_ok=True)
                working.mkdir()
                (working / ABOUT).write_text(json.dumps(about))
                in_use = InUse(working / ABOUT)
                yield working
                _rename(working, folder)
                del in_use
        finally:
            shutil.rmtree(working, ignore_errors=True)

    def hold(
        self,
        wanted: Sequence[NewArray],
        about: Mapping[str, Any],
        fill: Callable[[Sequence[np.ndarray], Sequence[int]], None],
    ) -> list[InUse]:
        """Make, or find, the arrays and keep them from being removed.

        `fill(arrays, numbers)` fills arrays of zeros, those of `wanted` of these numbers. Raises `InputError` when
        they do not fit in the cache.
        """
        while True:  # what was found may be removed before it is in use, and what was made too
            in_use = [self.use(new.key) for new in wanted]
            numbers = [number for number, held in enumerate(in_use) if held is None]
            if not numbers:
                return [held for held in in_use if held is not None]
            with self._filling([wanted[number] for number in numbers], about) as arrays:
                fill(arrays, numbers)

    @contextmanager
    def _filling(self, wanted: Sequence[NewArray], about: Mapping[str, Any]) -> Iterator[list[np.memmap]]:
        """Arrays of zeros, one new entry each, which are published when the caller has filled all of them."""
        with ExitStack() as published:
            # Two processes do not take the same room: it is taken before the lock is let go.
            with self._locked():
                self._make_room(sum(new.bytes for new in wanted))
                arrays = [
                    _new_array(published.enter_context(self.publishing(new.key, about)) / ARRAY, new) for new in wanted
                ]
            yield arrays
            for array in arrays:
                array.flush()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time, where the file system has locks."""
        with writing(str(self.folder / "")):
            with suppress(FileExistsError):  # a file, which the next line says
                self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, needed: int) -> None:
        """Remove what killed processes left and, for a limit, the entries used least recently that nobody uses."""
        found = [about.parent for about in self.folder.glob(f"*/{ABOUT}")]  # hidden ones too
        for folder in [folder for folder in found if folder.name.startswith(".")]:
            self._remove(folder)
        if not self.limit:
            return
        used = {folder: (folder / ABOUT).stat().st_mtime_ns for folder in found if (folder / ABOUT).exists()}
        sizes = {folder: _bytes(folder) for folder in sorted(used, key=used.__getitem__)}
        over, removed = sum(sizes.values()) + needed - self.limit, []
        for folder in sizes:
            if over <= 0:
                break
            if self._remove(folder):
                over -= sizes[folder]
                removed.append(folder)
        if removed:
            gigabytes = sum(sizes[folder] for folder in removed) / GB
            print(
                f"cache {str(self.folder)!r}: removed {len(removed)} entries used least recently, {gigabytes:.3g} GB, "
                f"to stay within cache_gb",
                file=sys.stderr,
            )
        if over > 0:
            raise InputError(
                f"cache_gb: {self.limit / GB:.3g}: this run needs {needed / GB:.3g} GB more, and living processes use "
                f"the rest of the cache {str(self.folder)!r}; set cache_gb to {(self.limit + over) / GB:.3g} or more, "
                f"or 0 for no limit"
            )

    def _remove(self, folder: Path) -> bool:
        """Remove an entry that no living process uses; whether it was so."""
        removed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        with suppress(OSError), (folder / ABOUT).open() as about:
            fcntl.flock(about, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.rename(removed)  # at once: nobody sees a part of it
            shutil.rmtree(removed, ignore_errors=True)
            return True
        return False


def _rename(working: Path, folder: Path) -> None:
    try:
        working.rename(folder)
    except OSError:
        if not (folder / ABOUT).exists():  # else another process finished the same content first
            raise


def _bytes(folder: Path) -> int:
    with suppress(FileNotFoundError):  # it has been published meanwhile, or was never whole
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0


def _new_array(path: Path, new: NewArray) -> np.memmap:
    """A memory-mapped array of zeros whose room on the disk is taken: a page without ends the process by a signal."""
    with writing(str(path)):
        array = np.lib.format.open_memmap(path, mode="w+", dtype=new.dtype, shape=new.shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
