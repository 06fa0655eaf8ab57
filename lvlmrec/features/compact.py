"""The local memory-mapped copy of feature sets' columns, in item_index order, that training reads.

One `.npy` of [I + 1, D] per (feature set, column, id map), of several tokens per item [I + 1, T, D]; row 0 is the
padding item. Every choice of columns reads the same files. Processes of one machine share them through the page cache,
so that trials and workers do not each load the features.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lvlmrec import storage
from lvlmrec.columns import ITEM_ID, PART, ROW
from lvlmrec.errors import InputError
from lvlmrec.features import array as arrays
from lvlmrec.features import store
from lvlmrec.features.array import Column, FeatureArray
from lvlmrec.features.cache import GB, Cache, InUse, NewArray, key_of
from lvlmrec.features.imported import COUNTED
from lvlmrec.features.poolings.pooling import SIZES
from lvlmrec.features.sources import PIXELS
from lvlmrec.features.store import FeatureSet
from lvlmrec.taps import READS_TEXT, parse_feature

MAX_MISSING = 0.05  # above this share of items without features, the set is taken for one of another catalogue
FLOAT32 = np.dtype(np.float32)
PARTS_AT_ONCE = 8  # reading one from object storage is mostly waiting


def choose_columns(feature_set: FeatureSet, patterns: Sequence[str], layers: str) -> list[str]:
    """The feature columns that an item encoder reads.

    `patterns` are shell patterns such as `describe/llm.*/visual_mean`; none means every tap of the language model, or
    of the encoder, of the first prompt and pooling. An encoder with `layers="one"` takes the deepest of them. Columns
    of several tokens per item are chosen by patterns that end in the name of their pooling, as `*/merged_16`. Raises
    `InputError`.
    """
    vectors = [str(name) for name in feature_set.recipe.vector_names]
    tokens = [name for name in feature_set.feature_names if name not in vectors and not name.endswith(SIZES)]
    if patterns:
        asked = {pattern.rsplit("/", 1)[-1] for pattern in patterns}
        names = vectors + [name for name in tokens if parse_feature(name).pooling in asked]
        chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    else:
        read = [name for name in vectors if parse_feature(name).tap.tower in READS_TEXT] or vectors
        first = parse_feature(read[0]) if read else None
        chosen = [
            n
            for n in read
            if first and (parse_feature(n).prompt, parse_feature(n).pooling) == (first.prompt, first.pooling)
        ]
    if not chosen:
        raise InputError(
            f"feature_columns {list(patterns)!r}: match no column; columns: {', '.join(vectors + tokens)} of "
            f"{feature_set.uri!r}"
        )
    for what, number in (("widths", 1), ("numbers of tokens", 0)):
        found = {token_shape(feature_set, name)[number] for name in chosen}
        if len(found) > 1:
            raise InputError(f"feature_columns {list(patterns)!r}: match features of different {what} {sorted(found)}")
    chosen.sort(key=lambda name: (parse_feature(name).prompt, parse_feature(name).pooling, parse_feature(name).tap))
    return [max(chosen, key=lambda name: parse_feature(name).tap)] if layers == "one" else chosen


def token_shape(feature_set: FeatureSet, name: str) -> tuple[int, int]:
    """(T, D) of a column: a pooled vector is one token, and so is a frame."""
    shape = feature_set.recipe.column(parse_feature(name)).shape
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def is_frames(name: str) -> bool:
    """Whether a column holds pixels."""
    return parse_feature(name).pooling == PIXELS


class Chosen(NamedTuple):
    """Columns of a feature set, and the part and row, or nothing, of each of the catalogue's I items."""

    feature_set: FeatureSet
    names: Sequence[str]
    rows: pd.DataFrame


def compact(
    chosen: Sequence[tuple[FeatureSet, Sequence[str]]],
    item_ids: Sequence[str],
    cache: str,
    max_missing: float = MAX_MISSING,
    cache_gb: float = 0.0,
) -> FeatureArray:
    """Make, or find, the memory-mapped columns of feature sets for `item_ids` (item_index 1..I).

    `cache_gb` bounds the cache, 0: no bound. Raises `InputError` when a larger share of the items than `max_missing`
    has no features in a set, when the columns do not fit in the cache, or when sets differ in their tokens per item.
    """
    distinct = _distinct_names(chosen)
    tokens = {token_shape(feature_set, name)[0] for feature_set, names in chosen for name in names}
    if len(tokens) > 1:
        raise InputError(f"features: sets of {' and '.join(map(str, sorted(tokens)))} tokens per item; choose one kind")
    sets = [Chosen(each, names, _find_items(each, item_ids, max_missing)) for each, names in chosen]
    place = Cache(Path(cache), round(cache_gb * GB))
    columns = _columns(place, sets, key_of(*item_ids))
    without = [np.concatenate([[True], each.rows[PART].isna().to_numpy()]) for each in sets]
    return FeatureArray(
        cache=place,
        columns=tuple(replace(column, name=name) for column, name in zip(columns, distinct, strict=True)),
        digest=key_of(*(text for each, names in chosen for text in (each.digest, *names)), "", *item_ids),
        recipe="+".join(feature_set.recipe.fingerprint for feature_set, _ in chosen),
        missing=np.stack([without[column.number] for column in columns], axis=1),
        tokens=tokens.pop(),
        item_shape=_item_shape(chosen),
        segments=tuple(name for each, _ in chosen for name in each.segments),
        mixed="; ".join(feature_set.mixed for feature_set, _ in chosen if feature_set.mixed),
    )


