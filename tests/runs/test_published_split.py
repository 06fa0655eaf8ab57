"""A dataset that is published split, with features that come as arrays: imported, trained on and evaluated."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lvlmrec import config
from lvlmrec.data import DatasetConfig, load_split
from lvlmrec.errors import InputError
from lvlmrec.features import imported
from lvlmrec.features.imported import ImportConfig
from lvlmrec.models.sequential.histories import pack
from lvlmrec.report.evaluation import evaluation
from lvlmrec.runs import evaluating, experiment
from lvlmrec.runs.checkpoint import load_checkpoint
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.runs.loop import encode_catalogue
from tests.toy import CPU, Fitting, fitted, publish, train_config

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
    overrides = {"dataset__name": "tiktok", "dataset__path": published, "dataset__split": "given"}
    overrides |= {"dataset__min_interactions": 1, "dataset__max_length": 6, "training__epochs": 2}
    return train_config(published, workspace, **overrides | values)


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
    assert ranks["item_rank"].tolist() == ranks_by_hand(uri, published, "test")
    assert result["test"] == pytest.approx(metrics_by_hand(ranks["user_id"], ranks["item_rank"]))
    assert (result["users"], result["targets"]) == (ranks["user_id"].nunique(), len(ranks)) and len(ranks) > result[
        "users"
    ]
    assert result["slices"]["overall"] == {"users": result["users"], "targets": len(ranks), **result["test"]}

    validation = pd.read_csv(published / "validation.tsv", sep="\t", dtype=str)
    validated = metrics_by_hand(users_of_rows(uri), ranks_by_hand(uri, published, "validation"))
    assert state.progress.best == result["validation"] == pytest.approx(validated)
    assert len(users_of_rows(uri)) == len(validation)
    for name, baseline in result["baselines"].items():
        own = evaluating.read_ranks(str(Path(result["ranks"]).with_name(f"ranks-{name}.parquet")))
        assert baseline["test"] == pytest.approx(metrics_by_hand(own["user_id"], apart(own)))
        assert set(baseline["validation"]) == set(result["validation"])
    overall = evaluation(result).split("\n\n")[0].splitlines()
    for name in ("validation RECALL@20", "RECALL@20", "NDCG@20", "MAP@20"):
        assert name in overall[0]
    assert f"{result['test']['recall@20']:.4f}" in overall[-1]


def test_a_user_with_several_targets_is_shown_one_list(published: Path, tmp_path: Path) -> None:
    prepared, state = fitted(run_config(published, tmp_path))
    uri = publish(prepared, state)
    result = evaluating.run(config.load(EvaluateConfig, [{"workspace": str(tmp_path), "checkpoint": uri}]))
    model, counts = load_checkpoint(uri, {}).model, prepared.data.train_counts
    items = encode_catalogue(model, NUM_ITEMS, None, CPU)
    split, _ = load_split(prepared.config.dataset)
    shown: dict[str, list[int]] = {}
    for user, inputs, history in zip(split.user_ids, split.test().inputs, split.test().histories, strict=True):
        read = items[inputs[inputs > 0].astype(np.int64)]
        with torch.inference_mode():
            query = model.encode_sequences(read, pack(torch.ones(1, len(read), dtype=torch.bool)))[-1]
        order = (items @ query).argsort(descending=True).tolist()
        shown[user] = [item for item in order if item and item not in history][:10]
    popularity = np.mean([counts[item] for items in shown.values() for item in items])
    assert result["beyond_accuracy"]["popularity@10"] == pytest.approx(popularity)
    assert len(shown) == result["users"] < result["targets"]


def apart(ranks: pd.DataFrame) -> list[int]:
    """Ranks as places of one list: of a user's targets that tie, each its own."""
    places: list[int] = []
    for user, rank in zip(ranks["user_id"], ranks["item_rank"], strict=True):
        same = (ranks["user_id"] == user) & (ranks["item_rank"] == rank)
        earlier = sum(same.to_numpy()[: len(places)])
        places.append(rank - (same.sum() - 1) + earlier)
    return places


