"""Evaluation of a checkpoint on the toy world, against a ranking counted by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lvlmrec import config, evaluating
from lvlmrec.checkpoint import load_checkpoint
from lvlmrec.errors import InputError
from lvlmrec.evaluating import EvaluateConfig
from lvlmrec.evaluation.metrics import metrics
from lvlmrec.evaluation.significance import paired_test
from lvlmrec.experiment import load_split
from lvlmrec.fitting import encode_catalogue
from lvlmrec.models.histories import pack
from tests.toy import CPU, arguments, fitted, publish, train_config, walks, write_pairs


@pytest.fixture(scope="module")
def workspace(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def trained(world: Path, workspace: Path) -> dict[str, str]:
    """A checkpoint with ids alone and one with DFF, by item encoder."""
    return {
        encoder: publish(
            *fitted(train_config(world, workspace, model__item_encoder__name=encoder, training__epochs=epochs))
        )
        for encoder, epochs in {"id": 1, "dff": 10}.items()
    }


def evaluate(workspace: Path, checkpoint: str, **values: Any) -> dict[str, Any]:
    dotted = {"workspace": str(workspace), "checkpoint": checkpoint, **values}
    return evaluating.run(config.load(EvaluateConfig, [], arguments(dotted)))


@pytest.fixture(scope="module")
def evaluated(workspace: Path, trained: dict[str, str]) -> dict[str, dict[str, Any]]:
    first = evaluate(workspace, trained["id"])
    return {"id": first, "dff": evaluate(workspace, trained["dff"], against=first["ranks"])}


@torch.inference_mode()
def ranks_by_hand(checkpoint: str) -> pd.DataFrame:
    """One user and one candidate at a time; nothing of the ranking's code."""
    loaded = load_checkpoint(checkpoint, {})
    items = encode_catalogue(loaded.model, len(loaded.item_ids), loaded.features, CPU)
    split, _ = load_split(loaded.config.dataset)
    holdout = split.test()
    rows = []
    for user, inputs, target, history in zip(
        split.user_ids, holdout.inputs, holdout.targets, holdout.histories, strict=True
    ):
        read = items[inputs[inputs > 0].astype(np.int64)]
        query = loaded.model.encode_sequences(read, pack(torch.ones(1, len(read), dtype=torch.bool)))[-1]
        scores = {i: float(items[i] @ query) for i in range(1, len(items)) if i == target or i not in history}
        rank = sum(score >= scores[target] for score in scores.values())
        cold = not (split.training() == target).any()
        rows.append((user, split.item_ids[target - 1], rank, cold))
    return pd.DataFrame(rows, columns=["user_id", "item_id", "item_rank", "cold"])


@pytest.mark.parametrize("encoder", ["id", "dff"])
def test_the_ranks_are_those_counted_by_hand(evaluated: dict, trained: dict[str, str], encoder: str) -> None:
    written = evaluating.read_ranks(evaluated[encoder]["ranks"])
    expected = ranks_by_hand(trained[encoder])
    pd.testing.assert_frame_equal(written, expected, check_dtype=False)
    assert written["item_id"].tolist() == [row[-1] for row in walks()]  # users come in the order of the file
    assert evaluated[encoder]["test"] == metrics(expected["item_rank"].to_numpy())
    assert evaluated[encoder]["users"] == 150


def test_the_slices_add_up(evaluated: dict) -> None:
    slices = evaluated["dff"]["slices"]
    assert slices["overall"] == {"users": 150, **evaluated["dff"]["test"]}
    assert slices["warm"]["users"] + slices["cold"]["users"] == 150


def test_the_baselines_stand_beside_it_and_lose_the_walk(evaluated: dict, workspace: Path) -> None:
    baselines = evaluated["dff"]["baselines"]
    assert set(baselines) == {"popularity", "item_knn", "markov"}
    assert baselines["popularity"]["test"]["hr@10"] < evaluated["dff"]["test"]["hr@10"]
    assert baselines["popularity"]["test"]["hr@10"] < baselines["markov"]["test"]["hr@10"]
    for name, result in baselines.items():
        ranks = evaluating.read_ranks(str(Path(evaluated["dff"]["ranks"]).with_name(f"ranks-{name}.parquet")))
        assert metrics(ranks["item_rank"].to_numpy()) == result["test"]


