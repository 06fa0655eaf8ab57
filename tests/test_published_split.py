"""A dataset that is published split, with features that come as arrays: imported, trained on and evaluated."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lvlmrec import config, evaluating, experiment
from lvlmrec.checkpoint import load_checkpoint
from lvlmrec.data import load_split
from lvlmrec.errors import InputError
from lvlmrec.evaluating import EvaluateConfig
from lvlmrec.evaluation.metrics import metrics
from lvlmrec.features import imported
from lvlmrec.features.imported import ImportConfig
from lvlmrec.fitting import encode_catalogue
from lvlmrec.models.histories import pack
from tests.toy import CPU, fitted, publish, train_config

NUM_ITEMS, NUM_USERS = 40, 70


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users of 1 to 30 items in training, 0 to 2 in validation and in test; and two arrays for the items."""
    folder, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    rows: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for user in range(NUM_USERS):
        items = rng.permutation(NUM_ITEMS).tolist()
        for part, number in {"train": 1 + user % 30, "validation": user % 3, "test": (user + 1) % 3}.items():
            rows[part] += [f"{user}\t{items.pop()}\n" for _ in range(number)]
    for part, lines in rows.items():
        (folder / f"{part}.tsv").write_text("user_id\titem_id\n" + "".join(lines))
    for name, dim in {"image": 8, "audio": 5}.items():
        np.save(folder / f"{name}.npy", rng.standard_normal((NUM_ITEMS, dim)).astype(np.float16))
    return folder


def run_config(published: Path, workspace: Path, **values: object) -> experiment.TrainConfig:
    given = {"dataset__name": "tiktok", "dataset__path": published, "dataset__split": "given"}
    given |= {"dataset__min_interactions": 1, "dataset__max_length": 6, "training__epochs": 2}
    return train_config(published, workspace, **given | values)


def test_two_imported_sets_through_training_and_evaluation(published: Path, tmp_path: Path) -> None:
    sets = [
        imported.run(
            config.load(ImportConfig, [{"file": f"{published}/{name}.npy", "name": name, "store": f"{tmp_path}/store"}])
        )
        for name in ("image", "audio")
    ]
    uris = ",".join(each["feature_set"] for each in sets)
    settings = run_config(published, tmp_path, model__item_encoder__name="dff", features=f"[{uris}]")
    prepared, state = fitted(settings)
    assert prepared.data.num_users == NUM_USERS < len(prepared.data.sequences)
    assert prepared.features is not None and prepared.features.shapes == [(1, 8), (1, 5)]
    uri = publish(prepared, state)
    result = evaluating.run(config.load(EvaluateConfig, [{"workspace": str(tmp_path), "checkpoint": uri}]))
    assert [name.split(":")[1] for name in result["layer_weights"]] == ["image/llm.0/imported", "audio/llm.0/imported"]

    ranks = evaluating.read_ranks(result["ranks"])
    lines = [line.split("\t") for line in (published / "test.tsv").read_text().splitlines()[1:]]
    assert sorted(zip(ranks["user_id"], ranks["item_id"], strict=True)) == sorted((u, i) for u, i in lines)
    assert result["test"] == metrics(ranks["item_rank"].to_numpy())
    assert ranks["item_rank"].tolist() == ranks_by_hand(uri, published)


@torch.inference_mode()
def ranks_by_hand(uri: str, published: Path) -> list[int]:
    """One target at a time: masked is what train.tsv and validation.tsv say of the user, nothing else."""
    loaded = load_checkpoint(uri, {})
    items = encode_catalogue(loaded.model, len(loaded.item_ids), loaded.features, CPU)
    known: dict[str, set[str]] = {}
    for part in ("train", "validation"):
        for line in (published / f"{part}.tsv").read_text().splitlines()[1:]:
            user, item = line.split("\t")
            known.setdefault(user, set()).add(item)
    split, _ = load_split(loaded.config.dataset)
    test, ranks = split.test(), []
    for user, inputs, target in zip(split.user_ids, test.inputs, test.targets, strict=True):
        read = items[inputs[inputs > 0].astype(np.int64)]
        query = loaded.model.encode_sequences(read, pack(torch.ones(1, len(read), dtype=torch.bool)))[-1]
        own = float(items[target] @ query)
        candidates = [i for i in range(1, len(items)) if loaded.item_ids[i - 1] not in known[user]]
        ranks.append(sum(float(items[i] @ query) >= own for i in candidates))
    return ranks


def test_what_has_one_item_is_counted_and_not_learned_from(published: Path, tmp_path: Path) -> None:
    """Batches of one sequence: each has something to predict."""
    prepared, _ = fitted(run_config(published, tmp_path, training__batch_size=1, training__epochs=1))
    lengths = [1 + user % 30 for user in range(NUM_USERS)]
    alone = sum(length % 7 == 1 for length in lengths)  # what is left of a history cut into sequences of seven
    assert prepared.report["training_sequences_of_one_item"] == alone > 0
    assert (prepared.data.sequences > 0).sum(1).min() == 2
    assert prepared.data.train_counts.sum() == sum(lengths) == (prepared.data.sequences > 0).sum() + alone


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
def test_it_has_no_other_split_by_time(published: Path, tmp_path: Path, split: str) -> None:
    with pytest.raises(InputError, match=f"dataset.split: '{split}'.*choices: given, random"):
        experiment.prepare(run_config(published, tmp_path, dataset__split=split))


def test_the_split_names_the_run(published: Path, tmp_path: Path) -> None:
    keys = {
        experiment.prepare(run_config(published, tmp_path, **values)).key
        for values in ({}, {"dataset__split": "random", "dataset__min_interactions": 3}, {"dataset__core": 2})
    }
    assert len(keys) == 3
