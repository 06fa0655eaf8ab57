"""Processes by host, PID and start time, and whether one is still alive."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

CLOCK_SECONDS = 1.0  # start times of one process may differ by less, when the host's clock is set


def host() -> str:
    """Host name and PID namespace: two containers of one host differ, as a PID means another process in each."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def born(pid: int) -> float:
    """Start time of a process in seconds since 1970, which tells it from a later one of its PID; 0 for a dead one."""
    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return 0.0


def is_alive(pid: int, born_at: float) -> bool:
    """Whether the process of this PID that started at `born_at` is still alive, on this host."""
    return abs(born(pid) - born_at) < CLOCK_SECONDS
