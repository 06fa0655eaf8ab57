"""Extraction: manifest -> decode tasks -> pool of LVLM actors -> parts, on Ray Data; then the commit."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.compute as pc
from ray.exceptions import RayActorError
from ray.runtime_env import RuntimeEnv

from lvlmrec import cluster, storage
from lvlmrec.columns import ERROR, ITEM_ID, MESSAGE, SOURCE, STAGE
from lvlmrec.errors import ConfigError, JobFailed, one_line
from lvlmrec.extraction import estimate, inspection, memory, stages
from lvlmrec.extraction.commits import Commits
from lvlmrec.extraction.extractor import Extractor
from lvlmrec.extraction.failures import Attempts, SharedAttempts, Streak
from lvlmrec.extraction.manifest import ROWS_AT_ONCE, columns_for, describe, read_manifest, source_of, texts_from
from lvlmrec.extraction.memory import Reserved
from lvlmrec.extraction.progress import Tally, tell_rejected
from lvlmrec.extraction.settings import ExtractConfig, PoolConfig
from lvlmrec.features import lease, store
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.index import is_among
from lvlmrec.features.lease import Lease
from lvlmrec.features.recipe import Recipe
from lvlmrec.lvlms import LVLMConfig
from lvlmrec.lvlms.files import authors_code, remote_code, source

if TYPE_CHECKING:
    from ray.data import Dataset

FILES_AT_ONCE = 32  # asked for their version: waiting, mostly
# On 2 CPUs it must find room beside one decoder, one actor, and the dealing out of the manifest: 1 CPU, says Ray.
WRITE_CPUS = 0.05


@dataclass(frozen=True)
class Plan:
    """What an extraction is of: `manifest` has a row for every item; `context` is that of `LVLMInfo`.

    `code` are the files of the authors' repository, for a family that runs it: they travel with the actors.
    """

    config: ExtractConfig
    recipe: Recipe
    feature_set: str
    manifest: pa.Table
    manifest_report: dict[str, int]
    code: dict[str, bytes]
    context: int = 0


def plan(config: ExtractConfig) -> Plan:
    """Check the input and the model and resolve the recipe. Raises `InputError`."""
    _check_environment(config.lvlm.environment)
    remote_code.check(config.lvlm)
    config = replace(config, lvlm=source.pin(config.lvlm))  # a branch may move while processes start
    code = authors_code.of(config.lvlm)
    info = inspection.inspect(
        config.lvlm, code, config.workspace, _actor_resources(config.pool, config.lvlm.environment)
    )
    recipe = recipes.resolve(config.recipe, info, config.seed, texts_from(config.input))
    manifest, report = read_manifest(config.input, columns_for(recipe.reading))
    if report:
        print(f"extract: left out of the input: {describe(report)}", file=sys.stderr)
    uri = store.locate(config.store, config.lvlm.name, recipe)
    store.create(uri, recipe)
    return Plan(config, recipe, uri, manifest, report, code, info.context)


def _check_environment(environment: dict[str, Any]) -> None:
    """Ray itself only logs a key that it does not know. Raises `ConfigError`."""
    if unknown := {*environment} - RuntimeEnv.known_fields:
        choices = ", ".join(sorted(field for field in RuntimeEnv.known_fields if not field.startswith("_")))
        raise ConfigError(f"lvlm.environment: unknown {', '.join(sorted(unknown))}; Ray's runtime_env has {choices}")
    try:
        RuntimeEnv(**environment)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lvlm.environment: {one_line(error)}") from error


def run(plan: Plan, log: Callable[[dict[str, float], int], None]) -> dict[str, Any]:
    """Extract what is missing, commit, and say what was done.

    `log(metrics, step)` is called as the work goes on. `busy_fraction` in the result is `forward_seconds`, summed over
    all batches (`extractor.Extractor`), / (`actors` x `seconds`): `actors` is the pool's maximum, and `seconds` the
    whole wall time, with Ray's start, the loading of the model and the writing of the last part. `oom_fallbacks` is how
    often forwards became smaller because memory ran out, `device_failures` how many processes a device cost.
    Raises `InputError` when another extraction writes the same feature set, `JobFailed` when all items fail alike or
    a device fails again and again.
    """
    config, uri, index = plan.config, plan.feature_set, store.read_index(plan.feature_set)
    sources = _sources(plan) if config.redo_changed else None
    todo = missing(plan, index, sources)
    if len(todo):
        inspection.check_length(config.lvlm, plan.recipe.reading, plan.context)
    if config.estimate.only:
        with _ray(plan, todo):
            return {"feature_set": uri, "items": len(plan.manifest), "estimate": _estimate(plan, todo)}
    if not len(todo) and store.is_committed(uri):
        nothing = Tally(0, _workers(config.pool), log)
        return _result(plan, nothing, 0.0, index) | Attempts().report() | {"estimate": _estimate(plan, todo)}
    with lease.hold(uri) as own_lease:
        if own_lease.after_break:
            store.adopt(uri, own_lease.number)
        todo = missing(plan, store.read_index(uri), sources)
        with _ray(plan, todo) as reserved:
            expected = _estimate(plan, todo)
            started = time.perf_counter()
            tally = Tally(len(todo), _workers(config.pool), log)
            attempts = _extract(plan, todo, tally, own_lease, reserved)
            seconds = time.perf_counter() - started
        own_lease.check()
        index = store.finish(uri, own_lease.number)
        own_lease.finish()
    return _result(plan, tally, seconds, index) | attempts | {"estimate": expected}


def missing(plan: Plan, index: pa.Table, sources: pa.Array | None = None) -> pa.Table:
    """The rows of the manifest that are to be extracted, given what is there already.

    `sources` tell, row by row of the manifest, which version of an item's files and texts there is now, empty where
    that is not known: those with another are redone.
    """
    known = index.select([ITEM_ID, SOURCE])
    if not plan.config.retry_rejected:
        known = pa.concat_tables([known, store.read_rejected(plan.feature_set).select([ITEM_ID, SOURCE])])
    item_ids = plan.manifest[ITEM_ID]
    if sources is None:
        return plan.manifest.filter(pc.invert(is_among(item_ids, known[ITEM_ID])))
    place = pc.index_in(
        item_ids, value_set=known[ITEM_ID].cast(item_ids.type).combine_chunks()
    )  # the first: of an item in both, that of its features
    changed = pc.and_(pc.not_equal(sources, ""), pc.not_equal(sources, known[SOURCE].take(place)))
    return plan.manifest.filter(pc.or_(pc.is_null(place), pc.fill_null(changed, False)))


def _sources(plan: Plan) -> pa.Array:
    """The version of the files and texts of each row of the manifest; empty where its files cannot be asked."""
    etags = {file.uri: file.etag for file in storage.iter_files(plan.config.input, recursive=True)}

    def version(uri: str) -> str:
        return etags.get(uri) or storage.version(uri)

    def source(row: dict[str, str]) -> str:
        try:
            return source_of(row, plan.recipe.reading, version)
        except Exception:  # whatever it is, it is one row's
            return ""

    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        found = [
            pa.array(threads.map(source, batch.to_pylist()), pa.string())
            for batch in plan.manifest.to_batches(ROWS_AT_ONCE)
        ]
    return pa.chunked_array(found, pa.string())


@contextmanager
def _ray(plan: Plan, todo: pa.Table) -> Iterator[Reserved | None]:
    """Ray, where there is work for it, and the memory to ask it for.

    Raises `ConfigError` when it has not what the processes need.
    """
    if not len(todo):
        yield None
        return
    with cluster.joined():
        cluster.require_gpus("pool.gpus_per_actor", plan.config.pool.gpus_per_actor)
        wanted = memory.needed(plan.recipe.reading, plan.config.lvlm.batch_size, plan.config.decode.memory_mb)
        yield memory.reserve(plan.config.pool, wanted)


def _extract(plan: Plan, todo: pa.Table, tally: Tally, own_lease: Lease, reserved: Reserved | None) -> dict[str, int]:
    """Run the pipeline over `todo` to its end; what went on in its processes. Raises `JobFailed`."""
    if reserved is None:
        return Attempts().report()
    streak, attempts = Streak(plan.config.max_rejected_in_a_row), SharedAttempts()
    blocks = _blocks(_dataset(plan, todo, own_lease.number, attempts, reserved))
    with Commits(plan.feature_set, own_lease) as commits:
        _commit_blocks(plan, todo, blocks, tally, streak, commits, own_lease)
    by_model = {reason: message for reason, message in tally.messages.items() if reason[0] in stages.MODEL_STAGES}
    if by_model and not len(store.read_index(plan.feature_set)):
        _drop_rejections(plan, todo, {*by_model}, own_lease)
        raise JobFailed(f"every video was rejected by the model: {[*by_model.values()][-1]}")
    return _report_failures(plan.config.lvlm, attempts.report())


def _commit_blocks(
    plan: Plan,
    todo: pa.Table,
    blocks: Generator[pa.Table],
    tally: Tally,
    streak: Streak,
    commits: Commits,
    own_lease: Lease,
) -> None:
    """Run the pipeline, committing what it writes. Raises `JobFailed`."""
    for block in blocks:
        _check_written(block)
        commits.add(block)
        if reason := _device_failure(block):
            _drop_rejections(plan, todo, {stages.DIED}, own_lease)  # it may have been the device
            raise JobFailed(f"stopped: {reason}; the next run goes on with what is missing")
        tally.add(block)
        own_lease.check()
        if streak.add(block):
            blocks.close()
            _drop_rejections(plan, todo, {streak.reason}, own_lease)
            raise JobFailed(f"stopped: {streak}")


def _blocks(dataset: Dataset) -> Generator[pa.Table]:
    """Run the pipeline. Raises `JobFailed` when no process can load the model."""
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayActorError as error:
        if "creation task" not in str(error):
            raise
        raise JobFailed(f"the model cannot be loaded: {str(error).strip().splitlines()[-1]}") from error


def _report_failures(lvlm: LVLMConfig, report: dict[str, int]) -> dict[str, int]:
    """The report, and on stderr what in it a user should know."""
    if report["oom_fallbacks"]:
        size = f"lvlm.batch_size={lvlm.batch_size}"
        lowest = f"the smallest now in use is {report['lowest_batch_size']}"
        print(f"extract: memory ran out {report['oom_fallbacks']} times with {size}; {lowest}", file=sys.stderr)
    if report["device_failures"]:
        print(f"extract: {report['device_failures']} processes ended because their device failed", file=sys.stderr)
    return report


def _check_written(block: pa.Table) -> None:
    """Raises `JobFailed` when storage did not take the rows."""
    failed = block.filter(pc.equal(block[STAGE], stages.WRITE)).slice(0, 1).to_pylist()
    if failed:
        raise JobFailed(f"stopped: storage does not take features: {failed[0][ERROR]}: {failed[0][MESSAGE]}")


def _device_failure(block: pa.Table) -> str:
    """Which device failed for good, and how; empty if none did."""
    failed: list[str] = block.filter(pc.equal(block[STAGE], stages.DEVICE))[MESSAGE].to_pylist()
    return failed[0] if failed else ""


def _drop_rejections(plan: Plan, todo: pa.Table, reasons: set[tuple[str, str]], own_lease: Lease) -> None:
    """Drop this run's rejections for reasons that are no item's fault: the next run tries them again."""
    rejected = store.read_rejected(plan.feature_set)
    is_ours = is_among(rejected[ITEM_ID], todo[ITEM_ID])
    found = zip(rejected[STAGE].to_pylist(), rejected[ERROR].to_pylist(), strict=True)
    is_alike = pa.array([reason in reasons for reason in found], pa.bool_())
    store.keep_rejected(plan.feature_set, rejected.filter(pc.invert(pc.and_(is_ours, is_alike))), own_lease.number)


def _workers(pool: PoolConfig) -> dict[str, int]:
    """How many of each stage work at the same time."""
    return {"decode": pool.decode_tasks, "prepare": pool.max_actors, "forward": pool.max_actors}


def _estimate(plan: Plan, todo: pa.Table) -> dict[str, Any]:
    """What the work will take, said on stderr."""
    config = plan.config
    seconds = None
    is_worth_it = len(todo) >= estimate.WORTH_TIMING * config.estimate.videos or config.estimate.only
    if config.estimate.videos and len(todo) and is_worth_it:
        seconds = estimate.time_remotely(
            estimate.sample_rows(todo, config.estimate.videos),
            plan.recipe,
            config.decode,
            config.lvlm,
            plan.code,
            _actor_resources(config.pool, config.lvlm.environment),
        )
    expected = estimate.estimate(len(todo), plan.recipe, seconds, _workers(config.pool))
    if len(todo):
        print(estimate.describe(expected), file=sys.stderr)
    return expected


def _actor_resources(pool: PoolConfig, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Ray's arguments for a process that holds the model; without `lvlm.environment` it runs in the job's own."""
    resources: dict[str, Any] = {"num_cpus": pool.cpus_per_actor, "num_gpus": pool.gpus_per_actor}
    return resources | ({"runtime_env": environment} if environment else {})


