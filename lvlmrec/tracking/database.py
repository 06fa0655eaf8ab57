"""The SQLite database of a workspace: created by one process, completely or not at all, while the others wait.

MLflow creates its tables in some fifty migrations, each committed by itself: two processes that do so at once, or one
that is killed meanwhile, leave a database that no process can open again.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from lvlmrec import storage
from lvlmrec.locks import locked

SQLITE = "sqlite:///"
OPTIONS = re.compile(r"\?\w+=[^/]*$")  # at the end of a URI; any other question mark belongs to the path
MLFLOW_TABLES = {"alembic_version", "experiments"}  # at least one exists from the first migration on
SEEDED_TABLES = {"alembic_version", "experiments", "workspaces"}  # tables to which migrations add rows
MIGRATING_PREFIX = "_alembic_tmp_"  # prefix of a table that a migration is rewriting
SIDE_FILES = ("-journal", "-wal", "-shm")  # of the files that SQLite keeps beside a database
BUSY_SECONDS = 20.0  # how long to wait for another writer, as MLflow does


@contextmanager
def prepared(file: Path) -> Iterator[None]:
    """Within the block the database `file` exists, and no other process creates or migrates it.

    An incomplete one in which nothing is recorded is created anew.
    """
    with locked(file.with_name(f"{file.name}.lock")) as is_alone:
        if is_alone:
            for leftover in file.parent.glob(f".{file.name}.*.making*"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
        is_incomplete = file.exists() and _is_incomplete(file)
        if is_incomplete and file.stat().st_size:
            print(f"tracking: {file} was left half-made and holds no run: made anew", file=sys.stderr)
        if is_incomplete or not file.exists():
            _create(file, replace=is_incomplete)
        yield


def _create(file: Path, replace: bool) -> None:
    """Create the database under a temporary name, then rename it. Of several processes the first one's counts."""
    import mlflow

    silence()
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.making")
    mlflow.MlflowClient(uri_of(temporary)).search_experiments(max_results=1)
    if replace:
        for suffix in SIDE_FILES:
            file.with_name(file.name + suffix).unlink(missing_ok=True)
        temporary.replace(file)
        return
    try:
        os.link(temporary, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        temporary.rename(file)
    temporary.unlink(missing_ok=True)


def silence() -> None:
    """Once mlflow is imported, which sets their levels: its loggers of what the project says itself, in one line."""
    for noisy in ("mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def file_of(tracking_uri: str) -> tuple[Path | None, str]:
    """The database file of a tracking URI and the URI's options (`?timeout=60`); (None, "") for other trackers."""
    rest = tracking_uri.removeprefix(SQLITE)
    path = OPTIONS.sub("", rest)
    return (Path(path), rest.removeprefix(path)) if rest != tracking_uri and path else (None, "")


def uri_of(file: Path) -> str:
    """The URI of a database file, with percent and question marks in its path quoted as SQLAlchemy expects.

    A path that needs quoting has the scheme `sqlite+pysqlite`: for `sqlite` MLflow creates the folder as it is quoted.
    """
    quoted = str(file).replace("%", "%25").replace("?", "%3F")
    return f"{SQLITE}{file}" if quoted == str(file) else f"sqlite+pysqlite:///{quoted}"


def move_artifacts(file: Path, location: str, artifacts: Path) -> None:
    """Change the artifact paths of experiment and runs from `location` to `artifacts`, after the workspace was moved.

    MLflow stores absolute paths, and has no call that changes them.
    """
    old_location = Path(storage.absolute(location))
    is_workspace = location.startswith(("/", "file:///")) and old_location.name == artifacts.name
    old_workspace = old_location.parent
    if not is_workspace or old_location == artifacts:
        return
    if old_workspace.exists() and old_workspace.samefile(artifacts.parent):
        return
    with closing(_connect(file)) as database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(
                f"update {table} set {column} = ? || substr({column}, ?) where substr({column} || '/', 1, ?) = ?",
                [artifacts.as_uri(), len(location) + 1, len(location) + 1, f"{location}/"],
            )
        database.commit()
    print(
        f"tracking: the workspace was at {old_workspace}; its artifacts are now those in {artifacts}", file=sys.stderr
    )


def is_outdated(file: Path) -> bool:
    """Whether a database has tables of an MLflow that is older than the installed one."""
    with closing(_connect(file)) as database:
        return bool(_tables(database) & MLFLOW_TABLES) and not _is_current(_version(database))


def _is_incomplete(file: Path) -> bool:
    """Whether a database is empty, or lacks tables of MLflow and has nothing recorded in the others."""
    with closing(_connect(file)) as database:
        tables = _tables(database)
        if not tables & MLFLOW_TABLES:
            return not tables
        recorded = [name for name in tables if name.removeprefix(MIGRATING_PREFIX) not in SEEDED_TABLES]
        if any(database.execute(f'select 1 from "{name}" limit 1').fetchone() for name in recorded):
            return False
        return not _is_current(_version(database))


def _connect(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=BUSY_SECONDS)


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}


def _version(database: sqlite3.Connection) -> str:
    """The id of the database's last migration; empty before the first one."""
    if "alembic_version" not in _tables(database):
        return ""
    return next(iter(database.execute("select version_num from alembic_version")), ("",))[0]


def _is_current(version: str) -> bool:
    """Whether a database at this migration has all tables; an unknown migration is of a later MLflow."""
    import mlflow
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    script = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    try:
        return bool(version) and (script.get_revision(version) is None or version == script.get_current_head())
    except CommandError:
        return True
