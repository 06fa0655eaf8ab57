"""Code that lies in a model's own repository: off, unless `lvlm.trust_remote_code` names it and nothing can change it.

transformers imports it from the files that `auto_map` in the model's configuration names. It runs with the rights and
the environment variables of the process that holds the model, a worker in `lvlm.environment`; the driver never imports
it (extraction/pipeline.py). A directory's Python files are part of the identity of its model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvlmrec.errors import ConfigError
from lvlmrec.lvlms.files import hub, source
from lvlmrec.lvlms.protocol import ModelConfig

FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)


def check(config: ModelConfig) -> None:
    """Raises `ConfigError` unless code is off, or is asked for where it can run and is pinned down to the last byte."""
    if not config.trust_remote_code:
        return
    if config.name != "auto":
        raise ConfigError(
            f"lvlm.trust_remote_code: lvlm.name={config.name} runs no code of a model's repository; lvlm.name=auto may"
        )
    if not Path(config.model).is_dir() and not hub.COMMIT.fullmatch(config.revision):
        raise ConfigError(
            f"lvlm.revision: {config.revision!r}: lvlm.trust_remote_code=true runs the code of {config.model!r}, "
            f"expected its commit, 40 hexadecimal digits: a branch or tag may hold other code tomorrow"
        )
    for name in FILES:
        tree = source.read_json(config, name)
        for reference in _strings(tree.get("auto_map") if isinstance(tree, dict) else None):
            where = reference.split("--")[0] if "--" in reference else config.model
            if where != config.model:
                raise ConfigError(
                    f"lvlm.model: {config.model!r}: {name} names code in another repository, {where!r}, which neither "
                    f"lvlm.revision nor this model's identity pins; copy its Python files into a directory of your own"
                )


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(part)
