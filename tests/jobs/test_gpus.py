"""A process uses the GPU that Ray gave it, and none that it was not given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from lvlmrec import cluster
from lvlmrec.config import load
from lvlmrec.errors import ConfigError
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.pipeline import ExtractConfig
from lvlmrec.jobs.tuning import TuneConfig
from lvlmrec.runs import experiment
from lvlmrec.runs.experiment import TrainConfig
from lvlmrec.runs.grid import StudyConfig
from tests import gpu_probes


@pytest.fixture(scope="class")
def ray_with_a_gpu() -> Iterator[None]:
    """Ray counts a GPU, and does not hide it from processes that get none."""
    options = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False, "log_to_driver": False}
    ray.init("local", runtime_env={"worker_process_setup_hook": gpu_probes.pretend_cuda}, **options)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_with_a_gpu")
class TestDevices:
    def test_a_process_without_a_gpu_sees_none(self) -> None:
        device, sees, place = ray.get(ray.remote(num_gpus=0)(gpu_probes.of_the_process).remote())
        assert (device, sees) == ("cpu", False)
        assert place.startswith("node ")
        device, sees, place = ray.get(ray.remote(num_gpus=0.5)(gpu_probes.of_the_process).remote())
        assert (device, sees) == ("cuda", True)
        assert place.startswith("GPU 0 of node ")

    def test_actors_take_theirs_and_decoders_none(self) -> None:
        on_cpu, on_gpu = (ray.remote(num_gpus=gpus)(gpu_probes.of_an_actor) for gpus in (0, 1))
        assert ray.get([on_cpu.remote("auto"), on_gpu.remote("auto"), on_gpu.remote("cpu")]) == ["cpu", "cuda", "cpu"]
        assert not ray.get(ray.remote(num_gpus=0)(gpu_probes.of_decoding).remote())

    @pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.25, "cuda")])
    def test_runs_of_studies_and_trials_of_searches(
        self, gpus: float, device: str, world: Path, tmp_path: Path
    ) -> None:
        arguments = [f"workspace={tmp_path}", f"dataset.path={world}/interactions", "model.item_encoder.name=id"]
        prepared = experiment.prepare(load(TrainConfig, [], arguments))
        assert ray.get(ray.remote(num_gpus=gpus)(gpu_probes.of_a_run).remote(prepared)) == [device] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("key", ["pool.gpus_per_actor", "training.use_gpu"])
def test_a_ray_without_gpus_is_not_waited_for(key: str) -> None:
    cluster.require_gpus(key, 0)
    with pytest.raises(ConfigError, match=rf"^{key}: 0.5: no node of this Ray has a GPU; set 0 to run on CPUs"):
        cluster.require_gpus(key, 0.5)


@pytest.mark.parametrize("gpus", [2, 1.5, 8])
def test_more_than_one_gpu_for_a_process_is_refused(gpus: float) -> None:
    refused = rf"_per_\w+: {float(gpus)}: a process uses one GPU at most; set 1, a share of one such as 0.5, or 0$"
    with pytest.raises(ConfigError, match=rf"^pool\.gpus{refused}"):
        pipeline.plan(load(ExtractConfig, [], [f"pool.gpus_per_actor={gpus}"]))
    with pytest.raises(ConfigError, match=rf"^study\.gpus{refused}"):
        load(StudyConfig, [], [f"study.gpus_per_run={gpus}"])
    with pytest.raises(ConfigError, match=rf"^search\.gpus{refused}"):
        load(TuneConfig, [], [f"search.gpus_per_trial={gpus}"])


@pytest.mark.parametrize(
    ("device", "gpus", "told"),
    [
        ("cuda", 0, "with pool.gpus_per_actor=0, actors without a GPU: set pool.gpus_per_actor=1, or lvlm.device=auto"),
        ("cuda:0", 0, "with pool.gpus_per_actor=0, actors without a GPU"),
        ("cuda:1", 1, "an actor sees the GPU that Ray gave it alone; set lvlm.device=auto"),
        ("cuda:3", 0.5, "an actor sees the GPU that Ray gave it alone"),
    ],
)
def test_a_device_that_actors_would_not_have_is_refused(device: str, gpus: float, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^lvlm\.device: '{device}'.*{told}"):
        pipeline.plan(load(ExtractConfig, [], [f"lvlm.device={device}", f"pool.gpus_per_actor={gpus}"]))
