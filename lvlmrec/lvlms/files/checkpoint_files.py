"""Published checkpoints of models that transformers does not hold, read without any code of their repositories.

Such a model is ported as a `PreTrainedModel` whose parameters bear the published names, so that transformers itself
finds the files (a directory or the hub, one file or an index of many), reads only what the model has, and reports
the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lvlmrec.errors import ConfigError, one_line
from lvlmrec.lvlms.files import source
from lvlmrec.lvlms.protocol import ModelConfig


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of tokenizer.json, whatever class of its repository the files name. Raises `ConfigError`."""
    from transformers import PreTrainedTokenizerFast

    folder = source.directory(config)
    try:
        with source.quiet():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"lvlm.model: {config.model!r}: tokenizer: {one_line(error, source.QUOTED)}") from error
    tokenizer.padding_side = "left"
    return tokenizer


def load_weights(
    model_class: Any, model_config: Any, config: ModelConfig, layers: str, left_out: Sequence[str] = ()
) -> Any:
    """A `model_class` (a `PreTrainedModel`) made of `model_config`, with the published weights of `config.model`.

    `layers` is the name of the decoder's layer list: layers that `model_config` does not have are not read. Tensors
    whose name matches one of the regular expressions `left_out` from its start are not read either.
    Raises `ConfigError` when a tensor is missing, unknown or of another shape, naming the first.
    """
    from lvlmrec.lvlms.files import loading  # imports torch

    folder = source.directory(config, weights=True)
    with loading.reading(config):
        model, report = model_class.from_pretrained(
            folder,
            config=model_config,
            dtype=config.dtype,
            attn_implementation=config.attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    num_layers = model_config.get_text_config().num_hidden_layers
    unknown = [name for name in report["unexpected_keys"] if not _is_left_out(name, layers, num_layers, left_out)]
    mismatched = [f"{name} {list(theirs)} instead of {list(ours)}" for name, theirs, ours in report["mismatched_keys"]]
    for what, names in (
        ("lacks", sorted(report["missing_keys"])),
        ("has unknown", sorted(unknown)),
        ("has misshapen", sorted(mismatched)),
    ):
        if names:
            raise ConfigError(f"lvlm.model: {config.model!r} {what} weights: {len(names)}, first {names[0]}")
    return model.eval().requires_grad_(False)


def _is_left_out(name: str, layers: str, num_layers: int, left_out: Sequence[str]) -> bool:
    layer = re.match(rf"{re.escape(layers)}\.(\d+)\.", name)
    if layer is not None:
        return int(layer[1]) >= num_layers
    return any(re.match(pattern, name) for pattern in left_out)
