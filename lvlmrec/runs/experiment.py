"""One training run as facts: its configuration, its data, its features and its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lvlmrec import config as configs
from lvlmrec import storage
from lvlmrec.config import MAX_SEED, option, variant
from lvlmrec.data import DatasetConfig, load_split
from lvlmrec.data.split import Holdout, Split, UserItems
from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import compact, pca, store
from lvlmrec.features.array import FeatureArray
from lvlmrec.features.noise import NOISES, noise_twin
from lvlmrec.features.store import FeatureSet
from lvlmrec.models.losses import LOSSES, LossConfig, SampledLossConfig
from lvlmrec.models.sequential.fusions.base import FeatureShape
from lvlmrec.models.sequential.recommender import ModelConfig, Recommender
from lvlmrec.runs import pretrained

SCHEDULES = ("constant", "linear", "cosine")
# Part of every run's name: to be counted up when the same configuration comes to learn something else.
FORMAT = 1
# What decides where and how fast a run happens, not what it learns.
WORKERS = ("training.num_workers", "training.min_workers", "training.use_gpu")
CHUNKS = ("model.item_encoder.items_at_once", "model.item_encoder.gradient_checkpointing")
CHECKS = ("max_missing_features",)  # what it refuses is not run, and it changes nothing else
NOT_LEARNED = ("workspace", "tracking_uri", "cache", "cache_gb", *WORKERS, *CHUNKS, *CHECKS)
SEARCH = "search."  # what a search tries decides nothing about a single one of its trials


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation, with the protocol's values as defaults."""

    epochs: int = option(40, "passes over the training users, at most", minimum=1)
    lr: float = option(2e-3, "highest learning rate of AdamW", minimum=0)
    encoder_lr: float = option(
        0.0, "highest learning rate of a video encoder that is trained; 0: training.lr", minimum=0
    )
    schedule: str = option(
        "constant", "learning rate after the warm-up: constant, or falling to 0 at the last step", choices=SCHEDULES
    )
    warmup: float = option(0.0, "share of all steps in which the learning rate rises from 0", minimum=0, maximum=1)
    batch_size: int = option(512, "users per step, over all workers", minimum=1)
    num_workers: int = option(
        1, "data-parallel workers, which share each batch; only dropout differs with their number", minimum=1
    )
    min_workers: int = option(
        0, "workers with which training starts, or goes on after losing one, at least; 0: num_workers", minimum=0
    )
    use_gpu: bool = option(False, "one GPU for each worker")
    weight_decay: float = option(0.1, "weight decay of AdamW", minimum=0)
    gradient_clip: float = option(
        5.0, "largest norm of the gradient, to which it is clipped; 0: no clipping", minimum=0
    )
    patience: int = option(
        5,
        "epochs without a better validation metric (HR@10, or Recall@20 for several targets) before it stops",
        minimum=1,
    )
    validation_users: int = option(
        0, "users on which an epoch is validated, the same in every epoch and run of a dataset; 0: all", minimum=0
    )
    precision: str = option("float32", "arithmetic of the forward pass", choices=("float32", "bfloat16"))
    loss: LossConfig = variant(LOSSES, "in_batch_softmax", "the loss")
    alignment: float = option(0.0, "weight of the mean squared distance between query and label, normalised", minimum=0)
    uniformity: float = option(0.0, "weight of the uniformity of queries and items, the mean of both", minimum=0)

    def check(self) -> None:
        if self.min_workers > self.num_workers:
            raise ConfigError(f"min_workers: {self.min_workers} is more than training.num_workers, {self.num_workers}")
        if self.batch_size == 1 and self.loss.in_batch_negatives:
            others = ", ".join(name for name, loss in LOSSES.items() if not loss.in_batch_negatives)
            raise ConfigError(
                f"batch_size: 1: {self.loss.name} takes its negatives from the batch's other users, there are none; "
                f"choices: 2 or more, or training.loss.name of {others}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """The train job."""

    workspace: str = option(
        "./workspace", "sample, stores, checkpoints and tracking database live here", required=True, uri=True
    )
    tracking_uri: str = option("sqlite:///${workspace}/mlflow.db", "MLflow tracking server or database", required=True)
    cache: str = option(
        "${workspace}/cache", "local folder for memory-mapped features, one per machine", required=True, uri=True
    )
    cache_gb: float = option(
        0.0,
        "GB that the cache may take: features used least recently, that no running job reads, make room; 0: any number",
        minimum=0,
    )
    seed: int = option(0, "seed of initialisation, order and dropout", minimum=0, maximum=MAX_SEED)
    dataset: DatasetConfig = option(DatasetConfig, "interactions")
    features: Any = option(
        "${workspace}/features", "feature set, or a store that holds exactly one; or a list of them", uri=True
    )
    feature_columns: list[str] = option(
        [], "columns to read, as patterns such as describe/llm.*/visual_mean; none: see docs/train.md"
    )
    max_missing_features: float = option(
        compact.MAX_MISSING, "share of the items that may have no features", minimum=0, maximum=1
    )
    feature_scaling: str = option(
        "standardize", "per dimension over the training items, or none", choices=("standardize", "none")
    )
    feature_control: str = option(
        "none",
        "a control instead of the features: those of another item (shuffled), or noise with their mean and deviation "
        "(gaussian, uniform) or with their covariance",
        choices=("none", "shuffled", *NOISES),
    )
    feature_pca: int = option(
        0, "principal components kept of each column, fitted on the training items; 0: all dimensions", minimum=0
    )
    model: ModelConfig = option(ModelConfig, "the recommender")
    training: TrainingConfig = option(TrainingConfig, "the optimisation")

    def check(self) -> None:
        check_video(self)
        self.model.backbone.check_width(self.model.embedding_dim)


def check_one_process(training: TrainingConfig, what: str, gpus: str) -> None:
    """Raises `ConfigError` where a run of one process is to have several, or a GPU by another key than `gpus`."""
    if training.num_workers != 1:
        raise ConfigError(f"training.num_workers: {training.num_workers}: {what} is one process; leave it 1")
    if training.use_gpu:
        raise ConfigError(f"training.use_gpu: {what} has the GPU that {gpus} says; leave it false")


@dataclass(frozen=True)
class TrainingData:
    """What training may see: no test interaction is in here.

    sequences     int32 [R, L + 1], left-padded, of two items at least: of one there is nothing to predict
    owners        int64 [R], the user of each sequence; a long history may be cut into several sequences
    user_items    all training items of each user, also of those without a sequence
    train_counts  int64 [I + 1], how often each item occurs in training, those single items included
    validation    what the split holds out for it
    num_users     how many users have training items
    """

    item_ids: np.ndarray
    sequences: np.ndarray
    owners: np.ndarray
    user_items: UserItems
    train_counts: np.ndarray
    validation: Holdout
    num_users: int

    def trained_items(self) -> np.ndarray:
        """int64 [T]: the indices of the items that occur in the sequences, ascending; of others nothing is learned."""
        occurs = np.zeros(len(self.item_ids) + 1, dtype=bool)
        occurs[self.sequences.ravel()] = True
        return np.flatnonzero(occurs[1:]) + 1


@dataclass(frozen=True)
class Experiment:
    """A run that is ready to start; `key` names it: the hash of everything that decides what it learns."""

    config: TrainConfig
    data: TrainingData
    features: FeatureArray | None
    key: str
    tags: dict[str, str]
    report: dict[str, int]

    @property
    def checkpoint(self) -> str:
        """Where the finished run is published."""
        name = f"{self.config.model.backbone.name}-{self.config.model.item_encoder.name}-{self.key}"
        return storage.join(self.config.workspace, "checkpoints", name)


def prepare(config: TrainConfig, *, every_layer: bool = False) -> Experiment:
    """Load the dataset, split it, and make the features ready. Raises `InputError`.

    `every_layer` prepares all matching columns even for an item encoder that reads one: a search chooses among them.
    """
    split, report = load_split(config.dataset)
    fingerprint = split.fingerprint()
    of_two = split.training()[:, -2] > 0
    sequences, owners = split.training()[of_two], split.owners[of_two]
    if not len(sequences):
        raise InputError(
            f"dataset {config.dataset.path!r}: no user has two training items, so there is nothing to learn"
        )
    report |= {"training_sequences_of_one_item": len(split.training()) - len(sequences)}
    data = TrainingData(
        np.asarray(split.item_ids),
        sequences,
        owners,
        split.user_items,
        split.train_counts(),
        validated_on(config, split),
        split.num_users,
    )
    _check_negatives(config, data)
    features = load_features(config, data.item_ids.tolist(), split.dataset_ids.tolist(), every_layer=every_layer)
    trained_on = np.flatnonzero(data.train_counts)
    if features is not None and config.feature_pca:
        features = pca.reduce(features, trained_on, config.feature_pca)
    if features is not None and config.feature_scaling == "standardize":
        features = features.standardized(trained_on)
    if not every_layer:
        check_model(config, len(data.item_ids), features)
    key = _key(config, features, fingerprint)
    tags = {"dataset": fingerprint, "feature_set": "none", "recipe": "none"}
    if features is not None:
        tags |= {"feature_set": features.digest, "recipe": features.recipe}
        tags |= {"feature_segments": " ".join(features.segments)}
        tags |= {"feature_differences": features.mixed} if features.mixed else {}
    return Experiment(config, data, features, key, {**tags, "key": key}, report)


def validated_on(config: TrainConfig, split: Split) -> Holdout:
    """What the epochs of a run are validated on: the validation targets of all users, or of `validation_users`."""
    most = config.training.validation_users
    return split.validation().sample(most) if most else split.validation()


def _key(config: TrainConfig, features: FeatureArray | None, fingerprint: str) -> str:
    """The name of a run: 12 hex digits of all that decides what it learns. `fingerprint`: of the dataset."""
    # Defaults do not count: a new option leaves the names of earlier runs as they were.
    flat = configs.changed(config)
    learned = {k: v for k, v in flat if k not in NOT_LEARNED and not k.startswith(SEARCH)}
    if features is None:  # what is asked of features changes no run without them
        learned = {k: v for k, v in learned.items() if not k.startswith("feature")}
    if not config.training.gradient_clip:  # it is not clipped; runs of this value once had gradients clipped to nothing
        learned["training.gradient_clip"] = "none"
    if config.model.item_encoder.pretrained:  # what the weights are, not where they lie
        learned["model.item_encoder.encoder_weights"] = pretrained.digest(config.model.item_encoder.pretrained)
    learned["format"] = FORMAT + config.training.loss.format
    learned |= {"dataset.path": fingerprint, "features": features.digest if features else ""}
    if config.dataset.several_targets:  # such runs were once chosen by the HR@10 of single targets
        learned["selected_by"] = config.dataset.selected_by
    return hashlib.blake2b(json.dumps(learned, sort_keys=True).encode(), digest_size=6).hexdigest()


def _check_negatives(config: TrainConfig, data: TrainingData) -> None:
    """Raises `ConfigError` when there is nothing to draw for a user."""
    if not isinstance(config.training.loss, SampledLossConfig):
        return
    trained = data.trained_items()
    occurs = np.isin(data.user_items.items, trained)
    most = np.diff(np.concatenate(([0], np.cumsum(occurs)))[data.user_items.offsets]).max()
    if most >= len(trained):
        raise ConfigError(
            f"training.loss.name: {config.training.loss.name!r} draws items that a user does not have, and one has all "
            f"{len(trained)} that are trained; choices: in_batch_softmax, full_softmax"
        )


def check_video(config: TrainConfig) -> None:
    """Raises `ConfigError` on what says nothing: of frames that are trained on, or of an encoder that there is not."""
    if not config.model.item_encoder.reads_frames:
        if config.training.encoder_lr:
            name = config.model.item_encoder.name
            raise ConfigError(f"training.encoder_lr: item encoder {name!r} trains no video encoder; leave it 0")
        return
    if config.feature_scaling != "none" or config.feature_pca:
        raise ConfigError("item_encoder.name: 'video' reads pixels; set feature_scaling=none and feature_pca=0")
    if config.feature_control not in ("none", "shuffled"):
        raise ConfigError(f"feature_control: {config.feature_control!r} of pixels; choices: none, shuffled")


def feature_uris(config: TrainConfig) -> list[str]:
    """The feature sets, one or several. Raises `ConfigError`."""
    uris = config.features if isinstance(config.features, list) else [config.features]
    if not uris or not all(isinstance(uri, str) and uri for uri in uris):
        raise ConfigError(f"features: {config.features!r} is neither the URI of a feature set nor a list of URIs")
    if len({uri.rstrip("/") for uri in uris}) < len(uris):
        raise ConfigError(f"features: {config.features!r}: a feature set is given twice")
    return uris


def load_features(
    config: TrainConfig, item_ids: Sequence[str], dataset_ids: Sequence[str] = (), *, every_layer: bool = False
) -> FeatureArray | None:
    """The columns that the item encoder reads, or their control, compacted on this machine; None for ids alone.

    Neither reduced nor scaled yet: both depend on the training items. `dataset_ids`: also the items that the catalogue
    `item_ids` leaves out; they tell whether ids that an import counted are the dataset's. Raises `InputError`.
    """
    layers = config.model.item_encoder.layers
    if layers == "none":
        return None
    if storage.is_remote(config.cache):
        raise InputError(f"cache {config.cache!r}: features are memory-mapped, so it is a local folder; set cache")
    feature_sets = [store.read(uri) for uri in feature_uris(config)]
    for feature_set in feature_sets:
        compact.check_counted(feature_set, dataset_ids)
    read = "many" if every_layer else layers
    chosen = [(each, compact.choose_columns(each, config.feature_columns, read)) for each in feature_sets]
    for feature_set, names in chosen:
        _check_read(config, feature_set, names[0])
    array = compact.compact(chosen, item_ids, config.cache, config.max_missing_features, config.cache_gb)
    if config.feature_control == "shuffled":
        return array.shuffled(config.seed)
    return array if config.feature_control == "none" else noise_twin(array, config.feature_control, config.seed)


def _check_read(config: TrainConfig, feature_set: FeatureSet, column: str) -> None:
    """Raises `ConfigError` when the item encoder, or a control, cannot read a column such as `column`."""
    tokens, _ = compact.token_shape(feature_set, column)
    frames = compact.is_frames(column)
    encoder = config.model.item_encoder
    if frames and not encoder.reads_frames:
        raise ConfigError(
            f"model.item_encoder.name: {encoder.name!r} reads vectors, and {column!r} of {feature_set.uri!r} is "
            f"frames; set model.item_encoder.name=video, or features to a feature set of vectors"
        )
    if tokens > 1 and not frames and not encoder.reads_tokens:
        raise ConfigError(
            f"feature_columns: {column!r} of {feature_set.uri!r} has {tokens} tokens per item, and item encoder "
            f"{encoder.name!r} reads vectors; choose columns of another pooling, as "
            f"{', '.join(map(str, feature_set.recipe.vector_names[-1:])) or 'visual_mean'}"
        )
    if tokens > 1 and config.feature_control in NOISES:
        raise ConfigError(f"feature_control: {config.feature_control!r} of several tokens; choices: none, shuffled")


def build_model(config: ModelConfig, num_items: int, max_length: int, features: FeatureArray | None) -> Recommender:
    """The recommender for a catalogue of `num_items` and the features' shape."""
    shapes = (
        [FeatureShape(*shape, features.item_shape, features.tokens) for shape in features.shapes] if features else []
    )
    return config.build(num_items, max_length, shapes)


def check_model(config: TrainConfig, num_items: int, features: FeatureArray | None) -> None:
    """Raises `ConfigError` when the recommender does not fit the features; none is made."""
    with torch.device("meta"):
        build_model(config.model, num_items, config.dataset.max_length, features)


def summary(experiment: Experiment) -> dict[str, Any]:
    """Facts of a run for its result."""
    return {
        **experiment.tags,
        "users": experiment.data.num_users,
        "catalogue": len(experiment.data.item_ids),
        "feature_columns": list(experiment.features.names) if experiment.features else [],
        "items_without_features": int(experiment.features.missing[1:].any(1).sum()) if experiment.features else 0,
        "dataset_report": {reason: count for reason, count in experiment.report.items() if count},
    }
