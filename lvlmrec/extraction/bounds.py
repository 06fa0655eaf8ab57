"""What a run keeps in the driver, bounded where Ray Data lets it grow with the catalogue."""

from __future__ import annotations

import math
from collections import deque

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces.physical_operator import PhysicalOperator
from ray.data._internal.execution.operators.map_operator import MapOperator
from ray.data._internal.execution.resource_manager import ResourceManager
from ray.data._internal.execution.streaming_executor_state import Topology

DEALER = "StreamingRepartition"  # how the name of Ray's stage begins
MAX_WAITING = 500  # blocks: more than many decoders take between two looks of Ray's


class DriverPolicy(BackpressurePolicy):
    """Deals out a block of the manifest when few wait, and forgets those that are through.

    Ray Data bounds what waits by the memory it uses. The blocks of a manifest use none of that, only memory of
    the driver: a catalogue of a million items would lie there in whole. All later stages are left to Ray. Of each
    block of each stage it keeps statistics to the end of the run, for a summary that nobody here asks for:
    https://github.com/ray-project/ray/issues/66016.
    """

    def __init__(self, data_context: DataContext, topology: Topology, resource_manager: ResourceManager) -> None:
        super().__init__(data_context, topology, resource_manager)
        for op in topology:
            if isinstance(op, MapOperator):
                op._output_blocks_stats = deque(maxlen=0)  # type: ignore[assignment]

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """As many bytes as the blocks have for which there is room; of the first block nobody knows its size."""
        if not op.name.startswith(DEALER):
            return None
        room = MAX_WAITING - self._topology[op].total_enqueued_output_blocks()
        return max(0, math.ceil(room * (op.metrics.average_bytes_per_output or 1)))


def bound(context: DataContext) -> None:
    """Put the policy beside Ray's own."""
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, DriverPolicy])