def derive(
    array: FeatureArray,
    keys: Sequence[str],
    mark: str,
    dim: int | None,
    rows_of: Callable[[int, np.ndarray], np.ndarray],
) -> FeatureArray:
    """Make, or find, float32 columns of what `rows_of` makes of `array`, of `dim` each; None: of its own widths.

    `rows_of(column, item_index [N])` gives [N, dim], of several tokens [N, T, dim]; it is asked for blocks of
    consecutive items, always the same. Items without a feature have none here. `keys` name each column's content, and
    `mark` says what it depends on.
    """
    items, tokens = len(array.missing), (array.tokens,) if array.tokens > 1 else ()
    missing, every = array.is_missing(np.arange(items)), range(len(keys))
    columns = [
        replace(
            column,
            key=key,
            read=key,
            width=column.width if dim is None else dim,
            dtype="float32",
            sizes=key_of(key, SIZES) if column.sizes else "",
        )
        for column, key in zip(array.columns, keys, strict=True)
    ]
    wanted = [NewArray(column.key, FLOAT32, (items, *tokens, column.width)) for column in columns]
    wanted += [NewArray(column.sizes, FLOAT32, (items, array.tokens)) for column in columns if column.sizes]
    reads = [(number, rows_of) for number in every]
    reads += [(number, lambda c, i: array.sizes(i)[:, c].numpy()) for number in every if columns[number].sizes]

    def fill(filled: Sequence[np.ndarray], numbers: Sequence[int]) -> None:
        for values, (column, read) in zip(filled, (reads[number] for number in numbers), strict=True):
            for start in range(1, items, arrays.ROWS_AT_ONCE):
                index = np.arange(start, min(start + arrays.ROWS_AT_ONCE, items))
                values[start : index[-1] + 1] = read(column, index)
                values[index[missing[index, column]]] = 0.0

    in_use = array.cache.hold(wanted, {"made_of": array.digest, "by": mark}, fill)
    return replace(
        array,
        columns=tuple(_using(columns, in_use)),
        digest=f"{array.digest}-{mark}",
        missing=missing,
        order=None,
        projection=None,
    )


def _columns(cache: Cache, sets: Sequence[Chosen], ids: str) -> tuple[Column, ...]:
    """The columns of all sets in the cache, which are filled where they are not there; `ids` names the id map."""
    columns: list[Column] = []
    sources: list[tuple[int, str]] = []  # of each array of `wanted`: its set, and its column there
    wanted: list[NewArray] = []
    for number, each in enumerate(sets):
        merged = [name for name in each.names if f"{name}{SIZES}" in each.feature_set.feature_names]
        names = [*each.names, *(f"{name}{SIZES}" for name in merged)]
        keys = {name: key_of(each.feature_set.digest, name, ids) for name in names}
        sources += [(number, name) for name in names]
        wanted += [_new_array(each, name, key) for name, key in keys.items()]
        for name in each.names:
            width, sizes = token_shape(each.feature_set, name)[1], keys.get(f"{name}{SIZES}", "")
            dtype = each.feature_set.recipe.dtype
            columns.append(Column(name, number, keys[name], keys[name], width, dtype, sizes))

    def fill(filled: Sequence[np.ndarray], numbers: Sequence[int]) -> None:
        for number, each in enumerate(sets):
            mine = zip(filled, (sources[place] for place in numbers), strict=True)
            _fill(each, {name: array for array, (owner, name) in mine if owner == number})

    in_use = cache.hold(wanted, {"feature_sets": [each.feature_set.uri for each in sets]}, fill)
    return _using(columns, in_use)


def _using(columns: Sequence[Column], in_use: Sequence[InUse]) -> tuple[Column, ...]:
    """The columns with the locks of their entries among `in_use`."""
    held = {lock.about.parent.name: lock for lock in in_use}
    return tuple(
        replace(column, in_use=tuple(held[key] for key in (column.key, column.sizes) if key)) for column in columns
    )


