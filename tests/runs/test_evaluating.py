"""Evaluation of a checkpoint on the toy world, against a ranking counted by hand."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlmrec import config, storage
from lvlmrec.baselines import BASELINES
from lvlmrec.baselines.base import without_padding
from lvlmrec.baselines.popularity import Popularity
from lvlmrec.data import load_split
from lvlmrec.errors import ConfigError, InputError
from lvlmrec.evaluation.beyond_accuracy import beyond_accuracy
from lvlmrec.evaluation.significance import holm
from lvlmrec.models.sequential.histories import pack
from lvlmrec.report.evaluation import evaluation
from lvlmrec.runs import evaluating
from lvlmrec.runs.checkpoint import load_checkpoint, note_trials
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.runs.loop import encode_catalogue
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


def by_hand(ranks: Iterable[int], ks: Sequence[int] = (10, 20)) -> dict[str, float]:
    """hr, ndcg and mrr, from their formulas."""
    ranks, found = list(ranks), {}
    for k in ks:
        hits = [rank for rank in ranks if rank <= k]
        for name, gains in {"hr": [1] * len(hits), "ndcg": [1 / np.log2(r + 1) for r in hits]}.items():
            found[f"{name}@{k}"] = sum(gains) / len(ranks)
        found[f"mrr@{k}"] = sum(1 / rank for rank in hits) / len(ranks)
    return found


@pytest.mark.parametrize("encoder", ["id", "dff"])
def test_the_ranks_are_those_counted_by_hand(evaluated: dict, trained: dict[str, str], encoder: str) -> None:
    written = evaluating.read_ranks(evaluated[encoder]["ranks"])
    expected = ranks_by_hand(trained[encoder])
    pd.testing.assert_frame_equal(written, expected, check_dtype=False)
    assert written["item_id"].tolist() == [row[-1] for row in walks()]  # users come in the order of the file
    assert evaluated[encoder]["test"] == pytest.approx(by_hand(expected["item_rank"]))
    assert evaluated[encoder]["users"] == 150


OFTEN = {3: "occurs_1_to_3", 10: "occurs_4_to_10", 30: "occurs_11_to_30"}


def slice_by_hand(row: list[str], counts: dict[str, int]) -> set[str]:
    """The slices of a user, by target and history: the target is its last item, training all but the last two."""
    target, length = row[-1], len(row) - 1
    inside = {"overall", "history_upto_5" if length <= 5 else "history_6_to_10" if length <= 10 else "history_over_10"}
    if not counts.get(target):
        return inside | {"cold"}
    above = sum(count for count in counts.values() if count > counts[target]) / sum(counts.values())
    often = next((name for most, name in OFTEN.items() if counts[target] <= most), "occurs_over_30")
    return inside | {often, "warm", "head" if above < 1 / 3 else "mid" if above < 2 / 3 else "tail"}


def test_the_slices_are_those_of_each_users_target_and_history(evaluated: dict) -> None:
    counts: dict[str, int] = {}
    for row in walks():
        for item in row[:-2]:
            counts[item] = counts.get(item, 0) + 1
    ranks = evaluating.read_ranks(evaluated["dff"]["ranks"])["item_rank"]
    of_slice: dict[str, list[int]] = {}
    for row, rank in zip(walks(), ranks, strict=True):
        for name in slice_by_hand(row, counts):
            of_slice.setdefault(name, []).append(rank)
    assert {"head", "mid", "tail", "warm", "history_6_to_10", "history_over_10"} < set(of_slice)
    for name, found in evaluated["dff"]["slices"].items():
        own = of_slice.get(name, [])
        assert found == pytest.approx({"users": len(own), **(by_hand(own) if own else {})}), name


@torch.inference_mode()
def test_beyond_accuracy_is_that_of_each_users_sorted_catalogue(evaluated: dict, trained: dict[str, str]) -> None:
    loaded = load_checkpoint(trained["dff"], {})
    items = encode_catalogue(loaded.model, len(loaded.item_ids), loaded.features, CPU)
    split, _ = load_split(loaded.config.dataset)
    holdout = split.test()
    lists = []
    for inputs, history in zip(holdout.inputs, holdout.histories, strict=True):
        read = items[inputs[inputs > 0].astype(np.int64)]
        query = loaded.model.encode_sequences(read, pack(torch.ones(1, len(read), dtype=torch.bool)))[-1]
        order = (items @ query).argsort(descending=True).tolist()
        lists.append([item for item in order if item and item not in history][:20])
    expected = beyond_accuracy(np.array(lists), holdout.targets, split.train_counts())
    assert evaluated["dff"]["beyond_accuracy"] == pytest.approx(expected)
    popular = evaluated["dff"]["baselines"]["popularity"]["beyond_accuracy"]
    assert popular["coverage@10"] < expected["coverage@10"] and popular["gini@10"] > expected["gini@10"]
    assert popular["popularity@10"] > expected["popularity@10"] and popular["novelty@10"] < expected["novelty@10"]


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_model_whose_scores_are_all_equal_or_nan_ranks_every_target_last(
    workspace: Path, trained: dict, tmp_path: Path, value: float
) -> None:
    broken = shutil.copytree(trained["id"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({name: torch.full_like(tensor, value) for name, tensor in weights.items()}, broken / "model.safetensors")
    result = evaluate(tmp_path, str(broken), baselines="[]")
    split, _ = load_split(load_checkpoint(trained["id"], {}).config.dataset)
    holdout = split.test()
    candidates = [
        60 - len(set(row) - {0, target}) for row, target in zip(holdout.histories, holdout.targets, strict=True)
    ]
    assert evaluating.read_ranks(result["ranks"])["item_rank"].tolist() == candidates
    assert result["test"]["hr@20"] == 0


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_baseline_whose_scores_are_all_equal_or_nan_ranks_every_target_last(
    workspace: Path, trained: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    class Level(Popularity):
        def score(self, histories: np.ndarray) -> np.ndarray:
            return without_padding(np.full((len(histories), 61), value, dtype=np.float32))

    monkeypatch.setitem(BASELINES, "popularity", Level)
    result = evaluate(tmp_path, trained["id"], baselines="[popularity]")
    level = result["baselines"]["popularity"]
    assert level["test"]["hr@20"] == level["validation"]["hr@20"] == 0
    ranks = evaluating.read_ranks(str(Path(result["ranks"]).with_name("ranks-popularity.parquet")))["item_rank"]
    assert ranks.min() >= 60 - 12 and ranks.max() < 60
    assert level["beyond_accuracy"]["coverage@20"] < 1, "the first of the tied, not all of them"


def test_parameters_and_trials_are_told(evaluated: dict, trained: dict[str, str], tmp_path: Path) -> None:
    weights = load_file(Path(trained["dff"]) / "model.safetensors")
    assert evaluated["dff"]["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert evaluated["dff"]["trials"] == 1, "no search chose it"
    searched = str(shutil.copytree(trained["id"], tmp_path / "searched"))
    for trials in (16, 3):  # of two searches that chose it
        note_trials(searched, trials)
    assert evaluate(tmp_path, searched, baselines="[]")["trials"] == 16


def test_the_tables_hold_every_run_slice_and_measure(evaluated: dict) -> None:
    result = evaluated["dff"]
    overall, by_slice, beyond, against = evaluation(result).split("\n\n")
    name = result["checkpoint"].rsplit("/", 1)[-1]
    rows = {line.split()[0]: line.split()[1:] for line in overall.splitlines()[2:]}
    assert list(rows) == ["popularity", "item_knn", "markov", name]
    numbers = [result["validation"]["hr@10"], *result["test"].values()]
    assert rows[name] == [f"{result['parameters']:,}", "1", *(f"{number:.4f}" for number in numbers)]
    assert rows["markov"][:2] == ["-", "-"]
    assert [line.split()[0] for line in by_slice.splitlines()[2:]] == list(result["slices"])
    assert by_slice.splitlines()[2].split()[1:] == [
        "150",
        *(f"{result['baselines'][run]['test']['ndcg@10']:.4f}" for run in list(rows)[:3]),
        f"{result['test']['ndcg@10']:.4f}",
    ]
    assert f"{result['beyond_accuracy']['coverage@20']:.4f}" in beyond.splitlines()[-2]
    assert beyond.splitlines()[-1].endswith(f"{result['beyond_accuracy']['target_popularity']:.1f}")
    assert against.splitlines()[1].startswith("  all (150 users): NDCG@10 +")


def test_the_baselines_stand_beside_it_and_lose_the_walk(evaluated: dict, workspace: Path) -> None:
    baselines = evaluated["dff"]["baselines"]
    assert set(baselines) == {"popularity", "item_knn", "markov"}
    assert baselines["popularity"]["test"]["hr@10"] < evaluated["dff"]["test"]["hr@10"]
    assert baselines["popularity"]["test"]["hr@10"] < baselines["markov"]["test"]["hr@10"]
    for name, result in baselines.items():
        ranks = evaluating.read_ranks(str(Path(evaluated["dff"]["ranks"]).with_name(f"ranks-{name}.parquet")))
        assert result["test"] == pytest.approx(by_hand(ranks["item_rank"]))


def test_two_runs_are_compared_user_by_user(evaluated: dict) -> None:
    assert "against" not in evaluated["id"]
    ranks = {name: evaluating.read_ranks(result["ranks"])["item_rank"].to_numpy() for name, result in evaluated.items()}
    (compared,) = evaluated["dff"]["against"].values()
    gains = {name: np.where(of < 11, 1 / np.log2(of + 1), 0) for name, of in ranks.items()}
    change = gains["dff"] - gains["id"]
    counted = {"better": (change > 0).sum(), "worse": (change < 0).sum(), "equal": (change == 0).sum(), "users": 150}
    assert {name: compared["all"][name] for name in counted} == counted
    signs = np.random.default_rng(1).choice([-1, 1], (20_000, 150))
    p_value = (np.abs(signs @ change) >= abs(change.sum()) - 1e-9).mean()
    assert compared["all"]["p_users"] == pytest.approx(p_value, abs=0.01)
    assert compared["all"]["p_users_holm"] == compared["all"]["p_users"]
    assert compared["all"]["metric"] == "ndcg@10" and compared["all"]["p_seeds"] is None
    difference = evaluated["dff"]["test"]["ndcg@10"] - evaluated["id"]["test"]["ndcg@10"]
    assert compared["all"]["difference"] == pytest.approx(difference)
    assert difference > 0


def test_users_with_several_targets_are_compared_and_flipped_whole(tmp_path: Path) -> None:
    """Five users of four targets, all better: 2 of 2^5 signs, of users and not of targets."""
    uris = []
    for name, ranks in {"ours": [1, 2, 3, 4] * 5, "theirs": [50, 60, 70, 80] * 5}.items():
        users = [f"u{n // 4}" for n in range(20)]
        table = {"user_id": users, "item_id": [f"i{n}" for n in range(20)], "item_rank": ranks, "cold": [False] * 20}
        pd.DataFrame(table).to_parquet(tmp_path / f"{name}.parquet")
        uris.append(str(tmp_path / f"{name}.parquet"))
    (compared,) = evaluating.compare(uris[0], uris[1:], 0).values()
    assert (compared["all"]["users"], compared["all"]["better"], compared["all"]["difference"]) == (5, 5, 1)
    assert compared["all"]["p_users"] == pytest.approx(2**-4, abs=0.01)


def test_several_runs_are_corrected_together_slice_by_slice(evaluated: dict, trained: dict, tmp_path: Path) -> None:
    ours = Path(evaluated["dff"]["ranks"])
    others = [
        evaluated["id"]["ranks"],
        *(str(ours.with_name(f"ranks-{name}.parquet")) for name in ("markov", "item_knn")),
    ]
    result = evaluate(tmp_path, trained["dff"], against=json.dumps([*others, others[0]]), baselines="[]")
    assert list(result["against"]) == others
    for part in ("all", "warm"):
        p_values = {other: result["against"][other][part]["p_users"] for other in others}
        assert {other: result["against"][other][part]["p_users_holm"] for other in others} == holm(p_values)
        assert any(result["against"][other][part]["p_users_holm"] > p_values[other] for other in others)
    assert result["against"][others[0]]["all"] != result["against"][others[1]]["all"]


@pytest.mark.parametrize("against", ["5", "['', a]", "[[a]]", "{a: b}"])
def test_what_cannot_be_compared_is_refused(workspace: Path, trained: dict, against: str) -> None:
    with pytest.raises(ConfigError, match=r"against: .* neither the URI of ranks nor a list"):
        evaluate(workspace, trained["id"], against=against)


def test_ranks_that_are_not_there_are_missed_before_the_work(trained: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not readable"):
        evaluate(tmp_path, trained["id"], against=tmp_path / "nowhere.parquet")
    assert not (tmp_path / "evaluations").exists()


def test_other_cut_offs(workspace: Path, trained: dict, evaluated: dict, tmp_path: Path) -> None:
    result = evaluate(tmp_path, trained["id"], ks="[7,1,7]", baselines="[markov]")
    ranks = evaluating.read_ranks(evaluated["id"]["ranks"])["item_rank"]
    assert list(result["test"]) == [f"{name}@{k}" for k in (1, 7) for name in ("hr", "ndcg", "mrr")]
    assert result["test"] == pytest.approx(by_hand(ranks, (1, 7)))
    assert result["slices"]["overall"] == pytest.approx({"users": 150, **by_hand(ranks, (1, 7))})
    assert {name.partition("@")[2] for name in result["beyond_accuracy"]} == {"", "1", "7"}
    assert set(result["baselines"]["markov"]["test"]) == set(result["test"])
    assert "NDCG@1 of" in evaluation(result)
    with pytest.raises(ConfigError, match="ks: no cut-off"):
        evaluate(tmp_path, trained["id"], ks="[]")


def test_the_order_of_the_other_runs_rows_does_not_matter(evaluated: dict, tmp_path: Path) -> None:
    other = tmp_path / "shuffled.parquet"
    evaluating.read_ranks(evaluated["id"]["ranks"]).sample(frac=1, random_state=0).to_parquet(other)
    shuffled = evaluating.compare(evaluated["dff"]["ranks"], [str(other)], 0)
    assert list(shuffled.values()) == list(evaluated["dff"]["against"].values())


def test_ranks_of_other_users_are_not_compared(evaluated: dict, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer.parquet"
    evaluating.read_ranks(evaluated["id"]["ranks"]).head(100).to_parquet(fewer)
    with pytest.raises(InputError, match="users and targets are not those"):
        evaluating.compare(evaluated["dff"]["ranks"], [str(fewer)], 0)
    with pytest.raises(InputError, match="not readable"):
        evaluating.compare(evaluated["dff"]["ranks"], [str(tmp_path / "nowhere.parquet")], 0)


def test_the_layer_weights_of_dff_sum_to_one(evaluated: dict) -> None:
    weights = evaluated["dff"]["layer_weights"]
    assert list(weights) == [f"describe/llm.{layer}/visual_mean" for layer in (0, 2, 4)]
    assert sum(weights.values()) == pytest.approx(1.0, abs=1e-6)
    assert all(0 < weight < 1 for weight in weights.values())
    assert len(set(weights.values())) == 3, "they start equal: nothing was learned"
    assert evaluated["id"]["layer_weights"] == {}


def test_baselines_are_validated_on_the_users_that_the_run_was(world: Path, tmp_path: Path) -> None:
    uri = publish(*fitted(train_config(world, tmp_path, training__validation_users=20, training__epochs=1)))
    result = evaluate(tmp_path, uri, baselines="[popularity]")
    for measured in (result, result["baselines"]["popularity"]):
        assert measured["validation_slices"]["overall"]["users"] == 20
        assert measured["validation_slices"]["overall"]["hr@10"] == measured["validation"]["hr@10"]
        assert measured["slices"]["overall"]["users"] == 150


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


GOOD = {"user_id": ["a"], "item_id": ["b"], "item_rank": [1], "cold": [False]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a table of something else", "no column 'user_id'; columns: score"),
        ("a truncated file", "not readable"),
        ("damaged metadata", "not readable: Couldn't deserialize thrift"),
        ("a text", "not readable"),
        ("a folder", r"a folder; give the file in it: .*/ranks\.parquet"),
        ("ranks that are texts", "not written by an evaluation: column 'item_rank' is string"),
        ("ranks from 0", "not written by an evaluation: 1 rows, ranks count from 1"),
        ("a rank that is missing", "column 'item_rank' is int64, 1 of 1 empty"),
        ("ids that are numbers", "column 'user_id' is int64"),
        ("nobody", "not written by an evaluation: 0 rows"),
    ],
)
def test_a_file_that_is_no_ranks_file_is_refused_before_anything_is_ranked(
    workspace: Path, trained: dict, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "other.parquet"
    tables = {
        "a table of something else": {"score": [1]},
        "ranks that are texts": GOOD | {"item_rank": ["1"]},
        "ranks from 0": GOOD | {"item_rank": [0]},
        "a rank that is missing": GOOD | {"item_rank": pa.array([None], pa.int64())},
        "ids that are numbers": GOOD | {"user_id": [7]},
        "nobody": {name: pa.array(values)[:0] for name, values in GOOD.items()},
    }
    storage.write_table(str(path), pa.table(tables.get(content, GOOD)))
    whole = path.read_bytes()
    if content == "a folder":
        path.unlink()
        path.mkdir()
    elif content not in tables:
        damaged = {"a truncated file": whole[:-20], "a text": b"hello", "damaged metadata": whole[:300] + whole[400:]}
        path.write_bytes(damaged[content])
    evaluations = sorted(workspace.glob("evaluations/*/ranks.parquet"))
    before = [file.stat().st_mtime_ns for file in evaluations]
    with pytest.raises(InputError, match=message) as caught:
        evaluate(workspace, trained["dff"], against=str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert [file.stat().st_mtime_ns for file in evaluations] == before
