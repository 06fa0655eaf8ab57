"""Evaluation on the test interactions: the only code that opens them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from lvlmrec import storage
from lvlmrec.baselines import BASELINES
from lvlmrec.baselines.base import Baseline
from lvlmrec.baselines.item_knn import NEIGHBOURS_HELP, NUM_NEIGHBOURS
from lvlmrec.columns import COLD, ITEM_ID, ITEM_RANK, USER_ID
from lvlmrec.config import MAX_SEED, option
from lvlmrec.data import load_split
from lvlmrec.data.split import Holdout, Split
from lvlmrec.errors import ConfigError, InputError, StorageError, StorageRefused, one_line
from lvlmrec.evaluation.beyond_accuracy import beyond_accuracy
from lvlmrec.evaluation.lists import top_from_scores
from lvlmrec.evaluation.metrics import metrics, per_user
from lvlmrec.evaluation.ranking import rank_from_scores, score_chunks
from lvlmrec.evaluation.significance import holm, permutation_test
from lvlmrec.evaluation.slices import slice_metrics, slices_of
from lvlmrec.runs.checkpoint import Checkpoint, load_checkpoint, read_trials
from lvlmrec.runs.experiment import validated_on
from lvlmrec.runs.loop import encode_catalogue, encode_users

RANKS = {  # column of a file of ranks -> what its type is
    USER_ID: lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    ITEM_ID: lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    ITEM_RANK: pa.types.is_integer,
    COLD: pa.types.is_boolean,
}
USERS_AT_ONCE = 512
COMPARED = "ndcg@10"
# Of evaluation.json: 1 had metrics of single targets where users have several, 2 no slices by occurrences.
FORMAT = 3


@dataclass(frozen=True)
class EvaluateConfig:
    """The evaluate job."""

    workspace: str = option(
        "./workspace", "sample, stores, checkpoints and tracking database live here", required=True, uri=True
    )
    tracking_uri: str = option("sqlite:///${workspace}/mlflow.db", "MLflow tracking server or database", required=True)
    seed: int = option(0, "seed of the permutation tests", minimum=0, maximum=MAX_SEED)
    checkpoint: str = option(
        "${workspace}/checkpoints", "a checkpoint, or a folder: its newest one", required=True, uri=True
    )
    dataset_path: str = option("", "where the dataset is now, if not where the checkpoint was trained", uri=True)
    features: Any = option(
        "", "where the feature set is now, or the list of them, if not where it was trained", uri=True
    )
    ks: list[int] = option([10, 20], "cut-offs K of the metrics", minimum=1)
    baselines: list[str] = option(
        ["popularity", "item_knn", "markov"],
        "baselines, fitted and ranked on the same split",
        choices=BASELINES,
        distinct=True,
    )
    item_knn_neighbours: int = option(NUM_NEIGHBOURS, NEIGHBOURS_HELP, minimum=1)
    against: Any = option("", "ranks of another evaluation, or a list of them: compared user by user", uri=True)

    def check(self) -> None:
        if not self.ks:
            raise ConfigError("ks: no cut-off given; as in ks=[10,20]")


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Rank every user's test item over the full catalogue, write the ranks, and give the metrics by slice.

    Raises `ConfigError` for a setting that says nothing, `InputError` when the dataset is not the one that the
    checkpoint was trained on.
    """
    ks, others = sorted(set(config.ks)), _others(config.against)
    for other in others:
        read_ranks(other)  # before the work, not after it
    checkpoint, split = _load(config)
    holdout = split.test()
    folder = storage.join(config.workspace, "evaluations", checkpoint.uri.rsplit("/", 1)[-1])
    storage.check_writable(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoint.model.to(device)
    catalogue = encode_catalogue(model, len(checkpoint.item_ids), checkpoint.features, device)
    queries = encode_users(model, catalogue, holdout.inputs)
    ranks, lists = _ranks_and_lists(score_chunks(queries, catalogue), holdout, ks[-1])
    uri = storage.join(folder, "ranks.parquet")
    write_ranks(uri, split, holdout, ranks)
    result: dict[str, Any] = {
        "checkpoint": checkpoint.uri,
        "format": FORMAT,
        "users": len(holdout.first_rows),
        "targets": len(ranks),
        "ranks": uri,
        **measure(split, holdout, ranks, lists, ks),
        "validation": checkpoint.result["validation"],
        "validation_slices": checkpoint.result.get("validation_slices", {}),
        "parameters": sum(tensor.numel() for tensor in checkpoint.model.state_dict().values()),
        "trials": read_trials(checkpoint.uri),
        "baselines": _baselines(config, split, validated_on(checkpoint.config, split), folder, ks),
        "item_knn_neighbours": config.item_knn_neighbours,
        "layer_weights": layer_weights(checkpoint),
    }
    if others:
        result["against"] = compare(uri, others, config.seed)
    storage.write_bytes(storage.join(folder, "evaluation.json"), json.dumps(result, indent=2).encode())
    return result


def _others(against: Any) -> list[str]:
    """The URIs of `against`, a text or a list of them. Raises `ConfigError`."""
    others = against if isinstance(against, list) else [against] if against else []
    if not all(isinstance(uri, str) and uri for uri in others):
        raise ConfigError(f"against: {against!r} is neither the URI of ranks nor a list of URIs")
    return list(dict.fromkeys(others))


def _load(config: EvaluateConfig) -> tuple[Checkpoint, Split]:
    """The checkpoint, and the split that it was trained on. Raises `InputError`."""
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
    return checkpoint, split


def measure(split: Split, holdout: Holdout, ranks: np.ndarray, lists: np.ndarray, ks: Sequence[int]) -> dict[str, Any]:
    """Everything that is said of a run or a baseline: metrics, the same by slice, and beyond accuracy.

    ranks [T] and lists [T, K] of the holdout's rows.
    """
    counts = split.train_counts()
    slices = slices_of(holdout.targets, counts, holdout.histories)
    return {
        "test": metrics(ranks, ks, holdout.users),
        "slices": slice_metrics(ranks, slices, ks, holdout.users),
        "beyond_accuracy": beyond_accuracy(lists[holdout.first_rows], holdout.targets, counts, ks),
    }


def layer_weights(checkpoint: Checkpoint) -> dict[str, float]:
    """The learned weight of each feature column; empty when the item encoder learns none."""
    weigh = getattr(checkpoint.model.item_encoder, "layer_weights", None)
    if weigh is None or checkpoint.features is None:
        return {}
    return dict(zip(checkpoint.features.names, weigh().tolist(), strict=True))


def write_ranks(uri: str, split: Split, holdout: Holdout, ranks: np.ndarray) -> None:
    """user_id, item_id (the target), item_rank, cold: what any two runs can be compared by."""
    targets = np.asarray(split.item_ids)[holdout.targets - 1]
    cold = split.is_cold(holdout.targets)
    table = {USER_ID: split.user_ids, ITEM_ID: targets, ITEM_RANK: ranks, COLD: cold}
    storage.write_table(uri, pa.table({name: pa.array(values) for name, values in table.items()}), compression="zstd")


def read_ranks(uri: str) -> pd.DataFrame:
    """Ranks that an evaluation wrote: user_id, item_id, item_rank from 1, cold. Raises `InputError`."""
    try:
        table = storage.read_table(uri, list(RANKS))
    except IsADirectoryError as error:
        raise InputError(
            f"ranks {uri!r}: a folder; give the file in it: {storage.join(uri, 'ranks.parquet')}"
        ) from error
    except (StorageError, StorageRefused):
        raise
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"ranks {uri!r}: not readable: {one_line(error)}") from error
    for name, is_kind in RANKS.items():
        if not is_kind(table[name].type) or table[name].null_count:
            found = f"{table[name].type}, {table[name].null_count} of {len(table)} empty"
            raise InputError(f"ranks {uri!r}: not written by an evaluation: column {name!r} is {found}")
    if not len(table) or pc.min(table[ITEM_RANK]).as_py() < 1:
        raise InputError(f"ranks {uri!r}: not written by an evaluation: {len(table)} rows, ranks count from 1")
    return table.to_pandas()


