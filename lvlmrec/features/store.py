"""Feature sets in object storage: parts, rejected items, and the index that commits them.

    <store>/<name>-<fingerprint>/
      recipe.json        what the features are; of imported ones also how their ids were found (ids_from)
      parts/*.parquet    item_id, num_distinct_frames (0: no video was shown), source (which version of its files the
                         item was read from), and one fixed-size-list column per feature; of several tokens per item,
                         [K, D], the rows one after another; generated texts
      rejected/*.parquet item_id, uri, source, stage, error, message
      index/*.parquet    the segments of the index, see `index`: readers see only what they list
      writers/*.json     who writes, see `lease`

A part is named after its generation, which is the number of its writer's lease, and the items in it, so that a
retried task writes the same file again. A part is whole or absent; those that a killed run wrote and did not commit
are adopted by the next one. Rows that no segment lists are nobody's; `vacuum` removes parts that have no others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lvlmrec import storage
from lvlmrec.columns import ERROR, GENERATION, ITEM_ID, MESSAGE, NUM_DISTINCT_FRAMES, PART, ROW, SOURCE, STAGE, URI
from lvlmrec.errors import InputError, one_line
from lvlmrec.features import index as segments
from lvlmrec.features import provenance
from lvlmrec.features.model_recipe import ANSWER, ModelRecipe
from lvlmrec.features.recipe import Recipe
from lvlmrec.features.sources import PIXEL_DTYPE

if TYPE_CHECKING:
    import torch

RECIPE = "recipe.json"
IDS_FROM = "ids_from"
# How a prompt names the time of a frame. 1, where recipe.json does not say: its index / the video's mean rate, as
# transformers does. 2: its time in the file, another in videos of variable frame rate alone.
FRAME_TIMES = "2"
RECORDED = ("versions", IDS_FROM)  # keys of recipe.json that are no part of the recipe
PARTS = "parts"
REJECTED = "rejected"
REJECTED_COLUMNS = (ITEM_ID, URI, SOURCE, STAGE, ERROR, MESSAGE)
REJECTED_SCHEMA = pa.schema([pa.field(name, pa.string()) for name in REJECTED_COLUMNS])
_INDEX_OF_EARLIER = pa.schema({ITEM_ID: pa.string(), PART: pa.string(), ROW: pa.int64(), SOURCE: pa.string()})
MANY_FILES = 16  # of rejections: more are made one at a commit
DTYPE_KEY = b"lvlmrec.dtype"
SHAPE_KEY = b"lvlmrec.shape"


class CastError(ValueError):
    """A feature overflows or vanishes in the stored dtype, or is not finite; the message names it and the remedy."""


@dataclass(frozen=True)
class FeatureSet:
    """A committed feature set, as it was when it was opened.

    index     a row for each item, `index.COLUMNS`: its part, and its row there
    segments  the names of the segments that were read
    snapshot  16 hex digits that change with any row of the index
    ids_from  how an import found the items' ids (from_zero, from_one, file); empty where no import did
    mixed     in what its parts were made differently, such as `torch: 2.8 | 2.9`; empty where they were made alike
    """

    uri: str
    recipe: Recipe
    index: pa.Table
    segments: tuple[str, ...]
    snapshot: str
    ids_from: str = ""
    mixed: str = ""

    @property
    def feature_names(self) -> list[str]:
        """Column names `prompt/tap/pooling`, in recipe order."""
        return [str(name) for name in self.recipe.feature_names]

    @property
    def digest(self) -> str:
        """16 hex digits that change with the recipe or with any item of the index."""
        if self.segments == (segments.EARLIER,):  # trainings of earlier releases know it by this one
            frame = self.index.select([ITEM_ID, PART, ROW, SOURCE]).cast(_INDEX_OF_EARLIER).to_pandas()
            rows = pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()
        else:
            rows = self.snapshot.encode()
        return hashlib.blake2b(self.recipe.fingerprint.encode() + rows, digest_size=8).hexdigest()

    def rows(self, item_ids: Sequence[str]) -> pd.DataFrame:
        """`part` and `row` of each of `item_ids`, missing where it has no features."""
        wanted = pa.array(item_ids, pa.string())
        theirs = self.index.filter(pc.is_in(self.index[ITEM_ID], value_set=wanted))
        place = pc.index_in(wanted, value_set=theirs[ITEM_ID].combine_chunks())
        found = theirs.select([PART, ROW]).take(place)
        return pd.DataFrame({PART: found[PART].cast(pa.string()).to_pandas(), ROW: found[ROW].to_pandas()})


def locate(store: str, name: str, recipe: Recipe) -> str:
    """The URI of the feature set of `recipe` in `store`."""
    return storage.join(store, f"{name}-{recipe.fingerprint}")


def create(uri: str, recipe: Recipe, ids_from: str = "") -> None:
    """Write recipe.json unless it is there; versions and `ids_from` are recorded, they are no part of the fingerprint.

    An import that found the same ids in another way is believed.
    """
    if storage.exists(storage.join(uri, RECIPE)) and (not ids_from or _read_about(uri).get(IDS_FROM) == ids_from):
        return
    versions = provenance.versions()
    if isinstance(recipe.source, ModelRecipe) and "llm" in recipe.source.width and "video" in recipe.source.media:
        versions["frame_times"] = FRAME_TIMES
    content = recipe.to_json() | {"versions": versions}
    content |= {IDS_FROM: ids_from} if ids_from else {}
    storage.write_bytes(storage.join(uri, RECIPE), json.dumps(content, indent=2).encode())


def committed(store: str) -> list[str]:
    """The URIs of the committed feature sets in a store."""
    return [uri for uri in storage.list_folders(store) if is_committed(uri)]


def find(uri: str) -> str:
    """The feature set at `uri`, or the only committed one of the store at `uri`. Raises `InputError`."""
    if storage.exists(storage.join(uri, RECIPE)):
        return uri
    found = committed(uri)
    if len(found) == 1:
        return found[0]
    names = ", ".join(u.rsplit("/", 1)[-1] for u in found) or "none; extract features first"
    raise InputError(
        f"features {uri!r}: not a feature set and not a store with exactly one; feature sets there: {names}"
    )


def read(uri: str) -> FeatureSet:
    """Open a committed feature set; says on stderr, once, in what its parts were made differently.

    Raises `InputError` when there is none.
    """
    uri = find(uri)
    about = _read_about(uri)
    found = segments.read(uri)
    if not found.segments:
        raise InputError(f"features {uri!r}: not committed: no index; run the extraction again to finish it")
    recipe, ids_from, mixed = _recipe_in(uri, about), about.get(IDS_FROM, ""), provenance.differences(found.made_with)
    provenance.say_mixed(uri, mixed)
    return FeatureSet(uri, recipe, found.latest(), found.segments, found.digest, ids_from, mixed)


def read_recipe(uri: str) -> Recipe:
    """What the features at `uri` are, committed or not."""
    return _recipe_in(uri, _read_about(uri))


def schema(recipe: Recipe) -> pa.Schema:
    """The schema of a part: item_id, num_distinct_frames, and the features with dtype and shape in their metadata."""
    fields = [pa.field(ITEM_ID, pa.string()), pa.field(NUM_DISTINCT_FRAMES, pa.int32()), pa.field(SOURCE, pa.string())]
    for column in recipe.columns:
        shape = ",".join(map(str, column.shape))
        metadata = {DTYPE_KEY: column.dtype.encode(), SHAPE_KEY: shape.encode()}
        element = pa.from_numpy_dtype(_numpy_dtype(column.dtype))
        fields.append(pa.field(str(column.name), pa.list_(element, math.prod(column.shape)), metadata=metadata))
    return pa.schema([*fields, *(pa.field(name, pa.string()) for name in recipe.text_names)])


def feature_table(
    recipe: Recipe,
    item_ids: Sequence[str],
    num_distinct_frames: Sequence[int],
    columns: Mapping[str, Any],
    sources: Sequence[str] = (),
) -> pa.Table:
    """Rows of a part; `columns[name]` is [len(item_ids), product of the shape], or texts. Raises `CastError`.

    `num_distinct_frames` below `recipe.frames` says that the video was short and frames were repeated. `sources` tell
    versions of the items' files apart.
    """
    sources = sources or [""] * len(item_ids)
    arrays = [
        pa.array(item_ids, pa.string()),
        pa.array(num_distinct_frames, pa.int32()),
        pa.array(sources, pa.string()),
    ]
    for name, dtype in ((str(column.name), column.dtype) for column in recipe.columns):
        values = cast(columns[name], dtype, name)
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]))
    arrays += [pa.array(columns[name], pa.string()) for name in recipe.text_names]
    return pa.Table.from_arrays(arrays, schema=schema(recipe))


def write_part(uri: str, recipe: Recipe, rows: pa.Table, generation: int = 0, made_with: Iterable[str] = ()) -> str:
    """Write rows of `feature_table` as one part of a writer's `generation`. Returns its name.

    `made_with`: see `provenance`.
    """
    target = schema(recipe).with_metadata(provenance.metadata(made_with))
    rows = rows.select(target.names).cast(target)
    return _write_named(uri, PARTS, generation, rows.column(ITEM_ID).to_pylist(), rows, recipe.dtype)


def write_rejected(uri: str, rows: pa.Table | Sequence[Mapping[str, Any]], generation: int = 0) -> str:
    """Write one file of rejected items, each with its stage, error and message. Returns its name."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([*rows], schema=REJECTED_SCHEMA)
    table = table.select([*REJECTED_COLUMNS]).cast(REJECTED_SCHEMA)
    return _write_named(uri, REJECTED, generation, table[ITEM_ID].to_pylist(), table, "")