def metrics_by_hand(users: Iterable[str], places: Iterable[int]) -> dict[str, float]:
    """Means over users; a user's targets count together."""
    of_user: dict[str, list[int]] = {}
    for user, place in zip(users, places, strict=True):
        of_user.setdefault(user, []).append(place)
    found: dict[str, float] = {}
    for k in (10, 20):
        values = []
        for own in of_user.values():
            hits = sorted(place for place in own if place <= k)
            best = min(k, len(own))
            gain = sum(1 / np.log2(place + 1) for place in hits) / sum(1 / np.log2(n + 2) for n in range(best))
            precision = sum((n + 1) / place for n, place in enumerate(hits)) / best
            values.append((bool(hits), len(hits) / len(own), gain, precision, 1 / hits[0] if hits else 0))
        for name, of in zip(("hr", "recall", "ndcg", "map", "mrr"), zip(*values, strict=True), strict=True):
            found[f"{name}@{k}"] = float(np.mean(of))
    return found


def users_of_rows(uri: str) -> list[int]:
    """The user of each row of validation, found by its history: no two users have the same."""
    split, _ = load_split(load_checkpoint(uri, {}).config.dataset)
    return [hash(tuple(row)) for row in split.validation().histories.tolist()]


@torch.inference_mode()
def ranks_by_hand(uri: str, published: Path, part: str) -> list[int]:
    """One target at a time: masked are the user's items in train.tsv, and for test those in validation.tsv."""
    loaded = load_checkpoint(uri, {})
    items = encode_catalogue(loaded.model, len(loaded.item_ids), loaded.features, CPU)
    known: dict[str, set[str]] = {}
    for file in ("train", "validation") if part == "test" else ("train",):
        for line in (published / f"{file}.tsv").read_text().splitlines()[1:]:
            user, item = line.split("\t")
            known.setdefault(user, set()).add(item)
    split, _ = load_split(loaded.config.dataset)
    rows = (published / f"{part}.tsv").read_text().splitlines()[1:]
    asked = sorted((int(row.split("\t")[0]), row.split("\t")[0]) for row in rows)  # users come in this order
    holdout, ranks = split.test() if part == "test" else split.validation(), []
    for (_, user), inputs, target in zip(asked, holdout.inputs, holdout.targets, strict=True):
        read = items[inputs[inputs > 0].astype(np.int64)]
        query = loaded.model.encode_sequences(read, pack(torch.ones(1, len(read), dtype=torch.bool)))[-1]
        own = float(items[target] @ query)
        candidates = [i for i in range(1, len(items)) if loaded.item_ids[i - 1] not in known[user]]
        assert target in candidates
        ranks.append(sum(float(items[i] @ query) >= own for i in candidates))
    return ranks


def test_epochs_are_chosen_by_recall_and_such_runs_have_names_of_their_own(published: Path, tmp_path: Path) -> None:
    prepared = experiment.prepare(run_config(published, tmp_path, training__epochs=12, training__lr=0.03))
    fitting = Fitting(prepared)
    state = fitting.run()
    by_recall, by_hits = (
        1 + int(np.argmax([epoch[f"validation/{name}"] for epoch in fitting.history]))
        for name in ("recall@20", "hr@10")
    )
    assert state.progress.best_epoch == by_recall != by_hits, "else this run tests nothing"
    assert prepared.config.dataset.selected_by == "recall@20"
    assert DatasetConfig(split="global_time").selected_by == "hr@10"


def test_what_has_one_item_is_counted_and_not_learned_from(published: Path, tmp_path: Path) -> None:
    """Batches of one sequence: each has an item to predict."""
    values = {"training__batch_size": 1, "training__loss__name": "full_softmax", "training__epochs": 1}
    prepared, _ = fitted(run_config(published, tmp_path, **values))
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
