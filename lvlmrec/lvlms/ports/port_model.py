"""What ports have in common as PyTorch models; see `port.py`.

Legend: B items, S sequence positions, N visual tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel


class PortedConfig(PreTrainedConfig):
    """What a port is built from. `has_head`: it generates; else it ends with the decoder's last state.

    `video_token_id` and `image_token_id`, the token at visual positions, are left open: the tokenizer knows them.
    """

    text_config: Any = None
    vision_config: Any = None
    video_token_id: int | None = None
    image_token_id: int | None = None
    has_head: bool = False

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's configuration."""
        return self.text_config


class PortedModel(PreTrainedModel, GenerationMixin):
    """A port: tower, projection and a decoder out of transformers."""

    base_model_prefix = ""
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def get_input_embeddings(self) -> Any:
        """The embedding of tokens."""
        return self.get_decoder().embed_tokens

    def embed(self, input_ids: Tensor, media: Mapping[str, Any] | None) -> Tensor:
        """[B, S, D]: embedded tokens, the encoded `media` in their order at visual positions.

        Raises `ValueError` when there is not one position for each visual token.
        """
        embeds_BSD: Tensor = self.get_input_embeddings()(input_ids)
        if not media:
            return embeds_BSD
        visual_BS = input_ids == self.config.video_token_id
        tokens_ND = torch.cat([clip for seen in media.values() for clip in seen.pooler_output])
        if int(visual_BS.sum()) != len(tokens_ND):
            raise ValueError(f"{int(visual_BS.sum())} places for {len(tokens_ND)} visual tokens")
        return embeds_BSD.masked_scatter(visual_BS[..., None], tokens_ND.to(embeds_BSD.dtype))


def whole_mask(attention_mask: Tensor | None, input_ids: Tensor, num_cached: int) -> Tensor:
    """[B, cached + S]: transformers' `generate` drops a mask that hides nothing."""
    if attention_mask is None:
        return input_ids.new_ones(len(input_ids), num_cached + input_ids.shape[1])
    return attention_mask


def count_positions(attention_mask_BS: Tensor) -> Tensor:
    """int64 [B, S]: padding counts no position, so that a sequence is the same whatever stands beside it."""
    return (attention_mask_BS.cumsum(dim=-1) - 1).clamp_min(0)
