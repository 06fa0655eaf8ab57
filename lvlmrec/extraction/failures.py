"""Failures that are not one item's: a process that dies with an item in its model, a device that fails again and
again, memory that runs out, and items that all fail alike, everywhere or on one worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lvlmrec.columns import ERROR, MESSAGE, STAGE

MAX_DEATHS = 3  # of a process with an item in its model, all but the first with this item alone: the item is at fault
MAX_LOSSES = 10  # of processes by one device, items that came through made up for: the device is at fault
ITEMS_PER_LOSS = 20  # that came through make up for one process that the device cost
DECODED_ON, EXTRACTED_ON = "decoded_on", "extracted_on"  # where a row was made: the node, and the model's process


class DeviceFailed(RuntimeError):
    """A device failed so often that the run is better stopped; the message names it."""


class Attempts:
    """What went on in the processes that hold a model, counted outside them.

    An item that was begun and never ended was there when a process died.
    """

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}
        self._losses: dict[str, float] = {}  # device -> processes, less what came through since
        self._sizes: dict[str, int] = {}  # worker -> items in a forward
        self._num_lost = self._num_lowered = 0

    def deaths(self, item_ids: Sequence[str]) -> int:
        """How many processes died with one of the items, the most of any of them."""
        return max((self._begun.get(item_id, 0) for item_id in item_ids), default=0)

    def begin(self, item_ids: Sequence[str]) -> None:
        """They are about to enter the model."""
        for item_id in item_ids:
            self._begun[item_id] = self._begun.get(item_id, 0) + 1

    def end(self, item_ids: Sequence[str], device: str) -> None:
        """They came out again, with features or an error."""
        for item_id in item_ids:
            self._begun.pop(item_id, None)
        if device in self._losses:
            self._losses[device] = max(0.0, self._losses[device] - len(item_ids) / ITEMS_PER_LOSS)

    def lose(self, device: str) -> bool:
        """A process is about to end because of its device. Whether the device has failed too often."""
        self._num_lost += 1
        self._losses[device] = self._losses.get(device, 0.0) + 1
        return self._losses[device] >= MAX_LOSSES

    def resize(self, worker: str, batch_size: int, ran_out: bool) -> None:
        """A worker's forwards are of `batch_size` items from now on, because memory ran out or not any more."""
        self._num_lowered += ran_out
        self._sizes[worker] = batch_size

    def report(self) -> dict[str, int]:
        """`oom_fallbacks`, `device_failures`, and `lowest_batch_size`, that of any worker whose memory ran out."""
        counts = {"oom_fallbacks": self._num_lowered, "device_failures": self._num_lost}
        return counts | ({"lowest_batch_size": min(self._sizes.values())} if self._sizes else {})


class SharedAttempts:
    """`Attempts` of all processes, in one of its own on the node of whoever makes it.

    Ray gives the work of a process that died to another, without end.
    """

    def __init__(self) -> None:
        this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Attempts)
        self._attempts = actor.options(num_cpus=0, scheduling_strategy=this_node).remote()

    def deaths(self, item_ids: Sequence[str]) -> int:
        """See `Attempts`."""
        return int(ray.get(self._attempts.deaths.remote(item_ids)))

    def begin(self, item_ids: Sequence[str]) -> None:
        """See `Attempts`."""
        ray.get(self._attempts.begin.remote(item_ids))

    def end(self, item_ids: Sequence[str], device: str) -> None:
        """See `Attempts`."""
        self._attempts.end.remote(item_ids, device)

    def lose(self, device: str) -> bool:
        """See `Attempts`."""
        return bool(ray.get(self._attempts.lose.remote(device)))

    def resize(self, worker: str, batch_size: int, ran_out: bool) -> None:
        """See `Attempts`."""
        ray.get(self._attempts.resize.remote(worker, batch_size, ran_out))

    def report(self) -> dict[str, int]:
        """See `Attempts`."""
        return dict(ray.get(self._attempts.report.remote()))


def end_process() -> NoReturn:
    """End this process as a crash would: Ray then starts another and repeats its work there."""
    os._exit(1)


@dataclass
class _Run:
    """Rows in a row that were rejected for one reason, and what the last of them said."""

    length: int = 0
    reason: tuple[str, str] = ("", "")
    message: str = ""

    def add(self, row: dict[str, Any]) -> None:
        reason = (row[STAGE], row[ERROR])
        self.length = 0 if row[ERROR] is None else self.length + 1 if reason == self.reason else 1
        self.reason, self.message = reason, row[MESSAGE]


class Streak:
    """Items rejected one after another for one and the same reason: wrong credentials, a full disk, a broken model.

    They are counted over all, and of each worker by itself: beside healthy ones a sick one is noticed. A row that
    failed counts where it failed, one with features counts for the node that decoded it and the process of its model.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._runs: dict[str, _Run] = {"": _Run()}
        self._worst = ""

    def add(self, block: pa.Table) -> bool:
        """Rows of `stages.WRITTEN`. Whether `limit` such items have come by now; 0 is no limit."""
        for row in block.select([STAGE, ERROR, MESSAGE, DECODED_ON, EXTRACTED_ON]).to_pylist():
            if row[EXTRACTED_ON]:
                self._runs.pop(row[DECODED_ON], None)  # its node decoded well
            for worker in dict.fromkeys((row[EXTRACTED_ON] or row[DECODED_ON] or "", "")):
                run = self._runs.setdefault(worker, _Run())
                run.add(row)
                if self.limit and run.length >= self.limit:
                    self._worst = worker
                    return True
        return False

    @property
    def reason(self) -> tuple[str, str]:
        """Stage and error of the items."""
        return self._runs[self._worst].reason

    def __str__(self) -> str:
        run, where = self._runs[self._worst], f" on {self._worst}" * bool(self._worst)
        return (
            f"{run.length} items one after another were rejected, all with {'/'.join(run.reason)}{where}, the last by: "
            f"{run.message} (max_rejected_in_a_row={self.limit}); the next run tries them again"
        )
