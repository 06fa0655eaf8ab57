"""Ray: that of the cluster where this process is in one, else one of its own."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import ray

# Ray ends workers without a task, past one for each CPU, after a second: on two CPUs the stages of an extraction would
# begin a process every few seconds.
MIN_IDLE_WORKERS = 8


def joined() -> AbstractContextManager[object]:
    """A context with Ray in it; at its end a Ray that it started or joined is left."""
    if ray.is_initialized():
        return nullcontext()
    keep_idle_workers()
    return ray.init()


def keep_idle_workers() -> None:
    """Set Ray's limit for one that this process starts next, unless the environment has it; a cluster has its own."""
    os.environ.setdefault("RAY_num_workers_soft_limit", str(max(MIN_IDLE_WORKERS, os.cpu_count() or 1)))