def _result(plan: Plan, tally: Tally, seconds: float, index: pa.Table) -> dict[str, Any]:
    item_ids, there = plan.manifest[ITEM_ID], index[ITEM_ID]
    rejected = store.read_rejected(plan.feature_set)
    rejected = rejected.filter(is_among(rejected[ITEM_ID], item_ids))
    rejected = rejected.filter(pc.invert(is_among(rejected[ITEM_ID], there)))
    reasons = Counter(zip(rejected[STAGE].to_pylist(), rejected[ERROR].to_pylist(), strict=True))
    not_in_input = there.filter(pc.invert(is_among(there, item_ids)))
    if len(not_in_input):
        first = not_in_input.take(pc.select_k_unstable(not_in_input, 3, [("", "ascending")])).to_pylist()
        names = ", ".join(first) + (", ..." if len(not_in_input) > 3 else "")
        print(f"extract: {len(not_in_input)} items with features are not in the input: {names}", file=sys.stderr)
    tell_rejected(rejected, storage.join(plan.feature_set, store.REJECTED))
    report = tally.report(seconds) if tally.total else {}
    if report:
        print(f"extract: {report['slowest_stage']}", file=sys.stderr)
    return {
        "feature_set": plan.feature_set,
        "items": len(item_ids),
        "written": tally.written,
        "skipped": len(item_ids) - tally.total,
        "rejected": reasons.total(),
        "rejected_now": sum(tally.reasons.values()),
        "rejected_by_reason": {f"{stage}/{error}": n for (stage, error), n in sorted(reasons.items())},
        "not_in_input": len(not_in_input),
        "seconds": round(seconds, 3),
        "videos_per_second": round(tally.total / seconds, 3) if tally.total else 0.0,
        "forward_seconds": round(tally.seconds[stages.FORWARD_SECONDS], 3),
        "actors": plan.config.pool.max_actors,
        "busy_fraction": round(tally.busy("forward", seconds), 4) if tally.total else 0.0,
        "features": len(plan.recipe.feature_names),
        "manifest": plan.manifest_report,
    } | report


