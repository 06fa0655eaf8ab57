"""Tiny MiniCPM-V 2.6 and 4.5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny

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


def write_version(version: str, directory: Path, seed: int) -> None:
    """A tiny random model with the published names and files."""
    import torch
    from safetensors.torch import save_file

    from lvlmrec.lvlms.ports.minicpm_v_model import MiniCPMV, build_config
    from lvlmrec.lvlms.ports.minicpm_v_processor import SPECIAL_TOKENS

    directory.mkdir(parents=True, exist_ok=True)
    words = tiny.tokenizer({}, SPECIAL_TOKENS)
    words.chat_template = TEMPLATES[version]
    tree = config_tree(version, len(words))
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


def config_tree(version: str, vocab_size: int) -> dict[str, Any]:
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
