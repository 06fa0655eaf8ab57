"""What the encoders of text, images and videos share: a model that ends at the highest tap, and hooks on its layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lvlmrec.errors import ConfigError
from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms.engine import hooks
from lvlmrec.lvlms.engine.hooks import Pool
from lvlmrec.lvlms.files import loading, source, torchvision_shim
from lvlmrec.lvlms.protocol import ModelConfig
from lvlmrec.taps import Tap

LAYER_LISTS = {"layer", "layers", "stages"}
UNREAD = ("pooler", "head")  # behind the last layer; a checkpoint of another task lacks them


def load(config: ModelConfig, recipe: ModelRecipe, info: LVLMInfo, model_config: Any) -> Any:
    """The model that `model_config` describes, on its device, without the layers above the highest tap.

    The default attention, sdpa, means the model's own where it has no sdpa. Raises `ConfigError`.
    """
    torchvision_shim.ensure_importable()
    from transformers import AutoModel

    source.check_identity(config, recipe, info)
    device, depth = loading.choose_device(config), max(tap.layer for tap in recipe.taps)
    if hasattr(model_config, "num_hidden_layers"):
        loading.cut(model_config, depth, source.DEPTH_KEYS)
    attention = None if config.attention == "sdpa" else config.attention
    model = loading.load_weights(AutoModel, config, model_config, attention, UNREAD)
    del find_layers(model, config)[max(depth, 1) :]
    if config.compile:
        for layer in find_layers(model, config):
            layer.forward = torch.compile(layer.forward, dynamic=True)
    return model.to(device)


def find_layers(model: Any, config: ModelConfig) -> nn.ModuleList:
    """The stack of layers, outermost and first in the model. Raises `ConfigError`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LAYER_LISTS:
            return module
    raise ConfigError(f"lvlm.model: {config.model!r}: {type(model).__name__} has no stack of layers to tap")


def attach(layers: nn.ModuleList, taps: Iterable[Tap], pool: Pool) -> None:
    """Call `pool(tap, hidden)` inside every forward: 0 is what enters the first layer, k what leaves layer k."""
    for tap in taps:
        if tap.layer:
            hooks.on_output(layers[tap.layer - 1], tap, pool)
        else:
            hooks.on_input(layers[0], tap, pool)
