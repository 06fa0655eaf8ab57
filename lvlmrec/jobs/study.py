"""Many methods under one split and one budget: every run a Ray task, every run a child of the study in MLflow.

What is finished is read from where it lies, the checkpoints and evaluations of the workspace: a study that was killed
goes on with the same command, and a run that the train job made is reused. An interrupted run goes on after the last
epoch that it saved. The tables are rewritten after every step.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray import ObjectRef

from lvlmrec import cluster, storage, tracking
from lvlmrec import config as configs
from lvlmrec.errors import InputError, JobFailed, one_line
from lvlmrec.evaluation.shown import shown_for
from lvlmrec.report import study as report
from lvlmrec.runs import checkpoint, evaluating, experiment, methods
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.runs.experiment import Experiment, TrainConfig
from lvlmrec.runs.grid import Outcomes, Plan, Step, StudyConfig, Trial, choose, folder, next_steps, num_tried
from lvlmrec.runs.loop import State, fit, new_state, of_slices, publish
from lvlmrec.tracking import Run

MAX_WORKER_FAILURES = 3
STATE_SECONDS = 30.0


@dataclass
class Study:
    """A running study: results by now, running tasks, and the folder of its tables."""

    config: StudyConfig
    plan: Plan
    parent: Run
    folder: str
    outcomes: Outcomes = field(default_factory=lambda: Outcomes({}, {}, {}))
    running: dict[ObjectRef, Step] = field(default_factory=dict)
    children: dict[Trial, Run] = field(default_factory=dict)

    @property
    def baselines(self) -> dict[str, Any]:
        """Measured with the evaluation of the reference's first seed."""
        return next((done["baselines"] for done in self.outcomes.evaluated.values() if done["baselines"]), {})


def check(config: StudyConfig, plan: Plan) -> None:
    """Fail at once, naming the method, where its dataset, features or model do not fit. Raises `InputError`.

    What the runs of this machine map into memory is made here, once for all of them.
    """
    split, _ = experiment.load_split(config.dataset)
    for name, (first, *_) in plan.configs.items():
        try:
            features = experiment.load_features(first, list(split.item_ids))
            experiment.check_model(first, len(split.item_ids), features)
        except InputError as error:
            raise InputError(f"study.methods.{name}: {error}") from error


def run(config: StudyConfig, plan: Plan, parent: Run) -> dict[str, Any]:
    """Do all that is missing, and give the tables' URIs and the methods' test metrics.

    Raises `JobFailed` at the end when a step failed; all others are done and in the tables then.
    """
    study = Study(config, plan, parent, folder(config))
    storage.check_writable(study.folder)
    with cluster.joined():
        cluster.require_gpus("study.gpus_per_run", config.study.gpus_per_run)
        try:
            _work(study)
        except BaseException:
            for step in study.running.values():  # Ray ends the tasks with their driver
                if step.action == "train":
                    study.children[step.trial].finish("KILLED")
            raise
    files = write(study)
    print(storage.read_bytes(files["table"]).decode(), file=sys.stderr)
    if study.outcomes.failed:
        reasons = [f"{_name(study, step)}: {reason}" for step, reason in study.outcomes.failed.items()]
        raise JobFailed(f"{len(reasons)} steps failed; {files['table']} has the rest. {'; '.join(reasons)}"[:2000])
    trained = list(study.outcomes.trained.values())
    return {
        "methods": methods.summary(methods.collect(plan, study.outcomes), plan.reference),
        "baselines": {name: result["test"] for name, result in study.baselines.items()},
        "runs": len(trained),
        "reused": sum(result["reused"] for result in trained),
        "failed": 0,
        **files,
    }


def _work(study: Study) -> None:
    """Start what can be done, take what has ended, until nothing is left."""
    while True:
        for step in next_steps(study.plan, study.outcomes):
            if len(study.running) < study.config.study.max_concurrent and step not in study.running.values():
                study.running[_start(study, step)] = step
        if not study.running:
            return
        ended, _ = ray.wait(list(study.running), num_returns=1)
        for task in ended:
            _take(study, task)
        write(study)


