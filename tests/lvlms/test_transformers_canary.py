"""Another minor release of transformers fails here first: what this project relies on beyond its documented interface.

These pass as long as nobody moves the pin; they say what to check when somebody does.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlmrec.lvlms import LVLMS
from lvlmrec.lvlms.families.family import NativeFamily
from lvlmrec.lvlms.files import torchvision_shim

torchvision_shim.ensure_importable()

import huggingface_hub  # noqa: E402
import transformers  # noqa: E402
from transformers import DynamicCache, ProcessorMixin  # noqa: E402

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(name for name, family in LVLMS.items() if isinstance(family, NativeFamily))
DECODER_CALL = {"inputs_embeds", "attention_mask", "position_ids", "cache"}
# prefix._BY_POSITION and prefix._VISUAL_ARGUMENTS: what else there is has to be cut with the sequence, too
BESIDE = {"gemma4": {"per_layer_inputs"}, "qwen3_vl": {"visual_pos_masks", "deepstack_visual_embeds"}}


def has(owner: object, name: str, *parameters: str) -> bool:
    """Whether `owner` has such an attribute and, called, takes these parameters."""
    value = getattr(owner, name, None)
    if value is None or not parameters:
        return value is not None
    taken = inspect.signature(value).parameters
    return {*parameters} <= {*taken} or any(p.kind is p.VAR_KEYWORD for p in taken.values())


def keeps_keys_and_values() -> bool:
    """`prefix.run_suffixes` reads the layers of a cache and makes another of pairs."""
    pair = (torch.ones(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    cache = DynamicCache([pair])
    (layer,) = cache.layers
    longer, _ = cache.update(*pair, 0)
    return longer.shape[2] == 6 and cache.get_seq_length() == 6 and layer.keys.shape == layer.values.shape


def reads_checkpoint_settings_where_callers_say_nothing() -> bool:
    """What `generation.leave_to_recipe` takes away."""
    source = inspect.getsource(transformers.GenerationMixin._prepare_generation_config)
    return "self.generation_config.to_dict(), defaults_only=True" in source


def adds_no_special_tokens_behind_a_written_bos() -> bool:
    """The rule of `conversation.adds_special_tokens`."""
    source = inspect.getsource(ProcessorMixin.apply_chat_template)
    return (
        'startswith(self.tokenizer.bos_token):\n                processor_kwargs["add_special_tokens"] = False'
        in source
    )


RELIED_ON: dict[str, Callable[[], bool]] = {
    "conversation.py: ProcessorMixin._merge_kwargs(tokenizer_init_kwargs)": lambda: has(
        ProcessorMixin, "_merge_kwargs", "tokenizer_init_kwargs"
    ),
    "conversation.py: when apply_chat_template adds special tokens": adds_no_special_tokens_behind_a_written_bos,
    "native.py: ProcessorMixin.create_mm_token_type_ids(input_ids)": lambda: has(
        ProcessorMixin, "create_mm_token_type_ids", "input_ids"
    ),
    "native.py: ProcessorMixin.return_mm_token_type_ids": lambda: has(ProcessorMixin, "return_mm_token_type_ids"),
    "media.py: text_replacement_offsets of ProcessorMixin.__call__": lambda: (
        '"text_replacement_offsets"' in inspect.getsource(ProcessorMixin.__call__)
        and has(ProcessorMixin, "get_text_with_replacements")
    ),
    "conversation.py: ProcessorMixin.all_special_multimodal_tokens": lambda: (
        "all_special_multimodal_tokens" in inspect.getsource(ProcessorMixin)
    ),
    "prefix.py: DynamicCache of pairs, its layers' keys and values": keeps_keys_and_values,
    "generation.py: generate takes settings of the checkpoint": reads_checkpoint_settings_where_callers_say_nothing,
    "generation.py: generate(logits_processor, tokenizer)": lambda: has(
        transformers.GenerationMixin, "generate", "generation_config", "logits_processor"
    ),
    "loading.py: from_pretrained(output_loading_info) and its keys": lambda: all(
        key in inspect.getsource(transformers.modeling_utils.LoadStateDictInfo)
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    ),
    "auto.py: PreTrainedModel._from_config": lambda: has(transformers.PreTrainedModel, "_from_config"),
    "auto.py: get_class_from_dynamic_module": lambda: has(
        importlib.import_module("transformers.dynamic_module_utils"), "get_class_from_dynamic_module", "class_reference"
    ),
    "minicpm_v_model.py: masking_utils.create_bidirectional_mask": lambda: has(
        importlib.import_module("transformers.masking_utils"), "create_bidirectional_mask"
    ),
    "phi_3_5_vision_model.py: ROPE_INIT_FUNCTIONS['longrope'], Phi3RotaryEmbedding": lambda: (
        "longrope" in importlib.import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
        and has(importlib.import_module("transformers.models.phi3.modeling_phi3"), "Phi3RotaryEmbedding")
    ),
    "smolvlm.py: DEFAULT_CHAT_TEMPLATE": lambda: has(
        importlib.import_module("transformers.models.smolvlm.processing_smolvlm"), "DEFAULT_CHAT_TEMPLATE"
    ),
    "source.py: NEEDS_CODE, the words 'trust_remote_code=True'": lambda: (
        "trust_remote_code=True"
        in inspect.getsource(importlib.import_module("transformers.dynamic_module_utils").resolve_trust_remote_code)
    ),
    "hub.py: huggingface_hub.get_cached_repo_tree, HfApi.resolve_revision, .repo_info(timeout)": lambda: (
        has(huggingface_hub, "get_cached_repo_tree", "revision")
        and "self.repo_info(" in inspect.getsource(huggingface_hub.HfApi.resolve_revision)
        and has(huggingface_hub.HfApi, "repo_info", "timeout")
        and has(huggingface_hub.errors, "RevisionResolutionError")
    ),
}


def fault(installed: str, pinned: str) -> str:
    """What is wrong with an installed version of transformers, empty if nothing is."""
    lowest = re.search(r">=(\d+\.\d+)", pinned)
    assert lowest is not None, pinned
    if installed.split(".")[:2] == lowest[1].split("."):
        return ""
    return (
        f"transformers {installed} is installed, pyproject.toml pins {pinned}: run tests/lvlms, and look at each of "
        f"these in lvlmrec/lvlms, no documented interface: {'; '.join(RELIED_ON)}; hooks on get_decoder().layers and "
        f".norm, and on each family's vision_layers; mm_encoder_outputs of the base models' forward; the arguments of "
        f"their decoders ({', '.join(sorted(DECODER_CALL))})"
    )


def pin() -> str:
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (pinned,) = [line for line in tree["project"]["dependencies"] if re.match(r"transformers\b", line)]
    return str(pinned)


def test_the_minor_release_is_the_one_that_was_checked() -> None:
    assert not fault(importlib.metadata.version("transformers"), pin())


def test_another_minor_release_says_what_to_look_at() -> None:
    major, minor = transformers.__version__.split(".")[:2]
    for other in (f"{major}.{int(minor) + 1}.0", f"{major}.{int(minor) - 1}.3", f"{int(major) + 1}.0.0.dev0"):
        found = fault(other, pin())
        assert (
            f"transformers {other} is installed" in found and "mm_encoder_outputs" in found and "DynamicCache" in found
        )


@pytest.mark.parametrize("what", RELIED_ON)
def test_what_is_relied_on_is_there(what: str) -> None:
    assert RELIED_ON[what](), f"{what}: changed in transformers {transformers.__version__}"


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_built_as_the_adapter_expects(family: str) -> None:
    """On the meta device: the decoder, the towers, and what their forwards take."""
    entry: Any = LVLMS[family]
    model_config, processor = importlib.import_module(f"lvlmrec.lvlms.tiny.{family}").make()
    with torch.device("meta"):
        base: Any = transformers.AutoModelForImageTextToText.from_config(model_config).base_model
    decoder, forward = base.get_decoder(), inspect.signature(base.forward).parameters
    assert isinstance(decoder.layers, torch.nn.ModuleList) and isinstance(decoder.norm, torch.nn.Module)
    assert isinstance(base.get_submodule(entry.vision_layers), torch.nn.ModuleList)
    assert "mm_encoder_outputs" in forward
    for modality in {entry.modality, "image"}:
        assert has(base, f"get_{modality}_features", "return_dict")
        assert getattr(model_config, f"{modality}_token_id", None) is not None
    taken = inspect.signature(decoder.forward).parameters
    named = {name for name, parameter in taken.items() if parameter.kind is not parameter.VAR_KEYWORD}
    assert named >= DECODER_CALL
    assert named - DECODER_CALL - {"input_ids", "use_cache", "logits_to_keep"} == BESIDE.get(family, set())
    assert isinstance(processor, ProcessorMixin) and isinstance(processor.return_mm_token_type_ids, bool)
