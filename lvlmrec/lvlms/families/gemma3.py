"""Gemma 3 (https://arxiv.org/abs/2503.19786): frames enter as images, whose tokens attend to each other both ways.

SigLIP tower; five of six layers of the decoder look back over a sliding window only. Its processor knows no videos: a
clip is its frames, one image after another, and no time is told.
"""

from __future__ import annotations

from typing import Any

from lvlmrec.lvlms.families.family import NativeFamily


def tiny() -> tuple[Any, Any]:
    """4 layers x 64, every other one sliding, over 3 vision layers x 48; 56 px frames of 4 tokens.

    As published, the tokenizer adds a beginning-of-text token, and the chat template writes one.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor, Gemma3TextConfig, SiglipVisionConfig

    from lvlmrec.lvlms.tiny import chat_sizes, chat_template, tokenizer

    words = tokenizer(
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
        text_config=Gemma3TextConfig(**chat_sizes(words), **text, **kinds, head_dim=16, query_pre_attn_scalar=16),
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
        chat_template="{{ bos_token }}" + chat_template("", "<start_of_image>"),
    )
    return model_config, processor


FAMILY = NativeFamily(
    name="gemma3",
    vision_layers="vision_tower.encoder.layers",
    tiny=tiny,
    modality="image",
    token_types="token_type_ids",
)
