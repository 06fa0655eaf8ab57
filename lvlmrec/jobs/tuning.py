"""Search with Ray Tune: learning rate, embedding size and layer taps, chosen on validation.

Every trial is a plain function of one process: a recommender is small, and the features are one memory-mapped file
that all trials share. Each trial is a child run of the sweep, written from the driver, so that a trial which the
scheduler stops still ends with the right status. Each trial also keeps what it reported in a file of its own: the
same search started again samples the same trials and repeats none of their epochs that it need not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from lvlmrec import cluster, storage, tracking
from lvlmrec import config as configs
from lvlmrec.config import check_gpus, option
from lvlmrec.errors import ConfigError, InputError, JobFailed, one_line
from lvlmrec.runs import checkpoint
from lvlmrec.runs.divergence import Diverged
from lvlmrec.runs.experiment import Experiment, TrainConfig, check_model, check_one_process, check_video, prepare
from lvlmrec.runs.loop import State, fit, new_state, of_slices
from lvlmrec.taps import parse_feature
from lvlmrec.tracking import Run

ALL_TAPS = "all"


@dataclass(frozen=True)
class SearchConfig:
    """The search space and its budget."""

    trials: int = option(8, "configurations tried", minimum=1)
    max_concurrent: int = option(2, "trials that run at the same time", minimum=1)
    cpus_per_trial: float = option(1.0, "CPUs that Ray reserves for one trial; a share of one is allowed", minimum=0.1)
    gpus_per_trial: float = option(
        0.0, "GPUs that Ray reserves for one trial: 1, or a share of one; 0: it runs on CPU", minimum=0
    )
    grace_epochs: int = option(3, "epochs that every trial trains before a worse one may be stopped", minimum=1)
    reduction: int = option(3, "at each rung of the search, one of so many trials goes on", minimum=2)
    lr_min: float = option(3e-4, "lower end of the learning rate, log-uniform", above=0)
    lr_max: float = option(3e-3, "upper end of the learning rate", above=0)
    embedding_dims: list[int] = option([32, 64, 128], "embedding sizes", minimum=1, required=True, distinct=True)
    taps: list[str] = option(
        [], "tap sets: all, or taps joined by + as llm.0+llm.4; none: all together and each alone", distinct=True
    )

    def check(self) -> None:
        if self.lr_min > self.lr_max:
            raise ConfigError(f"lr_min: {self.lr_min} is above search.lr_max={self.lr_max}")
        check_gpus("gpus_per_trial", self.gpus_per_trial)


@dataclass(frozen=True)
class TuneConfig(TrainConfig):
    """The tune job: everything of the train job, and a search over some of it."""

    search: SearchConfig = option(SearchConfig, "search space and budget")

    def check(self) -> None:
        check_one_process(self.training, "a trial", "search.gpus_per_trial")
        check_video(self)
        for width in self.search.embedding_dims:  # in place of `model.embedding_dim`
            try:
                self.model.backbone.check_width(width)
            except ConfigError as error:
                raise ConfigError(f"search.embedding_dims: {width}: {error}") from error


def run(config: TuneConfig, experiment: Experiment, parent: Run) -> dict[str, Any]:
    """Search, and give the best configuration by its best validation epoch. Raises `JobFailed` if no trial ended."""
    search, selected_by = config.search, config.dataset.selected_by
    runs = storage.join(config.workspace, "runs")
    storage.check_writable(runs)
    trial_runs = TrialRuns(parent, config.workspace, config.training.epochs, selected_by)
    param_space = space(search, experiment)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C would end the sweep as if it were complete
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # `TrialRuns` does
    with cluster.joined():
        cluster.require_gpus("search.gpus_per_trial", search.gpus_per_trial)
        trainable = tune.with_resources(
            tune.with_parameters(_trial, experiment=experiment, folder=storage.join(runs, f"trials-{experiment.key}")),
            {"CPU": search.cpus_per_trial, "GPU": search.gpus_per_trial},
        )
        tuner = tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=tune.TuneConfig(
                metric=f"validation/{selected_by}",
                mode="max",
                num_samples=search.trials,
                reuse_actors=True,  # a process imports torch for seconds, in which a small trial is over
                search_alg=BasicVariantGenerator(max_concurrent=search.max_concurrent, random_state=config.seed),
                scheduler=ASHAScheduler(
                    time_attr="epoch",
                    max_t=config.training.epochs,
                    grace_period=min(search.grace_epochs, config.training.epochs),
                    reduction_factor=search.reduction,
                ),
            ),
            run_config=tune.RunConfig(name=f"tune-{parent.id}", storage_path=runs, callbacks=[trial_runs], verbose=0),
        )
        try:
            results = tuner.fit()
        except BaseException:
            trial_runs.interrupt()
            raise
    outcome = _outcome(results, search.trials, selected_by)
    succeeded = outcome["trials"] - outcome["failed"]
    outcome["best"]["train_with"] = _note_trials(experiment, outcome["best"]["config"], succeeded)
    return outcome


def space(search: SearchConfig, experiment: Experiment) -> dict[str, Any]:
    """The search space; taps are part of it only where features are read. Raises `InputError` on an unknown tap."""
    chosen: dict[str, Any] = {
        "training.lr": tune.loguniform(search.lr_min, search.lr_max),
        "model.embedding_dim": tune.choice(search.embedding_dims),
    }
    if experiment.features is None:
        return chosen
    each = list(dict.fromkeys(str(parse_feature(name).tap) for name in experiment.features.names))
    one = experiment.config.model.item_encoder.layers == "one"
    sets = len(experiment.features.shapes)
    tap_sets = search.taps or ([ALL_TAPS, *each] if not one else each if sets == 1 else [ALL_TAPS])
    first = configured(
        experiment.config, {"model.embedding_dim": search.embedding_dims[0], "training.lr": search.lr_max}
    )
    for tap_set in tap_sets:
        read = experiment.features.select(columns_of(tap_set, experiment.features.names))
        if one and [num_columns for num_columns, _ in read.shapes] != [1] * sets:
            name = experiment.config.model.item_encoder.name
            of_each = "" if sets == 1 else " of each feature set; name one column of each in feature_columns, or here"
            raise InputError(
                f"search.taps: {tap_set!r}: item encoder {name!r} reads one tap{of_each}; choices: {', '.join(each)}"
            )
        check_model(first, len(experiment.data.item_ids), read)
    return chosen | {"taps": tune.choice(tap_sets)}


def columns_of(tap_set: str, names: Sequence[str]) -> list[str]:
    """The feature columns of a tap set such as `all` or `llm.0+llm.4`. Raises `InputError`."""
    if tap_set == ALL_TAPS:
        return list(names)
    taps = set(tap_set.split("+"))
    known = {str(parse_feature(name).tap) for name in names}
    if not taps <= known:
        raise InputError(
            f"search.taps: {tap_set!r}: not among the features' taps {', '.join(sorted(known))} or {ALL_TAPS}"
        )
    return [name for name in names if str(parse_feature(name).tap) in taps]


def configured(config: TrainConfig, sampled: dict[str, Any]) -> TrainConfig:
    """`config` with a trial's values."""
    model = replace(config.model, embedding_dim=sampled["model.embedding_dim"])
    training = replace(config.training, lr=sampled["training.lr"])
    return replace(config, model=model, training=training)


