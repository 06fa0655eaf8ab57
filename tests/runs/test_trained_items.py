"""Items that losses may read beyond the batch: those that occur in training, without the user's own."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lvlmrec.errors import ConfigError
from lvlmrec.models.losses import LOSSES, LossConfig, LossInputs, SampledLossConfig
from lvlmrec.runs import experiment
from lvlmrec.runs.batches import Batch, batches_of_epoch
from lvlmrec.runs.experiment import Experiment
from lvlmrec.runs.loop import Loss
from tests.toy import CPU, ITEM_IDS, Fitting, train_config, walks, write_pairs

SAMPLED = [name for name in LOSSES if issubclass(LOSSES[name], SampledLossConfig)]
COLD = [f"cold{i}" for i in range(12)]


@pytest.fixture(scope="module")
def cold_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy world's users, some of whom end with items that nobody is trained on; every third one at validation."""
    folder, rows = tmp_path_factory.mktemp("cold"), walks()
    for number, item in enumerate(COLD):
        rows[number] = [*rows[number][:-1], item, *rows[number][-1 : len(rows[number]) if number % 3 == 0 else -1]]
    write_pairs(folder / "interactions", rows)
    return folder


def prepare(world: Path, workspace: Path, loss: str = "sampled_softmax", **values: Any) -> Experiment:
    overrides = {"training__loss__name": loss, "training__batch_size": 16} | values
    return experiment.prepare(train_config(world, workspace, **overrides))


def batches(case: Experiment, epochs: int = 1) -> Iterator[Batch]:
    for epoch in range(epochs):
        yield from batches_of_epoch(case.config, case.data, None, epoch, CPU)


def trained(case: Experiment) -> set[int]:
    return {*case.data.sequences.ravel().tolist()} - {0}


def untrained(case: Experiment) -> list[int]:
    return sorted({*range(1, len(case.data.item_ids) + 1)} - trained(case))


@pytest.mark.parametrize("loss", SAMPLED)
def test_every_item_of_training_is_drawn_and_no_other(cold_world: Path, tmp_path: Path, loss: str) -> None:
    case = prepare(cold_world, tmp_path, loss, training__loss__negatives=8)
    assert len(untrained(case)) == len(COLD) and len(trained(case)) == len(ITEM_IDS)
    drawn: Counter[int] = Counter()
    for batch in batches(case, epochs=5):
        assert batch.local.negatives is not None
        drawn.update(batch.local.negatives.flatten().tolist())
        read = {*batch.items.item_index.tolist()}
        assert read == {*batch.local.user_items.flatten().tolist(), *batch.local.negatives.flatten().tolist()} - {0}
    assert drawn.total() > 20_000
    assert {*drawn} == trained(case)
    assert max(drawn.values()) < 1.5 * min(drawn.values()), "evenly"


def test_the_full_softmax_reads_the_items_of_training_in_every_batch(cold_world: Path, tmp_path: Path) -> None:
    case = prepare(cold_world, tmp_path, "full_softmax")
    for batch in batches(case):
        assert batch.items.item_index.tolist() == sorted(trained(case))


@pytest.mark.parametrize("loss", ["full_softmax", *SAMPLED])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_items_that_are_never_trained_keep_their_weights(
    cold_world: Path, tmp_path: Path, loss: str, decay: float
) -> None:
    case = prepare(cold_world, tmp_path, loss, training__weight_decay=decay, training__epochs=2)
    fitting = Fitting(case)
    state = fitting.new_state()
    before = state.model.item_encoder.ids.weight.detach().clone()  # type: ignore[union-attr]
    fitting.run(state)
    after = state.model.item_encoder.ids.weight.detach()  # type: ignore[union-attr]
    steps = sum(1 for _ in batches(case, epochs=2))
    others = untrained(case)
    torch.testing.assert_close(after[others], before[others] * (1 - case.config.training.lr * decay) ** steps)
    assert not decay or not torch.equal(after[others], before[others])
    assert (after != before).any(1)[sorted(trained(case))].all()


@dataclass(frozen=True)
class RecordingLoss(LossConfig):
    """Keeps the inputs of each call."""

    recorded: list[LossInputs]

    def sum(self, inputs: LossInputs) -> Tensor:
        self.recorded.append(inputs)
        return inputs.queries.sum() * 0.0


@pytest.mark.parametrize("loss", ["full_softmax", *SAMPLED])
def test_a_loss_is_told_how_many_items_are_drawn_from(cold_world: Path, tmp_path: Path, loss: str) -> None:
    """gBCE's alpha and sampled softmax's N count trained items, not the catalogue."""
    case = prepare(cold_world, tmp_path, loss)
    settings = replace(case.config.training, loss=RecordingLoss("recording", []))
    loss_module = Loss(Fitting(case).new_state().model, settings, case.data.train_counts)
    batch = next(batches(case))
    loss_module(batch.items, batch.local)
    (inputs,) = settings.loss.recorded  # type: ignore[attr-defined]
    assert inputs.num_items == len(trained(case)) < len(case.data.item_ids)


