"""Phi-3.5-vision (Abdin et al. 2024, https://arxiv.org/abs/2404.14219) as one PyTorch model with its published names.

CLIP ViT-L/14-336 over the views of every picture (the whole and its tiles), 2 x 2 patches joined, learned separators
at the ends of rows and between tiles and whole, a two-layer projection, Phi-3 decoder. Built from the authors'
published code and configuration (https://huggingface.co/microsoft/Phi-3.5-vision-instruct). Numbers have not been
compared with the published weights.

The decoder's rotary positions have two sets of frequencies, for sequences up to 4,096 tokens and for longer ones.
Which of them a sequence gets depends here on its own tokens alone, those of an answer that is read with it among
them; the original, and transformers' Phi-3, go by the longest of a batch, padding included. Features of the two sides
are not comparable: 8 frames of a video lie below the line, 16 above.

Legend: B clips, F frames of a clip, R views of all clips, P patches of a view and one class token, G x G joined
patches of a view, T x U tiles of a frame, V width of the tower, C = 4 V, D width of the decoder, S sequence positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Phi3Config,
    Phi3Model,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from lvlmrec.lvlms.ports.port_model import PortedConfig, PortedModel, count_positions, whole_mask

# The published configuration names this tower (openai/clip-vit-large-patch14-336) without its sizes.
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
UNUSED_LAYERS = 1  # at the end of the tower
VISION = "model.vision_embed_tokens.img_processor.vision_model"


class Phi35VisionConfig(PortedConfig):
    """What the model is built from; `build_config` makes it from a published config.json.

    `vision_config` counts the layers that are used, one less than published.
    """

    model_type = "phi3_v"


def build_config(tree: Mapping[str, Any]) -> Phi35VisionConfig:
    """The configuration of a published config.json, whose top level holds the decoder's values.

    `img_processor.vision_config` (a tower of other sizes) is ours. The ids of visual tokens are left open: the
    tokenizer knows them. Raises `KeyError` where a value is missing.
    """
    known = {*Phi3Config.__dataclass_fields__} - {"architectures", "dtype", "rope_parameters"}
    text = {key: value for key, value in tree.items() if key in known}
    if tree.get("sliding_window") and tree["sliding_window"] >= tree["max_position_embeddings"]:
        text["sliding_window"] = None  # it never cuts anything off
    # transformers' Phi-3 fails unless these two lie beside the factors
    rope = {key: tree[key] for key in ("rope_theta", "original_max_position_embeddings")}
    vision = {**CLIP_LARGE_336, **tree["img_processor"].get("vision_config", {})}
    vision["num_hidden_layers"] -= UNUSED_LAYERS
    return Phi35VisionConfig(
        text_config=Phi3Config(**text, rope_parameters={**tree["rope_scaling"], **rope}),
        vision_config=CLIPVisionConfig(**vision),
    )


def unread_weights(config: Phi35VisionConfig) -> list[str]:
    """Regular expressions of published tensors that no hidden state depends on."""
    return [
        rf"{VISION}\.encoder\.layers\.{config.vision_config.num_hidden_layers}\.",
        rf"{VISION}\.post_layernorm\.",
        r"model\.vision_embed_tokens\.wte\.",  # the token embedding again
        *([] if config.has_head else [r"lm_head\."]),
    ]


class Phi35Vision(PortedModel):
    """The whole model; without `lm_head` unless its configuration has `has_head`."""

    config_class = Phi35VisionConfig

    def __init__(self, config: Phi35VisionConfig) -> None:
        super().__init__(config)
        attention = config._attn_implementation
        self.model: Any = Decoder._from_config(config.text_config, attn_implementation=attention)
        self.model.vision_embed_tokens = PictureEmbedding(config, attention)
        if config.has_head:
            self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> Any:
        """The decoder, without the head."""
        return self.model

    def get_video_features(self, pixel_values_videos: Tensor, video_tiles: Tensor, return_dict: bool = True) -> Any:
        """The tower's last state and, as `pooler_output`, the visual tokens of each clip: B x [tokens, D].

        pixel_values_videos  [R, 3, side, side]: of each frame the whole, then its tiles row by row
        video_tiles          int64 [B, 3]: frames of each clip, rows and columns of tiles of each of its frames
        """
        embedding = self.model.vision_embed_tokens
        hidden_RPV = embedding.img_processor(pixel_values_videos)
        tiles = video_tiles.tolist()
        clips = hidden_RPV[:, 1:].split([frames * (rows * columns + 1) for frames, rows, columns in tiles])
        tokens = tuple(embedding(views, *shape) for views, shape in zip(clips, tiles, strict=True))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_RPV, pooler_output=tokens)  # type: ignore[arg-type]

    def get_image_features(self, pixel_values: Tensor, image_tiles: Tensor, return_dict: bool = True) -> Any:
        """As `get_video_features` for one picture of each item, a clip of one frame."""
        return self.get_video_features(pixel_values, image_tiles)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        cache: Any = None,
        use_cache: bool = False,
        video_tiles: Tensor | None = None,
        image_tiles: Tensor | None = None,
        **call: Any,
    ) -> Any:
        """The decoder over tokens [B, S], visual positions hold the projected pictures; logits where a cache is kept.

        An answer that is generated across the line stays on its prompt's side. The tiles are for `get_video_features`
        alone. Raises `ValueError` as `embed` does.
        """
        num_cached = 0 if cache is None else cache.get_seq_length()
        attention_mask = whole_mask(attention_mask, input_ids, num_cached)
        if num_cached == 0:
            self._lengths_B1 = attention_mask.sum(dim=-1, keepdim=True)
        positions_2BS = positions_and_lengths(attention_mask, self._lengths_B1)
        hidden = self.model(
            inputs_embeds=self.embed(input_ids, mm_encoder_outputs),
            attention_mask=attention_mask,
            position_ids=positions_2BS[..., -input_ids.shape[1] :],
            cache=cache,
            use_cache=use_cache,
        )
        if not use_cache or not self.config.has_head:
            return hidden
        logits = self.lm_head(hidden.last_hidden_state[:, -1:])
        return CausalLMOutputWithPast(logits=logits, cache=hidden.cache)

    def shares_prefix(self, lengths_PB: Tensor) -> bool:
        """Whether several prompts [P] may continue one start of a sequence, given the tokens of each for each clip.

        Not where one of them is long and another short: the keys of the start are rotated by one set of frequencies.
        """
        is_long_PB = lengths_PB > self.model.rotary_emb.original_length
        return bool((is_long_PB == is_long_PB[0]).all())


def positions_and_lengths(attention_mask_BS: Tensor, lengths_B1: Tensor) -> Tensor:
    """int64 [2, B, S]: the position of each token, and the number of tokens that its sequence counts as."""
    positions_BS = count_positions(attention_mask_BS)
    return torch.stack([positions_BS, lengths_B1.expand_as(positions_BS)])


class Decoder(Phi3Model):
    """Phi-3 whose rotary frequencies go by each sequence alone."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__(config)
        self.rotary_emb = LengthwiseRotary(config)

    def forward(self, position_ids: Tensor, **call: Any) -> Any:
        """As `Phi3Model`, with `positions_and_lengths` as `position_ids`; any slice of them tells the whole length."""
        positions_BS, lengths_BS = position_ids
        self.rotary_emb.length_B = lengths_BS.amax(dim=-1)
        return super().forward(position_ids=positions_BS, **call)


