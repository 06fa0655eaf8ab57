"""Extraction: manifest -> decode tasks -> pool of LVLM actors -> parts, on Ray Data; then the commit."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.exceptions import RayTaskError
from ray.runtime_env import RuntimeEnv

from lvlmrec.columns import ERROR, ITEM_ID, STAGE
from lvlmrec.config import option
from lvlmrec.errors import ConfigError, InputError, JobFailed
from lvlmrec.extraction import estimate, stages
from lvlmrec.extraction.estimate import EstimateConfig
from lvlmrec.extraction.manifest import columns_for, read_manifest, texts_from
from lvlmrec.extraction.progress import Tally
from lvlmrec.extraction.stages import DecodeConfig, Extractor
from lvlmrec.features import recipe as recipes
from lvlmrec.features import store
from lvlmrec.features.recipe import LVLMInfo, Recipe, RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig, authors_code, remote_code

BATCHES_AT_ONCE = 4  # of the model: enough items for neighbours of the same size
CALLS_AT_ONCE = 3  # of an actor: one in the model, one being prepared, one fetched


@dataclass(frozen=True)
class PoolConfig:
    """Resources of the extraction's stages."""

    decode_tasks: int = option(1, "videos decoded at the same time, over the whole cluster", minimum=1)
    cpus_per_decode: float = option(0.5, "CPUs that Ray reserves for one decode task", minimum=0)
    min_actors: int = option(1, "LVLM actors that the pool never goes below", minimum=1)
    max_actors: int = option(1, "LVLM actors that the pool may grow to", minimum=1)
    cpus_per_actor: float = option(0.4, "CPUs that Ray reserves for one LVLM actor", minimum=0)
    gpus_per_actor: float = option(0.0, "GPUs for one LVLM actor; 0 runs on CPU", minimum=0)
    videos_per_block: int = option(8, "videos that travel together between stages", minimum=1)
    videos_per_part: int = option(64, "videos in one file of the feature set", minimum=1)


@dataclass(frozen=True)
class ExtractConfig:
    """The extract job."""

    workspace: str = option("./workspace", "sample, stores, checkpoints and tracking database live here")
    tracking_uri: str = option("sqlite:///${workspace}/mlflow.db", "MLflow tracking server or database")
    seed: int = option(0, "seed of the sample and of everything random")
    input: str = option("${workspace}/sample/videos", "item manifest (.csv, .parquet), folder or prefix of videos")
    store: str = option("${workspace}/features", "folder or prefix that holds feature sets")
    lvlm: LVLMConfig = option(LVLMConfig, "the frozen model")
    recipe: RecipeConfig = option(RecipeConfig, "what to extract")
    decode: DecodeConfig = option(DecodeConfig, "limits of decoding")
    pool: PoolConfig = option(PoolConfig, "resources")
    estimate: EstimateConfig = option(EstimateConfig, "what is told before the run")


@dataclass(frozen=True)
class Plan:
    """What an extraction has to do: `todo` are the rows of the manifest that no part and no rejection covers.

    `code` are the files of the authors' repository, for a family that runs it: they travel with the actors.
    """

    config: ExtractConfig
    recipe: Recipe
    feature_set: str
    item_ids: frozenset[str]
    todo: pa.Table
    manifest_report: dict[str, int]
    code: dict[str, bytes]


def plan(config: ExtractConfig) -> Plan:
    """Check the input and the model, resolve the recipe and find what is missing. Raises `InputError`."""
    if config.pool.max_actors < config.pool.min_actors:
        raise InputError(f"pool.max_actors: {config.pool.max_actors} is below pool.min_actors={config.pool.min_actors}")
    _check_environment(config.lvlm.environment)
    code = authors_code.of(config.lvlm)
    info = _inspect(config)
    recipe = recipes.resolve(config.recipe, info, config.seed, texts_from(config.input))
    manifest, report = read_manifest(config.input, columns_for(recipe))
    uri = store.locate(config.store, config.lvlm.name, recipe)
    store.create(uri, recipe)
    seen = {*store.pending_index(uri)[ITEM_ID], *store.read_rejected(uri)[ITEM_ID]}
    item_ids = manifest[ITEM_ID].to_pylist()
    todo = manifest.filter(pa.array([item_id not in seen for item_id in item_ids]))
    return Plan(config, recipe, uri, frozenset(item_ids), todo, report, code)


def _inspect(config: ExtractConfig) -> LVLMInfo:
    """What the model is. Code of its own runs where the model will, never in this process. Raises `ConfigError`."""
    remote_code.check(config.lvlm)
    if not config.lvlm.trust_remote_code:
        return LVLMS[config.lvlm.name].inspect(config.lvlm)
    if not ray.is_initialized():
        ray.init()
    try:
        inspect = ray.remote(**_actor_resources(config))(inspect_here)
        return ray.get(inspect.remote(config.lvlm))
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        raise


def inspect_here(lvlm: LVLMConfig) -> LVLMInfo:
    """What the model is, from its files. Raises `ConfigError`."""
    return LVLMS[lvlm.name].inspect(lvlm)


def _check_environment(environment: dict[str, Any]) -> None:
    """Ray itself only logs a key that it does not know. Raises `ConfigError`."""
    if unknown := {*environment} - RuntimeEnv.known_fields:
        choices = ", ".join(sorted(field for field in RuntimeEnv.known_fields if not field.startswith("_")))
        raise ConfigError(f"lvlm.environment: unknown {', '.join(sorted(unknown))}; Ray's runtime_env has {choices}")
    try:
        RuntimeEnv(**environment)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lvlm.environment: {' '.join(str(error).split())}") from error


