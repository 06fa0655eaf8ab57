"""Feature sets in object storage: parts, rejected items, and the index that commits them.

    <store>/<name>-<fingerprint>/
      recipe.json        what the features are
      parts/*.parquet    item_id, num_distinct_frames (0: no video was shown), and one fixed-size-list column per
                         feature; of several tokens per item, [K, D], the rows one after another; generated texts
      rejected/*.parquet item_id, uri, stage, error, message
      index.parquet      item_id -> part, row; written last, atomically: readers see only what it lists

A part is named after the items in it, so that a retried task writes the same file again. What a killed run had
written is adopted by the next one: a part is whole or absent, and its first row for an item wins.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from lvlmrec import storage
from lvlmrec.columns import ERROR, ITEM_ID, MESSAGE, NUM_DISTINCT_FRAMES, PART, ROW, STAGE, URI
from lvlmrec.errors import InputError
from lvlmrec.features.recipe import ANSWER, SIZES, Recipe
from lvlmrec.taps import FeatureName

INDEX = "index.parquet"
RECIPE = "recipe.json"
PARTS = "parts"
REJECTED = "rejected"
REJECTED_COLUMNS = (ITEM_ID, URI, STAGE, ERROR, MESSAGE)
INDEX_COLUMNS = (ITEM_ID, PART, ROW)
DTYPE_KEY = b"lvlmrec.dtype"
SHAPE_KEY = b"lvlmrec.shape"


class CastError(ValueError):
    """A feature does not fit the stored dtype, or is not finite; the message names the feature and the remedy."""


@dataclass(frozen=True)
class FeatureSet:
    """A committed feature set: `index` maps each item to its part and row."""

    uri: str
    recipe: Recipe
    index: pd.DataFrame

    @property
    def feature_names(self) -> list[str]:
        """Column names `prompt/tap/pooling`, in recipe order."""
        return [str(name) for name in self.recipe.feature_names]

    @property
    def digest(self) -> str:
        """16 hex digits that change with the recipe or with any item of the index."""
        rows = pd.util.hash_pandas_object(self.index, index=False).to_numpy()
        return hashlib.blake2b(self.recipe.fingerprint.encode() + rows.tobytes(), digest_size=8).hexdigest()


def locate(store: str, name: str, recipe: Recipe) -> str:
    """The URI of the feature set of `recipe` in `store`."""
    return storage.join(storage.absolute(store), f"{name}-{recipe.fingerprint}")


def create(uri: str, recipe: Recipe) -> None:
    """Write recipe.json unless it is there; versions are recorded, they are no part of the fingerprint."""
    if storage.exists(storage.join(uri, RECIPE)):
        return
    versions = {package: version(package) for package in ("torch", "transformers", "av", "numpy")}
    content = recipe.to_json() | {"fingerprint": recipe.fingerprint, "versions": versions}
    storage.write_bytes(storage.join(uri, RECIPE), json.dumps(content, indent=2).encode())


def committed(store: str) -> list[str]:
    """The URIs of the committed feature sets in a store."""
    uri = storage.absolute(store)
    indexes = [f.uri for f in storage.list_files(uri, recursive=True) if f.uri.endswith(f"/{INDEX}")]
    return [index.removesuffix(f"/{INDEX}") for index in indexes]


def find(uri: str) -> str:
    """The feature set at `uri`, or the only committed one of the store at `uri`. Raises `InputError`."""
    uri = storage.absolute(uri)
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
    """Open a committed feature set. Raises `InputError` when there is none."""
    uri = find(uri)
    recipe = read_recipe(uri)
    try:
        index = storage.read_table(storage.join(uri, INDEX)).to_pandas()
    except FileNotFoundError as error:
        raise InputError(
            f"features {uri!r}: not committed: no {INDEX}; run the extraction again to finish it"
        ) from error
    return FeatureSet(uri, recipe, index)


def read_recipe(uri: str) -> Recipe:
    """What the features at `uri` are, committed or not."""
    content = json.loads(storage.read_bytes(storage.join(uri, RECIPE)))
    return Recipe.from_json({key: value for key, value in content.items() if key not in ("fingerprint", "versions")})


def schema(recipe: Recipe) -> pa.Schema:
    """The schema of a part: item_id, num_distinct_frames, and the features with dtype and shape in their metadata."""
    fields = [pa.field(ITEM_ID, pa.string()), pa.field(NUM_DISTINCT_FRAMES, pa.int32())]
    for name in recipe.feature_names:
        dtype, shape = _stored_dtype(recipe, name), recipe.shape(name)
        metadata = {DTYPE_KEY: dtype.encode(), SHAPE_KEY: ",".join(map(str, shape)).encode()}
        element = pa.from_numpy_dtype(_numpy_dtype(dtype))
        fields.append(pa.field(str(name), pa.list_(element, math.prod(shape)), metadata=metadata))
    return pa.schema([*fields, *(pa.field(name, pa.string()) for name in recipe.text_names)])


def feature_table(
    recipe: Recipe, item_ids: Sequence[str], num_distinct_frames: Sequence[int], columns: Mapping[str, Any]
) -> pa.Table:
    """Rows of a part; `columns[name]` is [len(item_ids), product of the shape], or texts. Raises `CastError`.

    `num_distinct_frames` below `recipe.frames` says that the video was short and frames were repeated.
    """
    arrays = [pa.array(item_ids, pa.string()), pa.array(num_distinct_frames, pa.int32())]
    for name in recipe.feature_names:
        values = cast(columns[str(name)], _stored_dtype(recipe, name), str(name))
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]))
    arrays += [pa.array(columns[name], pa.string()) for name in recipe.text_names]
    return pa.Table.from_arrays(arrays, schema=schema(recipe))


def write_part(uri: str, recipe: Recipe, rows: pa.Table) -> str:
    """Write rows of `feature_table` as one part. Returns its name."""
    rows = rows.select(schema(recipe).names).cast(schema(recipe))
    return _write_named(uri, PARTS, rows.column(ITEM_ID).to_pylist(), rows, recipe.dtype)


def write_rejected(uri: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Write one file of rejected items, each with its stage, error and message. Returns its name."""
    table = pa.Table.from_pylist([{c: row[c] for c in REJECTED_COLUMNS} for row in rows])
    return _write_named(uri, REJECTED, [row[ITEM_ID] for row in rows], table, "")


