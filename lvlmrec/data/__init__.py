"""Datasets: interactions, id maps, the split, and a small world made to measure."""

from __future__ import annotations

from dataclasses import dataclass

from lvlmrec.config import option
from lvlmrec.data import microlens, table
from lvlmrec.data.interactions import Dataset

DATASETS = {
    "microlens": microlens.load,
    "table": table.load,
}


@dataclass(frozen=True)
class DatasetConfig:
    """Which interactions to read, and how to split them."""

    name: str = option("microlens", "format of the interactions", choices=DATASETS)
    path: str = option("${workspace}/sample/interactions", "the interaction file, or the folder that holds one")
    max_length: int = option(10, "items of a user's history that a model reads", minimum=1)
    min_interactions: int = option(5, "users with fewer interactions are dropped", minimum=3)


def load(config: DatasetConfig) -> Dataset:
    """The dataset that `config` names. Raises `InputError`."""
    return DATASETS[config.name](config.path)
