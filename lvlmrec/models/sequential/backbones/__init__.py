"""Backbones: sequence encoders over item embeddings. One file and one line each."""

from lvlmrec.models.sequential.backbones.base import BackboneConfig
from lvlmrec.models.sequential.backbones.gru4rec import GRU4RecConfig
from lvlmrec.models.sequential.backbones.nextitnet import NextItNetConfig
from lvlmrec.models.sequential.backbones.sasrec import SASRecConfig

BACKBONES: dict[str, type[BackboneConfig]] = {
    "sasrec": SASRecConfig,
    "gru4rec": GRU4RecConfig,
    "nextitnet": NextItNetConfig,
}