def _start(study: Study, step: Step) -> ObjectRef:
    settings = study.config.study
    config, threads = study.plan.config(step.trial), settings.cpus_per_run
    task = ray.remote(num_cpus=threads, num_gpus=settings.gpus_per_run, max_retries=MAX_WORKER_FAILURES)
    if step.action == "evaluate":
        carries = step.trial.method == study.plan.reference and step.trial.seed == study.plan.seeds[0]
        uri = study.outcomes.trained[step.trial]["checkpoint"]
        checkpoint.note_trials(uri, num_tried(study.plan, study.outcomes, step.trial.method))
        baselines = settings.baselines if carries else []
        return task(evaluate).remote(config, uri, baselines, settings.item_knn_neighbours, threads)
    tags = {"job": "study run", "method": step.trial.method}
    run = tracking.start(study.parent.tracking_uri, config.workspace, _name(study, step), tags, study.parent)
    run.log_config(configs.to_dict(config))
    study.children[step.trial] = run
    return task(train).remote(config, run, threads, _name(study, step))


def _take(study: Study, task: ObjectRef) -> None:
    """What a step made, or why it failed."""
    step, outcomes = study.running[task], study.outcomes
    child = study.children[step.trial]
    try:
        result = ray.get(task)
    except Exception as error:  # whatever a run died of, the others go on
        cause = getattr(error, "cause", None) or error
        outcomes.failed[step] = one_line(f"{type(cause).__name__}: {cause}")[-400:]
        child.set_tags({"error": outcomes.failed[step]})
        child.finish("FAILED")
        outcome = f"failed, {outcomes.failed[step]}"
    else:
        kind = "validation" if step.action == "train" else "test"
        (outcomes.trained if step.action == "train" else outcomes.evaluated)[step.trial] = result
        if kind == "validation":
            slices = of_slices(result, study.config.dataset.selected_by)
            last = 0 if result["reused"] else result["epochs"]
            child.log_best_epoch(result[kind], result["best_epoch"], last, slices)
        else:
            child.log_metrics({f"{kind}/{name}": value for name, value in result[kind].items()})
        child.finish("FINISHED")
        name = study.config.dataset.selected_by
        outcome = f"{kind} {name.upper()} {result[kind][name]:.4f}" + ", reused" * result["reused"]
    del study.running[task]  # only now: an interrupted study closes the runs of what is in there
    left = len(next_steps(study.plan, outcomes))
    print(f"study: {step.action} {_name(study, step)}: {outcome}; {left} steps known to be left", file=sys.stderr)


def train(config: TrainConfig, run: Run, threads: int, name: str) -> dict[str, Any]:
    """One run, in this process: as the train job with one worker, down to the checkpoint's name."""
    torch.set_num_threads(threads)
    prepared = experiment.prepare(config)
    run.set_tags(prepared.tags)
    done = checkpoint.read_result(prepared.checkpoint)
    if done is not None:
        return done | {"checkpoint": prepared.checkpoint, "reused": True}
    saved = storage.join(config.workspace, "runs", f"study-{prepared.key}.tar")

    def tell(metrics: dict[str, float], epoch: int) -> None:
        run.log_metrics(metrics, step=epoch)
        metric = config.dataset.selected_by
        rate = metrics[f"validation/{metric}"]
        print(f"study: {name}: epoch {epoch}, validation {metric.upper()} {rate:.4f}", file=sys.stderr)

    state = _fit(prepared, saved, tell)
    result = publish(prepared, state.best_weights, state.progress)
    storage.remove(saved)
    return result | {"checkpoint": prepared.checkpoint, "reused": False}


def _fit(prepared: Experiment, saved: str, tell: Callable[[dict[str, float], int], None]) -> State:
    """Train from the state in the file `saved`, if there is one, and keep it up to date."""
    device = torch.device(cluster.device())
    config, settings = prepared.config, prepared.config.training
    state = new_state(config, prepared.data, prepared.features, device)
    if storage.exists(saved):
        load_state(state, saved)
    last_saved = time.monotonic()

    def report(metrics: dict[str, float], state: State) -> None:
        nonlocal last_saved
        tell(metrics, state.progress.epoch)
        finished = state.progress.finished(settings.epochs, settings.patience)
        if finished or time.monotonic() - last_saved >= STATE_SECONDS:
            save_state(state, saved)
            last_saved = time.monotonic()

    fit(config, prepared.data, prepared.features, state, report, device)
    return state


