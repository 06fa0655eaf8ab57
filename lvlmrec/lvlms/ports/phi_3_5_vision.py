"""Phi-3.5-vision (https://huggingface.co/microsoft/Phi-3.5-vision-instruct), ported: transformers does not hold it.

Every frame is a picture of 313 tokens. Sequences of up to 4,096 tokens and longer ones have features of their own
kind, see `phi_3_5_vision_model.py`: keep to one number of frames within a feature set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlmrec.errors import ConfigError
from lvlmrec.lvlms.files import checkpoint_files, source
from lvlmrec.lvlms.ports.port import PortedFamily
from lvlmrec.lvlms.protocol import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

NAME, MODEL_TYPE = "phi_3_5_vision", "phi3_v"
TINY_SIDE = 28
# As published: the content of a message is text, pictures stand in it as <|image_1|> on lines of their own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{ '<|assistant|>\n' }}{% endif %}"
)


def patches_of_views(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """Patch tokens of each clip, [P, D], from views that lie one after another, [R, 1 + P, D], class token first."""
    frames_B, rows_B, columns_B = inputs["video_tiles"].unbind(dim=-1)
    clips = hidden[:, 1:].split((frames_B * (rows_B * columns_B + 1)).tolist())
    return [views.flatten(0, 1) for views in clips]


def read_config(config: ModelConfig) -> Any:
    """The configuration of a published config.json. Raises `ConfigError` when it is of another model."""
    from lvlmrec.lvlms.ports.phi_3_5_vision_model import build_config

    return build_config(source.read_config(config, (MODEL_TYPE,), NAME))


def build(config: ModelConfig, model_config: Any) -> tuple[Any, Any]:
    """The model that `model_config` describes, with the published weights, and its processor. Raises `ConfigError`."""
    from lvlmrec.lvlms.ports.phi_3_5_vision_model import Phi35Vision, unread_weights

    processor = read_processor(config, model_config)
    model_config.video_token_id = model_config.image_token_id = processor.visual_token_id
    unread = unread_weights(model_config)
    return checkpoint_files.load_weights(Phi35Vision, model_config, config, "model.layers", unread), processor


def read_processor(config: ModelConfig, model_config: Any) -> Any:
    """The processor of a model. Raises `ConfigError`."""
    from lvlmrec.lvlms.ports.phi_3_5_vision_processor import PICTURE, Phi35VisionProcessor

    words, vision = checkpoint_files.load_tokenizer(config), model_config.vision_config
    if PICTURE not in words.get_vocab() or words.bos_token_id is None:
        raise ConfigError(f"lvlm.model: {config.model!r}: its tokenizer lacks {PICTURE} or a beginning-of-text token")
    return Phi35VisionProcessor(words, vision.image_size, vision.patch_size)


def tiny_config(words: Any) -> dict[str, Any]:
    """A config.json of the published form: 4 layers x 64 over 4 vision layers x 32 (3 of them used), 28 px pictures."""
    head_pairs = 8
    return {
        "architectures": ["Phi3VForCausalLM"],
        "model_type": MODEL_TYPE,
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
            "num_img_tokens": (TINY_SIDE // 14) ** 2,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "image_size": TINY_SIDE,
                "patch_size": 7,
            },
        },
    }


def write_tiny(directory: Path, seed: int) -> None:
    """A tiny random model in the layout and with the tensor names of the published repository."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionModel

    from lvlmrec.lvlms import tiny
    from lvlmrec.lvlms.ports import phi_3_5_vision_model

    words = tiny.tokenizer({}, ("<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>"))
    words.bos_token, words.chat_template = "<s>", CHAT_TEMPLATE
    tree = tiny_config(words)
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


FAMILY = PortedFamily(
    name=NAME,
    vision_layers="model.vision_embed_tokens.img_processor.vision_model.encoder.layers",
    patches=patches_of_views,
    read_config=read_config,
    processor=lambda config: read_processor(config, read_config(config)),
    build=build,
    tiny=write_tiny,
    shares_prefix=lambda base, lengths_PB: base.shares_prefix(lengths_PB),
)
