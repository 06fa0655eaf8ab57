"""The SQLite database of a workspace: made by one process, whole or not at all, while the others wait.

MLflow makes its tables in some fifty migrations, each committed by itself: two processes that do it at once, or one
that is killed on the way, leave a database that no process can open again.
"""

from __future__ import annotations

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
OPTIONS = re.compile(r"\?\w+=[^/]*$")  # of a URI; any other question mark is the path's
MLFLOW = {"alembic_version", "experiments"}  # one of these is there from the first migration on
SEEDED = {"alembic_version", "experiments", "workspaces"}  # tables in which MLflow itself writes rows
MOVING = "_alembic_tmp_"  # prefix of a table that a migration is rewriting
BESIDE = ("-journal", "-wal", "-shm")  # what SQLite keeps of a database in files of their own
BUSY_SECONDS = 20.0  # as MLflow waits for a writer


@contextmanager
def guarded(file: Path) -> Iterator[None]:
    """Inside, the database `file` is there, and no other process makes or migrates it.

    One that was left half-made, and in which nothing is recorded, is made anew.
    """
    with locked(file.with_name(f"{file.name}.lock")) as alone:
        if alone:
            for left in file.parent.glob(f".{file.name}.*.making*"):  # by a process that was killed
                left.unlink(missing_ok=True)
        is_half_made = file.exists() and _is_half_made(file)
        if is_half_made and file.stat().st_size:
            print(f"tracking: {file} was left half-made and holds no run: made anew", file=sys.stderr)
        if is_half_made or not file.exists():
            _make(file, replace=is_half_made)
        yield


def _make(file: Path, replace: bool) -> None:
    """Make the database under another name, and give it its own when it is whole; the first of several counts."""
    import mlflow

    making = file.with_name(f".{file.name}.{uuid.uuid4().hex}.making")
    mlflow.MlflowClient(uri_of(making)).search_experiments(max_results=1)
    if replace:
        for ending in BESIDE:
            file.with_name(file.name + ending).unlink(missing_ok=True)
        making.replace(file)
        return
    try:
        os.link(making, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        making.rename(file)
    making.unlink(missing_ok=True)


def file_of(tracking_uri: str) -> tuple[Path | None, str]:
    """The database file that a tracking URI names, None for any other tracker, and its options (`?timeout=60`)."""
    rest = tracking_uri.removeprefix(SQLITE)
    path = OPTIONS.sub("", rest)
    return (Path(path), rest.removeprefix(path)) if rest != tracking_uri and path else (None, "")


def uri_of(file: Path) -> str:
    """The URI of a database file: SQLAlchemy decodes percent signs, and takes what follows a question mark for options.

    Of `sqlite:///` MLflow itself would make the parent folder, as it is spelled there.
    """
    quoted = str(file).replace("%", "%25").replace("?", "%3F")
    return f"{SQLITE}{file}" if quoted == str(file) else f"sqlite+pysqlite:///{quoted}"


def move_artifacts(file: Path, location: str, artifacts: Path) -> None:
    """Have the artifacts of experiment and runs at `location` in `artifacts`: the workspace was moved or copied.

    MLflow keeps absolute paths, and has no call that changes them.
    """
    was = Path(storage.absolute(location))
    is_ours = location.startswith(("/", "file:///")) and was.name == artifacts.name
    if not is_ours or was == artifacts or (was.parent.exists() and was.parent.samefile(artifacts.parent)):
        return
    with closing(_connect(file)) as database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(
                f"update {table} set {column} = ? || substr({column}, ?) where substr({column} || '/', 1, ?) = ?",
                [artifacts.as_uri(), len(location) + 1, len(location) + 1, f"{location}/"],
            )
        database.commit()
    print(f"tracking: the workspace was at {was.parent}; its artifacts are now those in {artifacts}", file=sys.stderr)


def is_outdated(file: Path) -> bool:
    """Whether a database has tables of MLflow, but not those of the installed MLflow or a later one."""
    with closing(_connect(file)) as database:
        return bool(_tables(database) & MLFLOW) and not _is_current(_version(database))


def _is_half_made(file: Path) -> bool:
    """Whether it is empty, or has not all of MLflow's tables and nothing was ever recorded in it."""
    with closing(_connect(file)) as database:
        tables = _tables(database)
        if not tables & MLFLOW:
            return not tables
        recorded = [name for name in tables if name.removeprefix(MOVING) not in SEEDED]
        if any(database.execute(f'select 1 from "{name}" limit 1').fetchone() for name in recorded):
            return False
        return not _is_current(_version(database))


def _connect(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=BUSY_SECONDS)


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}


def _version(database: sqlite3.Connection) -> str:
    """The last migration that it went through; empty when it went through none."""
    if "alembic_version" not in _tables(database):
        return ""
    return next(iter(database.execute("select version_num from alembic_version")), ("",))[0]


def _is_current(version: str) -> bool:
    """Whether a database at this migration has all tables; a migration that is not known is of a later MLflow."""
    import mlflow
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    script = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    try:
        return bool(version) and (script.get_revision(version) is None or version == script.get_current_head())
    except CommandError:
        return True