def cast(values: torch.Tensor, dtype: str, name: str) -> np.ndarray:
    """[N, D] in the stored dtype; bfloat16 as its bits in uint16, pixels as they are.

    Raises `CastError` rather than store an inf, or a vector that `rounding.first_loss` finds lost.
    """
    import torch  # here, for processes that only decode or write do without it

    from lvlmrec.features import rounding

    values = values.detach().cpu()
    if dtype == PIXEL_DTYPE:
        if values.dtype != torch.uint8:
            raise CastError(f"{name}: {values.dtype} are no pixels; use recipe.dtype=float32")
        return values.numpy()
    stored = values.to(getattr(torch, dtype))
    if not torch.isfinite(stored).all():
        if not torch.isfinite(values).all():
            raise CastError(f"{name}: the model gave a value that is not finite")
        peak = float(values.abs().max())
        raise CastError(f"{name}: {peak:.4g} overflows {dtype}; use recipe.dtype=bfloat16 or float32, or drop this tap")
    if loss := rounding.first_loss(values, stored):
        remedy = f"use recipe.dtype={rounding.WIDER[dtype]}, or drop this tap"
        raise CastError(f"{name}: in {dtype} {loss}; {remedy}")
    return stored.view(torch.uint16).numpy() if dtype == "bfloat16" else stored.numpy()


