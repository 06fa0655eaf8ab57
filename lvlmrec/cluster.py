"""Ray: that of the cluster where this process is in one, else one of its own."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import ray
from ray._private import services
from ray._private.worker import global_worker

from lvlmrec.errors import ConfigError

# Ray ends workers without a task, past one for each CPU, after a second: on two CPUs the stages of an extraction would
# begin a process every few seconds.
MIN_IDLE_WORKERS = 8
# What became of tasks, for the dashboard, which shows no more of them. Ray would keep ten times as many.
MAX_TASK_RECORDS = 10_000
LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"


def join() -> AbstractContextManager[object]:
    """Start or join a Ray where there is none yet, and stay; the context that it gives leaves it again."""
    if ray.is_initialized():
        return nullcontext()
    set_limits()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A signal to the job's process group is the job's to handle. Ray's processes would end first, and its C++ code then
    # ends this one, at once and without a word, before the job has closed its runs.
    outside = partial(services.ConsolePopen, process_group=0)
    with _quiet(), patch.object(services, "ConsolePopen", outside):
        context: AbstractContextManager[object] = ray.init()
    for number, handler in handlers.items():  # Ray's own prints a stack and aborts the process three seconds later
        signal.signal(number, handler)
    return context


@contextmanager
def joined() -> Iterator[object]:
    """A context with Ray in it; at its end a Ray that it started or joined is left."""
    with join() as context:
        try:
            yield context
        except BaseException as error:
            _let_go(error)
            raise


def _let_go(error: BaseException | None) -> None:
    """Drop what the frames of an error hold: a pipeline that ends only after Ray was left complains of that."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Ray's C++ code of this process, which starts in here, say nothing on stderr but that it crashes.

    Its level is read from the environment: `putenv` reaches this process and none that Ray starts, so that Ray's log
    files stay whole. That the level was read is said at once, on the file descriptor, and left out here.
    """
    if LOG_LEVEL in os.environ:
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        os.putenv(LOG_LEVEL, "fatal")
        try:
            yield
        finally:
            os.unsetenv(LOG_LEVEL)
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            os.write(2, b"".join(line for line in held if LOG_LEVEL.encode() not in line))


def is_own() -> bool:
    """Whether Ray runs and was started by this process."""
    return ray.is_initialized() and global_worker.node is not None and global_worker.node.is_head()


def device() -> str:
    """`cuda` or `cpu`: in one of Ray's workers what Ray gave its task or actor, elsewhere what there is.

    A process that was given no GPU sees none from then on: Ray hides them or not, by the environment of its nodes
    (RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO), and libraries take what they see.
    """
    if not _in_worker():
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    if ray.get_gpu_ids():
        return "cuda"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return "cpu"


def place() -> str:
    """Where this process works, for messages: its node, and its GPU if Ray gave it one."""
    if not _in_worker():
        return "this machine"
    gpus = ", ".join(map(str, ray.get_gpu_ids()))
    return f"GPU {gpus} of node {node()}" if gpus else f"node {node()}"


def node() -> str:
    """The address of the node of this process; empty outside Ray."""
    return str(ray.util.get_node_ip_address()) if _in_worker() else ""


def require_gpus(key: str, gpus: float) -> None:
    """Raises `ConfigError` when this Ray has no node with a GPU and will start none: it would wait without end."""
    if not gpus or _grows():
        return
    if not any(node["Alive"] and node["Resources"].get("GPU", 0) >= gpus for node in ray.nodes()):
        raise ConfigError(f"{key}: {gpus:g}: no node of this Ray has a GPU; set 0 to run on CPUs, or join one that has")


def memory() -> int | None:
    """Bytes that the nodes of this Ray offer; None where it starts nodes by itself."""
    return None if _grows() else int(sum(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]))


def _grows() -> bool:
    """Whether this Ray starts nodes by itself."""
    return ray._private.state.state.get_max_resources_from_cluster_config() is not None


def _in_worker() -> bool:
    return ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def set_limits() -> None:
    """Ray's limits for one that this process starts next, unless the environment has them; a cluster has its own."""
    idle_workers = max(MIN_IDLE_WORKERS, os.cpu_count() or 1)
    os.environ.setdefault("RAY_num_workers_soft_limit", str(idle_workers))
    os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", str(MAX_TASK_RECORDS))
    # Nobody collects the metrics of a Ray that ends with the job, and every process would wait for the agent that does.
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
