"""What the model is, from its files, or as the workspace remembers it of the very same files.

Reading a model's configuration imports torch and transformers: seconds, in which a run with nothing to do is over.
A model in a directory is therefore remembered, under a name made of all that decides the answer: what is configured,
the content of the directory and of the authors' code, this package's own code, and the version of transformers. A hub
id is asked each time, and so is a model with code of its own, which runs in an environment that this process does not
know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

import lvlmrec
from lvlmrec import cluster, storage
from lvlmrec.errors import ConfigError
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.features.sources import Reading
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.files import authors_code, remote_code, source


def inspect(lvlm: LVLMConfig, code: Mapping[str, bytes], workspace: str, resources: Mapping[str, Any]) -> LVLMInfo:
    """What the model is. Code of its own runs in a process with `resources`, never in this one. Raises `ConfigError`.

    `code` are the files of the authors' repository; `workspace` remembers the answer.
    """
    remote_code.check(lvlm)
    if lvlm.trust_remote_code:
        return _inspect_there(lvlm, resources)
    if not lvlm.model or not Path(lvlm.model, "config.json").is_file():
        return inspect_here(lvlm)
    remembered = storage.join(workspace, "cache", "models", f"{_name(lvlm, code)}.json")
    try:
        tree: dict[str, Any] = json.loads(storage.read_bytes(remembered))
    except FileNotFoundError:
        info = inspect_here(lvlm)
        storage.write_bytes(remembered, json.dumps(asdict(info), indent=2).encode())
        return info
    lists = {key: tuple(value) for key, value in tree.items() if isinstance(value, list)}
    return LVLMInfo(**(tree | lists))


def _name(lvlm: LVLMConfig, code: Mapping[str, bytes]) -> str:
    """32 hex digits over all that decides what the model in a directory is said to be."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(lvlmrec.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    known = [asdict(lvlm), source.identity(lvlm), authors_code.digest(code), version("transformers")]
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()


def _inspect_there(lvlm: LVLMConfig, resources: Mapping[str, Any]) -> LVLMInfo:
    cluster.join()  # and stay: the pipeline needs it next
    cluster.require_gpus("pool.gpus_per_actor", resources.get("num_gpus", 0))
    try:
        return ray.get(ray.remote(**resources)(inspect_here).remote(lvlm))
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        raise


def inspect_here(lvlm: LVLMConfig) -> LVLMInfo:
    """What the model is, from its files. Raises `ConfigError`."""
    return LVLMS[lvlm.name].inspect(lvlm)


def check_length(lvlm: LVLMConfig, reading: Reading, limit: int) -> None:
    """Raises `ConfigError` when the recipe's prompts cannot fit in the `limit` tokens that the model reads at most.

    Says nothing of models that a process of their own must read: there each item is rejected.
    """
    if limit and not lvlm.trust_remote_code and not lvlm.environment:
        LVLMS[lvlm.name].check_length(lvlm, reading, limit)
