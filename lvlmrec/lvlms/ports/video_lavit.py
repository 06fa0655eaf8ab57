"""Video-LaVIT (https://arxiv.org/abs/2402.03161), run by its authors' code: key frames and motion, not frames.

That code (https://github.com/jy0205/LaVIT) and its weights are under the LaVIT Community License, whose clause 1.b.v
forbids to improve another large language model with them or with what they put out. The code is not part of this
project: `lvlm.code` names it. It is written for transformers 4.33.2, which runs in `lvlm.environment`; what the actor
imports for this family therefore names nothing of a later transformers or torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from lvlmrec.errors import ConfigError
from lvlmrec.features.model_recipe import MOTION, ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms.files import authors_code, source
from lvlmrec.lvlms.protocol import LVLM, ModelConfig
from lvlmrec.media.motion import ENCODER

NAME = "video_lavit"
POOLINGS = ("visual_mean", "all_mean", "last_token")
EXPECTED = "expected the local folder language_model_sft of the published weights"
# What the authors' code can do, of what `ModelConfig` offers.
OFFERED: dict[str, tuple[Any, ...]] = {
    "dtype": ("bfloat16", "float16"),
    "attention": ("eager",),
    "batch_size": (1,),
    "compile": (False,),
}


class VideoLaVITFamily:
    """The entry of `LVLMS`."""

    name = NAME

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        """What the model is, from its files, without loading its weights. Raises `ConfigError`."""
        for key, offered in OFFERED.items():
            if getattr(config, key) not in offered:
                choices = " or ".join(map(str, offered))
                raise ConfigError(f"lvlm.{key}: {getattr(config, key)!r}: the code of {NAME} runs {choices} only")
        code = authors_code.of(config)
        tree = _read_config(config)
        return LVLMInfo(
            family=NAME,
            identity=f"{source.identity(config)}+code:{authors_code.digest(code)}",
            compute_dtype=config.dtype,
            num_layers={"llm": tree["num_hidden_layers"]},
            width={"llm": tree["hidden_size"]},
            inputs=("video",),
            poolings=POOLINGS,
            places=("after",),
            video_form=MOTION,
            video_encoder=ENCODER,
            is_random=True,
        )

    def load(self, config: ModelConfig, recipe: ModelRecipe) -> LVLM:
        """The model, cut to the layers that `recipe` needs, with pooling in its forward. Raises `ConfigError`.

        The authors' code does not say which weights it found: what the files lack is left random.
        """
        from lvlmrec.lvlms.ports import video_lavit_model

        return video_lavit_model.load(config, recipe, self.inspect(config))

    def check_length(self, config: ModelConfig, recipe: ModelRecipe, limit: int) -> None:
        """Nothing: its files name no limit."""

    def write_tiny(self, directory: Path, seed: int) -> NoReturn:
        """Raises `ConfigError`: only the authors' code could make one."""
        raise ConfigError(f"lvlm.model: of {NAME} there is no tiny model; {EXPECTED}")


def _read_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the published weights. Raises `ConfigError`."""
    if not Path(config.model).is_dir():
        raise ConfigError(f"lvlm.model: {config.model!r}: no such directory; {EXPECTED}")
    found = source.read_json(config, "config.json")
    tree: dict[str, Any] = found if isinstance(found, dict) else {}
    for key in ("num_hidden_layers", "hidden_size"):
        if not isinstance(tree.get(key), int):
            raise ConfigError(f"lvlm.model: {config.model!r}: no {key} in its config.json; {EXPECTED}")
    return tree


FAMILY = VideoLaVITFamily()
