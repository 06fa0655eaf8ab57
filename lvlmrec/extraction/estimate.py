"""What an extraction will take, printed before it starts: bytes from the recipe, hours from a few videos."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayError

from lvlmrec.columns import ERROR
from lvlmrec.config import option
from lvlmrec.errors import InputError, JobFailed
from lvlmrec.extraction import stages
from lvlmrec.extraction.extractor import Extractor
from lvlmrec.extraction.stages import DecodeConfig
from lvlmrec.features import store
from lvlmrec.features.recipe import Recipe
from lvlmrec.lvlms import LVLMConfig

WORTH_TIMING = 50  # times as many videos as are timed: below it the run itself is the quicker answer
TEXT_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class EstimateConfig:
    """The estimate before a run."""

    videos: int = option(
        8, "number of videos timed before a run of at least 50 times as many; 0: hours are not estimated", minimum=0
    )
    only: bool = option(False, "stop after the estimate")


def bytes_per_item(recipe: Recipe) -> int:
    """Bytes of one item's features as stored; an answer counts with its length limit."""
    schema = store.schema(recipe)
    vectors = [schema.field(str(name)).type for name in recipe.feature_names]
    features = sum(vector.list_size * vector.value_type.byte_width for vector in vectors)
    answers = sum(TEXT_BYTES_PER_TOKEN * prompt.max_new_tokens for prompt in recipe.reading.prompts.values())
    return features + answers


def videos_in_part(recipe: Recipe, most: int, mb: int) -> int:
    """How many videos one part holds: at most `most`, and of no more than `mb` MB, but one in any case."""
    return max(1, min(most, (mb << 20) // bytes_per_item(recipe)))


def time_sample(
    rows: pa.Table, recipe: Recipe, decode: DecodeConfig, lvlm: LVLMConfig, code: Mapping[str, bytes]
) -> dict[str, float]:
    """Seconds per video of each stage, on one worker each, and of loading the model. Runs where the model would.

    The first batch warms the model up and is not counted.
    """
    decoded = pa.concat_tables(list(stages.decode(rows, recipe.reading, decode)))
    started = time.perf_counter()
    extractor = Extractor(lvlm, recipe, code)
    load_seconds = time.perf_counter() - started
    good = decoded.filter(pc.is_null(decoded[ERROR]))
    extractor(good.slice(0, lvlm.batch_size))
    measured = extractor(good)
    spent = {name: pc.sum(measured[name]).as_py() or 0.0 for name in (stages.PREPARE_SECONDS, stages.FORWARD_SECONDS)}
    return {
        "load": load_seconds,
        "decode": pc.sum(decoded[stages.DECODE_SECONDS]).as_py() / len(decoded),
        "prepare": spent[stages.PREPARE_SECONDS] / max(len(good), 1),
        "forward": spent[stages.FORWARD_SECONDS] / max(len(good), 1),
    }


def sample_rows(todo: pa.Table, num_videos: int) -> pa.Table:
    """At most `num_videos` rows, evenly spaced."""
    return todo.take(np.unique(np.linspace(0, len(todo) - 1, num_videos).round().astype("int64")))


def estimate(todo: int, recipe: Recipe, seconds: dict[str, float] | None, workers: dict[str, int]) -> dict[str, Any]:
    """Videos, bytes per item, GB and, from `seconds` per video of each stage, hours and what sets them."""
    size = bytes_per_item(recipe)
    expected: dict[str, Any] = {"videos": todo, "bytes_per_item": size, "gb": todo * size / 1e9}
    if seconds is None:
        return expected
    paces = {stage: seconds[stage] / workers[stage] for stage in workers}
    slowest = max(paces, key=lambda stage: paces[stage])
    hours = (seconds["load"] + todo * paces[slowest]) / 3600
    measured = {stage: round(value, 4) for stage, value in seconds.items()}
    return expected | {"hours": round(hours, 4), "limited_by": slowest, "seconds_per_video": measured}


def describe(expected: dict[str, Any]) -> str:
    """The estimate in one line."""
    size = f"{expected['videos']} videos, {expected['bytes_per_item']:,} bytes each, {expected['gb']:.3g} GB"
    if "hours" not in expected:
        return f"extract: {size}"
    hours = expected["hours"]
    length = f"{hours:.1f} hours" if hours >= 1 else f"{math.ceil(hours * 60)} minutes"
    return f"extract: {size}, about {length}, limited by {expected['limited_by']}"


def time_remotely(
    rows: pa.Table,
    recipe: Recipe,
    decode: DecodeConfig,
    lvlm: LVLMConfig,
    code: Mapping[str, bytes],
    resources: Mapping[str, Any],
) -> dict[str, float]:
    """`time_sample` on a worker with `resources`, Ray's arguments for one actor.

    Raises `JobFailed` when that worker dies or its model fails, `InputError` when the model cannot be loaded.
    """
    task = ray.remote(max_retries=0, **resources)(time_sample)  # what ends a worker once does so again
    try:
        seconds: dict[str, float] = ray.get(task.remote(rows, recipe, decode, lvlm, code))
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, InputError):
            raise cause from None
        reason = f"{type(cause).__name__}: {stages.message_of(cause)}"
        raise JobFailed(
            f"timing {len(rows)} videos before the run (estimate.videos=0 leaves it out): {reason}"
        ) from error
    return seconds