def _set_up_ray_data() -> None:
    from ray.data import DataContext
    from ray.util.debug import log_once

    from lvlmrec.extraction import bounds

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # its file gets all
            handler.setLevel(logging.WARNING)
    log_once("ray_data_progress_manager_disabled")  # a warning that progress bars are, as is said below
    context = DataContext.get_current()
    context.enable_progress_bars = False  # our own lines on stderr say what a user of this job asks
    # every 30 s a paragraph on a writer's 140 MB
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    context.max_consecutive_actor_init_deaths = 3
    bounds.bound(context)


def _dataset(plan: Plan, todo: pa.Table, generation: int, attempts: SharedAttempts, reserved: Reserved) -> Dataset:
    """The pipeline, not yet running."""
    # Slow to import; a run that finds nothing to do goes without.
    from ray.data import ActorPoolStrategy, TaskPoolStrategy, from_arrow

    _set_up_ray_data()
    config, pool = plan.config, plan.config.pool
    rows: Dataset = from_arrow(todo)
    rows = rows.repartition(target_num_rows_per_block=pool.videos_per_block)  # else one block, and one actor works
    clips = rows.map_batches(
        cast(Any, stages.decode),
        fn_kwargs={"reading": plan.recipe.reading, "config": config.decode},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=pool.cpus_per_decode,
        memory=reserved.decode,
        compute=TaskPoolStrategy(size=pool.decode_tasks),
    )
    features = clips.map_batches(
        Extractor,
        fn_constructor_kwargs={
            "lvlm": config.lvlm,
            "recipe": plan.recipe,
            "code": plan.code,
            "attempts": attempts,
        },
        batch_size=config.lvlm.batch_size * stages.BATCHES_AT_ONCE,
        batch_format="pyarrow",
        **_actor_resources(config.pool, config.lvlm.environment),
        memory=reserved.actor,
        compute=ActorPoolStrategy(
            min_size=pool.min_actors,
            max_size=pool.max_actors,
            max_concurrent_calls_per_actor=memory.CALLS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
    )
    return features.map_batches(
        cast(Any, stages.write),
        fn_kwargs={"uri": plan.feature_set, "recipe": plan.recipe, "generation": generation},
        batch_size=estimate.videos_in_part(plan.recipe, pool.videos_per_part, pool.mb_per_part),
        batch_format="pyarrow",
        num_cpus=WRITE_CPUS,
        memory=reserved.write,
    )
