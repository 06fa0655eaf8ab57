"""Extraction over several raylets and an object store that throttles, while what works on it dies: every item once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from s3fs import S3FileSystem

from lvlmrec import storage
from lvlmrec.columns import ITEM_ID
from lvlmrec.config import load
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features import store
from lvlmrec.lvlms import LVLMS
from lvlmrec.lvlms.protocol import Item
from tests import chaos
from tests.chaos import Driver
from tests.extraction.reader import Reader
from tests.faults import Faults, Proxy, faulty

ITEMS = 500
PART = 50  # items
READS = 200  # of the set while it is written
IN_FLIGHT = 2  # parts that the store takes of a driver before one of its nodes dies

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def proxy(bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What stands before the object store in the test, and drops or refuses a share of the requests."""
    with faulty(s3_server, Faults(slow_down=0.2, cut=0.05)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        S3FileSystem.clear_instance_cache()
        yield proxy
    assert proxy.counts["slow_down"] > 0 and proxy.counts["cut"] > 0
    S3FileSystem.clear_instance_cache()


def num_parts(bucket: str, proxy: Proxy) -> int:
    """As the store itself knows them: the faults are for those who work, not for who looks on ten times a second."""
    listed = boto3.client("s3", endpoint_url=proxy.upstream).list_objects_v2(Bucket=bucket.removeprefix("s3://"))
    return sum("/parts/" in file["Key"] for file in listed.get("Contents", []))


def wait_for_parts(bucket: str, proxy: Proxy, count: int, job: Driver) -> None:
    chaos.wait_for(lambda: num_parts(bucket, proxy) >= count or job.process.poll() is not None, timeout_s=300)
    assert job.process.poll() is None, job.log.read_text()[-3000:]


def assert_undisturbed(arguments: list[str], result: dict[str, Any]) -> None:
    """Every item once, with the features that the model gives here, bit for bit."""
    uri = result["feature_set"]
    index = store.read(uri).index.to_pandas()
    assert sorted(index[ITEM_ID]) == [f"item{i:05d}" for i in range(ITEMS)]
    assert not len(store.read_rejected(uri))
    config = load(ExtractConfig, [], arguments)
    model = LVLMS["text_encoder"].load(config.lvlm, store.read(uri).recipe.reading)
    titles = {row[ITEM_ID]: row["title"] for row in pipeline.plan(config).manifest.to_pylist()}
    for part, rows in index.groupby("part"):
        table = storage.read_table(f"{uri}/parts/{part}").take(rows["row"].to_numpy())
        items = [Item(item_id, texts={"title": titles[item_id]}) for item_id in table[ITEM_ID].to_pylist()]
        for name, values in model.extract(model.prepare(items)).items():
            np.testing.assert_array_equal(np.stack(table[name].to_numpy()), values.numpy())


@pytest.mark.parametrize("s3_server", ["moto", "s3rver"], indirect=True)
def test_actor_node_and_driver_die_while_the_store_throttles(
    tmp_path: Path, bucket: str, proxy: Proxy, request: pytest.FixtureRequest
) -> None:
    """A reader opens the set all the while."""
    arguments = chaos.titles_job(tmp_path, bucket, ITEMS)
    environment = os.environ | {"AWS_ENDPOINT_URL": proxy.upstream}  # faults are for those who write
    reader = Reader(f"{bucket}/features", tmp_path, environment)
    request.addfinalizer(reader.kill)
    proxy.take_parts(3)  # nobody is through before it has been killed, however fast the machine is
    with chaos.raylets() as cluster:
        *_, node, victim = cluster.list_all_nodes()
        with chaos.driver(cluster.address, tmp_path / "first", arguments) as first:
            wait_for_parts(bucket, proxy, 1, first)
            actors = chaos.workers(node, "Extractor") or chaos.workers(victim, "Extractor")
            actors[0].kill()
            wait_for_parts(bucket, proxy, 3, first)
            with chaos.driver(cluster.address, tmp_path / "second", arguments) as second:
                second.process.wait(timeout=400)
            assert second.process.returncode == 2, (tmp_path / "second").read_text()[-3000:]
            assert f"process {first.process.pid} on " in (tmp_path / "second").read_text()
            first.kill()
        proxy.take_parts(3 + IN_FLIGHT)
        with chaos.driver(cluster.address, tmp_path / "third", arguments) as third:
            wait_for_parts(bucket, proxy, 4, third)
            cluster.remove_node(victim, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            chaos.wait_for(lambda: reader.counts()["reads"] >= READS, timeout_s=300)
            proxy.take_parts(None)
            result = third.result(timeout_s=400)
    seen = reader.end()
    assert seen["items"] == ITEMS and seen["snapshots"] >= 3 and seen["committed"] > READS / 10
    assert_undisturbed(arguments, result)
    assert result["skipped"] >= PART * 2 + 1  # the last part may be smaller
    written = Counter[str]()
    for file in storage.list_files(f"{result['feature_set']}/parts"):
        written.update(storage.read_table(file.uri, [ITEM_ID])[ITEM_ID].to_pylist())
    assert written.total() - ITEMS <= PART * IN_FLIGHT


def test_a_disk_that_is_full_at_the_commit(tmp_path: Path) -> None:
    from tests.feature_sets import recipe_of, write_set

    recipe = recipe_of()
    uri = write_set(tmp_path, [["a"]], recipe)
    write_set(tmp_path, [[f"item{k}" for k in range(500)]], recipe, commit=False)
    code = (
        "import resource, signal, sys; from lvlmrec.features import store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "store.commit(sys.argv[1])"
    )
    failed = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True)
    assert failed.returncode == 1 and "OSError: [Errno 27] File too large" in failed.stderr
    assert store.read(uri).index[ITEM_ID].to_pylist() == ["a"]
    assert not [path for path in Path(uri).iterdir() if path.name.startswith(".")]
    assert len(store.commit(uri)) == 501
