"""The manifest waits where it is, not block by block in the driver, and leaves nothing there."""

from __future__ import annotations

import gc
import time

import pyarrow as pa
import pytest
import ray
import ray.data
from ray.data import DataContext, TaskPoolStrategy
from ray.data.block import BlockStats

from lvlmrec.extraction import bounds

NUM_BLOCKS = 20_000  # more than are dealt out, with nothing to hold them back, in the seconds of the test
WATCHED_S = 6.0

pytestmark = pytest.mark.slow


def num_references() -> int:
    """Of this driver to objects, blocks among them."""
    return len(ray._private.worker.global_worker.core_worker.get_all_reference_counts())


def test_no_more_blocks_are_dealt_out_than_a_slow_stage_takes_and_none_is_kept(
    local_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_WAITING", 10)

    def slow(rows: pa.Table) -> pa.Table:
        time.sleep(0.2)
        return rows

    bounds.bound(DataContext.get_current())
    table = pa.table({"item_id": [f"item{k}" for k in range(NUM_BLOCKS)]})
    rows = ray.data.from_arrow(table).repartition(target_num_rows_per_block=1)
    one = TaskPoolStrategy(size=1)
    rows = rows.map_batches(slow, batch_size=None, batch_format="pyarrow", num_cpus=0.5, compute=one)
    at_first, began, taken = 0, 0.0, 0
    # Ray releases all of them for a second or two, until it knows of CPUs: what matters is what comes after
    for _ in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        taken += 1
        at_first, began = (at_first, began) if began else (num_references(), time.monotonic())
        if time.monotonic() > began + WATCHED_S:
            break
    assert taken > 5
    assert num_references() < at_first
    assert not [kept for kept in gc.get_objects() if type(kept) is BlockStats]
