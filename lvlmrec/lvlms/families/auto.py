"""`lvlm.name=auto`: whatever video-language model transformers holds, and what the one adapter can do with it.

A model of a family in `LVLMS` is served by it. Another is looked at, built without weights: the adapter needs a
decoder with a list of layers, vision features that can be handed to the forward, and a token at visual positions.
Taps of its vision tower are not offered: where its layers lie differs too much. Code of a model's own is run only with
`lvlm.trust_remote_code`, see `remote_code.py`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lvlmrec.errors import ConfigError, one_line
from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms.engine.layout import always, never
from lvlmrec.lvlms.families import gemma4, qwen2_vl, qwen3_vl, video_llama_3
from lvlmrec.lvlms.families.family import NativeFamily, context_of
from lvlmrec.lvlms.files import remote_code, source
from lvlmrec.lvlms.protocol import LVLM, LVLMFamily, ModelConfig

_ATTENTION = {"full_attention", "sliding_attention"}  # layers whose keys and values prompts can share


@dataclass(frozen=True)
class Found(NativeFamily):
    """A family without a file of its own: the language model's taps and the projector."""

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        """What the model is, from its files. Raises `ConfigError`."""
        text = source.read_model_config(config, self.name).get_text_config()
        return LVLMInfo(
            family=self.name,
            identity=source.identity(config),
            compute_dtype=config.dtype,
            num_layers={"llm": text.num_hidden_layers},
            width={"llm": text.hidden_size},
            bos_written=source.bos_written(config),
            context=context_of(text),
            generation=source.generation(config),
        )


@dataclass(frozen=True)
class AutoFamily:
    """The entry `auto` of `LVLMS`, which has the families in `named` to choose from."""

    named: Mapping[str, LVLMFamily]
    name: str = "auto"

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        """What the model is; says on stderr how it is served. Raises `ConfigError` with the reason if it cannot be."""
        family, info = self._find(config)
        towers = ", ".join(f"{tower} {count} x {info.width[tower]}" for tower, count in info.num_layers.items())
        how = "served as such" if family.name in self.named else "the generic adapter, not verified for it"
        print(f"lvlm.name=auto: {config.model} is {family.name}: {towers}; {how}", file=sys.stderr)
        return info

    def load(self, config: ModelConfig, recipe: ModelRecipe) -> LVLM:
        """The model, by the family that was found. Raises `ConfigError`."""
        family, _ = self._find(config)
        trusts = config.trust_remote_code and family.name not in self.named
        return family.load(replace(config, name=family.name, trust_remote_code=trusts), recipe)

    def check_length(self, config: ModelConfig, recipe: ModelRecipe, limit: int) -> None:
        """See `LVLMFamily.check_length`."""
        family = self.named.get(recipe.family) or self._find(config)[0]
        family.check_length(replace(config, name=family.name), recipe, limit)

    def write_tiny(self, directory: Path, seed: int) -> None:
        """A tiny LLaVA-OneVision."""
        self.named["llava_onevision"].write_tiny(directory, seed)

    def _find(self, config: ModelConfig) -> tuple[LVLMFamily, LVLMInfo]:
        remote_code.check(config)
        source.check(config)  # its words, before those of each family in turn
        for family in self.named.values():
            try:
                return family, family.inspect(replace(config, name=family.name, trust_remote_code=False))
            except ConfigError:  # it reads models of another type
                continue
        found = look_at(config, source.read_any_config(config, "a model that transformers holds"))
        return found, found.inspect(replace(config, name=found.name))


def look_at(config: ModelConfig, model_config: Any) -> Found:
    """The generic adapter for a model of any type. Raises `ConfigError` that says what it lacks."""
    base = _build_without_weights(config, model_config)

    def need(condition: bool, what: str) -> None:
        if not condition:
            kind = model_config.model_type
            raise ConfigError(f"lvlm.model: {config.model!r}: lvlm.name=auto cannot serve a {kind} model: {what}")

    decoder: Any = base.get_decoder() if hasattr(base, "get_decoder") else None
    need(hasattr(decoder, "layers") and hasattr(decoder, "norm"), "its decoder has no list `layers` and final `norm`")
    modality = "video" if hasattr(base, "get_video_features") else "image"
    need(hasattr(base, f"get_{modality}_features"), "it has neither get_video_features nor get_image_features")
    takes = inspect.signature(base.forward).parameters
    need("mm_encoder_outputs" in takes, "its forward takes no encoded media (mm_encoder_outputs)")
    token = getattr(model_config, f"{modality}_token_id", None)
    need(token is not None, f"its configuration has no {modality}_token_id")
    attends = {*(getattr(model_config.get_text_config(), "layer_types", None) or ())} <= _ATTENTION
    return Found(
        name=model_config.model_type,
        vision_layers="",
        modality=modality,
        token_types_argument="token_type_ids" if "token_type_ids" in takes else "mm_token_type_ids",
        kept_tokens_key=video_llama_3.FAMILY.kept_tokens_key,
        state_attributes=[name for name in qwen2_vl.STATE_ATTRIBUTES if hasattr(base, name)],
        position_arguments=(*qwen3_vl.FAMILY.position_arguments, *gemma4.FAMILY.position_arguments),
        visual_arguments=qwen3_vl.FAMILY.visual_arguments,
        shares_prefix=always if attends else never,
        depth_keys=source.DEPTH_KEYS,
    )


def _build_without_weights(config: ModelConfig, model_config: Any) -> Any:
    from lvlmrec.lvlms.files import torchvision_shim

    torchvision_shim.ensure_importable()
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with source.quiet(), torch.device("meta"):
            own = _own_class(config, model_config)
            model: Any = (
                own._from_config(model_config)
                if own
                else AutoModelForImageTextToText.from_config(model_config, trust_remote_code=False)
            )
            return model.base_model
    except (OSError, ValueError, ImportError, AttributeError) as error:
        kind, reason = model_config.model_type, one_line(error, source.QUOTED)
        raise ConfigError(
            f"lvlm.model: {config.model!r}: lvlm.name=auto cannot serve a {kind} model: {reason}"
        ) from error


def _own_class(config: ModelConfig, model_config: Any) -> Any:
    """The class that a trusted repository brings, None if it brings none; `from_config` would take it from `main`."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = (getattr(model_config, "auto_map", None) or {}).get("AutoModelForImageTextToText")
    if not config.trust_remote_code or not reference:
        return None
    return get_class_from_dynamic_module(reference, str(source.directory(config)))
