"""A native model out of its files: on its device, without what a recipe does not need."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from lvlmrec.errors import ConfigError, one_line
from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms.files import source, torchvision_shim
from lvlmrec.lvlms.protocol import ModelConfig


def load_model(config: ModelConfig, recipe: ModelRecipe, info: LVLMInfo, depth_keys: Iterable[str]) -> Any:
    """The model of `config`, which `info` describes, in eval mode, on its device.

    A model that only reads ends at the recipe's highest tap: the layers above it and the head are never loaded. One
    that answers is whole; `depth_keys` as in `cut`. Raises `ConfigError`, also when the files are not the recipe's.
    """
    torchvision_shim.ensure_importable()
    from transformers import AutoModelForImageTextToText

    source.check_identity(config, recipe, info)
    model_config = source.read_model_config(config, info.family)
    cut(model_config.get_text_config(), num_layers_needed(recipe, info), depth_keys)
    device = choose_device(config)
    model = load_weights(AutoModelForImageTextToText, config, model_config, config.attention)
    return (model if recipe.text_names else model.base_model).to(device)


def load_weights(
    auto_class: Any, config: ModelConfig, model_config: Any, attention: str | None, unread: Collection[str] = ()
) -> Any:
    """The model that `model_config` describes, in eval mode, on the CPU. Raises `ConfigError`.

    Every weight comes from the files, except those of the modules called `unread`, which no tap is made of.
    """
    folder = source.directory(config, weights=True)
    with reading(config):
        loaded: Any = auto_class.from_pretrained(
            folder,
            config=model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    missing = [key for key in missing if not {*key.split(".")} & {*unread}]
    if missing:
        raise ConfigError(f"lvlm.model: {config.model!r} lacks {len(missing)} weights, first {missing[0]}")
    return model.eval().requires_grad_(False)


def cut(model_config: Any, depth: int, depth_keys: Iterable[str] = ()) -> None:
    """Take the layers above `depth` out of a configuration; one stays, its input may be tapped.

    All stay where a key in `depth_keys` is not 0: the weights of a layer then depend on how many layers there are.
    """
    if any(getattr(model_config, key, 0) for key in depth_keys):
        return
    model_config.num_hidden_layers = max(depth, 1)
    if getattr(model_config, "layer_types", None):
        model_config.layer_types = model_config.layer_types[: max(depth, 1)]


def num_layers_needed(recipe: ModelRecipe, info: LVLMInfo) -> int:
    """How many of the decoder's layers a recipe runs: all for an answer, else up to the highest tap."""
    top = max((tap.layer for tap in recipe.taps if tap.tower == "llm"), default=0)
    return info.num_layers["llm"] if recipe.text_names else top


def load_processor(config: ModelConfig) -> Any:
    """Its processor. Raises `ConfigError`."""
    torchvision_shim.ensure_importable()
    from transformers import AutoProcessor

    folder = source.directory(config)
    with reading(config):
        return AutoProcessor.from_pretrained(folder, trust_remote_code=config.trust_remote_code)


@contextlib.contextmanager
def reading(config: ModelConfig) -> Iterator[None]:
    """What transformers cannot read or run is the configuration's fault. Raises `ConfigError`."""
    from safetensors import SafetensorError

    try:
        with source.quiet():
            yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        where = f"lvlm.model: {config.model!r} with lvlm.attention={config.attention}"
        raise ConfigError(f"{where}: {one_line(error, source.QUOTED)}") from error


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
