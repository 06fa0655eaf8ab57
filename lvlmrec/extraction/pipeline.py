"""Extraction: manifest -> decode tasks -> pool of LVLM actors -> parts, on Ray Data; then the commit."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from lvlmrec.columns import ERROR, ITEM_ID, MESSAGE, STAGE, URI
from lvlmrec.config import option
from lvlmrec.errors import InputError, JobFailed
from lvlmrec.extraction import stages
from lvlmrec.extraction.manifest import read_manifest
from lvlmrec.extraction.stages import DecodeConfig, Extractor
from lvlmrec.features import recipe as recipes
from lvlmrec.features import store
from lvlmrec.features.recipe import Recipe, RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig

PROGRESS_SECONDS = 5.0


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


@dataclass(frozen=True)
class Plan:
    """What an extraction has to do: `todo` are the rows of the manifest that no part and no rejection covers."""

    config: ExtractConfig
    recipe: Recipe
    feature_set: str
    item_ids: frozenset[str]
    todo: pa.Table
    manifest_report: dict[str, int]


def plan(config: ExtractConfig) -> Plan:
    """Check the input and the model, resolve the recipe and find what is missing. Raises `InputError`."""
    if config.pool.max_actors < config.pool.min_actors:
        raise InputError(f"pool.max_actors: {config.pool.max_actors} is below pool.min_actors={config.pool.min_actors}")
    manifest, report = read_manifest(config.input)
    recipe = recipes.resolve(config.recipe, LVLMS[config.lvlm.name].inspect(config.lvlm))
    uri = store.locate(config.store, config.lvlm.name, recipe)
    store.create(uri, recipe)
    seen = {*store.pending_index(uri)[ITEM_ID], *store.read_rejected(uri)[ITEM_ID]}
    item_ids = manifest[ITEM_ID].to_pylist()
    todo = manifest.filter(pa.array([item_id not in seen for item_id in item_ids]))
    return Plan(config, recipe, uri, frozenset(item_ids), todo, report)


def run(plan: Plan, log: Callable[[dict[str, float], int], None]) -> dict[str, Any]:
    """Extract what the plan lists, commit, and say what was done.

    `log(metrics, step)` is called as the work goes on. `busy_fraction` in the result is `forward_seconds`, summed over
    all batches (`stages.Extractor`), / (`actors` x `seconds`): `actors` is the pool's maximum, and `seconds` the whole
    wall time, with Ray's start, the loading of the model and the writing of the last part.
    Raises `JobFailed` when every item failed in the model.
    """
    started = time.perf_counter()
    tally = _Tally(len(plan.todo), log)
    if len(plan.todo):
        with nullcontext() if ray.is_initialized() else ray.init():
            for block in _dataset(plan).iter_batches(batch_size=None, batch_format="pyarrow"):
                tally.add(block)
    seconds = time.perf_counter() - started
    index = store.commit(plan.feature_set)
    if index.empty and tally.model_message:
        store.forget_rejected(plan.feature_set)  # it was not the videos' fault: the next run tries them again
        raise JobFailed(f"every video was rejected by the model: {tally.model_message}")
    rejected = store.read_rejected(plan.feature_set)
    rejected = rejected[rejected[ITEM_ID].isin(plan.item_ids) & ~rejected[ITEM_ID].isin(index[ITEM_ID])]
    actor_seconds = seconds * plan.config.pool.max_actors
    return {
        "feature_set": plan.feature_set,
        "items": len(plan.item_ids),
        "written": tally.written,
        "skipped": len(plan.item_ids) - len(plan.todo),
        "rejected": len(rejected),
        "rejected_now": sum(tally.reasons.values()),
        "rejected_by_reason": {
            f"{s}/{e}": n for (s, e), n in sorted(Counter(zip(rejected[STAGE], rejected[ERROR], strict=True)).items())
        },
        "seconds": round(seconds, 3),
        "videos_per_second": round(len(plan.todo) / seconds, 3) if len(plan.todo) else 0.0,
        "forward_seconds": round(tally.forward_seconds, 3),
        "actors": plan.config.pool.max_actors,
        "busy_fraction": round(tally.forward_seconds / actor_seconds, 4) if len(plan.todo) else 0.0,
        "features": len(plan.recipe.feature_names),
        "manifest": plan.manifest_report,
    }


def _dataset(plan: Plan) -> ray.data.Dataset:
    """The pipeline, not yet running."""
    context = DataContext.get_current()
    context.enable_progress_bars = False  # our own lines on stderr say what a user of this job asks
    context.max_consecutive_actor_init_deaths = 3
    config, pool = plan.config, plan.config.pool
    rows: ray.data.Dataset = ray.data.from_arrow(plan.todo.select([ITEM_ID, URI]))
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
        fn_constructor_kwargs={"lvlm": config.lvlm, "recipe": plan.recipe},
        batch_size=config.lvlm.batch_size,
        batch_format="pyarrow",
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor,
        # one forward at a time; the second call fetches its clips and hands on its features meanwhile
        compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors, max_concurrent_calls_per_actor=2),
    )
    return features.map_batches(
        cast(Any, stages.write),
        fn_kwargs={"uri": plan.feature_set, "recipe": plan.recipe},
        batch_size=pool.videos_per_part,
        batch_format="pyarrow",
        num_cpus=0.1,
    )


class _Tally:
    """Counts of a running extraction, told on stderr and to `log` every few seconds."""

    def __init__(self, total: int, log: Callable[[dict[str, float], int], None]) -> None:
        self.total, self.log = total, log
        self.written = 0
        self.forward_seconds = 0.0
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.model_message = ""
        self.started = self.told = time.perf_counter()

    def add(self, block: pa.Table) -> None:
        bad = block.filter(pc.is_valid(block[ERROR])).to_pylist()
        self.written += len(block) - len(bad)
        self.reasons.update((row[STAGE], row[ERROR]) for row in bad)
        self.forward_seconds += pc.sum(block[stages.FORWARD_SECONDS]).as_py() or 0.0
        for row in bad:
            if row[STAGE] in stages.MODEL_STAGES:
                self.model_message = row[MESSAGE]
        done = self.written + sum(self.reasons.values())
        now = time.perf_counter()
        if now - self.told >= PROGRESS_SECONDS or done == self.total:
            self.told = now
            rate = done / (now - self.started)
            left = (self.total - done) / rate
            print(
                f"extract: {done}/{self.total} videos, {done - self.written} rejected, "
                f"{rate:.2f} videos/s, {left:.0f} s left",
                file=sys.stderr,
            )
            self.log({"videos": done, "rejected": done - self.written, "videos_per_second": rate}, done)
