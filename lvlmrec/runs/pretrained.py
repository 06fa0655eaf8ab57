"""Published weights that the training of a video encoder starts from: a directory of config.json and safetensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lvlmrec.errors import ConfigError

CONFIG = "config.json"


def read(directory: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of config.json, and every tensor of the directory by name. Raises `ConfigError`."""
    files = _files(directory)
    tensors: dict[str, Tensor] = {}
    for path in files[1:]:
        tensors |= load_file(path)
    return json.loads(files[0].read_text()), tensors


def digest(directory: str) -> str:
    """16 hex digits of the content of the files that `read` reads. Raises `ConfigError`."""
    content = hashlib.blake2b(digest_size=8)
    for path in _files(directory):
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "blake2b").digest())
    return content.hexdigest()


def _files(directory: str) -> list[Path]:
    """config.json first, then the safetensors files in the order of their names. Raises `ConfigError`."""
    config, weights = Path(directory, CONFIG), sorted(Path(directory).glob("*.safetensors"))
    if not config.is_file() or not weights:
        raise ConfigError(f"item_encoder.encoder_weights: {directory!r}: no {CONFIG} or no .safetensors there")
    return [config, *weights]
