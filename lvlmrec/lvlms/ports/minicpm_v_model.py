"""MiniCPM-V 2.6 and 4.5 as one PyTorch model with the published names of its weights.

SigLIP tower over frames of any size, one resampler that turns each frame, or each group of frames, into as many tokens
as it has queries, Qwen2 (2.6) or Qwen3 (4.5) decoder. Built from the authors' published code and configuration
(https://huggingface.co/openbmb/MiniCPM-V-2_6, https://huggingface.co/openbmb/MiniCPM-V-4_5; Yao et al. 2024,
https://arxiv.org/abs/2408.01800). Names, shapes and size of all tensors are those of the published index; numbers
have not been compared with the published weights.

Legend: B clips, R views (pictures that the tower sees), L patches of a view, G groups of views, Q queries, V width of
the tower, D width of the decoder, P = 14 px side of a patch, S sequence positions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from lvlmrec.lvlms.ports.port_model import PortedConfig, PortedModel, count_positions, whole_mask

HEAD_SIZE = 128  # of the resampler's attention
NORM_EPSILON = 1e-6
NO_TIME = -1  # temporal id of a picture without a time
DECODERS = {"2.6": Qwen2Config, "4.5": Qwen3Config}


class MiniCPMVConfig(PortedConfig):
    """What the model is built from; `build_config` makes it from a published config.json."""

    model_type = "minicpmv"
    query_num: int = 64


def build_config(tree: Mapping[str, Any]) -> MiniCPMVConfig:
    """The configuration of a published config.json, whose top level holds the decoder's values.

    Raises `KeyError` when the version is neither 2.6 nor 4.5.
    """
    text_class: Any = DECODERS[str(tree["version"])]
    known = {*text_class.__dataclass_fields__, "rope_theta", "rope_scaling"} - {"architectures", "dtype", "model_type"}
    vision = {key: value for key, value in tree["vision_config"].items() if key != "model_type"}
    if tree.get("drop_vision_last_layer"):
        vision["num_hidden_layers"] -= 1
    return MiniCPMVConfig(
        text_config=text_class(**{key: value for key, value in tree.items() if key in known}),
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        query_num=tree.get("query_num", 64),
    )


class MiniCPMV(PortedModel):
    """The whole model; without `llm.lm_head` unless its configuration has `has_head`."""

    config_class = MiniCPMVConfig

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        attention = config._attn_implementation
        self.llm: Any = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=attention)
        if not config.has_head:
            self.llm.lm_head = nn.Identity()
        self.vpm: Any = PatchTower._from_config(config.vision_config, attn_implementation=attention)
        width = config.text_config.hidden_size
        self.resampler = Resampler(config.query_num, width, config.vision_config.hidden_size)
        self.post_init()

    def get_decoder(self) -> Any:
        """The decoder, without the head."""
        return self.llm.model

    def get_video_features(
        self,
        pixel_values: Tensor,
        grid_hw: Tensor,
        temporal_ids: Tensor,
        group_sizes: Tensor,
        num_groups: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """The tower's last state and, as `pooler_output`, the visual tokens of each clip: B x [its groups * Q, D].

        pixel_values  [R, 3, P, L * P]: each view as one row of its patches, zeros behind the last
        grid_hw       int64 [R, 2]: rows and columns of patches of each view
        temporal_ids  int64 [R]: time of each view in tenths of a second, `NO_TIME` without
        group_sizes   int64 [G]: how many views, in order, each group joins
        num_groups    int64 [B]: how many groups, in order, each clip has
        """
        grid = grid_hw.tolist()
        hidden_RLV = self.vpm(pixel_values, grid)
        tokens_GQD = self.resampler(hidden_RLV, grid, temporal_ids.tolist(), group_sizes.tolist())
        clips = tuple(groups.flatten(0, 1) for groups in tokens_GQD.split(num_groups.tolist()))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_RLV, pooler_output=clips)  # type: ignore[arg-type]

    get_image_features = get_video_features  # one picture of each item

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        cache: Any = None,
        use_cache: bool = False,
        grid_hw: Tensor | None = None,
        temporal_ids: Tensor | None = None,
        group_sizes: Tensor | None = None,
        num_groups: Tensor | None = None,
        **call: Any,
    ) -> Any:
        """The decoder over tokens [B, S] whose visual positions hold what was seen; logits where a cache is kept.

        How the pixels lie is for `get_video_features` alone. Raises `ValueError` as `embed` does.
        """
        num_cached = 0 if cache is None else cache.get_seq_length()
        attention_mask = whole_mask(attention_mask, input_ids, num_cached)
        output = self.llm.model(
            inputs_embeds=self.embed(input_ids, mm_encoder_outputs),
            attention_mask=attention_mask,
            position_ids=count_positions(attention_mask)[:, -input_ids.shape[1] :],
            cache=cache,
            use_cache=use_cache,
        )
        if not use_cache or not self.config.has_head:
            return output
        logits_B1V = self.llm.lm_head(output.last_hidden_state[:, -1:])
        return CausalLMOutputWithPast(logits=logits_B1V, cache=output.cache)


class PatchTower(SiglipVisionModel):
    """SigLIP over pictures of any size and shape, their positions spread over its own square grid."""

    def forward(self, pixel_values: Tensor, grid: Sequence[Sequence[int]]) -> Tensor:
        """[R, L, V]: the states behind the last norm. What lies behind a view's last patch means nothing."""
        patches_RLV = self.embeddings.patch_embedding(pixel_values).squeeze(2).mT
        side = math.isqrt(self.embeddings.num_positions)
        positions_RL = pad_sequence([position_ids(rows, columns, side) for rows, columns in grid], batch_first=True)
        positions_RL = positions_RL.to(patches_RLV.device)
        hidden_RLV = patches_RLV + self.embeddings.position_embedding(positions_RL)
        lengths_R = torch.tensor([rows * columns for rows, columns in grid], device=patches_RLV.device)
        mask = None
        if len({rows * columns for rows, columns in grid}) > 1:
            real_RL = torch.arange(hidden_RLV.shape[1], device=lengths_R.device) < lengths_R[:, None]
            mask = create_bidirectional_mask(self.config, hidden_RLV, real_RL)
        return self.post_layernorm(self.encoder(hidden_RLV, mask).last_hidden_state)


