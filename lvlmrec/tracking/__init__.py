"""Experiment tracking in MLflow. Only this package imports mlflow, inside functions: the import takes seconds.

A job is an MLflow run of the experiment `lvlmrec`. Metrics are written by client calls with an explicit run id,
so that workers of a cluster and trials of a sweep can write to runs that another process opened.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlmrec import storage
from lvlmrec.config import flatten
from lvlmrec.errors import InputError, one_line
from lvlmrec.tracking import database, owner, untracked
from lvlmrec.tracking.names import encoded

if TYPE_CHECKING:
    import mlflow

EXPERIMENT = "lvlmrec"
MAX_PARAMS_PER_CALL = 100
MAX_METRICS_PER_CALL = 1000
MAX_PARAM_LENGTH, MAX_TAG_LENGTH, MAX_NAME_LENGTH = 6000, 8000, 250
# Without these MLflow waits minutes for a server that does not answer, and the run with it.
LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
SECRETS = re.compile(r"(?<=://)([^/\s:@]*:)[^/\s@]+(?=@)|([?&](?:password|token|secret)=)[^&\s]+", re.IGNORECASE)

_unsent_statuses: dict[Run, str] = {}  # final statuses of runs that ended while the tracker did not answer


@dataclass(frozen=True)
class Run:
    """A tracked run, by its id; picklable, so that it can be sent to workers.

    Its methods raise nothing: what the tracker does not accept is written to the workspace (untracked.py). A run that
    could not be opened, because the tracker did not answer, is not `in_tracker` and writes everything there.
    """

    tracking_uri: str
    id: str
    workspace: str
    experiment_id: str = ""
    in_tracker: bool = True

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step, in one call."""

        def send(client: mlflow.MlflowClient) -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            entries = [Metric(encoded(name), float(value), now, step) for name, value in metrics.items()]
            for start in range(0, len(entries), MAX_METRICS_PER_CALL):
                client.log_batch(self.id, metrics=entries[start : start + MAX_METRICS_PER_CALL])

        self._send("metrics", {"step": step, "metrics": dict(metrics)}, send)

    def log_best_epoch(
        self, validation: Mapping[str, float], epoch: int, last: int = 0, slices: Mapping[str, float] | None = None
    ) -> None:
        """Log the best epoch's metrics as `best/...` at its step, and as the value of `validation/...` in tables.

        `slices` are metrics of parts of the users, such as `hr@10 of cold`: they are `best/...` alone. `last` is the
        last epoch whose `validation/...` this run logged, 0 for none. MLflow's tables show the value of the largest
        step, and of several values at one step the latest: where the best epoch is not the last, its metrics are
        logged once more at the last step.
        """
        best = {**validation, **(slices or {})}
        self.log_metrics({f"best/{name}": value for name, value in best.items()}, step=epoch)
        if last != epoch:
            shown = {f"validation/{name}": value for name, value in validation.items()}
            self.log_metrics(shown, step=max(last, epoch))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log a resolved configuration: each key as a parameter, cut to MLflow's limit; the whole as config.json."""
        values = {key: masked(str(value))[:MAX_PARAM_LENGTH] for key, value in flatten(config)}

        def send(client: mlflow.MlflowClient) -> None:
            from mlflow.entities import Param

            params = [Param(encoded(key), value) for key, value in values.items()]
            for start in range(0, len(params), MAX_PARAMS_PER_CALL):
                client.log_batch(self.id, params=params[start : start + MAX_PARAMS_PER_CALL])

        self._send("parameters", values, send)
        self.log_json("config.json", config)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run: fingerprints, URIs, errors."""
        values = {key: masked(str(value)) for key, value in tags.items()}

        def send(client: mlflow.MlflowClient) -> None:
            from mlflow.entities import RunTag

            client.log_batch(self.id, tags=[RunTag(encoded(k), v[:MAX_TAG_LENGTH]) for k, v in values.items()])

        long = {key: value for key, value in values.items() if len(value) > MAX_TAG_LENGTH}
        if long:
            self._keep("tags", long, ValueError(f"MLflow takes the first {MAX_TAG_LENGTH} characters of a tag"))
        self._send("tags", values, send)

    def log_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Log `content` as a JSON artifact called `name`."""
        text = masked(json.dumps(content, indent=2, default=str))
        self._send(name, content, lambda client: client.log_text(self.id, text, name))

    def finish(self, status: str, urgent: bool = False) -> None:
        """Close the run as FINISHED, FAILED or KILLED. `urgent`: try even while a failed tracker is paused."""
        sent = self._send("end", status, lambda client: client.set_terminated(self.id, status), urgent)
        if self.in_tracker and not sent:
            _unsent_statuses[self] = status

    def _send(self, kind: str, content: Any, call: Callable[[mlflow.MlflowClient], None], urgent: bool = False) -> bool:
        error: Exception | None = untracked.TrackerPaused("the run could not be opened")
        if self.in_tracker:
            error = untracked.attempt(self.tracking_uri, lambda: call(_client(self.tracking_uri)), urgent)
        if error:
            self._keep(kind, content, error)
        return error is None

    def _keep(self, kind: str, content: Any, error: Exception) -> None:
        text = masked(json.dumps(content, default=str))
        error_kind = getattr(error, "error_code", type(error).__name__)
        untracked.save_locally(
            masked(self.tracking_uri), self.workspace, self.id, kind, text, _reason(error), error_kind
        )


