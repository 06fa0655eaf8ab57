"""The stages of the extraction pipeline, each a map over Arrow tables.

A row that fails at a stage keeps its place and carries `stage`, `error` and `message`; later stages pass it on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lvlmrec import cluster, storage
from lvlmrec.columns import ERROR, ITEM_ID, MADE_WITH, MESSAGE, PART, ROW, SOURCE, STAGE, URI
from lvlmrec.config import option
from lvlmrec.errors import one_line
from lvlmrec.extraction.failures import DECODED_ON, EXTRACTED_ON
from lvlmrec.extraction.manifest import MEDIA_COLUMNS, source_of
from lvlmrec.features import store
from lvlmrec.features.model_recipe import MEDIA, MOTION
from lvlmrec.features.recipe import Recipe
from lvlmrec.features.sources import Reading
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.file import VideoError
from lvlmrec.media.isolation import IsolatedDecoder, NoDecoderError
from lvlmrec.media.motion import CLIP_FRAMES, ENCODER, KEYFRAME_SIZE, MAP_SIZE, MotionClips
from lvlmrec.media.sampling import Clip

# A row's share of the time that its batch spent in a stage; see `extractor.Extractor`.
SECONDS = ("decode_seconds", "prepare_seconds", "forward_seconds", "write_seconds")
DECODE_SECONDS, PREPARE_SECONDS, FORWARD_SECONDS, WRITE_SECONDS = SECONDS
TEXTS = "texts"
MODEL_STAGES = ("model", "cast")
DIED = ("model", "worker_died")
WRITE, DEVICE = "write", "device"  # stages at which nothing is an item's fault: the run stops
BATCHES_AT_ONCE = 4  # of the model: enough items for neighbours of the same size
FAILURE = {STAGE: pa.string(), ERROR: pa.string(), MESSAGE: pa.string()}
CLIP = {
    "frames": pa.large_binary(),
    "shape": pa.list_(pa.int32(), 4),
    "timestamps": pa.list_(pa.float64()),
    "frame_indices": pa.list_(pa.int64()),
    "num_source_frames": pa.int64(),
    "duration": pa.float64(),
}
MOTION_CLIPS = {
    "keyframes": pa.large_binary(),
    "motion": pa.large_binary(),
    "starts": pa.list_(pa.int64()),
    "num_frames": pa.int64(),
}
MEASURED = {name: pa.float64() for name in SECONDS}
DECODED = pa.schema(
    {
        ITEM_ID: pa.string(),
        URI: pa.string(),
        SOURCE: pa.string(),
        DECODED_ON: pa.string(),
        TEXTS: pa.map_(pa.string(), pa.string()),
        **FAILURE,
        DECODE_SECONDS: pa.float64(),
    }
    | {f"{kind}.{name}": column for kind in MEDIA for name, column in CLIP.items()}
    | {f"{MOTION}.{name}": column for name, column in MOTION_CLIPS.items()}
)
PLACES = {DECODED_ON: pa.string(), EXTRACTED_ON: pa.string()}
PLACED = {SOURCE: pa.string(), PART: pa.string(), ROW: pa.int64(), MADE_WITH: pa.string()}
WRITTEN = pa.schema({ITEM_ID: pa.string(), **PLACED, **FAILURE, **MEASURED, **PLACES})


@dataclass(frozen=True)
class DecodeConfig:
    """Limits of one video's decoding."""

    timeout_s: float = option(60.0, "time limit of decoding one video, in seconds", minimum=0.1)
    memory_mb: int = option(4096, "address space of a decoding process, in MB", minimum=256)


def decode(rows: pa.Table, reading: Reading, config: DecodeConfig) -> Iterator[pa.Table]:
    """What a recipe shows of each item, decoded in the child process of this worker.

    Row by row, to bound memory; texts alone are one table, for a table per row would cost more than they do.
    Raises `RuntimeError` where the fault is this worker's, whatever the row.
    """
    if reading.video_form == MOTION and "video" in reading.media:
        _check_encoder(reading)
    cluster.device()  # none of its node's GPUs is a decoder's
    decoded_on = {DECODED_ON: cluster.place()}
    outcomes = (_outcome(row, reading, config) | decoded_on for row in rows.to_pylist())
    for known in ([outcome] for outcome in outcomes) if reading.media else [[*outcomes]]:
        yield pa.Table.from_pylist(known, schema=DECODED)


