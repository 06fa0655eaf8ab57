"""SmolVLM2 (https://arxiv.org/abs/2504.05299): frames enter as images, each behind its time in minutes and seconds.

SigLIP tower, Llama decoder. A cover is cut into tiles, frames are not.
"""

from __future__ import annotations

from typing import Any

from lvlmrec.lvlms.families.family import NativeFamily


def tiny() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 48; 56 px frames of 4 x 4 patches, 4 tokens per frame."""
    from transformers import (
        LlamaConfig,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    from lvlmrec.lvlms.tiny import chat_sizes, tokenizer

    words = tokenizer(
        {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
            "video_token": "<video>",
        },
        [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)],
    )
    side, patch = 56, 14
    sizes: dict[str, Any] = {"num_attention_heads": 4}
    text = sizes | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128}
    vision = sizes | {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96}
    model_config = SmolVLMConfig(
        text_config=LlamaConfig(**chat_sizes(words), **text, num_key_value_heads=2).to_dict(),
        vision_config=vision | {"image_size": side, "patch_size": patch},
        image_token_id=words.image_token_id,
        scale_factor=2,
    )
    size: dict[str, Any] = {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**size),
        tokenizer=words,
        video_processor=SmolVLMVideoProcessor(**size),
        image_seq_len=(side // patch // 2) ** 2,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    return model_config, processor


FAMILY = NativeFamily(
    name="smolvlm",
    vision_layers="vision_model.encoder.layers",
    tiny=tiny,
    modality="image",
)
