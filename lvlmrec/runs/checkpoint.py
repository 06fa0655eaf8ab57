"""Published checkpoints: what evaluation, export and serving read.

<uri>/model.safetensors  weights of the best epoch
      config.json         the resolved configuration
      item_ids.json       item_ids[i] is the id of item_index i + 1
      pca.safetensors     mean and components of the features, with `feature_pca`
      scaling.safetensors mean and std of the features [L, D], with `feature_scaling`
      result.json         validation metrics, epochs; written last: without it there is no checkpoint
      trials.json         among how many configurations a search chose it; none where no search did
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from lvlmrec import config as configs
from lvlmrec import storage
from lvlmrec.errors import InputError
from lvlmrec.features import pca
from lvlmrec.features.array import FeatureArray, Projection
from lvlmrec.models.sequential.recommender import Recommender
from lvlmrec.runs.experiment import TrainConfig, TrainingData, build_model, load_features

RESULT = "result.json"
TRIALS = "trials.json"  # of the choice, not of the run: a run is the same whoever chose it


@dataclass(frozen=True)
class Checkpoint:
    """A trained recommender in evaluation mode, with what it takes to score its catalogue.

    uri       the checkpoint's folder
    item_ids  item_ids[i] is the id of item_index i + 1
    features  scaled and reduced as in training; None for models of ids alone
    result    of the training job
    """

    uri: str
    config: TrainConfig
    item_ids: list[str]
    model: Recommender
    features: FeatureArray | None
    result: dict[str, Any]


def publish(
    uri: str,
    config: TrainConfig,
    data: TrainingData,
    features: FeatureArray | None,
    weights: Mapping[str, Tensor],
    result: Mapping[str, Any],
) -> None:
    """Write a checkpoint to the folder `uri`; result.json last, so that a killed job leaves no checkpoint."""
    settings = configs.to_dict(config)
    del settings["tracking_uri"]  # it may hold a password
    files = {
        "model.safetensors": save(dict(weights)),
        "config.json": json.dumps(settings, indent=2).encode(),
        "item_ids.json": json.dumps(data.item_ids.tolist()).encode(),
    }
    if features is not None and features.projection is not None:
        files[pca.FILE] = save(features.projection._asdict())
    if features is not None and features.mean is not None and features.std is not None:
        files["scaling.safetensors"] = save({"mean": features.mean, "std": features.std})
    for name, content in [*files.items(), (RESULT, json.dumps(result, indent=2).encode())]:
        storage.write_bytes(storage.join(uri, name), content)


def read_result(uri: str) -> dict[str, Any] | None:
    """result.json of the checkpoint at `uri`; None where there is no checkpoint."""
    try:
        return json.loads(storage.read_bytes(storage.join(uri, RESULT)))
    except (FileNotFoundError, NotADirectoryError):
        return None


def note_trials(uri: str, trials: int) -> None:
    """Keep beside the checkpoint `uri`, which may not be trained yet, among how many configurations it was chosen.

    Of several searches that chose it the largest number stays.
    """
    if trials > read_trials(uri):
        storage.write_bytes(storage.join(uri, TRIALS), json.dumps({"trials": trials}).encode())


def read_trials(uri: str) -> int:
    """Among how many configurations the checkpoint `uri` was chosen; 1 where no search chose it."""
    try:
        return int(json.loads(storage.read_bytes(storage.join(uri, TRIALS)))["trials"])
    except (FileNotFoundError, NotADirectoryError):
        return 1


def latest(uri: str) -> str:
    """`uri` itself if it is a checkpoint, else the newest checkpoint below that folder. Raises `InputError`."""
    if storage.exists(storage.join(uri, RESULT)):
        return uri
    results = [f for f in storage.list_files(uri, recursive=True) if f.uri.endswith(f"/{RESULT}")]
    if not results:
        raise InputError(f"checkpoint {uri!r}: no checkpoint there; train first: python rayjobs/train.py")
    return max(results, key=lambda f: f.modified).uri.removesuffix(f"/{RESULT}")


def load_checkpoint(uri: str, overrides: Mapping[str, Any]) -> Checkpoint:
    """Open a checkpoint. `overrides`: keys of its configuration whose values have changed, such as where features lie.

    Raises `InputError` when there is none, or when its features are missing or of another recipe.
    """
    uri = latest(uri)
    dotted = [f"{key}={json.dumps(value)}" for key, value in overrides.items() if value]
    config = configs.load(TrainConfig, [json.loads(storage.read_bytes(storage.join(uri, "config.json")))], dotted)
    item_ids = json.loads(storage.read_bytes(storage.join(uri, "item_ids.json")))
    result = read_result(uri) or {}
    features = _features(uri, config, item_ids, result)
    model = build_model(config.model, len(item_ids), config.dataset.max_length, features)
    model.load_state_dict(load(storage.read_bytes(storage.join(uri, "model.safetensors"))))
    return Checkpoint(uri, config, item_ids, model.eval(), features, result)


def _features(uri: str, config: TrainConfig, item_ids: list[str], result: Mapping[str, Any]) -> FeatureArray | None:
    features = load_features(config, item_ids)
    # The recipe, not the feature set's digest: the set may have grown since.
    if features is not None and features.recipe != result["recipe"]:
        raise InputError(
            f"features {config.features!r}: not of the recipe {result['recipe']} that {uri!r} learned from"
        )
    if features is not None and config.feature_pca:
        features = pca.project(features, Projection(**load(storage.read_bytes(storage.join(uri, pca.FILE)))))
    if features is None or config.feature_scaling == "none":
        return features
    scaling = load(storage.read_bytes(storage.join(uri, "scaling.safetensors")))
    return replace(features, mean=scaling["mean"], std=scaling["std"])