def cast(values: torch.Tensor, dtype: str, name: str) -> np.ndarray:
    """[N, D] in the stored dtype; bfloat16 as its bits in uint16. Raises `CastError` rather than store an inf."""
    values = values.detach().cpu()
    if not torch.isfinite(values).all():
        raise CastError(f"{name}: the model gave a value that is not finite")
    stored = values.to(getattr(torch, dtype))
    if not torch.isfinite(stored).all():
        peak = float(values.abs().max())
        raise CastError(f"{name}: {peak:.4g} overflows {dtype}; use recipe.dtype=bfloat16 or float32, or drop this tap")
    return stored.view(torch.uint16).numpy() if dtype == "bfloat16" else stored.numpy()


def read_texts(uri: str) -> pd.DataFrame:
    """What the prompts of a committed feature set were answered: item_id, and a column by each prompt's name."""
    feature_set = read(uri)
    names = {name: name.removesuffix(f"/{ANSWER}") for name in feature_set.recipe.text_names if name.endswith(ANSWER)}
    frames = []
    for part, rows in feature_set.index.groupby(PART, sort=True):
        table = storage.read_table(storage.join(feature_set.uri, PARTS, str(part)), [ITEM_ID, *names])
        frames.append(table.take(rows[ROW].to_numpy()).to_pandas())
    texts = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[ITEM_ID, *names], dtype="str")
    return texts.rename(columns=names)


def read_index(uri: str) -> pd.DataFrame:
    """The committed index, empty when nothing is committed yet."""
    try:
        return storage.read_table(storage.join(uri, INDEX)).to_pandas()
    except FileNotFoundError:
        return pd.DataFrame(
            {ITEM_ID: pd.Series(dtype="str"), PART: pd.Series(dtype="str"), ROW: pd.Series(dtype="int64")}
        )


def read_rejected(uri: str) -> pd.DataFrame:
    """All rejected items of a feature set with stage, error and message, each once."""
    tables = [storage.read_table(f.uri) for f in storage.list_files(storage.join(uri, REJECTED))]
    if not tables:
        return pd.DataFrame({column: pd.Series(dtype="str") for column in REJECTED_COLUMNS})
    return pa.concat_tables(tables).to_pandas().drop_duplicates(ITEM_ID).reset_index(drop=True)


def forget_rejected(uri: str) -> None:
    """Drop the rejections of a feature set, so that its items are tried again."""
    storage.remove(storage.join(uri, REJECTED))


def pending_index(uri: str) -> pd.DataFrame:
    """The index as `commit` would write it: what is committed, then the whole parts that no index lists yet."""
    index = read_index(uri)
    known = set(index[PART])
    frames = [index]
    for file in storage.list_files(storage.join(uri, PARTS)):
        name = file.uri.rsplit("/", 1)[-1]
        if name not in known:
            items = storage.read_table(file.uri, [ITEM_ID]).column(ITEM_ID).to_pylist()
            frames.append(pd.DataFrame({ITEM_ID: items, PART: name, ROW: range(len(items))}))
    return pd.concat(frames, ignore_index=True).drop_duplicates(ITEM_ID).reset_index(drop=True)


def commit(uri: str) -> pd.DataFrame:
    """Write the index: from here on readers see every whole part. Returns the index."""
    index = pending_index(uri)
    if not index.equals(read_index(uri)) or not storage.exists(storage.join(uri, INDEX)):
        schema = pa.schema([(ITEM_ID, pa.string()), (PART, pa.string()), (ROW, pa.int64())])
        storage.write_table(storage.join(uri, INDEX), pa.Table.from_pandas(index, schema=schema, preserve_index=False))
    return index


def _write_named(uri: str, folder: str, item_ids: Sequence[str], table: pa.Table, dtype: str) -> str:
    digest = hashlib.blake2b("\n".join(item_ids).encode(), digest_size=10).hexdigest()
    name = f"{folder.removesuffix('s')}-{digest}.parquet"
    vectors = [f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)]
    # DuckDB does not read BYTE_STREAM_SPLIT of float16.
    split = [f"{name}.list.element" for name in vectors if dtype != "float16"]
    storage.write_table(
        storage.join(uri, folder, name),
        table,
        # Parquet's defaults cost 5x on vectors. uint16 has no 2-byte physical type: only bfloat16 needs compression.
        compression="zstd" if dtype == "bfloat16" or not dtype else "none",
        use_dictionary=False,
        write_statistics=False,
        use_byte_stream_split=split or False,
        store_schema=True,
    )
    return name


def _stored_dtype(recipe: Recipe, name: FeatureName) -> str:
    """Counts keep float32: in float16 they are exact up to 2048 only."""
    return "float32" if name.pooling.endswith(SIZES) else recipe.dtype


def _numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)
