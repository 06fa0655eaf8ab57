"""Evaluation on the test interactions: the only code that opens them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from lvlmrec import storage
from lvlmrec.baselines import BASELINES
from lvlmrec.checkpoint import Checkpoint, load_checkpoint
from lvlmrec.columns import COLD, ITEM_ID, ITEM_RANK, USER_ID
from lvlmrec.config import option
from lvlmrec.data.split import Holdout, LeaveOneOut
from lvlmrec.errors import InputError
from lvlmrec.evaluation.metrics import metrics
from lvlmrec.evaluation.ranking import rank_from_scores
from lvlmrec.evaluation.significance import paired_test
from lvlmrec.evaluation.slices import by_coldness, slice_metrics
from lvlmrec.experiment import load_split
from lvlmrec.fitting import encode_catalogue, rank_holdout

USERS_AT_ONCE = 512


@dataclass(frozen=True)
class EvaluateConfig:
    """The evaluate job."""

    workspace: str = option("./workspace", "sample, stores, checkpoints and tracking database live here")
    tracking_uri: str = option("sqlite:///${workspace}/mlflow.db", "MLflow tracking server or database")
    seed: int = option(0, "seed of the permutation tests")
    checkpoint: str = option("${workspace}/checkpoints", "a checkpoint, or a folder: its newest one")
    dataset_path: str = option("", "where the dataset is now, if not where the checkpoint was trained")
    features: Any = option("", "where the feature set is now, or the list of them, if not where it was trained")
    baselines: list[str] = option(
        ["popularity", "item_knn", "markov"], "fitted and ranked on the same split", choices=BASELINES
    )
    against: str = option("", "ranks of another evaluation: both are compared user by user")


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Rank every user's test item over the full catalogue, write the ranks, and give the metrics by slice.

    Raises `InputError` when the dataset is not the one that the checkpoint was trained on.
    """
    overrides = {"dataset.path": config.dataset_path, "features": config.features, "workspace": config.workspace}
    if not storage.is_remote(config.workspace):
        overrides["cache"] = storage.join(config.workspace, "cache")  # that of the training may be on another machine
    checkpoint = load_checkpoint(config.checkpoint, overrides)
    split, _ = load_split(checkpoint.config.dataset)
    if split.fingerprint() != checkpoint.result["dataset"]:
        raise InputError(
            f"dataset {checkpoint.config.dataset.path!r} ({len(split.user_ids)} users, {len(split.item_ids)} items): "
            f"not the one that {checkpoint.uri!r} was trained on ({checkpoint.result['users']} users, "
            f"{len(checkpoint.item_ids)} items); set dataset_path to its own"
        )
    holdout = split.test()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoint.model.to(device)
    catalogue = encode_catalogue(model, len(checkpoint.item_ids), checkpoint.features, device)
    ranks = rank_holdout(model, catalogue, holdout)
    cold = split.is_cold(holdout.targets)
    folder = storage.join(storage.absolute(config.workspace), "evaluations", checkpoint.uri.rsplit("/", 1)[-1])
    uri = storage.join(folder, "ranks.parquet")
    write_ranks(uri, split, holdout, ranks, cold)
    slices = slice_metrics(ranks, by_coldness(cold))
    result: dict[str, Any] = {
        "checkpoint": checkpoint.uri,
        "test": metrics(ranks),
        "users": len(ranks),
        "ranks": uri,
        "slices": slices,
        "validation": checkpoint.result["validation"],
        "baselines": _baselines(config.baselines, split, folder, cold),
        "layer_weights": layer_weights(checkpoint),
    }
    if config.against:
        result["against"] = compare(uri, storage.absolute(config.against), config.seed)
    storage.write_bytes(storage.join(folder, "evaluation.json"), json.dumps(result, indent=2).encode())
    return result


def layer_weights(checkpoint: Checkpoint) -> dict[str, float]:
    """The learned weight of each feature column; empty when the item encoder learns none."""
    weigh = getattr(checkpoint.model.item_encoder, "layer_weights", None)
    if weigh is None or checkpoint.features is None:
        return {}
    return dict(zip(checkpoint.features.names, weigh().tolist(), strict=True))


def write_ranks(uri: str, split: LeaveOneOut, holdout: Holdout, ranks: np.ndarray, cold: np.ndarray) -> None:
    """user_id, item_id (the target), item_rank, cold: what any two runs can be compared by."""
    targets = np.asarray(split.item_ids)[holdout.targets - 1]
    table = {USER_ID: split.user_ids, ITEM_ID: targets, ITEM_RANK: ranks, COLD: cold}
    storage.write_table(uri, pa.table({name: pa.array(values) for name, values in table.items()}), compression="zstd")


def read_ranks(uri: str) -> pd.DataFrame:
    """Ranks that an evaluation wrote. Raises `InputError`."""
    try:
        return storage.read_table(uri, [USER_ID, ITEM_ID, ITEM_RANK, COLD]).to_pandas()
    except (FileNotFoundError, pa.ArrowException) as error:
        raise InputError(f"ranks {uri!r}: not readable: {' '.join(str(error).split())}") from error


def compare(ours: str, other: str, seed: int) -> dict[str, Any]:
    """Paired test of two evaluations over the same users and targets: all, warm and cold. Raises `InputError`."""
    both = read_ranks(ours).merge(read_ranks(other), on=[USER_ID, ITEM_ID], suffixes=("", "_other"))
    if len(both) != len(read_ranks(ours)) or len(both) != len(read_ranks(other)):
        raise InputError(f"against {other!r}: its users and targets are not those of {ours!r}")
    slices = {"all": both, "warm": both[~both[COLD]], "cold": both[both[COLD]]}
    return {
        name: paired_test(rows[ITEM_RANK].to_numpy(), rows[f"{ITEM_RANK}_other"].to_numpy(), seed=seed)
        for name, rows in slices.items()
        if len(rows)
    }


def _baselines(names: list[str], split: LeaveOneOut, folder: str, cold: np.ndarray) -> dict[str, Any]:
    """Validation and test metrics of the baselines; their ranks stand beside the run's."""
    results = {}
    for name in names:
        baseline = BASELINES[name]()
        baseline.fit(split.training(), len(split.item_ids))
        test = _rank_baseline(baseline, split.test())
        write_ranks(storage.join(folder, f"ranks-{name}.parquet"), split, split.test(), test, cold)
        slices = slice_metrics(test, by_coldness(cold))
        results[name] = {
            "validation": metrics(_rank_baseline(baseline, split.validation())),
            "test": metrics(test),
            "slices": slices,
        }
    return results


def _rank_baseline(baseline: Any, holdout: Holdout) -> np.ndarray:
    ranks = []
    for start in range(0, len(holdout.targets), USERS_AT_ONCE):
        users = slice(start, start + USERS_AT_ONCE)
        scores = torch.from_numpy(baseline.score(holdout.inputs[users]))
        ranks.append(rank_from_scores(scores, holdout.targets[users], holdout.histories[users]))
    return np.concatenate(ranks)