def _outcome(row: dict[str, str], reading: Reading, config: DecodeConfig) -> dict[str, Any]:
    """A row of `DECODED`."""
    started, source = time.perf_counter(), ""
    try:
        source = source_of(row, reading, storage.version)
        _check_texts(reading, row)
        outcome: dict[str, Any] = {TEXTS: [(field, row[field]) for field in reading.fields]}
        for kind in reading.media:
            outcome |= _decode(row[MEDIA_COLUMNS[kind]], kind, reading, config)
    except VideoError as error:
        outcome = {STAGE: error.stage, ERROR: error.error, MESSAGE: message_of(error.message)}
    except NoDecoderError:
        raise
    except Exception as error:
        outcome = {STAGE: "fetch", ERROR: type(error).__name__, MESSAGE: message_of(error)}
    seconds = time.perf_counter() - started
    return {ITEM_ID: row[ITEM_ID], URI: row.get(URI, ""), SOURCE: source, DECODE_SECONDS: seconds} | outcome


def _decode(uri: str, kind: str, reading: Reading, config: DecodeConfig) -> dict[str, Any]:
    """Columns of `DECODED`: a video or cover as a clip, or a video as key frames and motion."""
    if not uri:
        raise VideoError("fetch", "missing", "the manifest names no file")
    decoder, limit = _decoder(config.memory_mb), config.timeout_s
    with storage.local_copy(uri) as path:
        if kind == "video" and reading.video_form == MOTION:
            kind, values = MOTION, _motion_row(decoder.motion_clips(path, reading.frames, limit))
        else:
            num_frames = reading.frames if kind == "video" else 1
            values = _clip_row(decoder.sample_clip(path, num_frames, reading.frame_max_side, limit))
    return {f"{kind}.{name}": value for name, value in values.items()}


def _check_encoder(reading: Reading) -> None:
    """Motion depends on the encoder's version: one feature set, one version. Raises `RuntimeError`."""
    expected = reading.video_encoder
    if expected != ENCODER:
        raise RuntimeError(f"this worker's encoder is {ENCODER}, the recipe's {expected}: install one PyAV")


def _check_texts(reading: Reading, row: Mapping[str, str]) -> None:
    """A prompt that shows text alone needs some. Raises `VideoError`."""
    for name, prompt in reading.prompts.items():
        if prompt.input == "text" and prompt.fields and not any(row[field].strip() for field in prompt.fields):
            raise VideoError("text", "empty", f"prompt {name!r} shows {', '.join(prompt.fields)} alone: empty")


def write(rows: pa.Table, uri: str, recipe: Recipe, generation: int) -> pa.Table:
    """Write a part with the rows that have features and a file with those that were rejected.

    When storage fails for good, the rows come out with stage `write`: nothing of them is there, and the driver stops,
    as it does for rows of stage `device`.
    """
    started = time.perf_counter()
    good = rows.filter(pc.is_null(rows[ERROR]))
    bad = rows.filter(pc.is_valid(rows[ERROR]))
    rejected = bad.filter(pc.not_equal(bad[STAGE], DEVICE))
    try:
        made_with = good[MADE_WITH].unique().to_pylist()
        part = store.write_part(uri, recipe, good, generation, made_with) if len(good) else None
        if len(rejected):
            store.write_rejected(uri, rejected, generation)
    except OSError as error:
        failure = {STAGE: WRITE, ERROR: type(error).__name__, MESSAGE: message_of(error)}
        return pa.Table.from_pylist([{ITEM_ID: i, **failure} for i in rows[ITEM_ID].to_pylist()], schema=WRITTEN)
    good = good.select([ITEM_ID, SOURCE, MADE_WITH, *PLACES, DECODE_SECONDS, PREPARE_SECONDS, FORWARD_SECONDS])
    good = good.append_column(PART, pa.array([part] * len(good), pa.string()))
    good = good.append_column(ROW, pa.array(range(len(good)), pa.int64()))
    bad = bad.select([ITEM_ID, *PLACES, *FAILURE, DECODE_SECONDS, PREPARE_SECONDS, FORWARD_SECONDS])
    written = pa.concat_tables([WRITTEN.empty_table(), good, bad], promote_options="default")
    return filled(written, WRITE_SECONDS, (time.perf_counter() - started) / max(len(written), 1))


