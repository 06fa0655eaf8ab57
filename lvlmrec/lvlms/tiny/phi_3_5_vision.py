"""A tiny Phi-3.5-vision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny

SIDE = 28  # pixels of a picture
# As published: the content of a message is text, pictures stand in it as <|image_1|> on lines of their own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{ '<|assistant|>\n' }}{% endif %}"
)


def config_tree(words: Any) -> dict[str, Any]:
    """A config.json of the published form: 4 layers x 64 over 4 vision layers x 32 (3 of them used), 28 px pictures."""
    head_pairs = 8
    return {
        "architectures": ["Phi3VForCausalLM"],
        "model_type": "phi3_v",
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0 + pair / 20 for pair in range(head_pairs)],
            "long_factor": [1.5 + 2.0 * pair for pair in range(head_pairs)],
        },
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096,
        "sliding_window": 262_144,
        "tie_word_embeddings": False,
        "embd_layer": {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp"},
        "img_processor": {
            "name": "clip_vision_model",
            "image_dim_out": 32,
            "num_img_tokens": (SIDE // 14) ** 2,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": 7,
            },
        },
    }


def write(directory: Path, seed: int) -> None:
    """A tiny random model in the layout and with the tensor names of the published repository."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionModel

    from lvlmrec.lvlms.ports import phi_3_5_vision_model

    directory.mkdir(parents=True, exist_ok=True)
    words = tiny.tokenizer({}, ("<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>"))
    words.bos_token, words.chat_template = "<s>", CHAT_TEMPLATE
    tree = config_tree(words)
    config = phi_3_5_vision_model.build_config(tree)
    config.has_head = True
    with torch.random.fork_rng(devices=[]):
        model = phi_3_5_vision_model.Phi35Vision(config)
        config.vision_config.num_hidden_layers += phi_3_5_vision_model.UNUSED_LAYERS
        vision = model.model.vision_embed_tokens
        vision.img_processor.vision_model = CLIPVisionModel(config.vision_config)
    tiny.initialise(model, seed)
    tiny.initialise(vision, seed + 1)  # again, under names that do not look like those of a token embedding
    save_file({**model.state_dict()}, directory / "model.safetensors", metadata={"format": "pt"})
    words.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(tree, indent=2))
    (directory / "preprocessor_config.json").write_text(json.dumps({"num_crops": 4}))
