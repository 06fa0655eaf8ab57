"""Fusions: how an item's id embedding and its features become one embedding. One file and one line each."""

from lvlmrec.models.sequential.fusions.base import FusionConfig
from lvlmrec.models.sequential.fusions.concatenation import ConcatenationConfig
from lvlmrec.models.sequential.fusions.dff import DFFConfig
from lvlmrec.models.sequential.fusions.fusion import SingleLayerConfig
from lvlmrec.models.sequential.fusions.id import IdConfig
from lvlmrec.models.sequential.fusions.mean import MeanConfig
from lvlmrec.models.sequential.fusions.replacement import ReplacementConfig
from lvlmrec.models.sequential.fusions.video import VideoConfig

FUSIONS: dict[str, type[FusionConfig]] = {
    "id": IdConfig,
    "replacement": ReplacementConfig,
    "concatenation": ConcatenationConfig,
    "fusion": SingleLayerConfig,
    "mean": MeanConfig,
    "dff": DFFConfig,
    "video": VideoConfig,
}
