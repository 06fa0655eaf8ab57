"""Models learn the order of a history, which a bag of its items does not have.

Users walk a ring of 60 items one step at a time, half of them forwards and half backwards; both have the same sets of
items. The next item is one of the two neighbours of the set, and the order alone says which of them. So a model of the
set is right at the first place half of the time, and a model of the order always.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lvlmrec.config import load, option
from lvlmrec.models.losses import LOSSES, SampledLossConfig
from lvlmrec.models.sequential.backbones import BACKBONES
from lvlmrec.models.sequential.backbones.base import BackboneConfig
from lvlmrec.models.sequential.fusions import FUSIONS
from lvlmrec.models.sequential.histories import Histories, join_runs, split_runs
from lvlmrec.runs import experiment
from lvlmrec.runs.experiment import TrainConfig
from lvlmrec.runs.loop import encode_catalogue, rank_holdout
from tests.feature_sets import write_frames, write_values
from tests.toy import CPU, ITEM_IDS, NUM_ITEMS, Fitting, arguments, settings, video, write_pairs


@dataclass(frozen=True)
class BagConfig(BackboneConfig):
    """The control: at each position the mean of the items up to it, through a linear layer."""

    name: str = option("bag", "the mean of the history's items")
    dropout: float = option(0.0, "none")

    def build(self, embedding_dim: int, max_length: int) -> nn.Module:
        return Bag(embedding_dim)


class Bag(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, embeddings: Tensor, histories: Histories, last: bool = False) -> Tensor:
        runs = split_runs(embeddings, histories.runs)
        means = [run.cumsum(1) / torch.arange(1, run.shape[1] + 1)[None, :, None] for run in runs]
        x = join_runs(means, embeddings)
        x = x + self.layer(x)
        return x[histories.ends] if last else x


@pytest.fixture(scope="module")
def two_ways(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 users of 6 to 10 items, from any place of the ring."""
    folder, rng, rows = tmp_path_factory.mktemp("two_ways"), np.random.default_rng(0), []
    for user in range(400):
        start, way = rng.integers(NUM_ITEMS), 1 if user % 2 else -1
        rows.append([ITEM_IDS[(start + way * step) % NUM_ITEMS] for step in range(rng.integers(6, 11))])
    write_pairs(folder / "interactions", rows)
    write_values(
        folder / "features", ITEM_IDS, torch.randn(NUM_ITEMS, 3, 8, generator=torch.Generator().manual_seed(0))
    )
    write_frames(folder / "frames", ITEM_IDS)
    return folder


def right_at_first(folder: Path, workspace: Path, **values: Any) -> float:
    """The share of users whose validation target ranks first after the last epoch."""
    overrides = {"training__epochs": 20, "training__patience": 100, "training__lr": 0.01, **values}
    dotted = settings(folder, workspace, **overrides)
    if overrides.get("model__backbone__name") == "nextitnet":
        del dotted["model.backbone.dropout"]  # it has none
    case = experiment.prepare(load(TrainConfig, [], arguments(dotted)))
    state = Fitting(case).run()
    state.model.eval()
    catalogue = encode_catalogue(state.model, NUM_ITEMS, case.features, CPU)
    return float((rank_holdout(state.model, catalogue, case.data.validation) == 1).mean())


def first_quick(names: Iterable[str]) -> list[Any]:
    """The names as parameters, of which the quick part of the suite runs the first."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.thorough) for name in others)]


def with_loss(name: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {"training__loss__name": name}
    if issubclass(LOSSES[name], SampledLossConfig):
        chosen["training__loss__negatives"] = 16
    if name == "gbce":  # its positives weigh least; it takes more steps
        chosen["training__batch_size"] = 16
    return chosen


@pytest.mark.parametrize("loss", first_quick(LOSSES))
def test_a_bag_of_items_is_right_no_more_often_than_by_chance(
    two_ways: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """If the bag were right, the tests below would not show that order is learned."""
    monkeypatch.setitem(BACKBONES, "bag", BagConfig)
    assert 0.4 < right_at_first(two_ways, tmp_path, model__backbone__name="bag", **with_loss(loss)) < 0.7


@pytest.mark.parametrize("backbone", first_quick(BACKBONES))
def test_every_backbone_learns_the_order(two_ways: Path, tmp_path: Path, backbone: str) -> None:
    assert right_at_first(two_ways, tmp_path, model__backbone__name=backbone) > 0.9


@pytest.mark.parametrize("loss", first_quick(name for name in LOSSES if name != "in_batch_softmax"))
def test_every_loss_learns_the_order(two_ways: Path, tmp_path: Path, loss: str) -> None:
    assert right_at_first(two_ways, tmp_path, **with_loss(loss)) > 0.9


@pytest.mark.parametrize("encoder", first_quick(name for name in FUSIONS if name != "id"))
def test_every_item_encoder_learns_the_order(two_ways: Path, tmp_path: Path, encoder: str) -> None:
    chosen: dict[str, Any] = video(two_ways) if encoder == "video" else {"model__item_encoder__name": encoder}
    assert right_at_first(two_ways, tmp_path, **chosen) > 0.9