def test_two_runs_are_compared_user_by_user(evaluated: dict) -> None:
    assert "against" not in evaluated["id"]
    ranks = {name: evaluating.read_ranks(result["ranks"])["item_rank"].to_numpy() for name, result in evaluated.items()}
    assert evaluated["dff"]["against"]["all"] == paired_test(ranks["dff"], ranks["id"], seed=0)
    difference = evaluated["dff"]["test"]["ndcg@10"] - evaluated["id"]["test"]["ndcg@10"]
    assert evaluated["dff"]["against"]["all"]["difference"] == pytest.approx(difference)
    assert difference > 0


def test_the_order_of_the_other_runs_rows_does_not_matter(evaluated: dict, tmp_path: Path) -> None:
    other = tmp_path / "shuffled.parquet"
    evaluating.read_ranks(evaluated["id"]["ranks"]).sample(frac=1, random_state=0).to_parquet(other)
    assert evaluating.compare(evaluated["dff"]["ranks"], str(other), 0) == evaluated["dff"]["against"]


def test_ranks_of_other_users_are_not_compared(evaluated: dict, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer.parquet"
    evaluating.read_ranks(evaluated["id"]["ranks"]).head(100).to_parquet(fewer)
    with pytest.raises(InputError, match="users and targets are not those"):
        evaluating.compare(evaluated["dff"]["ranks"], str(fewer), 0)
    with pytest.raises(InputError, match="not readable"):
        evaluating.compare(evaluated["dff"]["ranks"], str(tmp_path / "nowhere.parquet"), 0)


def test_the_layer_weights_of_dff_sum_to_one(evaluated: dict) -> None:
    weights = evaluated["dff"]["layer_weights"]
    assert list(weights) == [f"describe/llm.{layer}/visual_mean" for layer in (0, 2, 4)]
    assert sum(weights.values()) == pytest.approx(1.0, abs=1e-6)
    assert all(0 < weight < 1 for weight in weights.values())
    assert len(set(weights.values())) == 3, "they start equal: nothing was learned"
    assert evaluated["id"]["layer_weights"] == {}


def test_the_result_is_kept_beside_the_ranks(evaluated: dict) -> None:
    written = json.loads(Path(evaluated["dff"]["ranks"]).with_name("evaluation.json").read_text())
    assert written == evaluated["dff"]


@pytest.mark.parametrize("change", ["another order", "another item", "another test target"])
def test_another_dataset_is_refused(world: Path, workspace: Path, trained: dict, tmp_path: Path, change: str) -> None:
    rows = walks()
    if change == "another order":  # the same items and users
        rows[0][0], rows[0][1] = rows[0][1], rows[0][0]
    elif change == "another item":
        rows[0][0] = "v61"
    else:
        rows[0][-1] = next(item for item in rows[1] if item not in rows[0])
    write_pairs(tmp_path, rows)
    with pytest.raises(InputError, match=r"not the one that .* was trained on"):
        evaluate(workspace, trained["id"], dataset_path=tmp_path)


def test_everything_may_have_moved(world: Path, evaluated: dict, trained: dict, tmp_path: Path) -> None:
    """Another workspace, and dataset and features elsewhere: the same ranks, and nothing written to the old places."""
    moved = shutil.copytree(world, tmp_path / "moved")
    checkpoint = shutil.copytree(trained["dff"], tmp_path / "elsewhere" / "mine")
    settings = json.loads((checkpoint / "config.json").read_text())
    gone = "/proc/nobody/writes/here"  # the machine of the training
    settings |= {"workspace": gone, "cache": f"{gone}/cache", "features": f"{gone}/features"}
    settings["dataset"]["path"] = f"{gone}/interactions"
    (checkpoint / "config.json").write_text(json.dumps(settings))
    result = evaluate(
        tmp_path / "other", str(checkpoint), dataset_path=moved / "interactions", features=moved / "features"
    )
    assert result["test"] == evaluated["dff"]["test"]
    assert result["ranks"].startswith(str(tmp_path / "other"))
    pd.testing.assert_frame_equal(
        evaluating.read_ranks(result["ranks"]), evaluating.read_ranks(evaluated["dff"]["ranks"])
    )