def run(plan: Plan, log: Callable[[dict[str, float], int], None]) -> dict[str, Any]:
    """Extract what the plan lists, commit, and say what was done.

    `log(metrics, step)` is called as the work goes on. `busy_fraction` in the result is `forward_seconds`, summed over
    all batches (`stages.Extractor`), / (`actors` x `seconds`): `actors` is the pool's maximum, and `seconds` the whole
    wall time, with Ray's start, the loading of the model and the writing of the last part.
    Raises `JobFailed` when every item failed in the model.
    """
    with nullcontext() if ray.is_initialized() or not len(plan.todo) else ray.init():
        told = _estimate(plan)
        print(estimate.describe(told), file=sys.stderr)
        if plan.config.estimate.only:
            return {"feature_set": plan.feature_set, "items": len(plan.item_ids), "estimate": told}
        started = time.perf_counter()
        tally = Tally(len(plan.todo), _workers(plan.config.pool), log)
        if len(plan.todo):
            for block in _dataset(plan).iter_batches(batch_size=None, batch_format="pyarrow"):
                tally.add(block)
        seconds = time.perf_counter() - started
    index = store.commit(plan.feature_set)
    if index.empty and tally.model_message:
        store.forget_rejected(plan.feature_set)  # it was not the videos' fault: the next run tries them again
        raise JobFailed(f"every video was rejected by the model: {tally.model_message}")
    return _result(plan, tally, seconds, index) | {"estimate": told}


def _workers(pool: PoolConfig) -> dict[str, int]:
    """How many of each stage work at the same time."""
    return {"decode": pool.decode_tasks, "prepare": pool.max_actors, "forward": pool.max_actors}


def _estimate(plan: Plan) -> dict[str, Any]:
    config, todo = plan.config, plan.todo
    seconds = None
    is_worth_it = len(todo) >= estimate.WORTH_TIMING * config.estimate.videos or config.estimate.only
    if config.estimate.videos and len(todo) and is_worth_it:
        seconds = estimate.time_remotely(
            estimate.sample_rows(todo, config.estimate.videos),
            plan.recipe,
            config.decode,
            config.lvlm,
            plan.code,
            _actor_resources(config),
        )
    return estimate.estimate(len(todo), plan.recipe, seconds, _workers(config.pool))


def _actor_resources(config: ExtractConfig) -> dict[str, Any]:
    """Ray's arguments for a process that holds the model; without `lvlm.environment` it runs in the job's own."""
    resources: dict[str, Any] = {"num_cpus": config.pool.cpus_per_actor, "num_gpus": config.pool.gpus_per_actor}
    return resources | ({"runtime_env": config.lvlm.environment} if config.lvlm.environment else {})


def _result(plan: Plan, tally: Tally, seconds: float, index: pd.DataFrame) -> dict[str, Any]:
    rejected = store.read_rejected(plan.feature_set)
    rejected = rejected[rejected[ITEM_ID].isin(plan.item_ids) & ~rejected[ITEM_ID].isin(index[ITEM_ID])]
    reasons = Counter(zip(rejected[STAGE], rejected[ERROR], strict=True))
    report = tally.report(seconds) if len(plan.todo) else {}
    if report:
        print(f"extract: {report['slowest_stage']}", file=sys.stderr)
    return {
        "feature_set": plan.feature_set,
        "items": len(plan.item_ids),
        "written": tally.written,
        "skipped": len(plan.item_ids) - len(plan.todo),
        "rejected": len(rejected),
        "rejected_now": sum(tally.reasons.values()),
        "rejected_by_reason": {f"{stage}/{error}": n for (stage, error), n in sorted(reasons.items())},
        "seconds": round(seconds, 3),
        "videos_per_second": round(len(plan.todo) / seconds, 3) if len(plan.todo) else 0.0,
        "forward_seconds": round(tally.seconds[stages.FORWARD_SECONDS], 3),
        "actors": plan.config.pool.max_actors,
        "busy_fraction": round(tally.busy("forward", seconds), 4) if len(plan.todo) else 0.0,
        "features": len(plan.recipe.feature_names),
        "manifest": plan.manifest_report,
    } | report


def _dataset(plan: Plan) -> ray.data.Dataset:
    """The pipeline, not yet running."""
    context = DataContext.get_current()
    context.enable_progress_bars = False  # our own lines on stderr say what a user of this job asks
    context.max_consecutive_actor_init_deaths = 3
    config, pool = plan.config, plan.config.pool
    rows: ray.data.Dataset = ray.data.from_arrow(plan.todo)
    rows = rows.repartition(target_num_rows_per_block=pool.videos_per_block)  # else one block, and one actor works
    clips = rows.map_batches(
        cast(Any, stages.decode),
        fn_kwargs={"recipe": plan.recipe, "config": config.decode},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=pool.cpus_per_decode,
        compute=TaskPoolStrategy(size=pool.decode_tasks),
    )
    features = clips.map_batches(
        Extractor,
        fn_constructor_kwargs={"lvlm": config.lvlm, "recipe": plan.recipe, "code": plan.code},
        batch_size=config.lvlm.batch_size * BATCHES_AT_ONCE,
        batch_format="pyarrow",
        **_actor_resources(config),
        compute=ActorPoolStrategy(
            min_size=pool.min_actors,
            max_size=pool.max_actors,
            max_concurrent_calls_per_actor=CALLS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
    )
    return features.map_batches(
        cast(Any, stages.write),
        fn_kwargs={"uri": plan.feature_set, "recipe": plan.recipe},
        batch_size=pool.videos_per_part,
        batch_format="pyarrow",
        num_cpus=0.1,
    )
