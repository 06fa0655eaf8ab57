"""Text encoders: BERT, RoBERTa, MPNet, XLM-R, E5, BGE, MiniLM, and embedders of decoder build such as Qwen3-Embedding.

`text.0` is what enters the first layer, `text.n` what leaves the last of n, after the final norm where a model has one.
A model that wants a prefix ("query: ", "passage: ") has it in the prompt: `passage: {title}`.

A directory of sentence-transformers is read as it is. Its published embedding is `text.-1` under the pooling that its
files name (`all_mean` for most, `first_token` for BGE, `last_token` for Qwen3-Embedding); loading says which. What
follows there is not applied: a norm changes no cosine, a Dense module does, and loading names it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms import protocol
from lvlmrec.lvlms.files import source
from lvlmrec.lvlms.protocol import LVLM, ModelConfig

POOLINGS = ("all_mean", "first_token", "last_token")
# what sentence-transformers calls them: true keys `pooling_mode_...`, or one key `pooling_mode`
PUBLISHED = {
    "mean_tokens": "all_mean",
    "mean": "all_mean",
    "cls_token": "first_token",
    "cls": "first_token",
    "lasttoken": "last_token",
}
EXPECTED = "a text encoder"


@dataclass(frozen=True)
class TextFamily:
    """The entry of `LVLMS` for every text encoder whose layers lie in one list."""

    name: str

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        """What the model is, from its files, without loading its weights. Raises `ConfigError`."""
        model_config = read_config(config, self.name)
        return LVLMInfo(
            family=self.name,
            identity=source.identity(config),
            compute_dtype=config.dtype,
            num_layers={"text": model_config.num_hidden_layers},
            width={"text": model_config.hidden_size},
            inputs=("text",),
            poolings=POOLINGS,
        )

    def load(self, config: ModelConfig, recipe: ModelRecipe) -> LVLM:
        """The model, cut to the layers that `recipe` needs, with pooling in its forward. Raises `ConfigError`."""
        from lvlmrec.lvlms.encoders import text_model

        model_config = read_config(config, self.name)
        sentence_config = source.read_json(config, "sentence_bert_config.json") or {}
        model = text_model.load(config, recipe, self.inspect(config), model_config, sentence_config)
        published = describe(config)
        if published:
            print(f"{self.name}: {published}", file=sys.stderr)
        return model

    def check_length(self, config: ModelConfig, recipe: ModelRecipe, limit: int) -> None:
        """Nothing: a text that is too long is cut."""

    def write_tiny(self, directory: Path, seed: int) -> None:
        """See `LVLMFamily.write_tiny`."""
        protocol.write_tiny(self.name, directory, seed)


def read_config(config: ModelConfig, family: str) -> Any:
    """The configuration of a text encoder. Raises `ConfigError` on any other model."""
    model_config = source.read_any_config(config, EXPECTED)
    sizes = ("vocab_size", "num_hidden_layers", "hidden_size")
    is_other = model_config.is_encoder_decoder or hasattr(model_config, "vision_config")
    if is_other or not all(hasattr(model_config, size) for size in sizes):
        source.refuse(config, model_config.model_type, family, EXPECTED)
    return model_config


def describe(config: ModelConfig) -> str:
    """What the files of sentence-transformers say of the model, in one line; empty for one that has none."""
    modules = source.read_json(config, "modules.json") or []
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if "Pooling" not in kinds:
        return ""
    pooling = source.read_json(config, f"{kinds['Pooling']}/config.json") or {}
    modes = [key.removeprefix("pooling_mode_") for key, used in pooling.items() if used is True and "_mode_" in key]
    modes = modes or [pooling.get("pooling_mode", "a rule of its own")]
    if len(modes) > 1 or modes[0] not in PUBLISHED:
        return f"its published embedding is pooled by {', '.join(modes)}, which no column is"
    left_out = [kind for kind in kinds if kind not in ("Transformer", "Pooling")]
    return f"its published embedding is text.-1/{PUBLISHED[modes[0]]}" + (
        f" before {', '.join(left_out)}" if left_out else ""
    )


FAMILY = TextFamily("text_encoder")
