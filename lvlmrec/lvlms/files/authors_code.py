"""The authors' own code, for a model that runs it: read from where the user says, named by its content, imported.

None of it is part of this project. Its files travel to the processes that hold the model as an argument of theirs. The
ways of Ray's own fall short: it ships local folders for a whole job only, and next to a container image none at all;
and other processes must not find it, as its modules bear names such as `utils`.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import io
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType

from lvlmrec import storage
from lvlmrec.errors import ConfigError, one_line
from lvlmrec.lvlms.protocol import ModelConfig

# Entries of `LVLMS` that run their authors' code -> a file that no other folder of the repository has.
FAMILIES = {"video_lavit": "models/modeling_video_lavit_hf.py"}
MAX_BYTES = 32 * 2**20  # of Python files: a repository has well under one MiB
_unpacked: dict[str, Path] = {}
_COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")


def of(config: ModelConfig) -> dict[str, bytes]:
    """The Python files that `lvlm.code` names, by path from the folder that they import from; none for most families.

    Raises `ConfigError`.
    """
    landmark = FAMILIES.get(config.name)
    if landmark is None:
        if config.code:
            raise ConfigError(f"lvlm.code: {config.code!r}: {config.name} runs no code of its authors; leave it empty")
        return {}
    expected = f"{config.name} needs its authors' repository: a folder, or the URL of a zip with the commit in it"
    if not config.code:
        raise ConfigError(f"lvlm.code: empty; {expected}")
    try:
        files = _read_zip(config.code) if storage.is_remote(config.code) else _read_folder(Path(config.code))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"lvlm.code: {config.code!r}: {expected}; {one_line(error, 300)}") from error
    roots = [path.removesuffix(landmark) for path in files if f"/{path}".endswith(f"/{landmark}")]
    if not roots:
        raise ConfigError(f"lvlm.code: {config.code!r}: no {landmark} in it; {expected}")
    root = min(roots, key=lambda path: (path.count("/"), path))
    return {path.removeprefix(root): content for path, content in sorted(files.items()) if path.startswith(root)}


def digest(files: Mapping[str, bytes]) -> str:
    """32 hex digits over names and contents."""
    whole = hashlib.blake2b(digest_size=16)
    for path, content in sorted(files.items()):
        whole.update(f"{path}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()


def unpack(files: Mapping[str, bytes]) -> Path:
    """A folder with `files` in it, of this process alone and for as long as it lives; the same for the same files."""
    name = digest(files)
    if name in _unpacked:
        return _unpacked[name]
    folder = _unpacked[name] = Path(tempfile.mkdtemp(prefix="lvlmrec-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


def import_from(folder: Path, name: str) -> ModuleType:
    """The module `name` of a folder, which from now on comes first wherever this process imports.

    Raises `ConfigError`, also when the process holds another module of that name.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"lvlm.code: importing {name!r}: {one_line(error)}; lvlm.environment must hold what it needs"
        ) from error
    if folder.resolve() not in Path(str(module.__file__)).resolve().parents:
        raise ConfigError(f"lvlm.code: this process already holds another module {name!r}: {module.__file__}")
    return module


def _read_folder(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise ValueError("no such folder")
    paths = [path for path in sorted(folder.rglob("*.py")) if path.is_file()]
    _check_size(sum(path.stat().st_size for path in paths))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _read_zip(url: str) -> dict[str, bytes]:
    """Without the commit the address would run whatever lies there tomorrow."""
    if not _COMMIT.search(url):
        raise ValueError("this address has no commit of 40 hexadecimal digits in it")
    with zipfile.ZipFile(io.BytesIO(storage.read_bytes(url))) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".py")]
        _check_size(sum(entry.file_size for entry in entries))
        for entry in entries:
            path = PurePosixPath(entry.filename)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{entry.filename!r} leads out of the zip")
        return {entry.filename: archive.read(entry) for entry in entries}


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise ValueError(f"{num_bytes} bytes of Python files, expected at most {MAX_BYTES}")
