"""The sample of a workspace whose first jobs start at the same time."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lvlmrec.data.micro_world import MARKER
from lvlmrec.features import lease
from lvlmrec.jobs import sample
from tests.toy import train_config

# The parts that three first jobs ask for; a small world, for all that.
ENSURE = """
import functools, sys
from lvlmrec.jobs import sample
from lvlmrec.data import micro_world
micro_world.MicroWorldConfig = functools.partial(
    micro_world.MicroWorldConfig, num_items=40, num_users=40, frame_side=32, clip_seconds=0.5
)
sample.ensure(sys.argv[1], f"{sys.argv[1]}/sample/videos", f"{sys.argv[1]}/sample/models/text_encoder")
"""


@pytest.mark.thorough
def test_three_first_jobs_make_one_sample(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENSURE, str(tmp_path)]
    jobs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outcomes = [(process.communicate()[1], process.returncode) for process in jobs]
    assert [status for _, status in outcomes] == [0, 0, 0], [err[-500:] for err, _ in outcomes]
    assert sum(err.count("rendering the micro-world") for err, _ in outcomes) == 1
    made = tmp_path / "sample"
    assert (made / MARKER).exists() and len(list((made / "videos").glob("*.mp4"))) == 40
    assert [path.name for path in (made / "models").iterdir()] == ["text_encoder"]


@pytest.mark.parametrize("others", ["ends", "dies"])
def test_features_that_another_job_extracts_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    """The other job ends with features, or dies, and this one then makes them."""
    world = tmp_path / "sample" / "interactions"
    config = train_config(world, tmp_path, model__item_encoder__name="dff", features=str(tmp_path / "features"))
    there: list[str] = []
    tries: list[Any] = []

    def run(plan: Any, log: Any) -> None:
        tries.append(plan)
        if len(tries) == 1:
            if others == "ends":
                there.append("by the other")
            raise lease.BusyInputError("another process is writing it")
        there.append("by this one")

    monkeypatch.setattr(lease, "BEAT", 0.01)
    monkeypatch.setattr(sample, "ensure", lambda *parts: None)
    monkeypatch.setattr(sample.pipeline, "plan", lambda config: "plan")
    monkeypatch.setattr(sample.pipeline, "run", run)
    monkeypatch.setattr(sample.store, "committed", lambda uri: there)
    sample.ensure_features(config)
    assert there == ["by the other" if others == "ends" else "by this one"]
