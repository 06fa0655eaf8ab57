"""A family that transformers does not hold: a port of ours in the shape of a transformers model, served as the others.

A port is three functions beside the fields of `layout.Layout`; its modules bear the published names, so that
`checkpoint_files.py` reads the published weights into them. No code of the model's own repository is ever run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lvlmrec.errors import ConfigError, one_line
from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms.families.family import DeclaredFamily, describe
from lvlmrec.lvlms.files import source
from lvlmrec.lvlms.protocol import LVLM, ModelConfig


@dataclass(frozen=True, kw_only=True)
class PortedFamily(DeclaredFamily):
    """An entry of `LVLMS`.

    read_config     the model's configuration, from its published config.json alone
    read_processor  the model's processor, out of its files and that configuration
    build           model and processor of a configuration that was cut to what a recipe needs; the model has its head,
                    and generates, if that configuration `has_head`
    """

    read_config: Callable[[ModelConfig], Any]
    read_processor: Callable[[ModelConfig, Any], Any]
    build: Callable[[ModelConfig, Any], tuple[Any, Any]]

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        """What the model is, from its files, without loading its weights. Raises `ConfigError`."""
        return describe(self.name, config, self._read(config), self.video_options)

    def load(self, config: ModelConfig, recipe: ModelRecipe) -> LVLM:
        """The model, cut to the layers that `recipe` needs, with pooling in its forward. Raises `ConfigError`."""
        from lvlmrec.lvlms.engine import native
        from lvlmrec.lvlms.files import loading

        device, info = loading.choose_device(config), self.inspect(config)
        source.check_identity(config, recipe, info)
        model_config = self._read(config)
        model_config.has_head = bool(recipe.text_names)
        loading.cut(model_config.get_text_config(), loading.num_layers_needed(recipe, info), self.depth_keys)
        model, processor = self.build(config, model_config)
        return native.serve(self, config, recipe, info, model.to(device), processor)

    def processor(self, config: ModelConfig) -> Any:
        """See `DeclaredFamily.processor`."""
        return self.read_processor(config, self._read(config))

    def _read(self, config: ModelConfig) -> Any:
        """The configuration. What it lacks or holds of the wrong kind is the file's fault."""
        from lvlmrec.lvlms.files import torchvision_shim

        torchvision_shim.ensure_importable()
        try:
            with source.quiet():
                return self.read_config(config)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {one_line(error, source.QUOTED)}"
            raise ConfigError(f"lvlm.model: {config.model!r}: config.json: {reason}") from error
