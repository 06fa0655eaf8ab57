"""Extraction over several raylets and an object store that throttles, while nodes die: every item once."""

from __future__ import annotations

from pathlib import Path

import pytest
from s3fs import S3FileSystem

from lvlmrec import storage
from lvlmrec.features import store
from tests import chaos
from tests.faults import Faults, faulty

ITEMS = 500


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_dies_and_the_store_throttles(
    tmp_path: Path, bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = chaos.titles_job(tmp_path, bucket, ITEMS)
    with faulty(s3_server, Faults(slow_down=0.2, cut=0.05)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        S3FileSystem.clear_instance_cache()
        with chaos.raylets() as cluster, chaos.driver(cluster.address, tmp_path / "log", arguments) as job:
            victim = cluster.list_all_nodes()[-1]

            def parts() -> int:
                return sum("/parts/" in file.uri for file in storage.iter_files(f"{bucket}/features", recursive=True))

            chaos.wait_for(lambda: parts() >= 2 or job.process.poll() is not None, timeout_s=250)
            assert job.process.poll() is None, job.log.read_text()[-3000:]
            cluster.remove_node(victim, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            result = job.result(timeout_s=200)
        assert proxy.counts["slow_down"] > 0 and proxy.counts["cut"] > 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    S3FileSystem.clear_instance_cache()
    index = store.read(result["feature_set"]).index
    assert sorted(index["item_id"]) == [f"item{i:05d}" for i in range(ITEMS)]
    assert store.read_rejected(result["feature_set"]).empty
