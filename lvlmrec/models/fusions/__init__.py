"""Fusions: how an item's id embedding and its features become one embedding. One file and one line each."""

from lvlmrec.models.fusions.base import FusionConfig
from lvlmrec.models.fusions.concatenation import ConcatenationConfig
from lvlmrec.models.fusions.dff import DFFConfig
from lvlmrec.models.fusions.fusion import SingleLayerConfig
from lvlmrec.models.fusions.id import IdConfig
from lvlmrec.models.fusions.mean import MeanConfig
from lvlmrec.models.fusions.replacement import ReplacementConfig
from lvlmrec.models.fusions.video import VideoConfig

FUSIONS: dict[str, type[FusionConfig]] = {
    "id": IdConfig,
    "replacement": ReplacementConfig,
    "concatenation": ConcatenationConfig,
    "fusion": SingleLayerConfig,
    "mean": MeanConfig,
    "dff": DFFConfig,
    "video": VideoConfig,
}