def read_texts(uri: str) -> pd.DataFrame:
    """What the prompts of a committed feature set were answered: item_id, and a column by each prompt's name."""
    feature_set = read(uri)
    names = {name: name.removesuffix(f"/{ANSWER}") for name in feature_set.recipe.text_names if name.endswith(ANSWER)}
    index, tables = feature_set.index, []
    for part in sorted(index[PART].unique().to_pylist()):
        rows = index.filter(pc.equal(index[PART].cast(pa.string()), part))[ROW]
        table = storage.read_table(storage.join(feature_set.uri, PARTS, part), [ITEM_ID, *names])
        tables.append(table.take(rows))
    empty = pa.schema([pa.field(name, pa.string()) for name in (ITEM_ID, *names)]).empty_table()
    texts = pa.concat_tables([empty, *tables], promote_options="default").to_pandas()
    return texts.rename(columns=names)


def is_committed(uri: str) -> bool:
    """Whether there is an index, be it an empty one."""
    return bool(segments.segments(uri))


def read_index(uri: str) -> pa.Table:
    """The committed index, `index.COLUMNS`, empty when nothing is committed yet."""
    return segments.read(uri).latest()


def read_rejected(uri: str) -> pa.Table:
    """All rejected items of a feature set, REJECTED_COLUMNS, each once, as the last writer saw it."""
    files = storage.list_files(storage.join(uri, REJECTED))
    with ThreadPoolExecutor(segments.READ_AT_ONCE) as threads:
        tables = list(threads.map(lambda file: storage.read_table(file.uri).cast(REJECTED_SCHEMA), files))
    return segments.last_of_each(pa.concat_tables([REJECTED_SCHEMA.empty_table(), *tables]))


def keep_rejected(uri: str, rows: pa.Table, generation: int) -> None:
    """Make `rows`, some or all of `read_rejected`, the only rejections: the others' items are tried again."""
    files = storage.list_files(storage.join(uri, REJECTED))
    kept = write_rejected(uri, rows, generation) if len(rows) else ""
    for file in files:
        if not file.uri.endswith(f"/{kept}"):
            storage.remove(file.uri)