def start(tracking_uri: str, workspace: str, name: str, tags: Mapping[str, str], parent: Run | None = None) -> Run:
    """Open a run. Raises `InputError` when the tracking server or database cannot be reached; a child's never does."""
    tracking_uri = _absolute(tracking_uri)
    labels = {"mlflow.source.git.commit": git_revision(), **tags}
    if parent is not None:
        labels["mlflow.parentRunId"] = parent.id
    opened: list[Run] = []

    def open_() -> None:
        client = _client(tracking_uri)
        experiment_id = _experiment(client, tracking_uri, workspace)
        made = client.create_run(experiment_id, run_name=name[:MAX_NAME_LENGTH], tags=labels)
        opened.append(Run(tracking_uri, made.info.run_id, workspace, experiment_id))

    if parent is not None:
        error = untracked.attempt(tracking_uri, open_)
        if error is None:
            return opened[0]
        run = Run(tracking_uri, f"unopened-{uuid.uuid4().hex}", workspace, in_tracker=False)
        run._keep("run", {"name": name, **labels}, error)
        return run
    file, _ = database.file_of(tracking_uri)
    try:
        with database.prepared(file) if file else nullcontext():
            open_()
    except Exception as error:  # MLflow lets through what SQLAlchemy, requests or the file system raised
        raise InputError(f"tracking_uri {masked(tracking_uri)!r}: {_reason(error)}{_remedy(file)}") from error
    return opened[0]


@contextmanager
def tracked(tracking_uri: str, workspace: str, job: str, config: Mapping[str, Any]) -> Iterator[Run]:
    """A run around a job: FINISHED when the block ends, KILLED on interruption, FAILED on any other error.

    Runs that killed jobs of the same name and configuration left open are closed first.
    """
    this_process = owner.tags({"job": job, "config": {k: v for k, v in config.items() if k != "tracking_uri"}})
    run = start(tracking_uri, workspace, job, {"job": job, **this_process})
    try:
        untracked.attempt(run.tracking_uri, lambda: _close_abandoned(run, this_process))
        run.log_config(config)
        with owner.heartbeat(lambda tags: _write_heartbeat(run, tags)):
            yield run
    except (KeyboardInterrupt, SystemExit):
        _close(run, "KILLED")
        raise
    except BaseException as error:
        run.set_tags({"error": f"{type(error).__name__}: {error}"[:500]})
        _close(run, "FAILED")
        raise
    _close(run, "FINISHED")


def _close(run: Run, status: str) -> None:
    """Close a job's run, and its children's that ended while the tracker did not answer."""
    run.finish(status, urgent=True)
    while _unsent_statuses:
        child, status_of_child = _unsent_statuses.popitem()
        untracked.attempt(
            child.tracking_uri, partial(_client(child.tracking_uri).set_terminated, child.id, status_of_child)
        )


