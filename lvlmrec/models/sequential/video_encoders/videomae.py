"""VideoMAE's encoder (Tong et al., arXiv 2203.12602) in plain torch; it reads the published weights.

A ViT over tubelets: pre-norm blocks, fixed sinusoid positions, no class token; the vector is the mean of the last
hidden states. Equal to transformers' VideoMAEModel (tests).

Shapes: N items, T tubelets of an item, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmrec.config import option
from lvlmrec.errors import ConfigError
from lvlmrec.models.sequential.video_encoders.base import VideoEncoder, VideoEncoderConfig, normalise

NORM_EPS = 1e-12
INITIAL_STD = 0.02
# Parts of published tensor names -> names here; files written before transformers 5 have `q_bias` and `v_bias`.
RENAMED = {
    "videomae.": "",
    "embeddings.patch_embeddings.projection.": "embedding.",
    "encoder.layer.": "blocks.",
    "attention.attention.q_bias": "query.bias",
    "attention.attention.v_bias": "value.bias",
    "attention.attention.": "",
    "attention.output.dense.": "output.",
    "intermediate.dense.": "inner.",
    "output.dense.": "outer.",
    "layernorm_before.": "attention_norm.",
    "layernorm_after.": "feed_forward_norm.",
    "layernorm.": "norm.",
}
# Keys of config.json and transformers' defaults: what this encoder always has, and what its configuration sets.
FIXED_DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": NORM_EPS, "qv_bias": True, "num_channels": 3}
SIZE_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "tubelet_size": 2,
    "use_mean_pooling": True,
}


@dataclass(frozen=True)
class VideoMAEConfig(VideoEncoderConfig):
    """The sizes, by the names of the published config.json; the defaults are those of VideoMAE base."""

    name: str = option("videomae", "a vision transformer over tubelets")
    hidden_size: int = option(768, "width of the hidden states", minimum=1)
    num_hidden_layers: int = option(12, "number of blocks", minimum=1)
    num_attention_heads: int = option(12, "attention heads of a block; divides hidden_size", minimum=1)
    intermediate_size: int = option(3072, "width of a block's feed-forward layer", minimum=1)
    patch_size: int = option(16, "side of a tubelet, in pixels", minimum=1)
    tubelet_size: int = option(2, "depth of a tubelet, in frames", minimum=1)
    use_mean_pooling: bool = option(False, "no norm after the last block, as in checkpoints tuned on actions")

    def check(self) -> None:
        heads, width = self.num_attention_heads, self.hidden_size
        if width % heads:
            raise ConfigError(f"num_attention_heads: {heads} does not divide hidden_size {width}")

    def build(self, shape: tuple[int, ...]) -> VideoEncoder:
        """An encoder for frames of `shape` (F, 3, H, W). Raises `ConfigError` when they do not divide into tubelets."""
        frames, _, height, width = shape
        if frames % self.tubelet_size or height % self.patch_size or width % self.patch_size:
            tubelet = f"{self.tubelet_size} x {self.patch_size} x {self.patch_size}"
            raise ConfigError(f"item_encoder.encoder: frames of {shape} do not divide into tubelets of {tubelet}")
        return VideoMAE(self, shape)

    def published_weights(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's weights of a checkpoint with any head, by names here. Raises `ConfigError`."""
        expected = FIXED_DEFAULTS | {name: getattr(self, name) for name in SIZE_DEFAULTS} | {"model_type": self.name}
        declared = FIXED_DEFAULTS | SIZE_DEFAULTS | {key: value for key, value in config.items() if key in expected}
        for key, value in expected.items():
            if declared.get(key) != value:
                raise ConfigError(
                    f"item_encoder.encoder_weights: {key} is {declared.get(key)!r} there, and {value!r} in "
                    f"item_encoder.encoder{'' if key in SIZE_DEFAULTS else ' always'}"
                )
        return {renamed(name): tensor for name, tensor in tensors.items() if _is_encoder_weight(name)}


class VideoMAE(VideoEncoder):
    def __init__(self, settings: VideoMAEConfig, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.width = settings.hidden_size
        tubelet = settings.tubelet_size, settings.patch_size, settings.patch_size
        self.embedding = nn.Conv3d(3, self.width, tubelet, stride=tubelet)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.num_hidden_layers))
        self.norm = nn.Identity() if settings.use_mean_pooling else nn.LayerNorm(self.width, eps=NORM_EPS)
        frames, _, height, width = shape
        num_tubelets = frames // tubelet[0] * (height // tubelet[1]) * (width // tubelet[2])
        self.register_buffer("positions", sinusoids(num_tubelets, self.width), persistent=False)
        self.apply(_initialise)

    def forward(self, frames: Tensor) -> Tensor:
        return self.states(normalise(frames, next(self.parameters()).dtype)).mean(1)

    def states(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, F, H, W] -> the last hidden states [N, T, D]."""
        x = self.embedding(pixels).flatten(2).transpose(1, 2)
        x = x + self.positions.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Block(nn.Module):
    """x = x + W_o MHA(LN(x)), x = x + W_2 gelu(W_1 LN(x)); no bias in K."""

    def __init__(self, settings: VideoMAEConfig) -> None:
        super().__init__()
        width = settings.hidden_size
        self.num_heads = settings.num_attention_heads
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.inner = nn.Linear(width, settings.intermediate_size)
        self.outer = nn.Linear(settings.intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, D] -> [N, T, D]"""
        normed = self.attention_norm(x)
        parts = [part(normed).unflatten(-1, (self.num_heads, -1)) for part in (self.query, self.key, self.value)]
        q_NHTD, k_NHTD, v_NHTD = (part.transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(q_NHTD, k_NHTD, v_NHTD)
        x = x + self.output(attended.transpose(1, 2).flatten(-2))
        return x + self.outer(functional.gelu(self.inner(self.feed_forward_norm(x))))


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Position embeddings [T, D]: sin(t / 10000^(2i / D)) at dimension 2i, its cosine at 2i + 1."""
    rates = 10000.0 ** (-2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * rates
    angles[:, 0::2], angles[:, 1::2] = angles[:, 0::2].sin(), angles[:, 1::2].cos()
    return angles.float()


def renamed(name: str) -> str:
    """The name here of the tensor that is published as `name`."""
    for published, local in RENAMED.items():
        name = name.replace(published, local)
    return name


def _is_encoder_weight(name: str) -> bool:
    return name.removeprefix("videomae.").startswith(("embeddings.patch", "encoder.layer.", "layernorm."))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