def histories_of(case: Experiment) -> list[set[int]]:
    offsets, items = case.data.user_items
    return [{*items[start:end].tolist()} for start, end in itertools.pairwise(offsets)]


@pytest.mark.parametrize("split", ["random", "global_time", "given"])
def test_negatives_are_none_of_the_users_items_where_histories_are_cut(tmp_path: Path, split: str) -> None:
    """Users of 28 or 32 training items in sequences of four: items of the other sequences are the user's too."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(50)[:40].tolist() for _ in range(20)]
    lines: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for user, row in enumerate(rows):
        for place, item in enumerate(row):
            part = "train" if place < 28 else "validation" if place < 35 else "test"
            stamp = f"\t{place}" if split == "global_time" else ""
            lines[part if split == "given" else "train"].append(f"u{user}\ti{item}{stamp}")
    folder = tmp_path / "data"
    folder.mkdir()
    if split == "given":
        for part, content in lines.items():
            (folder / f"{part}.tsv").write_text("\n".join(["user_id\titem_id", *content]) + "\n")
    else:
        header = "user_id\titem_id" + ("\ttimestamp" if split == "global_time" else "")
        (folder / "t.csv").write_text("\n".join([header, *lines["train"]]).replace("\t", ",") + "\n")
    case = prepare(
        tmp_path,
        tmp_path,
        training__loss__negatives=50,
        dataset__name="tiktok" if split == "given" else "table",
        dataset__path=str(folder if split == "given" else folder / "t.csv"),
        dataset__split=split,
        dataset__max_length=3,
    )
    histories, trained_items = histories_of(case), trained(case)
    assert {len(history) for history in histories} == {28 if split == "given" else 32}
    cut = [{*row.tolist()} - {0} for row in case.data.sequences]
    assert all(row < histories[owner] for row, owner in zip(cut, case.data.owners, strict=True))
    drawn: dict[int, set[int]] = {}
    for batch in batches(case, epochs=3):
        assert batch.local.negatives is not None
        for own, negatives in zip(batch.local.user_items.tolist(), batch.local.negatives.tolist(), strict=True):
            owner = case.data.owners[cut.index({*own} - {0})]
            drawn.setdefault(int(owner), set()).update(negatives)
    assert len(drawn) == len(rows)
    for owner, items in drawn.items():
        assert items == trained_items - histories[owner], "all others, and none of the user's own"


def test_held_out_items_may_be_drawn(cold_world: Path, tmp_path: Path) -> None:
    """Leaving them out would leak the targets of validation and test into training."""
    case = prepare(cold_world, tmp_path, training__loss__negatives=60)
    held_out = set()
    targets = {tuple(row[row > 0]): target for row, target in zip(*holdout(case), strict=True)}
    for batch in batches(case):
        assert batch.local.negatives is not None
        for own, negatives in zip(batch.local.user_items.tolist(), batch.local.negatives.tolist(), strict=True):
            held_out.add(targets[tuple(item for item in own if item)] in negatives)
    assert True in held_out


def holdout(case: Experiment) -> tuple[np.ndarray, np.ndarray]:
    return case.data.validation.histories, case.data.validation.targets


def test_a_user_who_has_every_item_is_refused(tmp_path: Path) -> None:
    for part, items in {"train": range(8), "validation": [8], "test": [9]}.items():
        lines = [f"{user}\t{item}" for user in range(8) for item in items if part != "train" or item <= user]
        (tmp_path / f"{part}.tsv").write_text("\n".join(["user_id\titem_id", *lines]) + "\n")
    overrides = {"dataset__name": "tiktok", "dataset__path": str(tmp_path), "dataset__split": "given"}
    overrides["dataset__min_interactions"] = "1"
    for loss in SAMPLED:
        with pytest.raises(ConfigError, match=rf"training.loss.name: '{loss}' .*one has all 8.*choices: in_batch"):
            prepare(tmp_path, tmp_path, loss, **overrides)
    prepare(tmp_path, tmp_path, "in_batch_softmax", **overrides)


def test_runs_that_learn_something_else_have_another_name(
    cold_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {name: prepare(cold_world, tmp_path, name).key for name in LOSSES}
    for loss in LOSSES.values():
        monkeypatch.setattr(loss, "format", 0)
    earlier = {name: prepare(cold_world, tmp_path, name).key for name in LOSSES}
    assert [name for name in LOSSES if keys[name] == earlier[name]] == ["in_batch_softmax"]


@pytest.mark.data
def test_of_microlens_768_items_are_never_drawn(real_data: Path, tmp_path: Path) -> None:
    case = prepare(tmp_path, tmp_path, dataset__path=real_data / "microlens_50k", training__batch_size=512)
    never = untrained(case)
    assert len(never) == 768 and len(case.data.item_ids) == 19_099
    drawn = np.zeros(19_100, dtype=np.int64)
    for _, batch in zip(range(20), batches(case), strict=False):
        assert batch.local.negatives is not None
        drawn += np.bincount(batch.local.negatives.flatten().numpy(), minlength=19_100)
        assert batch.items.num_trained == 19_099 - 768
    assert drawn.sum() > 9_000_000 and not drawn[never].any()
