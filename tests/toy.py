"""A toy world for tests: 150 users walk a ring of 60 items, so that the next item is learnable and popularity is not.

`train_config` describes a small run on it; `Fitting` runs the training loop in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvlmrec import config
from lvlmrec.runs import experiment, loop
from lvlmrec.runs.experiment import Experiment, TrainConfig
from lvlmrec.runs.loop import State, fit, new_state
from tests.feature_sets import recipe_of, write_frames, write_set

NUM_ITEMS = 60
NUM_USERS = 150
ITEM_IDS = [f"v{i}" for i in range(1, NUM_ITEMS + 1)]
CPU = torch.device("cpu")


def walks() -> list[list[str]]:
    """Each user's items: 6 to 12 steps of 1 or 2 along the ring, from any place of it."""
    rng = np.random.default_rng(0)
    steps = [rng.choice([1, 1, 1, 2], size=rng.integers(6, 13)) for _ in range(NUM_USERS)]
    return [[ITEM_IDS[place % NUM_ITEMS] for place in rng.integers(NUM_ITEMS) + np.cumsum(walk)] for walk in steps]


def write_pairs(folder: Path, rows: list[list[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy_pairs.tsv").write_text("".join(f"{u}\t{' '.join(row)}\n" for u, row in enumerate(rows, 1)))
    return folder


def write_world(folder: Path) -> Path:
    """`folder`/interactions, and the stores `folder`/features and `folder`/frames with one feature set each."""
    write_pairs(folder / "interactions", walks())
    write_set(folder / "features", [ITEM_IDS[:40], ITEM_IDS[40:]], recipe_of())
    write_frames(folder / "frames", ITEM_IDS)
    return folder


def settings(world: Path, workspace: Path, **values: Any) -> dict[str, Any]:
    """A small run as dotted keys; `values` are more of them, dots written as two underscores."""
    small = {
        "workspace": str(workspace),
        "dataset.path": str(world / "interactions"),
        "features": str(world / "features"),
        "model.embedding_dim": 16,
        "model.backbone.dropout": 0.0,
        "training.epochs": 2,
        "training.lr": 0.01,
        "training.batch_size": 64,
    }
    return small | {name.replace("__", "."): value for name, value in values.items()}


def arguments(dotted: dict[str, Any]) -> list[str]:
    """The same as a job's command line."""
    return [f"{key}={value}" for key, value in dotted.items()]


def train_config(world: Path, workspace: Path, **values: Any) -> TrainConfig:
    return config.load(TrainConfig, [], arguments(settings(world, workspace, **values)))


def video(world: Path, **values: Any) -> dict[str, Any]:
    """Settings of a run that trains a tiny encoder on the world's frames."""
    tiny = {"features": str(world / "frames"), "feature_scaling": "none", "model__item_encoder__name": "video"}
    return tiny | {"model__item_encoder__encoder__channels": 8} | values


@dataclass
class Fitting:
    """The training loop on a prepared experiment, in this process; `each` is called after every epoch."""

    experiment: Experiment
    each: Callable[[State], None] = lambda state: None
    history: list[dict[str, float]] = field(default_factory=list)

    def new_state(self) -> State:
        return new_state(self.experiment.config, self.experiment.data, self.experiment.features, CPU)

    def run(self, state: State | None = None) -> State:
        state = state or self.new_state()

        def report(metrics: dict[str, float], state: State) -> None:
            self.history.append(metrics)
            self.each(state)

        fit(self.experiment.config, self.experiment.data, self.experiment.features, state, report, CPU)
        return state


def fitted(config: TrainConfig) -> tuple[Experiment, State]:
    prepared = experiment.prepare(config)
    return prepared, Fitting(prepared).run()


def publish(prepared: Experiment, state: State) -> str:
    """Publish the best weights as the train job does. Returns the checkpoint's URI."""
    loop.publish(prepared, state.best_weights, state.progress)
    return prepared.checkpoint