def train_arguments(experiment: Experiment, sampled: Mapping[str, Any]) -> list[str]:
    """What the train job is given, beside what the search was given but `search.*`, to train a trial's values."""
    arguments = [f"{key}={json.dumps(value)}" for key, value in sampled.items() if key != "taps"]
    if experiment.features is not None and sampled["taps"] != ALL_TAPS:
        columns = columns_of(sampled["taps"], experiment.features.names)
        patterns = list(dict.fromkeys(name.rpartition(":")[2] for name in columns))  # of several sets: set:column
        arguments.append(f"feature_columns={json.dumps(patterns)}")
    return arguments


def _note_trials(experiment: Experiment, sampled: Mapping[str, Any], trials: int) -> list[str] | None:
    """The arguments with which the train job trains the best configuration; its checkpoint will tell the `trials`.

    None where it cannot, as with a tap set that leaves out one of several feature sets.
    """
    given = configs.to_dict(experiment.config)
    del given["search"]
    arguments = train_arguments(experiment, sampled)
    try:
        chosen = prepare(configs.load(TrainConfig, [given], arguments))
    except InputError as error:
        print(f"tune: the train job takes no such configuration: {one_line(error)}", file=sys.stderr)
        return None
    checkpoint.note_trials(chosen.checkpoint, trials)
    print(f"tune: to train the best one: python rayjobs/train.py {shlex.join(arguments)}", file=sys.stderr)
    return arguments


