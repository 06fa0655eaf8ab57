"""MiniCPM-V 2.6 and 4.5 (Yao et al. 2024, https://arxiv.org/abs/2408.01800): 64 tokens for a frame of any size.

Ports: transformers holds neither, and no code of their repositories is run. Decoders: Qwen2 (2.6), Qwen3 (4.5). 4.5 may
read up to six frames as one pack, with the time of each; time counts within a pack alone, since one vector on all keys
of a softmax changes none of its shares. Videos are shown as in the authors' examples, except that 2.6 sees whole frames
alone (as in their demo, for long videos) and that frames are sampled as the recipe says: up to 180 are not packed.
Covers are shown as pictures are in the authors' chat, cut into slices where they are large.

The numbers of these ports have not been compared with the published weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lvlmrec.errors import ConfigError
from lvlmrec.lvlms.files import checkpoint_files, source
from lvlmrec.lvlms.ports.port import PortedFamily
from lvlmrec.lvlms.protocol import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


def patches_of_views(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """Patch tokens of each clip, [P, D], from views of any size that lie one after another, [R, L, D]."""
    import torch

    lengths = inputs["grid_hw"].prod(dim=-1).tolist()
    views = [hidden[row, :length] for row, length in enumerate(lengths)]
    patches, start = [], 0
    for groups in inputs["group_sizes"].split(inputs["num_groups"].tolist()):
        patches.append(torch.cat(views[start : start + int(groups.sum())]))
        start += int(groups.sum())
    return patches


def name_of(version: str) -> str:
    """The key in `LVLMS`."""
    return f"minicpm_v_{version.replace('.', '_')}"


def read_config(version: str, config: ModelConfig) -> Any:
    """The configuration of a published config.json. Raises `ConfigError` when it is of another model or version."""
    from lvlmrec.lvlms.ports.minicpm_v_model import build_config

    family = name_of(version)
    tree = source.read_config(config, ("minicpmv",), family)
    if str(tree["version"]) != version:
        found = f"minicpmv model of version {tree['version']}"
        raise ConfigError(f"lvlm.model: {config.model!r} is a {found}; lvlm.name={family} reads version {version}")
    return build_config(tree)


def build(config: ModelConfig, model_config: Any) -> tuple[Any, Any]:
    """The model that `model_config` describes, with the published weights, and its processor. Raises `ConfigError`."""
    from lvlmrec.lvlms.ports.minicpm_v_model import MiniCPMV

    processor = read_processor(config, model_config)
    model_config.video_token_id = model_config.image_token_id = processor.visual_token_id
    left_out = [] if model_config.has_head else [r"llm\.lm_head\."]
    return checkpoint_files.load_weights(MiniCPMV, model_config, config, "llm.model.layers", left_out), processor


def read_processor(config: ModelConfig, model_config: Any) -> Any:
    """The processor of a model. Raises `ConfigError`."""
    from lvlmrec.lvlms.ports.minicpm_v_processor import MiniCPMVProcessor

    settings = source.read_json(config, "preprocessor_config.json") or {}
    return MiniCPMVProcessor(
        checkpoint_files.load_tokenizer(config),
        reads_times=model_config.text_config.model_type == "qwen3",
        num_queries=model_config.query_num,
        patch=model_config.vision_config.patch_size,
        **{key: settings[key] for key in ("scale_resolution", "max_slice_nums", "use_image_id") if key in settings},
    )


def _family(version: str) -> PortedFamily:
    return PortedFamily(
        name=name_of(version),
        vision_layers="vpm.encoder.layers",
        patches=patches_of_views,
        read_config=partial(read_config, version),
        read_processor=read_processor,
        build=build,
        video_options={"max_slice_nums": 1} | ({"packing": 0} if version == "4.5" else {}),
    )


V2_6, V4_5 = _family("2.6"), _family("4.5")
