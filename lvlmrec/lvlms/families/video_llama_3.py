"""VideoLLaMA 3 (https://arxiv.org/abs/2501.13106): frames of any size, each behind its time, without what stands still.

Tower with rotary positions, Qwen2 decoder. A token whose pixels hardly differ from those of the frame before it is left
out (`use_token_compression`, the authors' default), so that a calm video costs less.
"""

from __future__ import annotations

from typing import Any

from lvlmrec.lvlms.families.family import NativeFamily, max_pixels_in_size, patches_of_packed_clips

# max_pixels, of the whole video: 0 leaves it to the files.
VIDEO_OPTIONS = {"use_token_compression": True, "max_pixels": 0}


def tiny() -> tuple[Any, Any]:
    """4 layers x 64 over 3 vision layers x 48; patches of 14 px, four frames of at most 112 x 112 px."""
    from transformers import (
        Qwen2Config,
        VideoLlama3Config,
        VideoLlama3ImageProcessor,
        VideoLlama3Processor,
        VideoLlama3VideoProcessor,
    )

    from lvlmrec.lvlms.tiny import chat_sizes, chat_template, tokenizer

    words = tokenizer({"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    sizes: dict[str, Any] = {"num_attention_heads": 4}
    text = sizes | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    vision = sizes | {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96, "patch_size": 14}
    model_config = VideoLlama3Config(
        text_config=Qwen2Config(**chat_sizes(words), **text).to_dict(),
        vision_config=vision,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 4 * 112 * 112}
    processor = VideoLlama3Processor(
        image_processor=VideoLlama3ImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}),
        tokenizer=words,
        video_processor=VideoLlama3VideoProcessor(size=size),
        chat_template=chat_template("<|video_pad|>", "<|image_pad|>"),
    )
    return model_config, processor


FAMILY = NativeFamily(
    name="video_llama_3",
    vision_layers="vision_model.encoder.layers",
    patches=patches_of_packed_clips,
    tiny=tiny,
    video_options=VIDEO_OPTIONS,
    processor_options=max_pixels_in_size,
    kept_tokens="video_compression_mask",
)
