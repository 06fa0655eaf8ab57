"""The settings of the extract job."""

from __future__ import annotations

from dataclasses import dataclass

from lvlmrec.config import MAX_SEED, check_gpus, option
from lvlmrec.errors import ConfigError
from lvlmrec.extraction.estimate import EstimateConfig
from lvlmrec.extraction.stages import DecodeConfig
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMConfig


@dataclass(frozen=True)
class PoolConfig:
    """Resources of the extraction's stages."""

    decode_tasks: int = option(1, "videos decoded at the same time, over the whole cluster", minimum=1)
    cpus_per_decode: float = option(
        0.5, "CPUs that Ray reserves for one decode task; a share of one is allowed", minimum=0
    )
    min_actors: int = option(1, "LVLM actors (processes with a model) that are kept at least", minimum=1)
    max_actors: int = option(1, "LVLM actors that are started at most", minimum=1)
    cpus_per_actor: float = option(
        0.4, "CPUs that Ray reserves for one LVLM actor; a share of one is allowed", minimum=0
    )
    gpus_per_actor: float = option(
        0.0, "GPUs that Ray reserves for one LVLM actor: 1, or a share of one; 0: the model runs on CPU", minimum=0
    )
    videos_per_block: int = option(8, "videos that are sent together from one stage to the next", minimum=1)
    videos_per_part: int = option(64, "videos in one file of the feature set, at most", minimum=1)
    mb_per_part: int = option(64, "MB of features in one file of the feature set, at most", minimum=1)

    def check(self) -> None:
        if self.max_actors < self.min_actors:
            raise ConfigError(f"max_actors: {self.max_actors} is below pool.min_actors={self.min_actors}")
        check_gpus("gpus_per_actor", self.gpus_per_actor)


@dataclass(frozen=True)
class ExtractConfig:
    """The extract job."""

    workspace: str = option(
        "./workspace", "sample, stores, checkpoints and tracking database live here", required=True, uri=True
    )
    tracking_uri: str = option("sqlite:///${workspace}/mlflow.db", "MLflow tracking server or database", required=True)
    seed: int = option(0, "seed of the sample and of everything random", minimum=0, maximum=MAX_SEED)
    input: str = option(
        "${workspace}/sample/videos",
        "item manifest (.csv, .parquet or folder of its parts), folder or prefix of videos",
        required=True,
        uri=True,
    )
    store: str = option("${workspace}/features", "folder or prefix that holds feature sets", required=True, uri=True)
    lvlm: LVLMConfig = option(LVLMConfig, "the frozen model")
    recipe: RecipeConfig = option(RecipeConfig, "what to extract")
    decode: DecodeConfig = option(DecodeConfig, "limits of decoding")
    pool: PoolConfig = option(PoolConfig, "resources")
    estimate: EstimateConfig = option(EstimateConfig, "the estimate of hours and size before the run")
    retry_rejected: bool = option(False, "try rejected items again")
    redo_changed: bool = option(False, "extract items again whose file or texts have changed since")
    max_rejected_in_a_row: int = option(
        200, "items in a row that fail for the same reason before the run stops; 0: it never stops", minimum=0
    )

    def check(self) -> None:
        """Raises `ConfigError` for a device that the actors would not have."""
        device = self.lvlm.device
        if device.startswith("cuda") and not self.pool.gpus_per_actor:
            remedy = "set pool.gpus_per_actor=1, or lvlm.device=auto"
            raise ConfigError(f"lvlm.device: {device!r} with pool.gpus_per_actor=0, actors without a GPU: {remedy}")
        if device.startswith("cuda:") and device != "cuda:0":
            raise ConfigError(
                f"lvlm.device: {device!r}: an actor sees the GPU that Ray gave it alone; set lvlm.device=auto"
            )
