"""A tiny Gemma 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny


def make() -> tuple[Any, Any]:
    """4 layers x 64, every other one sliding, over 3 vision layers x 48; 56 px frames of 4 tokens.

    As published, the tokenizer adds a beginning-of-text token, and the chat template writes one.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor, Gemma3TextConfig, SiglipVisionConfig

    words = tiny.tokenizer(
        {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        ["<bos>"],
    )
    words.bos_token = "<bos>"
    words.backend_tokenizer.post_processor = TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", words.bos_token_id)]
    )
    side, patch, tokens_per_frame = 56, 14, 4
    sizes: dict[str, Any] = {"num_attention_heads": 4}
    text = sizes | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    kinds: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}
    vision = sizes | {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96}
    model_config = Gemma3Config(
        text_config=Gemma3TextConfig(**tiny.chat_sizes(words), **text, **kinds, head_dim=16, query_pre_attn_scalar=16),
        vision_config=SiglipVisionConfig(**vision, image_size=side, patch_size=patch, vision_use_head=False),
        mm_tokens_per_image=tokens_per_frame,
        tie_word_embeddings=False,  # random words would only be repeated
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": side, "width": side}),
        tokenizer=words,
        image_seq_length=tokens_per_frame,
        chat_template="{{ bos_token }}" + tiny.chat_template("", "<start_of_image>"),
    )
    return model_config, processor


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed)
