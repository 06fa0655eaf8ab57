"""MiniCPM-V 2.6 and 4.5 (Yao et al. 2024, https://arxiv.org/abs/2408.01800): 64 tokens for a frame of any size.

Ports: transformers holds neither, and no code of their repositories is run. Decoders: Qwen2 (2.6), Qwen3 (4.5). 4.5 may
read up to six frames as one pack, with the time of each; time counts within a pack alone, since one vector on all keys
of a softmax changes none of its shares. Videos are shown as in the authors' examples, except that 2.6 sees whole frames
alone (as in their demo, for long videos) and that frames are sampled as the recipe says: up to 180 are not packed.
Covers are shown as pictures are in the authors' chat, cut into slices where they are large.

The numbers of these ports have not been compared with the published weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlmrec.errors import ConfigError
from lvlmrec.lvlms.files import checkpoint_files, source
from lvlmrec.lvlms.ports.port import PortedFamily
from lvlmrec.lvlms.protocol import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER_CLASS = {  # code of the repository, which is never run
    "tokenizer_class": "MiniCPMVTokenizerFast",
    "auto_map": {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
    "add_bos_token": False,
    "bos_token": "<|im_start|>",
}
TEMPLATES = {
    "2.6": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "4.5": (
        "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}"
    ),
}


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


def write_tiny(version: str, directory: Path, seed: int) -> None:
    """A tiny random model with the published names and files."""
    import torch
    from safetensors.torch import save_file

    from lvlmrec.lvlms import tiny
    from lvlmrec.lvlms.ports.minicpm_v_model import MiniCPMV, build_config
    from lvlmrec.lvlms.ports.minicpm_v_processor import SPECIAL_TOKENS

    words = tiny.tokenizer({}, SPECIAL_TOKENS)
    words.chat_template = TEMPLATES[version]
    tree = tiny_tree(version, len(words))
    model_config = build_config(tree)
    model_config.has_head = True
    with torch.random.fork_rng(devices=[]):
        model = MiniCPMV(model_config)
    tiny.initialise(model, seed)
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    words.save_pretrained(directory, save_jinja_files=False)
    published = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")) | TOKENIZER_CLASS
    settings = {"scale_resolution": 112, "max_slice_nums": 3, "use_image_id": True, "patch_size": 14}
    files = {"config.json": tree, "preprocessor_config.json": settings, "tokenizer_config.json": published}
    for name, values in files.items():
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def tiny_tree(version: str, vocab_size: int) -> dict[str, Any]:
    """A config.json of 4 layers x 128 over 3 vision layers x 48; about 64 patches and 4 tokens per frame."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return {
        "version": float(version),
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        **heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "query_num": 4,
        "drop_vision_last_layer": False,
        "vision_config": {
            "model_type": "siglip",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 140,
            "patch_size": 14,
        },
    }


def _family(version: str) -> PortedFamily:
    return PortedFamily(
        name=name_of(version),
        vision_layers="vpm.encoder.layers",
        patches=patches_of_views,
        read_config=partial(read_config, version),
        processor=lambda config: read_processor(config, read_config(version, config)),
        build=build,
        tiny=partial(write_tiny, version),
        video_options={"max_slice_nums": 1} | ({"packing": 0} if version == "4.5" else {}),
    )


V2_6, V4_5 = _family("2.6"), _family("4.5")
