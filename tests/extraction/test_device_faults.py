"""Memory that runs out and devices that fail, in real actors of a local Ray with a real encoder of titles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lvlmrec.errors import JobFailed
from lvlmrec.features import store
from lvlmrec.lvlms import LVLMS
from lvlmrec.lvlms.protocol import Item
from tests.extraction import stand_ins
from tests.extraction.test_faults import model, plan_of, run, write_items
from tests.extraction.test_pipeline import rows_of

__all__ = ["model"]  # the fixture
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def cluster(ray_address: str) -> Iterator[None]:
    import ray

    ray.init(ray_address, log_to_driver=False, runtime_env={"worker_process_setup_hook": stand_ins.register})
    yield
    ray.shutdown()


def test_memory_that_runs_out_and_an_item_that_kills_the_device(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = {f"item{k}": f"a large one {k}" for k in range(12)}
    titles |= {"item3": "a huge one", "item7": "an assert", "item9": "small"}
    write_items(tmp_path / "items.csv", titles)
    plan = plan_of(tmp_path, model, "lvlm.batch_size=4")
    result = run(plan)
    assert (result["written"], result["rejected"]) == (10, 2)
    assert result["rejected_by_reason"] == {"model/out_of_memory": 1, "model/worker_died": 1}
    assert result["device_failures"] == 3
    assert result["oom_fallbacks"] >= 2  # of 4 titles, of 2; again in each new process
    assert result["lowest_batch_size"] == 1
    assert f"memory ran out {result['oom_fallbacks']} times with lvlm.batch_size=4" in capsys.readouterr().err
    encoder = LVLMS["text_encoder"].load(plan.config.lvlm, plan.recipe.reading)
    for item_id, row in rows_of(result["feature_set"]).items():
        for name, values in encoder.extract(encoder.prepare([Item(item_id, texts={"title": titles[item_id]})])).items():
            np.testing.assert_allclose(row[name], values[0].numpy(), rtol=0, atol=2e-6)


def test_a_device_that_always_fails_stops_the_run_and_rejects_nothing(tmp_path: Path, model: Path) -> None:
    write_items(tmp_path / "items.csv", {f"item{k}": f"number {k}" for k in range(20)})
    plan = plan_of(tmp_path, model, "lvlm.environment={env_vars: {LVLMREC_TEST_BROKEN: device}}")
    with pytest.raises(JobFailed, match=r"stopped: node [\d.]+ failed again and again, the last time with Accelera.*s"):
        run(plan)
    assert not len(store.read_rejected(plan.feature_set))
    assert not len(store.read_index(plan.feature_set))


def test_a_sick_process_beside_a_healthy_one_stops_the_run(tmp_path: Path, model: Path) -> None:
    write_items(tmp_path / "items.csv", {f"item{k}": f"number {k}" for k in range(300)})
    environment = f"{{env_vars: {{LVLMREC_TEST_BROKEN: one, LVLMREC_TEST_CLAIM: {tmp_path}/claim}}}}"
    overrides = [f"lvlm.environment={environment}", "pool.min_actors=2", "pool.max_actors=2"]
    plan = plan_of(tmp_path, model, *overrides, "max_rejected_in_a_row=40", "estimate.videos=0")
    with pytest.raises(JobFailed, match=r"40 items one after .* model/RuntimeError on process \d+ on node [\d.]+, the"):
        run(plan)
    assert (tmp_path / "healthy").exists()


@pytest.mark.parametrize(
    ("estimate", "told"),
    [
        ("estimate.only=true", r"^timing 8 videos before the run \(.*\): OutOfMemoryError: CUDA out of memory"),
        ("estimate.videos=0", r"^the model cannot be loaded: torch.OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line(tmp_path: Path, model: Path, estimate: str, told: str) -> None:
    write_items(tmp_path / "items.csv", {f"item{k}": f"number {k}" for k in range(20)})
    plan = plan_of(tmp_path, model, "lvlm.environment={env_vars: {LVLMREC_TEST_BROKEN: load}}", estimate)
    with pytest.raises(JobFailed, match=told):
        run(plan)
