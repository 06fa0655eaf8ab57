"""Several raylets on one machine and a driver beside them, to be killed at will."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
START_TRIES = 3
DETECTION = {  # a dead raylet is noticed within seconds, not half a minute
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,  # a live one may be slow on a busy machine; a dead one refuses at once
    "health_check_failure_threshold": 3,
}


@contextmanager
def raylets(num_workers: int = 2, cpus: float = 2, head_cpus: float = 0) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster`: a head with `head_cpus` and workers with `cpus` each.

    Its processes have this process's environment: set AWS_* before. `cluster.remove_node(node, allow_graceful=False)`
    kills a node, `cluster.add_node(num_cpus=...)` brings another.
    """
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), path]) if path else str(ROOT)
    try:
        cluster = _started([head_cpus] + [cpus] * num_workers)
        try:
            yield cluster
        finally:
            cluster.shutdown()
    finally:
        os.environ["PYTHONPATH"] = path


def _started(cpus_of_nodes: Sequence[float]) -> Any:
    """A cluster whose nodes are all up; on a busy machine a node may fail to start, so it is tried `START_TRIES` times.

    Raises what the last try raised.
    """
    from ray.cluster_utils import Cluster

    for tries_left in reversed(range(START_TRIES)):
        before, cluster = set(psutil.Process().children()), Cluster()
        try:
            for number, num_cpus in enumerate(cpus_of_nodes):
                head = {} if number else {"include_dashboard": False, "_system_config": DETECTION}
                cluster.add_node(num_cpus=num_cpus, **head)
            cluster.wait_for_nodes()
            return cluster
        except Exception as error:
            with suppress(Exception):
                cluster.shutdown()
            # Of a node that did not come up Ray gives no handle; its processes are children of this one.
            _end(set(psutil.Process().children()) - before)
            if not tries_left:
                raise
            print(f"Ray did not start, {tries_left} tries are left: {error}", file=sys.stderr)
    raise AssertionError("no try")


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def workers(node: Any, name: str = "") -> list[psutil.Process]:
    """The processes of a node's actors and tasks that are at work, whose title has `name` in it."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    titles = {}
    for process in raylet.children(recursive=True):
        try:
            titles[process] = " ".join(process.cmdline())
        except psutil.Error:
            continue
    return [p for p, title in titles.items() if title.startswith("ray::") and "IDLE" not in title and name in title]


@dataclass
class Driver:
    """A running extraction job."""

    process: subprocess.Popen[str]
    log: Path

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def result(self, timeout_s: float) -> dict[str, Any]:
        """The JSON of its last line, once it has ended well."""
        out, _ = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, self.log.read_text()[-3000:]
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found


@contextmanager
def driver(address: str, log: Path, arguments: Sequence[str]) -> Iterator[Driver]:
    """`rayjobs/extract.py` with `arguments` on the cluster at `address`; killed at the end if it still runs."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "rayjobs" / "extract.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=os.environ | {"RAY_ADDRESS": address},
        )
        try:
            yield Driver(process, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def wait_for(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


def titles_job(folder: Path, root: str, num_items: int) -> list[str]:
    """Arguments for extracting `num_items` titles with a tiny text encoder, from and to the prefix `root`."""
    from lvlmrec import storage
    from lvlmrec.lvlms import LVLMS

    LVLMS["text_encoder"].write_tiny(folder / "model", seed=0)
    lines = ["item_id,title", *(f"item{i:05d},A dog runs across field number {i}" for i in range(num_items))]
    storage.write_bytes(f"{root}/titles.csv", "\n".join(lines).encode())
    return [
        f"workspace={folder / 'workspace'}",
        f"input={root}/titles.csv",
        f"store={root}/features",
        "lvlm.name=text_encoder",
        f"lvlm.model={folder / 'model'}",
        "lvlm.device=cpu",
        "recipe.taps=[text.*]",
        'recipe.prompts={title: {text: "{title}", input: text}}',
        "recipe.poolings=[all_mean]",
        "recipe.dtype=float32",
        "lvlm.batch_size=1",  # so that who shares a batch with whom changes no bit
        "pool.videos_per_block=50",
        "pool.videos_per_part=50",
        "pool.min_actors=2",
        "pool.max_actors=2",
        "estimate.videos=0",
    ]
