"""What processes of a Ray with a GPU take for their device; apart from the tests, because Ray's workers import it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from lvlmrec import cluster
from lvlmrec.extraction import stages
from lvlmrec.extraction.extractor import Extractor
from lvlmrec.jobs import study, tuning
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.runs import evaluating
from lvlmrec.runs.experiment import Experiment, TrainConfig
from tests.extraction import stand_ins


class Told(BaseException):
    """Carries a device out of what would go on with it."""


def pretend_cuda() -> None:
    """First thing in each of Ray's workers: a GPU that is seen unless it is hidden, as the driver does it."""
    torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    LVLMS["stand_in"] = Named()  # type: ignore[index]


class Named(stand_ins.Family):
    """Its models say for which device they were loaded."""

    def __init__(self) -> None:
        super().__init__(lambda titles: None)

    def load(self, config: Any, recipe: Any) -> Any:
        raise Told(config.device)


def of_the_process() -> tuple[str, bool, str]:
    """Our answer, torch's after it, and how messages name the place."""
    return cluster.device(), torch.cuda.is_available(), cluster.place()


def of_an_actor(device: str) -> str:
    try:
        Extractor(LVLMConfig(name="stand_in", device=device), stand_ins.RECIPE)
    except Told as told:
        return str(told)
    raise AssertionError


def of_decoding() -> bool:
    rows = stand_ins.rows("a").select(["item_id", "uri"]).append_column("title", [["a"]])
    list(stages.decode(rows, stand_ins.RECIPE, stages.DecodeConfig()))
    return torch.cuda.is_available()


def of_a_run(experiment: Experiment) -> list[str]:
    """Of a run of a study, of a trial of a search, and what an evaluation would see."""

    def tell(config: TrainConfig, data: Any, features: Any, device: torch.device) -> Any:
        raise Told(device.type)

    study.new_state = tuning.new_state = tell
    sampled = {"model.embedding_dim": 8, "training.lr": 1e-3}
    found = []
    for run in (
        lambda: study._fit(experiment, "/nowhere", lambda metrics, epoch: None),
        lambda: tuning._trial(sampled, replace(experiment, features=None), "/nowhere"),
    ):
        try:
            run()
        except Told as told:
            found.append(str(told))
    evaluating.run = lambda config: {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    return [*found, study.evaluate(experiment.config, "/nowhere/x", [], 1, 1)["device"]]
