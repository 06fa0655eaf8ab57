"""The resources that the stages of the pipeline ask Ray for."""

from lvlmrec.extraction.pipeline import WRITE_CPUS
from lvlmrec.extraction.settings import PoolConfig


def test_the_default_pool_has_room_for_every_stage_on_two_cpus() -> None:
    """Ray Data takes each stage from what is left of the CPUs, as floats; a stage that does not fit never runs.

    The first is the dealing out of the manifest, which lasts nearly as long as the run.
    """
    pool, free = PoolConfig(), 2.0
    for cpus in (1, pool.cpus_per_decode, pool.cpus_per_actor, WRITE_CPUS):
        assert cpus <= free
        free -= cpus
