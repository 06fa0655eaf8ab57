"""Where a job writes: not into a folder that goes with it, nor a database where there are no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec import storage
from lvlmrec.errors import ConfigError
from lvlmrec.tracking import database

WRITTEN = ("workspace", "store")


def check(config: Any) -> None:
    """Raises `ConfigError` when what the job of this configuration writes could not be written, or would be lost."""
    file, _ = database.file_of(config.tracking_uri)
    if "://" in config.tracking_uri.removeprefix(database.SQLITE) and file:
        raise ConfigError(
            f"tracking_uri: {config.tracking_uri!r}: a database file lies on a disk, not in object storage; give "
            f"tracking_uri=http://SERVER:5000 or {database.SQLITE}/FOLDER/mlflow.db"
        )
    package = _package()
    if package is None:
        return
    values = {key: getattr(config, key) for key in WRITTEN if hasattr(config, key)}
    places = values | ({"tracking_uri": str(file)} if file else {})
    lost = [key for key, place in places.items() if _is_inside(place, package)]
    if lost:
        named = ", ".join(f"{key}={getattr(config, key)!r}" for key in lost)
        raise ConfigError(
            f"{named}: in {package}, which Ray unpacked for this job and removes; give an absolute path that all nodes "
            f"share or s3://... for workspace and store, and http://SERVER:5000 for tracking_uri"
        )


def _package() -> Path | None:
    """The folder that Ray made of a job's working directory, if this process is in one."""
    working_directory = Path.cwd()
    folders = (each for each in (working_directory, *working_directory.parents) if each.name.startswith("_ray_pkg_"))
    return next((each for each in folders if each.parent.name == "working_dir_files"), None)


def _is_inside(place: str, folder: Path) -> bool:
    return not storage.is_remote(place) and Path(storage.absolute(place)).resolve().is_relative_to(folder.resolve())
