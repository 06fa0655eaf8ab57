"""Devices that Ray's processes choose where there is a GPU. A module of its own, because Ray's workers import it."""

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


class DeviceReport(BaseException):
    """Raised with the device's name when a model would be loaded, to end the process under test there."""


def pretend_cuda() -> None:
    """Run first in each of Ray's workers: torch reports a GPU unless CUDA_VISIBLE_DEVICES hides it."""
    torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    LVLMS["stand_in"] = ReportingFamily()  # type: ignore[index]


class ReportingFamily(stand_ins.Family):
    """Raises `DeviceReport` with the device for which a model is loaded."""

    def __init__(self) -> None:
        super().__init__(lambda titles: None)

    def load(self, config: Any, recipe: Any) -> Any:
        raise DeviceReport(config.device)


def of_the_process() -> tuple[str, bool, str]:
    """The device of `cluster.device`, whether torch then reports CUDA, and the place as messages name it."""
    return cluster.device(), torch.cuda.is_available(), cluster.place()


def of_an_actor(device: str) -> str:
    try:
        Extractor(LVLMConfig(name="stand_in", device=device), stand_ins.RECIPE)
    except DeviceReport as report:
        return str(report)
    raise AssertionError


def of_decoding() -> bool:
    rows = stand_ins.rows("a").select(["item_id", "uri"]).append_column("title", [["a"]])
    list(stages.decode(rows, stand_ins.RECIPE.reading, stages.DecodeConfig()))
    return torch.cuda.is_available()


def of_a_run(experiment: Experiment) -> list[str]:
    """Of a run of a study, of a trial of a search, and what an evaluation would see."""

    def tell(config: TrainConfig, data: Any, features: Any, device: torch.device) -> Any:
        raise DeviceReport(device.type)

    study.new_state = tuning.new_state = tell
    sampled = {"model.embedding_dim": 8, "training.lr": 1e-3}
    found = []
    for run in (
        lambda: study._fit(experiment, "/nowhere", lambda metrics, epoch: None),
        lambda: tuning._trial(sampled, replace(experiment, features=None), "/nowhere"),
    ):
        try:
            run()
        except DeviceReport as report:
            found.append(str(report))
    evaluating.run = lambda config: {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    return [*found, study.evaluate(experiment.config, "/nowhere/x", [], 1, 1)["device"]]
