"""The recommender: an item encoder (a fusion) and a sequence encoder (a backbone); score = h . e.

With a temperature t the item embedding e has length 1 and the query h length 1 / t: the score is their cosine, divided
by t (Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019).

Shapes: N items to encode, P real positions of all users, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from lvlmrec.config import option, variant
from lvlmrec.errors import ConfigError
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.sequential.backbones import BACKBONES, BackboneConfig
from lvlmrec.models.sequential.fusions import FUSIONS, FusionConfig
from lvlmrec.models.sequential.fusions.base import FeatureShape
from lvlmrec.models.sequential.histories import Histories


@dataclass(frozen=True)
class ModelConfig:
    """The recommender that is trained."""

    embedding_dim: int = option(64, "width of item embeddings and of the sequence encoder", minimum=1)
    item_encoder: FusionConfig = variant(FUSIONS, "id", "how ids and features become item embeddings")
    backbone: BackboneConfig = variant(BACKBONES, "sasrec", "how a history becomes a query")
    temperature: float = option(0.0, "scores are cosines divided by this, as by 0.1; 0: h . e, as MicroLens", minimum=0)

    def build(self, num_items: int, max_length: int, shapes: Sequence[FeatureShape]) -> Recommender:
        """A newly initialised recommender for items 1..num_items and histories of up to max_length items.

        `shapes` describe the features that `encode_items` will read, one per feature set. Raises `ConfigError` when
        the item encoder cannot read them.
        """
        encoder = self.item_encoder
        sizes = [shape.num_layers for shape in shapes]
        if encoder.layers != "none" and not sum(sizes):
            raise ConfigError(f"item_encoder.name: {encoder.name!r} reads feature layers and there are none")
        if encoder.layers == "one" and set(sizes) != {1}:
            raise ConfigError(
                f"item_encoder.name: {encoder.name!r} reads exactly 1 layer of each feature set, not {sizes}"
            )
        return Recommender(
            encoder.build(num_items, self.embedding_dim, shapes),
            self.backbone.build(self.embedding_dim, max_length),
            encoder.reads_frames,
            self.temperature,
        )


class Recommender(nn.Module):
    """Stores no features: the caller passes those of the items, which may lie in memory-mapped files.

    `reads_frames`: the item encoder encodes frames, which is so much work that training workers share it.
    """

    def __init__(
        self, item_encoder: nn.Module, backbone: nn.Module, reads_frames: bool = False, temperature: float = 0.0
    ) -> None:
        super().__init__()
        self.item_encoder = item_encoder
        self.backbone = backbone
        self.reads_frames = reads_frames
        self.temperature = temperature

    def encode_items(self, item_index: Tensor, features: ItemFeatures | None = None) -> Tensor:
        """item_index int64 [N] and the features of the same items -> [N, E]; item 0, padding: zero, no gradient."""
        embeddings = self.item_encoder(item_index, features)
        if self.temperature:
            embeddings = functional.normalize(embeddings, dim=-1)
        return embeddings.masked_fill(item_index[:, None] == 0, 0.0)

    def encode_sequences(self, embeddings: Tensor, histories: Histories) -> Tensor:
        """Item embeddings [P, E] in packed order -> the query [P, E] at each position, after the items up to it."""
        return self._scaled(self.backbone(embeddings, histories))

    def encode_queries(self, embeddings: Tensor, histories: Histories, num_users: int) -> Tensor:
        """The query after each user's last item, [num_users, E], from embeddings [P, E]; zero without a history."""
        queries = self._scaled(self.backbone(embeddings, histories, last=True))
        return queries.new_zeros(num_users, queries.shape[1]).index_copy(0, histories.users, queries)

    def _scaled(self, queries: Tensor) -> Tensor:
        return functional.normalize(queries, dim=-1) / self.temperature if self.temperature else queries
