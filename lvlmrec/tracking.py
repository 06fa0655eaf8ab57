"""Experiment tracking; nothing else imports mlflow, and this only where it is used: it takes seconds in every worker.

A job is an MLflow run of the experiment `lvlmrec`. Metrics are written by client calls with an explicit run id,
so that workers of a cluster and trials of a sweep can write to runs that another process opened.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlmrec import storage, tracking_database
from lvlmrec.config import flatten
from lvlmrec.errors import InputError

if TYPE_CHECKING:
    import mlflow

EXPERIMENT = "lvlmrec"
MAX_PARAMS_PER_CALL = 100
MAX_PARAM_LENGTH = 6000
# Of a server that does not answer a user should hear at once; MLflow asks it for minutes.
FIRST_CALL = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
SECRETS = re.compile(r"(?<=://)([^/\s:@]*:)[^/\s@]+(?=@)|([?&](?:password|token|secret)=)[^&\s]+", re.IGNORECASE)
NAMES_REFUSED = str.maketrans({"@": "_at_"})  # hr@10: MLflow refuses the at sign in metric names


@dataclass(frozen=True)
class Run:
    """A tracked run, by its id; picklable, so that it travels to workers."""

    tracking_uri: str
    id: str

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Numbers at a step, in one call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(name.translate(NAMES_REFUSED), float(value), now, step) for name, value in metrics.items()]
        _client(self.tracking_uri).log_batch(self.id, metrics=entries)

    def log_chosen(self, validation: Mapping[str, float], epoch: int, last: int = 0) -> None:
        """The metrics of the epoch that was chosen: `best/...` at its step, and what tables show of `validation/...`.

        `last` is the last epoch whose `validation/...` this run logged, 0 for none. MLflow's tables show the value of
        the largest step, of several the latest: where another epoch was the last, the chosen one's stands behind it.
        """
        self.log_metrics({f"best/{name}": value for name, value in validation.items()}, step=epoch)
        if last != epoch:
            shown = {f"validation/{name}": value for name, value in validation.items()}
            self.log_metrics(shown, step=max(last, epoch))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Every key of a resolved configuration as a parameter, and the whole as an artifact."""
        from mlflow.entities import Param

        params = [Param(key, masked(str(value))[:MAX_PARAM_LENGTH]) for key, value in flatten(config)]
        for start in range(0, len(params), MAX_PARAMS_PER_CALL):
            _client(self.tracking_uri).log_batch(self.id, params=params[start : start + MAX_PARAMS_PER_CALL])
        self.log_json("config.json", config)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Labels of the run: fingerprints, URIs, why it stopped."""
        from mlflow.entities import RunTag

        _client(self.tracking_uri).log_batch(self.id, tags=[RunTag(k, masked(str(v))) for k, v in tags.items()])

    def log_json(self, name: str, content: Mapping[str, Any]) -> None:
        """A JSON artifact."""
        _client(self.tracking_uri).log_text(self.id, masked(json.dumps(content, indent=2)), name)

    def finish(self, status: str) -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        _client(self.tracking_uri).set_terminated(self.id, status)


def start(tracking_uri: str, workspace: str, name: str, tags: Mapping[str, str], parent: Run | None = None) -> Run:
    """Open a run. Raises `InputError` when the tracking server or database cannot be reached."""
    tracking_uri = _absolute(tracking_uri)
    file = _database_file(tracking_uri)
    try:
        with _first_call(), tracking_database.guarded(file) if file and not parent else nullcontext():
            client = _client(tracking_uri)
            experiment_id = _experiment(client, tracking_uri, workspace)
    except Exception as error:  # MLflow lets through what SQLAlchemy, requests or the file system raised
        raise InputError(f"tracking_uri {masked(tracking_uri)!r}: {_reason(error)}{_remedy(file)}") from error
    labels = {"mlflow.source.git.commit": git_revision(), **tags}
    if parent is not None:
        labels["mlflow.parentRunId"] = parent.id
    return Run(tracking_uri, client.create_run(experiment_id, run_name=name, tags=labels).info.run_id)


@contextmanager
def tracked(tracking_uri: str, workspace: str, job: str, config: Mapping[str, Any]) -> Iterator[Run]:
    """A run around a job: FINISHED when the block ends, KILLED on interruption, FAILED on any other error."""
    run = start(tracking_uri, workspace, job, {"job": job})
    try:
        run.log_config(config)
        yield run
    except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into the latter
        run.finish("KILLED")
        raise
    except BaseException as error:
        run.set_tags({"error": f"{type(error).__name__}: {error}"[:500]})
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


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
    """The id of the experiment, which is made when there is none."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return str(experiment.experiment_id)
    try:
        return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts(tracking_uri, workspace)))
    except Exception:
        experiment = client.get_experiment_by_name(EXPERIMENT)  # another job made it between the two calls
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def artifacts(tracking_uri: str, workspace: str) -> str | None:
    """Where a database's artifacts lie: in the workspace, and beside a file where that is remote. A server knows."""
    if not _is_database(tracking_uri):
        return None
    if storage.is_remote(workspace) and tracking_uri.startswith("sqlite:///"):
        return str(Path(tracking_uri.removeprefix("sqlite:///")).parent / "artifacts")
    return storage.join(storage.absolute(workspace), "artifacts")


def _reason(error: Exception) -> str:
    return " ".join(masked(str(error)).split())[:200]


def _remedy(file: Path | None) -> str:
    """What to do with a database that does not open."""
    try:
        if file and tracking_database.is_outdated(file):
            return f"; a copy of it made first, try 'mlflow db upgrade sqlite:///{file}', or move it away for a new one"
    except (OSError, sqlite3.Error):
        pass
    return ""


@contextmanager
def _first_call() -> Iterator[None]:
    ours = {name: value for name, value in FIRST_CALL.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _absolute(tracking_uri: str) -> str:
    """A database file by its absolute path: the workers of a run have other working directories."""
    path = tracking_uri.removeprefix("sqlite:///")
    return f"sqlite:///{Path(path).absolute()}" if path != tracking_uri and path else tracking_uri


def _database_file(tracking_uri: str) -> Path | None:
    return Path(tracking_uri.removeprefix("sqlite:///")) if tracking_uri.startswith("sqlite:///") else None


def _client(tracking_uri: str) -> mlflow.MlflowClient:
    import mlflow

    return mlflow.MlflowClient(tracking_uri)


def _is_database(tracking_uri: str) -> bool:
    return not tracking_uri.startswith(("http://", "https://", "databricks"))