def save_state(state: State, uri: str) -> None:
    """The state as one file: of two versions there is always one, whole."""
    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as made, tarfile.open(fileobj=content, mode="w") as archive:
        state.save(Path(made))
        archive.add(made, arcname="")
    storage.write_bytes(uri, content.getbuffer())


def load_state(state: State, uri: str) -> None:
    """Continue from what `save_state` wrote."""
    with (
        tempfile.TemporaryDirectory() as read,
        tarfile.open(fileobj=io.BytesIO(storage.read_bytes(uri))) as archive,
    ):
        archive.extractall(read, filter="data")
        state.load(Path(read))


def evaluate(
    config: TrainConfig, uri: str, baselines: list[str], item_knn_neighbours: int, threads: int
) -> dict[str, Any]:
    """The test metrics of a checkpoint; an evaluation of it that is already written and has them all is reused."""
    torch.set_num_threads(threads)
    cluster.device()  # without a GPU of its own it sees none
    written = storage.join(config.workspace, "evaluations", uri.rsplit("/", 1)[-1], "evaluation.json")
    try:
        done = json.loads(storage.read_bytes(written))
    except FileNotFoundError:
        done = None
    if done and done["checkpoint"] == uri and done.get("format") == evaluating.FORMAT:
        same = not baselines or done["item_knn_neighbours"] == item_knn_neighbours
        has_all = set(shown_for(config.dataset.several_targets).test) <= set(done["test"])  # its `ks` may be others
        if same and has_all and set(baselines) <= set(done["baselines"]):
            return done | {"trials": checkpoint.read_trials(uri), "reused": True}
    settings: dict[str, Any] = {"workspace": config.workspace, "checkpoint": uri, "baselines": baselines}
    settings |= {"item_knn_neighbours": item_knn_neighbours}
    return evaluating.run(configs.load(EvaluateConfig, [settings])) | {"reused": False}


def write(study: Study) -> dict[str, str]:
    """The tables and the layer curve of what is known by now; gives their URIs."""
    from lvlmrec.report import layer_curve  # here, for workers that train do without matplotlib

    found, reference = methods.collect(study.plan, study.outcomes), study.plan.reference
    rows = methods.rows(found, study.baselines, reference)
    contents = {
        "table": ("table.txt", report.to_text(rows, reference).encode()),
        "markdown": ("table.md", report.to_markdown(rows, reference).encode()),
        "csv": ("table.csv", report.to_csv(rows).encode()),
        "runs_csv": ("runs.csv", report.to_csv(_runs(study)).encode()),
    }
    drawn = layer_curve.figure(found, found[0].shown.tested)
    if drawn is not None:
        contents |= {kind: (f"layers.{kind}", layer_curve.rendered(drawn, kind)) for kind in ("png", "svg")}
    for name, content in contents.values():
        storage.write_bytes(storage.join(study.folder, name), content)
    return {kind: storage.join(study.folder, name) for kind, (name, _) in contents.items()}


def _runs(study: Study) -> list[dict[str, Any]]:
    """Every training run, also those that were not chosen."""
    chosen, outcomes = choose(study.plan, study.outcomes), study.outcomes
    runs = []
    for trial, result in outcomes.trained.items():
        row = {"method": trial.method, **study.plan.settings[trial.setting], "seed": trial.seed}
        row |= {"chosen": chosen.get(trial.method) == trial.setting, "status": "complete"}
        row |= {f"validation {name}": value for name, value in result["validation"].items()}
        names = ("epochs", "best_epoch", "seconds_per_epoch", "parameters", "key", "checkpoint")
        runs.append(row | {name: result[name] for name in names})
    for (action, trial), reason in outcomes.failed.items():
        row = {"method": trial.method, **study.plan.settings[trial.setting], "seed": trial.seed}
        runs.append(row | {"status": f"{action} failed: {reason}"})
    return runs


def _name(study: Study, step: Step) -> str:
    return f"{step.trial.method}, {methods.describe(study.plan.settings[step.trial.setting])}, seed {step.trial.seed}"
