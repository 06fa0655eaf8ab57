"""Data-parallel training with Ray Train: workers that can die, and a driver that can be started again."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
from ray.train import Checkpoint as RayCheckpoint
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.collective import barrier, broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.result import Result as TrainResult
from safetensors.torch import load_file

from lvlmrec import cluster, storage
from lvlmrec.errors import JobFailed, one_line, writing
from lvlmrec.features import pca
from lvlmrec.features.array import FeatureArray
from lvlmrec.runs import checkpoint
from lvlmrec.runs.divergence import Diverged
from lvlmrec.runs.experiment import Experiment, TrainConfig, TrainingConfig, load_features
from lvlmrec.runs.loop import Progress, State, fit, new_state, of_slices, publish
from lvlmrec.tracking import Run

MAX_WORKER_FAILURES = 3
RECORD = "checkpoint_manager_snapshot.json"  # what Ray Train keeps of a run's checkpoints, in the run's folder
CHECKPOINT_SECONDS = 10.0  # an epoch of a small dataset is over sooner than its checkpoint is written


def run(experiment: Experiment, tracking: Run) -> dict[str, Any]:
    """Train, publish the best epoch's checkpoint, and say what was measured.

    A run that is already published is not repeated; an interrupted one goes on after its last whole epoch.
    Raises `JobFailed` when the workers failed more often than `MAX_WORKER_FAILURES`; an interruption says after which
    epoch the same run goes on.
    """
    selected_by = experiment.config.dataset.selected_by
    done = checkpoint.read_result(experiment.checkpoint)
    if done is not None:
        print(f"train: {experiment.checkpoint} is finished; nothing to do", file=sys.stderr)
        tracking.log_best_epoch(done["validation"], done["best_epoch"], slices=of_slices(done, selected_by))
        return done | {"checkpoint": experiment.checkpoint, "reused": True}
    for folder in (experiment.checkpoint.rpartition("/")[0], _runs(experiment)):
        storage.check_writable(folder)
    try:
        with cluster.joined():
            cluster.require_gpus("training.use_gpu", float(experiment.config.training.use_gpu))
            trained = _fit(experiment, tracking)
            result = _publish(experiment, trained)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_resumes(experiment)) from None
    print(f"train: {_ending(experiment.config, result)}", file=sys.stderr)
    slices = of_slices(result, selected_by)
    tracking.log_best_epoch(result["validation"], result["best_epoch"], result["epochs"], slices)
    return result | {"checkpoint": experiment.checkpoint, "reused": False}


class _Trainer(TorchTrainer):
    def _create_default_callbacks(self) -> list[Any]:
        """A Ray of this process's own ends with it, and leaves no placement group to be cleaned up.

        Who would clean up asks the machine's Ray, and where there are several the wrong one, or none.
        """
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # the checker sees the older class
        return [
            each for each in callbacks if not (cluster.is_own() and isinstance(each, PlacementGroupCleanerCallback))
        ]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ctrl-C ends the job as it does everywhere else; Ray's handler would wait for the workers first."""