def filled(table: pa.Table, name: str, value: str | float) -> pa.Table:
    """The same value in every row of a column."""
    column = pa.array([value] * len(table), table.schema.field(name).type)
    return table.set_column(table.column_names.index(name), name, column)


@functools.cache
def _decoder(memory_mb: int) -> IsolatedDecoder:
    return IsolatedDecoder(memory_mb=memory_mb)


def extracted(recipe: Recipe) -> pa.Schema:
    measured = {name: pa.float64() for name in (DECODE_SECONDS, PREPARE_SECONDS, FORWARD_SECONDS)}
    extra = pa.schema({URI: pa.string(), MADE_WITH: pa.string(), **FAILURE, **measured, **PLACES})
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


def _motion_row(clips: MotionClips) -> dict[str, Any]:
    return {
        "keyframes": clips.keyframes.tobytes(),
        "motion": clips.motion.tobytes(),
        "starts": clips.starts.tolist(),
        "num_frames": clips.num_frames,
    }


def items(rows: pa.Table, reading: Reading) -> list[Item]:
    """Rows of `DECODED` as the model takes them; pictures and motion are buffers that are not copied."""
    video = MOTION if reading.video_form == MOTION else "video"
    kinds = [video if kind == "video" else kind for kind in reading.media]
    shown: dict[str, Any] = {kind: _motions(rows) if kind == MOTION else _clips(rows, kind) for kind in kinds}
    texts = rows[TEXTS].to_pylist()
    return [
        Item(item_id, **{kind: seen[i] for kind, seen in shown.items()}, texts=dict(texts[i] or []))
        for i, item_id in enumerate(rows[ITEM_ID].to_pylist())
    ]


def _motions(rows: pa.Table) -> list[MotionClips]:
    columns = [rows[f"{MOTION}.{name}"] for name in MOTION_CLIPS]
    return [
        MotionClips(
            keyframes=np.frombuffer(keyframes.as_buffer(), np.uint8).reshape(-1, KEYFRAME_SIZE, KEYFRAME_SIZE, 3),
            motion=np.frombuffer(motion.as_buffer(), np.float32).reshape(-1, 2, CLIP_FRAMES, *MAP_SIZE),
            starts=np.array(starts.as_py(), np.int64),
            num_frames=num_frames.as_py(),
        )
        for keyframes, motion, starts, num_frames in zip(*columns, strict=True)
    ]


def num_distinct_frames(item: Item) -> int:
    """How many pictures of its video an item's model sees: frames, or key frames."""
    if item.motion is not None:
        return len(item.motion.starts)
    return item.video.num_distinct_frames if item.video else 0


def _clips(rows: pa.Table, kind: str) -> list[Clip]:
    plain = rows.select([f"{kind}.{name}" for name in CLIP if name != "frames"])
    plain = plain.rename_columns([name.removeprefix(f"{kind}.") for name in plain.column_names])
    frames = [scalar.as_buffer() for scalar in rows[f"{kind}.frames"]]
    return [_clip(row | {"frames": buffer}) for row, buffer in zip(plain.to_pylist(), frames, strict=True)]


def _clip(row: dict[str, Any]) -> Clip:
    return Clip(
        frames=np.frombuffer(row["frames"], dtype=np.uint8).reshape(row["shape"]),
        timestamps=np.asarray(row["timestamps"], dtype=np.float64),
        frame_indices=np.asarray(row["frame_indices"], dtype=np.int64),
        num_source_frames=row["num_source_frames"],
        duration=row["duration"],
    )


def message_of(error: object) -> str:
    """What an error says, on one line; of a file's name that is no text, its bytes."""
    return one_line(error, 500).encode(errors="backslashreplace").decode()
