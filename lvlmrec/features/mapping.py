"""Columns of the local copy, memory-mapped side by side: one tensor whose columns are files of their own."""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Linux's values; `mmap` has no name for the second, and no way to choose an address.
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
FLAGS = mmap.MAP_PRIVATE | MAP_NORESERVE


@lru_cache(maxsize=8)  # one for each feature set of a run; a mapping that is made anew faults in every page again
def side_by_side(paths: tuple[Path, ...], dtype: str) -> Tensor:
    """The `.npy` files of L columns, [I + 1, ...] each, of one shape and dtype, as one tensor [I + 1, L, ...].

    The files' pages stand one file after the other in the address space, so that a row of all columns is one strided
    view. `dtype` bfloat16 is that of bits in uint16. Writing to the tensor changes no file.
    """
    first = np.load(paths[0], mmap_mode="r")
    size, itemsize = paths[0].stat().st_size, first.itemsize
    distance = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, distance * len(paths), flags=FLAGS | mmap.MAP_ANONYMOUS)  # unmaps the files with itself
    whole = np.frombuffer(region, first.dtype)
    for number, path in enumerate(paths):
        _map(path, size, whole.ctypes.data + number * distance)
    values = torch.from_numpy(whole).as_strided(
        (len(first), len(paths), *first.shape[1:]),
        (first.strides[0] // itemsize, distance // itemsize, *(stride // itemsize for stride in first.strides[1:])),
        (size - first.nbytes) // itemsize,  # behind the header of the first file
    )
    return values.view(torch.bfloat16) if dtype == "bfloat16" else values


def _map(path: Path, size: int, address: int) -> None:
    """Map the file `path` of `size` bytes at `address`, in memory that this process has reserved."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(descriptor).st_size != size:  # a page behind the end of a file ends the process by a signal
            raise ValueError(f"{path}: {os.fstat(descriptor).st_size} bytes, {size} expected; remove it")
        if libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, FLAGS | MAP_FIXED, descriptor, 0) != address:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)
