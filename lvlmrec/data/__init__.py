"""Datasets: interactions, id maps, splits, and the synthetic micro-world."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lvlmrec.config import option
from lvlmrec.data import amazon_beauty, amazon_reviews_2023, microlens, ninerec, recbole, table, tiktok
from lvlmrec.data.interactions import Dataset, k_core
from lvlmrec.data.split import SEVERAL_TARGETS, SPLITS, Split

DATASETS = {
    "microlens": microlens.load,
    "ninerec": ninerec.load,
    "tiktok": tiktok.load,
    "amazon_reviews_2023": amazon_reviews_2023.load,
    "amazon_beauty": amazon_beauty.load,
    "recbole": recbole.load,
    "table": table.load,
}


@dataclass(frozen=True)
class DatasetConfig:
    """Which interactions are read, and how they are split."""

    name: str = option("microlens", "format of the interactions", choices=DATASETS)
    path: str = option(
        "${workspace}/sample/interactions",
        "the interaction file, or the folder that holds one",
        required=True,
        uri=True,
    )
    split: str = option(
        "leave_one_out",
        "what is training, validation and test: the last two items of each user, two points in time, a draw, or as the "
        "dataset is published",
        choices=SPLITS,
    )
    max_length: int = option(10, "items of a user's history that a model reads", minimum=1)
    min_interactions: int = option(5, "users with fewer interactions are dropped", minimum=1)
    core: int = option(
        0, "users and items with fewer interactions are dropped, again and again until there are none", minimum=0
    )

    @property
    def several_targets(self) -> bool:
        """Whether the split may hold out several items of a user, so that metrics are those of sets."""
        return self.split in SEVERAL_TARGETS

    @property
    def selected_by(self) -> str:
        """The validation metric by which epochs and settings are chosen.

        hr@10 as in MicroLens' protocol; where users have several targets recall@20, as LATTICE, FREEDOM and MMRec use.
        """
        return "recall@20" if self.several_targets else "hr@10"


def load(config: DatasetConfig) -> Dataset:
    """The dataset that `config` names. Raises `InputError`."""
    dataset = DATASETS[config.name](config.path)
    if not config.core:
        return dataset
    core = k_core(dataset.interactions, config.core)
    return replace(
        dataset, interactions=core, report=dataset.report | core.report, item_ids_before_core=dataset.item_ids
    )


def load_split(config: DatasetConfig) -> tuple[Split, dict[str, int]]:
    """The split of the dataset, and counts of everything that was dropped, by reason. Raises `InputError`."""
    dataset = load(config)
    split = SPLITS[config.split](dataset.interactions, config.max_length, config.min_interactions)
    return replace(split, dataset_ids=dataset.item_ids), {**dataset.report, **split.report}
