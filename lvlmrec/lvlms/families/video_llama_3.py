"""VideoLLaMA 3 (https://arxiv.org/abs/2501.13106): frames of any size, each behind its time, without what stands still.

Tower with rotary positions, Qwen2 decoder. A token whose pixels hardly differ from those of the frame before it is left
out (`use_token_compression`, the authors' default), so that a calm video costs less.
"""

from __future__ import annotations

from lvlmrec.lvlms.families.family import NativeFamily, max_pixels_in_size, patches_of_packed_clips

# max_pixels, of the whole video: 0 leaves it to the files.
VIDEO_OPTIONS = {"use_token_compression": True, "max_pixels": 0}


FAMILY = NativeFamily(
    name="video_llama_3",
    vision_layers="vision_model.encoder.layers",
    patches=patches_of_packed_clips,
    video_options=VIDEO_OPTIONS,
    processor_options=max_pixels_in_size,
    kept_tokens_key="video_compression_mask",
)