def _close_abandoned(run: Run, this_process: Mapping[str, str]) -> None:
    """End, as KILLED, the runs of the same job and configuration whose process is dead, and their children."""
    client = _client(run.tracking_uri)

    def running_runs(tag: str, value: str) -> list[mlflow.entities.Run]:
        of = f"attributes.status = 'RUNNING' and tags.`{tag}` = '{value}'"
        return list(client.search_runs([run.experiment_id], of))

    for abandoned in running_runs(owner.KEY, this_process[owner.KEY]):
        if abandoned.info.run_id != run.id and owner.is_dead(abandoned.data.tags):
            for each in [*running_runs("mlflow.parentRunId", abandoned.info.run_id), abandoned]:
                client.set_tag(each.info.run_id, "error", "its process was killed")
                client.set_terminated(each.info.run_id, "KILLED")


def _write_heartbeat(run: Run, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        _client(run.tracking_uri).set_tag(run.id, key, value)


def masked(text: str) -> str:
    """`text` without the passwords of the URIs in it.

    >>> masked("postgresql://ann:secret@host/db")
    'postgresql://ann:***@host/db'
    """
    return SECRETS.sub(lambda match: f"{match[1] or match[2]}***", text)


def git_revision() -> str:
    """The commit of the checkout this package runs from, `unknown` outside one."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def _experiment(client: mlflow.MlflowClient, tracking_uri: str, workspace: str) -> str:
    """The id of the experiment `lvlmrec`; where it was deleted, of `lvlmrec-2` and so on.

    Artifacts of a database lie in the workspace, those of a server where it is configured to keep them.
    """
    for number in itertools.count(1):
        name = EXPERIMENT if number == 1 else f"{EXPERIMENT}-{number}"
        experiment = client.get_experiment_by_name(name) or _create_experiment(client, name, tracking_uri, workspace)
        if experiment.lifecycle_stage == "active":
            if number > 1:
                problem = f"experiment {EXPERIMENT!r} in {masked(tracking_uri)} is deleted; runs are in {name!r}"
                untracked.warn_once(tracking_uri, name, problem)
            file, _ = database.file_of(tracking_uri)
            if file and file.is_relative_to(workspace):
                database.move_artifacts(file, experiment.artifact_location, Path(workspace, "artifacts"))
            return str(experiment.experiment_id)
    raise AssertionError("itertools.count does not end")


def _create_experiment(
    client: mlflow.MlflowClient, name: str, tracking_uri: str, workspace: str
) -> mlflow.entities.Experiment:
    location = artifacts(tracking_uri, workspace)
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=location))
    except Exception:
        experiment = client.get_experiment_by_name(name)  # another job made it between the two calls
        if experiment is None:
            raise
        return experiment


def artifacts(tracking_uri: str, workspace: str) -> str | None:
    """URI of a database's artifacts: in the workspace, or beside the database file where the workspace is remote.

    None for a server, which decides itself.
    """
    if not _is_database(tracking_uri):
        return None
    file, _ = database.file_of(tracking_uri)
    if storage.is_remote(workspace):
        return (file.parent / "artifacts").absolute().as_uri() if file else storage.join(workspace, "artifacts")
    return Path(storage.absolute(workspace), "artifacts").as_uri()


def _reason(error: Exception) -> str:
    return one_line(masked(str(error)), 200)


def _remedy(file: Path | None) -> str:
    """Advice for a database that cannot be opened, empty without any."""
    try:
        if file and database.is_outdated(file):
            return f"; a copy of it made first, try 'mlflow db upgrade sqlite:///{file}', or move it away for a new one"
    except (OSError, sqlite3.Error):
        pass
    return ""


def _absolute(tracking_uri: str) -> str:
    """The tracking URI with a database file's path made absolute: workers have other working directories."""
    file, options = database.file_of(tracking_uri)
    return f"{database.SQLITE}{file.absolute()}{options}" if file else tracking_uri


def _client(tracking_uri: str) -> mlflow.MlflowClient:
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)
    import mlflow

    database.silence()
    file, options = database.file_of(tracking_uri)
    return mlflow.MlflowClient(database.uri_of(file) + options if file else tracking_uri)


def _is_database(tracking_uri: str) -> bool:
    return not tracking_uri.startswith(("http://", "https://", "databricks"))