class LengthwiseRotary(Phi3RotaryEmbedding):
    """LongRoPE (https://arxiv.org/abs/2402.13753): long factors for sequences longer than in the first training."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__(config)
        rope: Any = config.rope_parameters
        self.original_length = int(rope["original_max_position_embeddings"])
        self.length_B: Tensor  # set before each forward

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, S, head width] for positions [B, S], of the dtype of `x`."""
        beyond = self.config.max_position_embeddings + 1
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](self.config, x.device, seq_len=beyond)
        short, scale = ROPE_INIT_FUNCTIONS["longrope"](self.config, x.device)
        frequencies_BE = torch.where(self.length_B[:, None] > self.original_length, long, short)
        angles_BSE = position_ids[..., None].float() * frequencies_BE[:, None]
        angles_BSE = torch.cat([angles_BSE, angles_BSE], dim=-1)
        return (angles_BSE.cos() * scale).to(x.dtype), (angles_BSE.sin() * scale).to(x.dtype)


class PictureEmbedding(nn.Module):
    """Tower, separators and projection."""

    def __init__(self, config: Phi35VisionConfig, attention: str | None) -> None:
        super().__init__()
        joined, width = 4 * config.vision_config.hidden_size, config.text_config.hidden_size
        self.img_processor = Tower(config.vision_config, attention)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, joined))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, joined))
        self.img_projection = nn.Sequential(nn.Linear(joined, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, views_RPV: Tensor, num_frames: int, rows: int, columns: int) -> Tensor:
        """[tokens, D] of one clip from the patches of its views: of each frame its tiles as one picture, the whole."""
        joined_RGGC = join_patches(views_RPV)
        side, width = joined_RGGC.shape[1], joined_RGGC.shape[-1]
        joined_FNGGC = joined_RGGC.reshape(num_frames, rows * columns + 1, side, side, width)
        tiles_FTUGGC = joined_FNGGC[:, 1:].reshape(num_frames, rows, columns, side, side, width)
        tiles_FHWC = tiles_FTUGGC.transpose(2, 3).reshape(num_frames, rows * side, columns * side, width)
        between_F1C = self.glb_GN.expand(num_frames, 1, width)
        tokens_FNC = torch.cat(
            [self._with_line_ends(tiles_FHWC), between_F1C, self._with_line_ends(joined_FNGGC[:, 0])], 1
        )
        return self.img_projection(tokens_FNC).flatten(0, 1)

    def _with_line_ends(self, picture_FHWC: Tensor) -> Tensor:
        """[F, H * (W + 1), C]: a separator behind every row."""
        num_frames, height, _, width = picture_FHWC.shape
        ends_FH1C = self.sub_GN.expand(num_frames, height, 1, width)
        return torch.cat([picture_FHWC, ends_FH1C], dim=2).flatten(1, 2)


class Tower(nn.Module):
    """CLIP up to its last layer but one; without the last norm, which nothing reads."""

    def __init__(self, config: CLIPVisionConfig, attention: str | None) -> None:
        super().__init__()
        self.vision_model: Any = CLIPVisionModel._from_config(config, attn_implementation=attention)
        self.vision_model.post_layernorm = nn.Identity()

    def forward(self, pixels_R3HW: Tensor) -> Tensor:
        """[R, P, V], the class token first."""
        hidden_RPV = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels_R3HW))
        return self.vision_model.encoder(inputs_embeds=hidden_RPV).last_hidden_state


def join_patches(views_RPV: Tensor) -> Tensor:
    """[R, G, G, C]: each square of 2 x 2 patches as one, its patches row by row."""
    num_views, num_patches, width = views_RPV.shape
    half = round(num_patches**0.5) // 2
    squares = views_RPV.reshape(num_views, half, 2, half, 2, width).transpose(2, 3)
    return squares.reshape(num_views, half, half, 4 * width)
