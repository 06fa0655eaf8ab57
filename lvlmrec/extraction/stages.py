"""The stages of the extraction pipeline, each a map over Arrow tables.

A row that fails at a stage keeps its place and carries `stage`, `error` and `message`; later stages pass it on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lvlmrec import storage
from lvlmrec.columns import ERROR, ITEM_ID, MESSAGE, PART, ROW, STAGE, URI
from lvlmrec.config import option
from lvlmrec.extraction.isolation import IsolatedDecoder
from lvlmrec.features import store
from lvlmrec.features.recipe import Recipe
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.video import Clip, VideoError

FORWARD_SECONDS = "forward_seconds"  # a row's share of its batch's time in the model; see `Extractor`
MODEL_STAGES = ("model", "cast")
FAILURE = {STAGE: pa.string(), ERROR: pa.string(), MESSAGE: pa.string()}
CLIP = {
    "frames": pa.large_binary(),
    "shape": pa.list_(pa.int32(), 4),
    "timestamps": pa.list_(pa.float64()),
    "frame_indices": pa.list_(pa.int64()),
    "num_source_frames": pa.int64(),
    "duration": pa.float64(),
}
DECODED = pa.schema({ITEM_ID: pa.string(), URI: pa.string(), **FAILURE, **CLIP})
WRITTEN = pa.schema(
    {ITEM_ID: pa.string(), PART: pa.string(), ROW: pa.int64(), **FAILURE, FORWARD_SECONDS: pa.float64()}
)


@dataclass(frozen=True)
class DecodeConfig:
    """Limits of one video's decoding."""

    timeout_s: float = option(60.0, "seconds after which a video is given up", minimum=0.1)
    memory_mb: int = option(4096, "address space of the decoding process", minimum=256)


def decode(rows: pa.Table, recipe: Recipe, config: DecodeConfig) -> Iterator[pa.Table]:
    """Sample each video's frames in the child process of this worker; one row at a time, to bound memory."""
    for item_id, uri in zip(rows[ITEM_ID].to_pylist(), rows[URI].to_pylist(), strict=True):
        try:
            with storage.local_copy(uri) as path:
                clip = _decoder(config.memory_mb).sample_clip(
                    path, recipe.frames, recipe.frame_max_side, config.timeout_s
                )
            outcome = _clip_row(clip)
        except VideoError as error:
            outcome = {STAGE: error.stage, ERROR: error.error, MESSAGE: _one_line(error.message)}
        except (OSError, ValueError) as error:
            outcome = {STAGE: "fetch", ERROR: type(error).__name__, MESSAGE: _one_line(error)}
        yield pa.Table.from_pylist([{ITEM_ID: item_id, URI: uri, **outcome}], schema=DECODED)


class Extractor:
    """A pool's actor: one frozen LVLM, clips in, features out.

    `forward_seconds` of the rows of a batch add up to the seconds that it spent in the model's `extract`, failed
    attempts included. The model's own preprocessing is in it; decoding, fetching, casting and waiting are not.
    """

    def __init__(self, lvlm: LVLMConfig, recipe: Recipe) -> None:
        self.recipe = recipe
        self.lvlm = LVLMS[lvlm.name].load(lvlm, recipe)

    def __call__(self, rows: pa.Table) -> pa.Table:
        self.forward_seconds = 0.0
        failed = rows.filter(pc.is_valid(rows[ERROR])).select([ITEM_ID, URI, *FAILURE])
        decoded = rows.filter(pc.is_null(rows[ERROR]))
        tables = [self._features(decoded)] if len(decoded) else []
        seconds = self.forward_seconds / len(rows)
        table = pa.concat_tables([_extracted(self.recipe).empty_table(), *tables, failed], promote_options="default")
        return table.set_column(
            table.column_names.index(FORWARD_SECONDS), FORWARD_SECONDS, pa.array([seconds] * len(table))
        )

    def _features(self, rows: pa.Table) -> pa.Table:
        """A batch in one forward; when that fails, one by one, so that an item costs no neighbour."""
        try:
            return self._forward(rows)
        except Exception as error:
            if len(rows) > 1:
                return pa.concat_tables(
                    [self._features(rows.slice(i, 1)) for i in range(len(rows))], promote_options="default"
                )
            model, cast = MODEL_STAGES
            failure = {
                STAGE: cast if isinstance(error, store.CastError) else model,
                ERROR: type(error).__name__,
                MESSAGE: _one_line(error),
            }
            row = {ITEM_ID: rows[ITEM_ID][0].as_py(), URI: rows[URI][0].as_py(), **failure}
            return pa.Table.from_pylist([row], schema=_extracted(self.recipe))

    def _forward(self, rows: pa.Table) -> pa.Table:
        clips = [_clip(row) for row in _python_rows(rows)]
        started = time.perf_counter()
        try:
            features = self.lvlm.extract(clips)
        finally:
            self.forward_seconds += time.perf_counter() - started
        item_ids = rows[ITEM_ID].to_pylist()
        table = store.feature_table(self.recipe, item_ids, [clip.num_distinct_frames for clip in clips], features)
        return table.append_column(URI, rows[URI].cast(pa.string()))


def write(rows: pa.Table, uri: str, recipe: Recipe) -> pa.Table:
    """Write a part with the rows that have features and a file with those that were rejected."""
    good = rows.filter(pc.is_null(rows[ERROR]))
    bad = rows.filter(pc.is_valid(rows[ERROR]))
    part = store.write_part(uri, recipe, good) if len(good) else None
    if len(bad):
        store.write_rejected(uri, bad.select(list(store.REJECTED_COLUMNS)).to_pylist())
    good = good.select([ITEM_ID, FORWARD_SECONDS])
    good = good.append_column(PART, pa.array([part] * len(good), pa.string()))
    good = good.append_column(ROW, pa.array(range(len(good)), pa.int64()))
    bad = bad.select([ITEM_ID, *FAILURE, FORWARD_SECONDS])
    return pa.concat_tables([WRITTEN.empty_table(), good, bad], promote_options="default")


@functools.cache
def _decoder(memory_mb: int) -> IsolatedDecoder:
    return IsolatedDecoder(memory_mb=memory_mb)


def _extracted(recipe: Recipe) -> pa.Schema:
    extra = pa.schema({URI: pa.string(), **FAILURE, FORWARD_SECONDS: pa.float64()})
    return pa.unify_schemas([store.schema(recipe), extra])


def _clip_row(clip: Clip) -> dict[str, Any]:
    return {
        "frames": clip.frames.tobytes(),
        "shape": list(clip.frames.shape),
        "timestamps": clip.timestamps.tolist(),
        "frame_indices": clip.frame_indices.tolist(),
        "num_source_frames": clip.num_source_frames,
        "duration": clip.duration,
    }


def _python_rows(rows: pa.Table) -> Sequence[dict[str, Any]]:
    """Rows as dicts, the frames as buffers that are not copied."""
    plain = rows.select([name for name in CLIP if name != "frames"]).to_pylist()
    frames = [scalar.as_buffer() for scalar in rows["frames"]]
    return [row | {"frames": buffer} for row, buffer in zip(plain, frames, strict=True)]


def _clip(row: dict[str, Any]) -> Clip:
    return Clip(
        frames=np.frombuffer(row["frames"], dtype=np.uint8).reshape(row["shape"]),
        timestamps=np.asarray(row["timestamps"], dtype=np.float64),
        frame_indices=np.asarray(row["frame_indices"], dtype=np.int64),
        num_source_frames=row["num_source_frames"],
        duration=row["duration"],
    )


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:500]