def _fit(experiment: Experiment, tracking: Run) -> RayCheckpoint:
    settings = experiment.config.training
    if cluster.is_own():  # it has no machines that could be taken away; a process would watch for that
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    trainer = _Trainer(
        cast(Any, _worker),
        # Through the object store once, not into every worker's configuration.
        train_loop_config={"experiment": ray.put(experiment), "tracking": tracking},
        scaling_config=ScalingConfig(num_workers=_num_workers(settings), use_gpu=settings.use_gpu),
        run_config=RunConfig(  # type: ignore[call-arg]  # the checker sees the older class of this name
            name=experiment.key,  # the same run started again goes on from its last checkpoint
            storage_path=_runs(experiment),
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raise JobFailed(f"training {experiment.key}: {_reason(error)}") from error
    if diverged := cast(TrainResult, result).return_value:
        raise JobFailed(f"training {experiment.key}: {diverged}")
    return cast(RayCheckpoint, result.checkpoint)


def _runs(experiment: Experiment) -> str:
    """Where Ray Train keeps the checkpoints of runs that are not finished."""
    return storage.join(experiment.config.workspace, "runs")


def _resumes(experiment: Experiment) -> str:
    """From where an interrupted run goes on: after the epoch of the last checkpoint that Ray Train recorded."""
    try:
        recorded = json.loads(storage.read_bytes(storage.join(_runs(experiment), experiment.key, RECORD)))
        epoch = int(recorded["latest_checkpoint_result"]["metrics"]["epoch"])
    except (OSError, ValueError, KeyError, TypeError):  # none was saved, or by a Ray that keeps other records
        return "from the start: no epoch was saved yet"
    return f"after epoch {epoch} of {experiment.config.training.epochs}, the last that was saved"


def _ending(config: TrainConfig, result: Mapping[str, Any]) -> str:
    """Why the training ended, and its best epoch."""
    settings, selected_by = config.training, config.dataset.selected_by
    best = (
        f"best: epoch {result['best_epoch']}, validation {selected_by.upper()} {result['validation'][selected_by]:.4f}"
    )
    if result["epochs"] >= settings.epochs:
        return f"all {settings.epochs} epochs; {best}"
    return (
        f"stopped early after epoch {result['epochs']} of {settings.epochs}: {settings.patience} without a better one "
        f"(training.patience); {best}"
    )


def _reason(error: Exception) -> str:
    """What a worker said last: Ray's text is its whole traceback."""
    return re.split(r"lvlmrec\.errors\.\w+: ", one_line(error))[-1][-500:]


def _num_workers(settings: TrainingConfig) -> Any:
    """A number, or from how many to how many: the loss is the same, so it may change between two checkpoints."""
    return (settings.min_workers, settings.num_workers) if settings.min_workers else settings.num_workers


def _worker(config: dict[str, Any]) -> str:
    """What each worker runs: restore, fit, report a checkpoint from time to time and at the end.

    Gives why it diverged, else nothing: an error would be tried again, which is of no use here.
    """
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells of every report
    experiment: Experiment = ray.get(config["experiment"])
    tracking: Run = config["tracking"]
    context = ray.train.get_context()
    leads = context.get_world_rank() == 0
    device = get_device()
    if context.get_local_rank() == 0:
        _local_features(experiment)  # made once on each machine, found by its other workers
    barrier()
    features = _local_features(experiment)
    state = new_state(experiment.config, experiment.data, features, device)
    resumed = ray.train.get_checkpoint()
    if resumed:
        with resumed.as_directory() as folder:
            state.load(Path(folder))

    settings = experiment.config.training
    last_saved = time.monotonic()

    def report(metrics: dict[str, float], state: State) -> None:
        nonlocal last_saved
        if leads:
            tracking.log_metrics(metrics, step=state.progress.epoch)
            _tell(metrics, settings.epochs, experiment.config.dataset.selected_by)
        finished = state.progress.finished(settings.epochs, settings.patience)
        # Every worker must report as often as the others, so the first one's clock decides for all.
        if broadcast_from_rank_zero(finished or time.monotonic() - last_saved >= CHECKPOINT_SECONDS):
            with writing(_runs(experiment)), tempfile.TemporaryDirectory() as folder:
                if leads:
                    state.save(Path(folder))
                ray.train.report(metrics, checkpoint=RayCheckpoint.from_directory(folder) if leads else None)
            last_saved = time.monotonic()

    try:
        fit(experiment.config, experiment.data, features, state, report, device)
    except Diverged as error:
        return str(error)
    return ""


def _local_features(experiment: Experiment) -> FeatureArray | None:
    """The features as the driver prepared them, compacted anew where this machine does not have the file yet."""
    features = experiment.features
    if features is not None and not features.is_here():
        local = load_features(experiment.config, experiment.data.item_ids.tolist())
        if local and features.projection:
            local = pca.project(local, features.projection)
        return replace(features, cache=local.cache, columns=local.select(features.names).columns) if local else None
    return features


def _publish(experiment: Experiment, trained: RayCheckpoint) -> dict[str, Any]:
    with trained.as_directory() as folder:
        state_folder = Path(folder)
        weights = load_file(state_folder / "best.safetensors")
        progress = Progress(**json.loads((state_folder / "progress.json").read_text()))
    return publish(experiment, weights, progress)


def _tell(metrics: dict[str, float], epochs: int, selected_by: str) -> None:
    # Ray Train's patched print() would say it twice.
    sys.stderr.write(
        f"train: epoch {metrics['epoch']:.0f}/{epochs}, loss {metrics['train_loss']:.4f}, "
        f"validation {selected_by.upper()} {metrics[f'validation/{selected_by}']:.4f} "
        f"NDCG@10 {metrics['validation/ndcg@10']:.4f}, "
        f"{metrics['epoch_seconds']:.2f} s\n"
    )