def compare(ours: str, others: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Permutation tests over users with other evaluations of the same targets: all, warm and cold, of each other's URI.

    `p_users_holm` is Holm's correction over all others, of each slice by itself. `p_seeds` is None: these are single
    runs, and only a study has several seeds of each method. Raises `InputError`.
    """
    own = read_ranks(ours)
    tests = {other: _compare(own, ours, other, seed) for other in others}
    for name in next(iter(tests.values())):
        corrected = holm({other: slices[name]["p_users"] for other, slices in tests.items()})
        for other, slices in tests.items():
            slices[name]["p_users_holm"] = corrected[other]
    return tests


def _compare(own: pd.DataFrame, ours: str, other: str, seed: int) -> dict[str, dict[str, Any]]:
    theirs = read_ranks(other)
    both = own.merge(theirs, on=[USER_ID, ITEM_ID], suffixes=("", "_other"))
    if not len(both) == len(own) == len(theirs):
        raise InputError(f"against {other!r}: its users and targets are not those of {ours!r}")
    slices = {"all": both, "warm": both[~both[COLD]], "cold": both[both[COLD]]}
    columns = ITEM_RANK, f"{ITEM_RANK}_other"
    tests: dict[str, dict[str, Any]] = {}
    for name, rows in slices.items():
        if len(rows):
            users = rows[USER_ID].to_numpy()
            values, other_values = (per_user(rows[column].to_numpy(), COMPARED, users) for column in columns)
            tests[name] = {"metric": COMPARED, "p_seeds": None, **permutation_test(values, other_values, seed=seed)}
    return tests


def _baselines(
    config: EvaluateConfig, split: Split, validation: Holdout, folder: str, ks: Sequence[int]
) -> dict[str, Any]:
    """The same of the baselines, and their metrics on `validation`; their ranks stand beside the run's.

    They are fitted on each user's whole training history and read all that is masked, however few items a model reads.
    """
    results = {}
    settings = {"item_knn": {"num_neighbours": config.item_knn_neighbours}}
    histories, test = split.training_histories(), split.test()
    for name in config.baselines:
        baseline = BASELINES[name](**settings.get(name, {}))
        baseline.fit(histories, len(split.item_ids))
        validated, _ = _ranks_and_lists(_scored(baseline, validation), validation, 0)
        ranks, lists = _ranks_and_lists(_scored(baseline, test), test, ks[-1])
        write_ranks(storage.join(folder, f"ranks-{name}.parquet"), split, test, ranks)
        slices = slices_of(validation.targets, split.train_counts(), validation.histories)
        results[name] = {
            "validation": metrics(validated, users=validation.users),
            "validation_slices": slice_metrics(validated, slices, users=validation.users),
            **measure(split, test, ranks, lists, ks),
        }
    return results


def _ranks_and_lists(
    scored: Iterable[tuple[slice, torch.Tensor]], holdout: Holdout, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of a holdout its target's rank [T] and its list of `k` items [T, k], in one pass over the scores."""
    ranks, lists = [np.empty(0, np.int64)], [np.empty((0, k), np.int64)]
    for rows, scores in scored:
        ranks.append(rank_from_scores(scores, holdout.targets[rows], holdout.histories[rows]))
        if k:
            lists.append(top_from_scores(scores, holdout.histories[rows], k))
    return np.concatenate(ranks), np.concatenate(lists)


def _scored(baseline: Baseline, holdout: Holdout) -> Iterator[tuple[slice, torch.Tensor]]:
    """Which rows, and their scores [B, I + 1], a block after the other."""
    for start in range(0, len(holdout.targets), USERS_AT_ONCE):
        rows = slice(start, start + USERS_AT_ONCE)
        yield rows, torch.from_numpy(baseline.score(holdout.histories[rows]))
