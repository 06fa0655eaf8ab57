"""How much of the manifest is dealt out ahead of its decoding."""

from __future__ import annotations

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    DownstreamCapacityBackpressurePolicy,
)
from ray.data._internal.execution.interfaces.physical_operator import PhysicalOperator

DEALER = "StreamingRepartition"  # how the name of Ray's stage begins
WAITING = 20.0  # blocks for each that is being decoded


class ManifestPolicy(DownstreamCapacityBackpressurePolicy):
    """Deals out a block when one of few that wait is taken.

    Ray Data bounds what waits by the memory it uses. The blocks of a manifest use none of that, and 5 KB each of the
    driver: a catalogue of a million items would lie there in whole. All later stages are left to Ray.
    """

    def _should_apply_backpressure(self, op: PhysicalOperator) -> bool:
        return op.name.startswith(DEALER) and self._get_output_pressure(op) > WAITING


def bound(context: DataContext) -> None:
    """Put the policy beside Ray's own."""
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, ManifestPolicy])
