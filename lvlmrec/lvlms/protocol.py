"""What a frozen large video-language model offers to the rest of the project."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lvlmrec.config import option
from lvlmrec.errors import ConfigError
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.media.motion import MotionClips
from lvlmrec.media.sampling import Clip

if TYPE_CHECKING:
    import torch

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu|hpu|npu)(:\d+)?")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


def is_hub_id(model: str) -> bool:
    """Whether `lvlm.model` names a model of the hub, owner/name, and no local directory."""
    return bool(HUB_ID.fullmatch(model)) and not Path(model).is_dir()


@dataclass(frozen=True)
class ModelConfig:
    """Where a model's files lie and how its forward runs."""

    name: str = option("llava_onevision", "model family")
    model: str = option(
        "${workspace}/sample/models/${.name}",
        "local directory or hub id (owner/name)",
        uri=lambda value: not is_hub_id(value),
    )
    revision: str = option("", "branch, tag or commit of a hub id; empty is the default branch")
    dtype: str = option("float32", "dtype of weights and activations", choices=COMPUTE_DTYPES)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is cuda when there is one")
    attention: str = option("sdpa", "attention kernel", choices=ATTENTIONS)
    batch_size: int = option(4, "videos per forward pass", minimum=1)
    compile: bool = option(False, "torch.compile the layers of the decoder; results then differ in their last bits")
    trust_remote_code: bool = option(
        False, "of lvlm.name=auto: run the code in the model's repository, a directory or a hub id at a pinned commit"
    )
    code: str = option(
        "", "the authors' repository, for families that run it: folder, or zip by URL with its commit", uri=True
    )
    environment: dict[str, Any] = option(
        {}, "Ray runtime_env of the processes that hold the model, such as {pip: [...]}, {py_executable: ...}"
    )

    def check(self) -> None:
        if not DEVICE.fullmatch(self.device):
            raise ConfigError(f"device: {self.device!r} is not one of auto, cpu, cuda, cuda:1, mps, xpu")


@dataclass(frozen=True)
class Item:
    """What a model is shown of one item: what its recipe asks for, the rest may be missing.

    video  the sampled frames
    cover  the cover image, a clip of one frame
    motion key frames and motion vectors, of a video that is not shown as frames
    texts  columns of the manifest by name: title, text, ...
    """

    item_id: str
    video: Clip | None = None
    cover: Clip | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    motion: MotionClips | None = None


class LVLM(Protocol):
    """A loaded model, made for one recipe.

    One thread may `prepare` while another is in `extract`; no two are in the same method at the same time.
    `batch_size` is how many items share a forward at most, `lvlm.batch_size` at first: what is prepared from then on
    keeps to a smaller one that the caller sets.
    """

    info: LVLMInfo
    batch_size: int

    def prepare(self, items: Sequence[Item]) -> Any:
        """What the processor makes of `items` on the CPU, in batches of items alike in size: for `extract`."""

    def extract(self, prepared: Any) -> dict[str, torch.Tensor | list[str]]:
        """The recipe's columns of prepared items, in their order.

        A feature, `str(FeatureName)`, is float32 [B, D] on the CPU; a text column (`text_names`) is B strings.
        Merged tokens [K, D] lie in one row, one after another; the recipe's `shapes` tell.
        Pooled means are accumulated and returned in float32 whatever the compute dtype, so that they are rounded
        once, where they are stored. An item's features are the same for any batch up to the order of summation:
        2e-6 of a feature's largest entry in float32 (4e-5 with layers of linear attention), 2e-2 in bfloat16. Of
        merged tokens this holds for their mean weighted by size; which tokens were merged can turn on a last bit. So
        can the next word of an answer.
        """


def write_tiny(name: str, directory: Path, seed: int) -> None:
    """The tiny random model of the entry `name`, see `LVLMFamily.write_tiny`. Raises `ConfigError` where there is none.

    Found by name: no family depends on what is made for tests and for the embedded sample.
    """
    if importlib.util.find_spec(f"lvlmrec.lvlms.tiny.{name}") is None:
        raise ConfigError(f"lvlm.name: {name!r}: there is no tiny model of it; lvlm.model names a published one")
    importlib.import_module(f"lvlmrec.lvlms.tiny.{name}").write(directory, seed)


class LVLMFamily(Protocol):
    """One entry of `LVLMS`."""

    @property
    def name(self) -> str:
        """The key in `LVLMS`."""

    def inspect(self, config: ModelConfig) -> LVLMInfo:
        """What the model is, from its files, without loading its weights. Raises `ConfigError`."""

    def load(self, config: ModelConfig, recipe: Any) -> LVLM:
        """The model, cut to the layers that `recipe` needs, with pooling in its forward. Raises `ConfigError`."""

    def check_length(self, config: ModelConfig, recipe: Any, limit: int) -> None:
        """Raises `ConfigError` when the recipe's prompts cannot fit in the `limit` tokens that the model reads at most.

        Reads the model's processor. Does nothing for models that cut what is too long.
        """

    def write_tiny(self, directory: Path, seed: int) -> None:
        """A tiny random model of this family as an ordinary Hugging Face directory, the same bytes for a seed."""