@functools.lru_cache(maxsize=256)
def position_ids(rows: int, columns: int, side: int) -> Tensor:
    """int64 [rows * columns]: where each patch, row by row, lies on the tower's own grid of `side` x `side`."""
    return (buckets(rows, side)[:, None] * side + buckets(columns, side)).flatten()


def buckets(count: int, side: int) -> Tensor:
    """int64 [count]: `count` even steps over [0, 1) counted in buckets of 1 / `side`.

    As the reference does, on the CPU, with 1 / count rounded to float32: exact arithmetic differs by one bucket where
    count is 25, 49, 50, 55 or 58.
    """
    step = float(1 / torch.tensor(count, dtype=torch.int32, device="cpu"))
    fractions = torch.arange(0, 1 - 1e-6, step, device="cpu")
    boundaries = torch.arange(1 / side, 1.0, 1 / side, device="cpu")
    return torch.bucketize(fractions, boundaries, right=True)


class Resampler(nn.Module):
    """Queries that look once at the patches of each group of views: Q tokens for a group, whatever its size."""

    def __init__(self, num_queries: int, width: int, vision_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_queries, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // HEAD_SIZE)
        self.ln_q = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.ln_kv = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.ln_post = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(
        self,
        hidden_RLV: Tensor,
        grid: Sequence[Sequence[int]],
        temporal_ids: Sequence[int],
        group_sizes: Sequence[int],
    ) -> Tensor:
        """[G, Q, D]. Places and times of the patches are in the keys alone, never in the values."""
        values_RLD = self.ln_kv(self.kv_proj(hidden_RLV))
        planes = {tuple(shape): plane_positions(shape[0], shape[1], values_RLD) for shape in grid}
        times_RD = sincos(np.array(temporal_ids), values_RLD.shape[-1]).to(values_RLD)
        keys, values = [], []
        for row, shape in enumerate(grid):
            value_LD = values_RLD[row, : math.prod(shape)]
            key_LD = value_LD + planes[tuple(shape)]
            keys.append(key_LD if temporal_ids[row] == NO_TIME else key_LD + times_RD[row])
            values.append(value_LD)
        starts = np.cumsum([0, *group_sizes])
        spans = [slice(start, start + size) for start, size in zip(starts, group_sizes, strict=False)]
        keys_KGD = pad_sequence([torch.cat(keys[span]) for span in spans])
        values_KGD = pad_sequence([torch.cat(values[span]) for span in spans])
        padding_GK = None
        lengths = [sum(len(key) for key in keys[span]) for span in spans]
        if len(set(lengths)) > 1:
            lengths_G1 = torch.tensor(lengths, device=keys_KGD.device)[:, None]
            padding_GK = torch.arange(len(keys_KGD), device=keys_KGD.device) >= lengths_G1
        queries_QGD = self.ln_q(self.query)[:, None].expand(-1, len(spans), -1)
        out_QGD = self.attn(queries_QGD, keys_KGD, values_KGD, key_padding_mask=padding_GK, need_weights=False)[0]
        return self.ln_post(out_QGD.transpose(0, 1)) @ self.proj


def plane_positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows * columns, D] of the dtype, device and width of `like`: where each patch of a grid lies, row by row.

    The first half of each vector tells the column, the second the row.
    """
    column_CE, row_RE = (sincos(np.arange(count), like.shape[-1] // 2).to(like) for count in (columns, rows))
    return torch.cat([column_CE.expand(rows, -1, -1), row_RE[:, None].expand(-1, columns, -1)], dim=-1).flatten(0, 1)


def sincos(positions_N: np.ndarray, width: int) -> Tensor:
    """float32 [N, width]: sines, then cosines, of each position times 10000^(-k / (width / 2)).

    In numpy and float32, as the reference's tables, so that they agree in the last bit.
    """
    frequencies = np.arange(width // 2, dtype=np.float32) / np.float32(width / 2)
    frequencies = np.float32(1.0) / np.float32(10000) ** frequencies
    angles = np.outer(positions_N.astype(np.float32), frequencies)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
