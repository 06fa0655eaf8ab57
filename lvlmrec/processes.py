"""Which process is meant by a number, on which host, and whether it still lives."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

CLOCK_SECONDS = 1.0  # by which the start of one process may seem to move when the host's clock is set


def host() -> str:
    """The host as far as its process numbers mean the same: two containers of one host have different ones."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def born(pid: int) -> float:
    """When a process began, which tells it from a later one with its number; 0 when there is none or it is dead."""
    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return 0.0


def is_alive(pid: int, born_at: float) -> bool:
    """Whether the process that had this number and began then still lives, on this host."""
    return abs(born(pid) - born_at) < CLOCK_SECONDS
