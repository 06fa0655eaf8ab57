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
    # for a Ray that is started here; a cluster has its own setting
    os.environ.setdefault("RAY_num_workers_soft_limit", str(max(MIN_IDLE_WORKERS, os.cpu_count() or 1)))
    return ray.init()