def adopt(uri: str, generation: int) -> int:
    """Commit the rows of whole parts that no segment lists: a killed run wrote them. Returns how many parts."""
    known = segments.read(uri).rows[PART].unique()
    names = pa.array(
        [file.uri.rsplit("/", 1)[-1] for file in storage.iter_files(storage.join(uri, PARTS))], pa.string()
    )
    new = sorted(names.filter(pc.invert(pc.is_in(names, value_set=known.cast(pa.string())))).to_pylist())
    if new:
        with ThreadPoolExecutor(segments.READ_AT_ONCE) as threads:
            found = list(threads.map(lambda name: _rows_of(uri, name), new))
        rows = pa.concat_tables(rows for rows, _ in found).unify_dictionaries()
        latest = segments.last_of_each(rows, rows[GENERATION].to_numpy())
        segments.write(uri, latest, generation, {each for _, known in found for each in known})
    return len(new)


def commit(uri: str, generation: int = 0) -> pa.Table:
    """Commit every whole part, also where there is none. Returns the index."""
    adopt(uri, generation)
    return finish(uri, generation)


def commit_parts(uri: str, items: Mapping[str, Sequence[str]], generation: int, made_with: Iterable[str]) -> None:
    """Commit parts that this writer just wrote, by the items in them, as one segment."""
    rows = [_rows_in(part, pa.array(ids, pa.string()), pa.array([""] * len(ids))) for part, ids in items.items()]
    if rows:
        segments.write(uri, pa.concat_tables(rows).unify_dictionaries(), generation, made_with)


def finish(uri: str, generation: int) -> pa.Table:
    """End a writer's work, whose parts are committed. An index with no rows is one, too. Returns the index."""
    if not is_committed(uri):
        segments.write(uri, segments.COLUMNS.empty_table(), generation)
    if len(storage.list_files(storage.join(uri, REJECTED))) > MANY_FILES:
        keep_rejected(uri, read_rejected(uri), generation)
    return read_index(uri)


def vacuum(uri: str, generation: int) -> dict[str, int]:
    """Merge the segments and remove the parts that none of their last rows is in; how many files and bytes."""
    before = len(segments.segments(uri))
    listed = {*segments.merge(uri, generation).rows[PART].unique().to_pylist()}
    unlisted = [f for f in storage.iter_files(storage.join(uri, PARTS)) if f.uri.rsplit("/", 1)[-1] not in listed]
    for file in unlisted:
        storage.remove(file.uri)
    return {
        "merged_segments": before,
        "removed_parts": len(unlisted),
        "removed_bytes": sum(file.size for file in unlisted),
    }


def _read_about(uri: str) -> dict[str, Any]:
    """The content of recipe.json. Raises `InputError` when it is no JSON object."""
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(storage.join(uri, RECIPE)))
    except ValueError as error:
        raise InputError(f"features {uri!r}: recipe.json is damaged: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"features {uri!r}: recipe.json is damaged: no JSON object")
    return content


def _recipe_in(uri: str, about: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.from_json({key: value for key, value in about.items() if key not in RECORDED})
    except InputError as error:
        raise type(error)(f"features {uri!r}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = one_line(f"{type(error).__name__}: {error}")
        raise InputError(f"features {uri!r}: recipe.json is damaged: {what}") from error


def _rows_of(uri: str, part: str) -> tuple[pa.Table, list[str]]:
    """The rows of a part as a segment lists them, and what they were made with."""
    table = storage.read_table(storage.join(uri, PARTS, part), [ITEM_ID, SOURCE])
    rows = _rows_in(part, *(table[name].combine_chunks() for name in (ITEM_ID, SOURCE)))
    return rows, provenance.read(table.schema.metadata)


def _rows_in(part: str, item_ids: pa.Array, sources: pa.Array) -> pa.Table:
    number = len(item_ids)
    return segments.rows_of(item_ids, [part] * number, pa.array(range(number), pa.int64()), sources)


def _write_named(uri: str, folder: str, generation: int, item_ids: Sequence[str], table: pa.Table, dtype: str) -> str:
    digest = hashlib.blake2b("\n".join(item_ids).encode(), digest_size=10).hexdigest()
    name = f"{folder.removesuffix('s')}-{generation:06d}-{digest}.parquet"
    vectors = [f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)]
    # Parquet has no integers below 4 bytes: of pixels and of bfloat16 bits compression leaves what there is.
    # DuckDB does not read BYTE_STREAM_SPLIT of float16.
    split = [f"{name}.list.element" for name in vectors if dtype != "float16"]
    is_plain = dtype in ("float16", "float32")  # else a page is unpacked as a whole, and no row has a place of its own
    storage.write_table(
        storage.join(uri, folder, name),
        table,
        # Parquet's defaults cost 5x on vectors.
        compression="none" if is_plain else "zstd",
        use_dictionary=False,
        write_statistics=False,
        use_byte_stream_split=split or False,
        store_schema=True,
        one_page=is_plain,
    )
    return name


def _numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)
