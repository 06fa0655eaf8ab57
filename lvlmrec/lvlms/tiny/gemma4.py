"""A tiny Gemma 4."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny

LARGE: dict[str, Any] = {"use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0}
SMALL: dict[str, Any] = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}


def make(kind: Mapping[str, Any] = LARGE) -> tuple[Any, Any]:
    """4 layers x 64, every other one sliding, over 3 vision layers x 64; at most 70 tokens per frame."""
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4TextConfig,
        Gemma4VideoProcessor,
        Gemma4VisionConfig,
    )

    names = ("boi", "eoi", "image", "boa", "eoa", "audio")
    words = tiny.tokenizer({f"{name}_token": f"<{name}>" for name in names}, ["<|video|>"])
    pixels: dict[str, Any] = {"patch_size": 4, "pooling_kernel_size": 2}
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    text = sizes | {"num_hidden_layers": 4, "num_key_value_heads": 2, "global_head_dim": 32}
    layers: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}
    model_config = Gemma4Config(
        text_config=Gemma4TextConfig(
            **tiny.chat_sizes(words), **text, **layers, **kind, vocab_size_per_layer_input=len(words)
        ),
        vision_config=Gemma4VisionConfig(
            **sizes, **pixels, num_hidden_layers=3, num_key_value_heads=4, position_embedding_size=160
        ),
        **{f"{name}_token_id": getattr(words, f"{name}_token_id") for name in names if name != "eoa"},
        eoa_token_index=words.eoa_token_id,
        video_token_id=words.convert_tokens_to_ids("<|video|>"),
        tie_word_embeddings=False,  # random words would only be repeated
    )
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(**pixels, max_soft_tokens=70),
        tokenizer=words,
        video_processor=Gemma4VideoProcessor(**pixels, max_soft_tokens=70),
        chat_template=tiny.chat_template("<|video|>", "<image>"),
    )
    return model_config, processor


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
