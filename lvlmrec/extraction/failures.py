"""Failures that are not one item's: a process that dies with an item in its model, and items that all fail alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lvlmrec.columns import ERROR, MESSAGE, STAGE

MAX_DEATHS = 3  # of a process with an item in its model, all but the first with this item alone: the item is at fault


class Attempts:
    """Which items are in a model right now. An item that was begun and never ended was there when a process died."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}

    def deaths(self, item_ids: Sequence[str]) -> int:
        """How many processes died with one of the items, the most of any of them."""
        return max((self._begun.get(item_id, 0) for item_id in item_ids), default=0)

    def begin(self, item_ids: Sequence[str]) -> None:
        """They are about to enter the model."""
        for item_id in item_ids:
            self._begun[item_id] = self._begun.get(item_id, 0) + 1

    def end(self, item_ids: Sequence[str]) -> None:
        """They came out again, with features or an error."""
        for item_id in item_ids:
            self._begun.pop(item_id, None)


class SharedAttempts:
    """`Attempts` of all processes, in one of its own on the node of whoever makes it.

    Ray gives the work of a process that died to another, without end.
    """

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Attempts)
        self._attempts = actor.options(num_cpus=0, scheduling_strategy=here).remote()

    def deaths(self, item_ids: Sequence[str]) -> int:
        """See `Attempts`."""
        return int(ray.get(self._attempts.deaths.remote(item_ids)))

    def begin(self, item_ids: Sequence[str]) -> None:
        """See `Attempts`."""
        ray.get(self._attempts.begin.remote(item_ids))

    def end(self, item_ids: Sequence[str]) -> None:
        """See `Attempts`."""
        self._attempts.end.remote(item_ids)


class Streak:
    """Items rejected one after another for one and the same reason: wrong credentials, a full disk, a broken model."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.length = 0
        self.reason = ("", "")
        self.message = ""

    def add(self, block: pa.Table) -> bool:
        """Rows of `stages.WRITTEN`. Whether `limit` such items have come by now; 0 is no limit."""
        for row in block.select([STAGE, ERROR, MESSAGE]).to_pylist():
            reason = (row[STAGE], row[ERROR])
            self.length = self.length + 1 if reason == self.reason else 1
            self.reason, self.message = reason, row[MESSAGE]
            if row[ERROR] is None:
                self.length = 0
            if self.limit and self.length >= self.limit:
                return True
        return False

    def __str__(self) -> str:
        return (
            f"{self.length} items one after another were rejected, all with {'/'.join(self.reason)}, the last by: "
            f"{self.message} (max_rejected_in_a_row={self.limit}); the next run tries them again"
        )
