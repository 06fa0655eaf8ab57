"""How much of the manifest is dealt out ahead of its decoding."""

from __future__ import annotations

import math

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces.physical_operator import PhysicalOperator

DEALER = "StreamingRepartition"  # how the name of Ray's stage begins
MAX_WAITING = 500  # blocks: more than many decoders take between two looks of Ray's


class ManifestPolicy(BackpressurePolicy):
    """Deals out a block when few wait.

    Ray Data bounds what waits by the memory it uses. The blocks of a manifest use none of that, only memory of
    the driver: a catalogue of a million items would lie there in whole. All later stages are left to Ray.
    """

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """As many bytes as the blocks have for which there is room; of the first block nobody knows its size."""
        if not op.name.startswith(DEALER):
            return None
        room = MAX_WAITING - self._topology[op].total_enqueued_output_blocks()
        return max(0, math.ceil(room * (op.metrics.average_bytes_per_output or 1)))


def bound(context: DataContext) -> None:
    """Put the policy beside Ray's own."""
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, ManifestPolicy])