def _new_array(each: Chosen, name: str, key: str) -> NewArray:
    tokens, width = token_shape(each.feature_set, name)
    dtype = "float32" if name.endswith(SIZES) else each.feature_set.recipe.dtype
    shape = (tokens, width) if tokens > 1 else (width,)
    return NewArray(key, np.dtype("uint16" if dtype == "bfloat16" else dtype), (len(each.rows) + 1, *shape))


def _fill(each: Chosen, arrays_of: Mapping[str, np.ndarray]) -> None:
    """Copy columns of one feature set into arrays [I + 1, ...] by name, each part read once."""
    rows_of = each.rows.assign(item_index=range(1, len(each.rows) + 1)).dropna(subset=[PART])

    def copy(part: tuple[str, pd.DataFrame]) -> None:
        name, rows = part
        at, wanted = storage.join(each.feature_set.uri, store.PARTS, name), rows[ROW].astype("int64").tolist()
        index, picked = rows["item_index"].to_numpy(), storage.read_table(at, [*arrays_of], wanted)
        for column, array in arrays_of.items():
            flat = picked[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            array[index] = flat.reshape(len(index), *array.shape[1:])

    if arrays_of:
        with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
            list(threads.map(copy, rows_of.groupby(PART, sort=True)))


def _find_items(feature_set: FeatureSet, item_ids: Sequence[str], max_missing: float) -> pd.DataFrame:
    """Part and row of each item, or nothing. Raises `InputError`."""
    check_counted(feature_set, item_ids)
    found = feature_set.rows(item_ids)
    share = float(found[PART].isna().mean())
    if share > max_missing:
        ids = ", ".join(feature_set.index[ITEM_ID].slice(0, 3).to_pylist())
        raise InputError(
            f"features {feature_set.uri!r}: {share:.1%} of the dataset's {len(item_ids)} items have no features there; "
            f"it is a feature set of another catalogue (its ids: {ids}, ...), or set max_missing_features, "
            f"now {max_missing:g}, to the share that may lack them"
        )
    return found


def check_counted(feature_set: FeatureSet, item_ids: Sequence[str]) -> None:
    """Raises `InputError` when an import counted the ids, and the dataset has items that are none of its rows.

    Such a dataset's ids are not the places of the rows, so that its other items would read each another's features.
    A row that was rejected is a row all the same.
    """
    if feature_set.ids_from not in COUNTED:
        return
    outside = _without(item_ids, feature_set.index[ITEM_ID])
    if not outside:
        return
    rejected = store.read_rejected(feature_set.uri)[ITEM_ID]
    outside = _without(outside, rejected)
    if not outside:
        return
    rows = {*feature_set.index[ITEM_ID].to_pylist(), *rejected.to_pylist()}
    first = COUNTED[feature_set.ids_from]
    ways = ["a file of the ids in the order of the rows"]
    for name, other in COUNTED.items():
        if {str(other + row) for row in range(len(rows))}.issuperset(item_ids):
            ways.insert(0, name)
    last, shown = first + len(rows) - 1, ", ".join(outside[:3]) + ", ..." * (len(outside) > 3)
    raise InputError(
        f"features {feature_set.uri!r}: imported with item_ids={feature_set.ids_from}, which counts its rows {first} "
        f"to {last}, and {len(outside)} of the dataset's {len(item_ids)} items are outside ({shown}), so that items "
        f"would read the rows of others; import it again with item_ids={' or '.join(ways)}"
    )


def _without(item_ids: Sequence[str], known: pa.ChunkedArray) -> list[str]:
    """Those of `item_ids` that are not known."""
    ids = pa.array(item_ids, pa.string())
    found: list[str] = ids.filter(
        pc.invert(pc.is_in(ids, value_set=known.filter(pc.is_in(known, value_set=ids))))
    ).to_pylist()
    return found


def _item_shape(chosen: Sequence[tuple[FeatureSet, Sequence[str]]]) -> tuple[int, ...]:
    """The shape of an item's frames where they are all that was chosen."""
    columns = [(feature_set, name) for feature_set, names in chosen for name in names]
    if len(columns) != 1 or not is_frames(columns[0][1]):
        return ()
    ((feature_set, name),) = columns
    return feature_set.recipe.column(parse_feature(name)).shape


def _distinct_names(chosen: Sequence[tuple[FeatureSet, Sequence[str]]]) -> tuple[str, ...]:
    """Column names; of several feature sets with the set's name in front. Raises `InputError` on a set given twice."""
    folders = [feature_set.uri.rstrip("/").rsplit("/", 1)[-1] for feature_set, _ in chosen]
    if len(set(folders)) < len(folders):
        raise InputError(f"features: {', '.join(folders)}: a feature set is given twice")
    if len(chosen) == 1:
        return tuple(chosen[0][1])
    return tuple(f"{folder}:{name}" for folder, (_, names) in zip(folders, chosen, strict=True) for name in names)
