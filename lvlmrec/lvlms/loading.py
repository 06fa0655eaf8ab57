"""A native model out of its files: on its device, without what a recipe does not need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from lvlmrec.errors import ConfigError
from lvlmrec.features.recipe import LVLMInfo, Recipe
from lvlmrec.lvlms import source, torchvision_shim
from lvlmrec.lvlms.protocol import ModelConfig


class Named(Protocol):
    """A family, as far as loading is concerned."""

    @property
    def name(self) -> str: ...
    def inspect(self, config: ModelConfig) -> LVLMInfo: ...


def load_model(family: Named, config: ModelConfig, recipe: Recipe) -> Any:
    """The model of `config`, in eval mode, on its device.

    A model that only reads ends at the recipe's highest tap: the layers above it and the head are never loaded. One
    that answers is whole. Raises `ConfigError`, also when the files are not the recipe's.
    """
    torchvision_shim.ensure_importable()
    from transformers import AutoModelForImageTextToText

    device, info = choose_device(config), expect_identity(family, config, recipe)
    model_config = source.read_model_config(config, family.name)
    cut_config(model_config, recipe, info)
    with reading(config):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            config.model,
            revision=source.resolve_revision(config),
            config=model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ConfigError(f"lvlm.model: {config.model!r} lacks {len(missing)} weights, first {missing[0]}")
    model = model if recipe.text_names else model.base_model
    return model.eval().requires_grad_(False).to(device)


def expect_identity(family: Named, config: ModelConfig, recipe: Recipe) -> LVLMInfo:
    """What the files are. Raises `ConfigError` when they are not the recipe's."""
    info = family.inspect(config)
    if info.identity != recipe.identity:
        raise ConfigError(f"lvlm.model: {config.model!r} is {info.identity}, the recipe names {recipe.identity}")
    return info


def cut_config(model_config: Any, recipe: Recipe, info: LVLMInfo) -> None:
    """Leave the decoder the layers that `recipe` runs: all for an answer, else up to the highest tap; at least one."""
    top = max((tap.layer for tap in recipe.taps if tap.tower == "llm"), default=0)
    depth = info.num_layers["llm"] if recipe.text_names else max(top, 1)
    text = model_config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]


def load_processor(config: ModelConfig) -> Any:
    """Its processor. Raises `ConfigError`."""
    torchvision_shim.ensure_importable()
    from transformers import AutoProcessor

    with reading(config):
        return AutoProcessor.from_pretrained(config.model, revision=source.resolve_revision(config))


@contextlib.contextmanager
def reading(config: ModelConfig) -> Iterator[None]:
    """What transformers cannot read or run is the configuration's fault. Raises `ConfigError`."""
    from safetensors import SafetensorError

    try:
        with source.quiet():
            yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"lvlm.model: {config.model!r} with lvlm.attention={config.attention}: {reason}") from error


def choose_device(config: ModelConfig) -> torch.device:
    """The device of `lvlm.device`. Raises `ConfigError`."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        choices = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ConfigError(f"lvlm.device: {config.device!r} is not one of {', '.join(choices)}") from error
    return device
