"""A video encoder trained end to end with the recommender: MicroLens' VideoRec (Ni et al., arXiv 2309.15379).

The frames of an item are its only stored feature. Items are encoded in chunks whose activations are not kept: the
backward pass encodes each chunk again, so that memory depends on the chunk's size, not on the batch's.

Shapes: N items of the batch, D width of the encoder, E embedding dim; frames are (F, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lvlmrec.config import option, variant
from lvlmrec.errors import ConfigError
from lvlmrec.models.initial import xavier_normal
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.sequential.fusions.base import FeatureShape, FusionConfig, item_table
from lvlmrec.models.sequential.video_encoders import VIDEO_ENCODERS, VideoEncoderConfig
from lvlmrec.models.sequential.video_encoders.base import VideoEncoder

RANDOM = "random"


@dataclass(frozen=True)
class VideoConfig(FusionConfig):
    """v = gelu(W encoder(frames) + b); e = v, or with ids e = g * e_id + (1 - g) * v, g = sigmoid(G([e_id; v]))."""

    name: str = option("video", "a video encoder trained with the recommender, on frames of lvlm.name=frames")
    encoder: VideoEncoderConfig = variant(VIDEO_ENCODERS, "tiny", "what is trained on the frames")
    encoder_weights: str = option(
        RANDOM,
        "what the encoder starts from: a local directory with config.json and safetensors, or random",
        required=True,
        uri=lambda value: value != RANDOM,
    )
    frozen_blocks: int = option(0, "first blocks of the encoder that are not trained, its embedding too", minimum=0)
    ids: str = option("none", "whether item embeddings are gated with the video's", choices=("none", "gate"))
    items_at_once: int = option(32, "items encoded in one forward pass", minimum=1)
    gradient_checkpointing: bool = option(True, "encode again in the backward pass instead of keeping activations")
    layers: ClassVar[str] = "one"
    reads_frames: ClassVar[bool] = True

    @property
    def pretrained(self) -> str:
        return "" if self.encoder_weights == RANDOM else self.encoder_weights

    def build(self, num_items: int, embedding_dim: int, shapes: Sequence[FeatureShape]) -> nn.Module:
        """Raises `ConfigError` when the features are not one set of frames, or of a shape the encoder cannot read."""
        if len(shapes) != 1 or not shapes[0].frames:
            raise ConfigError(
                "item_encoder.name: 'video' reads one set of stored frames; extract it with conf/lvlm/frames.yaml "
                "and name it in features"
            )
        return Video(num_items, embedding_dim, shapes[0].frames, self)


class Video(nn.Module):
    """Encoder, linear layer and GELU as published; the gate with item embeddings is an addition of this project."""

    def __init__(self, num_items: int, embedding_dim: int, shape: tuple[int, ...], settings: VideoConfig) -> None:
        super().__init__()
        self.frame_shape, self.settings = shape, settings
        self.encoder: VideoEncoder = settings.encoder.build(shape)
        self.encoder.freeze(settings.frozen_blocks)
        self.projection = nn.Linear(self.encoder.width, embedding_dim)
        self.projection.apply(xavier_normal)
        self.ids = item_table(num_items, embedding_dim) if settings.ids == "gate" else None
        self.gate = nn.Linear(2 * embedding_dim, embedding_dim) if settings.ids == "gate" else None
        for part in (self.ids, self.gate):
            if part is not None:
                part.apply(xavier_normal)

    def forward(self, item_index: Tensor, features: ItemFeatures) -> Tensor:
        dtype = self.projection.weight.dtype
        vectors = [self.projection.weight.new_zeros(0, self.encoder.width)]
        for start in range(0, len(item_index), self.settings.items_at_once):
            chunk = features.take(slice(start, start + self.settings.items_at_once))
            if torch.is_grad_enabled() and self.settings.gradient_checkpointing:
                vector = checkpoint(self.encode, chunk, use_reentrant=False, preserve_rng_state=False)
            else:
                vector = self.encode(chunk)
            vectors.append(vector.to(dtype))
        present_vectors = torch.cat(vectors).masked_fill(features.missing[:, :1], 0.0)
        videos = functional.gelu(self.projection(present_vectors)).to(dtype)
        if self.ids is None or self.gate is None:
            return videos
        ids = self.ids(item_index)
        gate = torch.sigmoid(self.gate(torch.cat([ids, videos], dim=-1)))
        return (gate * ids + (1 - gate) * videos).to(dtype)

    def load_published(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Load published weights into the encoder: `config` is their config.json, `tensors` their tensors by name.

        Raises `ConfigError` when they are of another encoder.
        """
        weights = self.settings.encoder.published_weights(config, tensors)
        missing = sorted({*self.encoder.state_dict()} - {*weights})
        if missing:
            raise ConfigError(f"item_encoder.encoder_weights: no tensor there for {', '.join(missing[:3])}")
        self.encoder.load_state_dict(weights)

    def encode(self, features: ItemFeatures) -> Tensor:
        """The encoder's vectors [N, D]. Frames are read and copied here, so that backward keeps none."""
        frames = features.as_stored(0).to(self.projection.weight.device, non_blocking=True)
        return self.encoder(frames.reshape(len(frames), *self.frame_shape))