def _trial(sampled: dict[str, Any], experiment: Experiment, folder: str) -> None:
    """One trial: a whole training run in this process, reporting each epoch.

    What an earlier, interrupted search reported of the same trial is reported again; training, which is
    deterministic, starts over only if the trial needs more epochs than that.
    """
    name = hashlib.blake2b(json.dumps(sampled, sort_keys=True).encode(), digest_size=8).hexdigest()
    record = storage.join(folder, f"{name}.json")
    history = _read_history(record)
    for reported in history:
        tune.report(reported)
    if history and history[-1]["finished"]:
        return
    config = configured(experiment.config, sampled)
    features = experiment.features
    if features is not None:
        features = features.select(columns_of(sampled["taps"], features.names))
    device = torch.device(cluster.device())

    def report(metrics: dict[str, float], state: State) -> None:
        progress = state.progress
        if progress.epoch <= len(history):
            return
        best = {f"best/{name}": value for name, value in progress.best.items()}
        finished = progress.finished(config.training.epochs, config.training.patience)
        slices = {"validation_slices": progress.best_slices}
        history.append({**metrics, **best, **slices, "best_epoch": progress.best_epoch, "finished": finished})
        storage.write_bytes(record, json.dumps(history).encode())
        tune.report(history[-1])

    fit(config, experiment.data, features, new_state(config, experiment.data, features, device), report, device)


def _read_history(record: str) -> list[dict[str, Any]]:
    try:
        return json.loads(storage.read_bytes(record))
    except FileNotFoundError:
        return []


class TrialRuns(tune.Callback):
    """Each trial as a child run of the sweep: its values, its metrics per epoch, its end."""

    def __init__(self, parent: Run, workspace: str, epochs: int, selected_by: str) -> None:
        self.parent, self.workspace, self.epochs, self.selected_by = parent, workspace, epochs, selected_by
        self.runs: dict[str, Run] = {}
        self.ended: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._run(trial)

    def _run(self, trial: Trial) -> Run:
        """The trial's run, opened when it starts or, if it cannot, when it fails; a restarted trial goes on in it."""
        if trial.trial_id in self.runs:
            return self.runs[trial.trial_id]
        run = tracking.start(
            self.parent.tracking_uri, self.workspace, f"trial-{trial.trial_id}", {"job": "trial"}, self.parent
        )
        run.log_config(trial.config)
        self.runs[trial.trial_id] = run
        return run

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **info: Any) -> None:
        numbers = {key: value for key, value in result.items() if key.startswith(("validation/", "train_", "epoch"))}
        self._run(trial).log_metrics(numbers, step=int(result["epoch"]))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        result = trial.last_result
        if best := _best(result):
            slices = of_slices(result, self.selected_by)
            self._run(trial).log_best_epoch(best, result["best_epoch"], int(result["epoch"]), slices)
        self._finish(trial, "FINISHED")
        ended = sum(t.is_finished() for t in trials) + (not trial.is_finished())
        print(
            f"tune: {ended} trials ended, this one at epoch {result.get('epoch', 0)}/{self.epochs} "
            f"with validation {self.selected_by.upper()} {result.get(f'best/{self.selected_by}', 0.0):.4f}: "
            f"{trial.config}",
            file=sys.stderr,
        )

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        trace = Path(trial.error_file).read_text().strip() if trial.error_file else "it left no error"
        reason = trace.splitlines()[-1].removeprefix(f"{Diverged.__module__}.")
        self._run(trial).set_tags({"error": reason[:500]})
        self._finish(trial, "FAILED")
        if not reason.startswith(Diverged.__name__):
            print(trace, file=sys.stderr)
        print(f"tune: a trial failed: {reason}: {trial.config}", file=sys.stderr)

    def interrupt(self) -> None:
        """Close the runs of the trials that were going on."""
        for trial_id in set(self.runs) - self.ended:
            self.runs[trial_id].finish("KILLED")

    def _finish(self, trial: Trial, status: str) -> None:
        result = trial.last_result or {}
        reason = "error" if status == "FAILED" else "last epoch or patience"
        if status == "FINISHED" and not result.get("finished", False):
            reason = "stopped by the scheduler"
        self._run(trial).set_tags({"stop_reason": reason, "epochs": str(int(result.get("epoch", 0)))})
        self._run(trial).finish(status)
        self.ended.add(trial.trial_id)


def _best(reported: Mapping[str, Any]) -> dict[str, float]:
    """The validation metrics of the best epoch by now; none before the first epoch."""
    return {name.removeprefix("best/"): value for name, value in reported.items() if name.startswith("best/")}


def _outcome(results: tune.ResultGrid, trials: int, selected_by: str) -> dict[str, Any]:
    every = [results[i] for i in range(len(results))]
    ended = [(result.config, result.metrics) for result in every if result.error is None and result.metrics]
    if not ended:
        raise JobFailed(f"tune: all {trials} trials failed: {one_line(results.errors[0])[-400:]}")
    chosen, metrics = max(ended, key=lambda trial: trial[1][f"best/{selected_by}"])
    return {
        "best": {
            "config": chosen,
            "validation": _best(metrics),
            "validation_slices": metrics.get("validation_slices", {}),
            "epoch": metrics["best_epoch"],
        },
        "trials": len(results),
        "failed": len(results) - len(ended),
    }
