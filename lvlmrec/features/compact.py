"""The local memory-mapped copy of feature sets' columns, in item_index order, that training reads.

One `.npy` of [I + 1, L, D] per (feature sets, columns, id map); row 0 is the padding item. The columns of several
feature sets stand one after the other, zeros behind those narrower than D. Processes of one machine share it through
the page cache, so that trials and workers do not each load the features.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load, save
from torch import Tensor

from lvlmrec import storage
from lvlmrec.columns import ITEM_ID, PART, ROW
from lvlmrec.errors import InputError, writing
from lvlmrec.features import store
from lvlmrec.features.imported import COUNTED
from lvlmrec.features.moments import sums
from lvlmrec.features.store import FeatureSet
from lvlmrec.taps import READS_TEXT, parse_feature

ARRAY = "features.npy"
ABOUT = "about.json"
MAX_MISSING = 0.05  # above this share of items without features, the set is taken for one of another catalogue
ROWS_AT_ONCE = 4096


class Projection(NamedTuple):
    """What features were turned by: (h - mean [L, D]) @ components [L, D, P]."""

    mean: Tensor
    components: Tensor


@dataclass(frozen=True)
class FeatureArray:
    """Features of a catalogue, read in place.

    digest  16 hex digits of feature sets, columns and id map
    recipe  fingerprints of the feature sets' recipes
    names   the L columns, `prompt/tap/pooling`; of several feature sets `feature_set:prompt/tap/pooling`
    columns where each of them stands in the file
    widths  the dim of each, sets: the number of its feature set
    missing bool [I + 1, columns of the file], no feature: zeros (after scaling: the mean)
    order   int64 [I + 1], the row read for each item; None: its own (a control gives items the rows of others)
    mean, std float32 [L, D], the scaling applied by `rows`; None leaves features as they are
    projection what the features in the file were made by, None when they are as stored
    item_shape (F, 3, H, W) of an item's frames, flat in its row; (): vectors
    """

    path: Path
    digest: str
    recipe: str
    names: tuple[str, ...]
    columns: tuple[int, ...]
    widths: tuple[int, ...]
    sets: tuple[int, ...]
    dtype: str
    missing: np.ndarray
    order: np.ndarray | None = None
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None
    projection: Projection | None = None
    item_shape: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(I + 1, L, D)"""
        items, _, dim = np.load(self.path, mmap_mode="r").shape
        return items, len(self.columns), dim

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(columns, dim) of each feature set."""
        return [(self.sets.count(k), self.widths[self.sets.index(k)]) for k in sorted(set(self.sets))]

    def rows(self, item_index: np.ndarray) -> torch.Tensor:
        """float32 [N, L, D]: the features of the items at `item_index` [N], scaled."""
        row, columns = torch.from_numpy(self.row(item_index)), torch.tensor(self.columns)
        values = self.stored()[row[:, None], columns].float()
        if self.mean is not None and self.std is not None:
            values = (values - self.mean) / self.std
            values[torch.from_numpy(self.is_missing(item_index))] = 0.0
        return values

    def stored(self) -> torch.Tensor:
        """The file itself, [I + 1, columns of the file, D] in its dtype: rows as `row` says, columns as `columns`."""
        # Opened at each call: a mapping is cheap to open and must not be pickled to a worker with its content.
        return read_stored(self.path, self.dtype)

    def is_missing(self, item_index: np.ndarray) -> np.ndarray:
        """bool [N, L]: the items at `item_index` [N] that have no feature, by column."""
        return self.missing[self.row(item_index)[:, None], np.asarray(self.columns)[None, :]]

    def row(self, item_index: np.ndarray) -> np.ndarray:
        """int64 [N]: the rows of the file that the items at `item_index` [N] read."""
        return np.asarray(item_index if self.order is None else self.order[item_index], dtype=np.int64)

    def select(self, names: Sequence[str]) -> FeatureArray:
        """The same array with the columns `names` only."""
        kept = [self.names.index(name) for name in names]
        part = "" if list(names) == list(self.names) else f"-{_hash(*names)}"
        return replace(
            self,
            digest=f"{self.digest}{part}",
            names=tuple(names),
            columns=tuple(self.columns[i] for i in kept),
            widths=tuple(self.widths[i] for i in kept),
            sets=tuple(self.sets[i] for i in kept),
            mean=None if self.mean is None else self.mean[kept],
            std=None if self.std is None else self.std[kept],
            projection=None if self.projection is None else Projection(*(part[kept] for part in self.projection)),
        )

    def shuffled(self, seed: int) -> FeatureArray:
        """A control: every item gets the features of another, drawn once; what features say of an item is gone."""
        order = np.concatenate([[0], 1 + np.random.default_rng(seed).permutation(len(self.missing) - 1)])
        return replace(self, order=order, digest=f"{self.digest}-shuffled-{seed}")

    def standardized(self, item_index: np.ndarray) -> FeatureArray:
        """Scaled per dimension to mean 0 and variance 1 over the items at `item_index` (those of training)."""
        mean, variance, squares = self.moments(item_index)
        # A dimension that does not vary carries nothing; dividing by its rounding noise would make it loud.
        std = torch.where(variance > 1e-12 * squares, variance.sqrt(), torch.inf)
        return replace(self, mean=mean.float(), std=std.float())

    def moments(self, item_index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and mean square of the unscaled features of the items that have them, float64 [L, D].

        They are kept beside the array, for every run on it needs those of the same items.
        """
        items = hashlib.blake2b(np.asarray(item_index, dtype=np.int64).tobytes(), digest_size=8).hexdigest()
        kept = self.path.with_name(f"moments-{_hash(self.digest, items)}.safetensors")
        if kept.exists():
            found = load(kept.read_bytes())
            return found["mean"], found["variance"], found["squares"]
        made = self.compute_moments(item_index)
        with suppress(OSError):  # a cache that others filled may be read-only
            storage.write_bytes(str(kept), save(dict(zip(("mean", "variance", "squares"), made, strict=True))))
        return made

    def compute_moments(self, item_index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The same, not kept."""
        index, rows = np.asarray(item_index), torch.from_numpy(self.row(item_index))
        total, squares = sums(self.stored(), rows, self.columns, ROWS_AT_ONCE)  # zeros where there is no feature
        count = torch.from_numpy((~self.is_missing(index)).sum(0))[:, None].clamp_min(1)
        mean, squares = total / count, squares / count
        return mean, (squares - mean.square()).clamp_min(0.0), squares


def read_stored(path: Path, dtype: str) -> Tensor:
    """A file of features, memory-mapped, [T, columns, D] in `dtype`."""
    # Copy-on-write, though nobody writes: torch warns of memory that it must not write to.
    values = torch.from_numpy(np.load(path, mmap_mode="c"))
    return values.view(torch.bfloat16) if dtype == "bfloat16" else values


def choose_columns(feature_set: FeatureSet, patterns: Sequence[str], layers: str) -> list[str]:
    """The feature columns that an item encoder reads.

    `patterns` are shell patterns such as `describe/llm.*/visual_mean`; none means every tap of the language model, or
    of the encoder, of the first prompt and pooling. An encoder with `layers="one"` takes the deepest of them. Columns
    of several tokens per item are never chosen. Raises `InputError`.
    """
    names = [str(name) for name in feature_set.recipe.vector_names]
    if patterns:
        chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    else:
        read = [name for name in names if parse_feature(name).tap.tower in READS_TEXT] or names
        first = parse_feature(read[0]) if read else None
        chosen = [
            n
            for n in read
            if first and (parse_feature(n).prompt, parse_feature(n).pooling) == (first.prompt, first.pooling)
        ]
    if not chosen:
        raise InputError(
            f"feature_columns {list(patterns)!r}: match no column; columns: {', '.join(names)} of {feature_set.uri!r}"
        )
    widths = {feature_set.recipe.shape(parse_feature(name))[-1] for name in chosen}
    if len(widths) > 1:
        raise InputError(f"feature_columns {list(patterns)!r}: match features of different widths {sorted(widths)}")
    chosen.sort(key=lambda name: (parse_feature(name).prompt, parse_feature(name).pooling, parse_feature(name).tap))
    return [max(chosen, key=lambda name: parse_feature(name).tap)] if layers == "one" else chosen


def compact(
    chosen: Sequence[tuple[FeatureSet, Sequence[str]]],
    item_ids: Sequence[str],
    cache: str,
    max_missing: float = MAX_MISSING,
) -> FeatureArray:
    """Make, or find, the memory-mapped array of feature sets and their columns for `item_ids` (item_index 1..I).

    Raises `InputError` when a larger share of the items than `max_missing` has no features in a set.
    """
    found = [_find_items(feature_set, item_ids, max_missing) for feature_set, _ in chosen]
    without = [np.concatenate([[True], rows[PART].isna().to_numpy()]) for rows in found]
    parts = [part for feature_set, names in chosen for part in (feature_set.digest, *names)]
    digest = _hash(*parts, "", *item_ids)
    folder = Path(storage.absolute(cache), digest)
    dtypes = {feature_set.recipe.dtype for feature_set, _ in chosen}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    sets = [k for k, (_, names) in enumerate(chosen) for _ in names]
    widths = [_width(feature_set, name) for feature_set, names in chosen for name in names]
    if not (folder / ABOUT).exists():
        shape = (len(item_ids) + 1, len(sets), max(widths))
        with publishing(folder, {"feature_sets": [s.uri for s, _ in chosen], "shape": shape}) as working:
            element = np.dtype("uint16" if dtype == "bfloat16" else dtype)
            array = _new_array(working / ARRAY, element, shape)
            for k, (feature_set, names) in enumerate(chosen):
                _fill(array, sets.index(k), feature_set, names, found[k])
            array.flush()
    return FeatureArray(
        path=folder / ARRAY,
        digest=digest,
        recipe="+".join(feature_set.recipe.fingerprint for feature_set, _ in chosen),
        names=_distinct_names(chosen),
        columns=tuple(range(len(sets))),
        widths=tuple(widths),
        sets=tuple(sets),
        dtype=dtype,
        missing=np.stack([without[k] for k in sets], axis=1),
        item_shape=_item_shape(chosen),
    )


def derive(
    array: FeatureArray,
    key: str,
    dim: int,
    rows_of: Callable[[int, np.ndarray], np.ndarray],
    projection: Projection | None = None,
) -> FeatureArray:
    """Make, or find, the float32 array [I + 1, L, dim] of what `rows_of` makes of `array`, beside it in the cache.

    `rows_of(column, item_index [N])` gives [N, dim]; it is asked for blocks of consecutive items, always the same.
    Items without a feature have none here. `key` says what `rows_of` depends on.
    """
    folder = array.path.parent.with_name(f"{array.digest}-{key}")
    items, num_columns, old_dim = array.shape
    missing = array.is_missing(np.arange(items))
    if not (folder / ABOUT).exists():
        with publishing(folder, {"made_of": array.digest, "shape": (items, num_columns, dim)}) as working:
            made = _new_array(working / ARRAY, np.dtype(np.float32), (items, num_columns, dim))
            for column in range(num_columns):
                for start in range(1, items, ROWS_AT_ONCE):
                    index = np.arange(start, min(start + ROWS_AT_ONCE, items))
                    made[start : index[-1] + 1, column] = rows_of(column, index)
                    made[index[missing[index, column]], column] = 0.0
            made.flush()
    return replace(
        array,
        path=folder / ARRAY,
        digest=folder.name,
        columns=tuple(range(num_columns)),
        widths=array.widths if dim == old_dim else (dim,) * num_columns,
        dtype="float32",
        missing=missing,
        order=None,
        projection=projection,
    )


def _hash(*texts: str) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()


def _find_items(feature_set: FeatureSet, item_ids: Sequence[str], max_missing: float) -> pd.DataFrame:
    """Part and row of each item, or nothing. Raises `InputError`."""
    check_counted(feature_set, item_ids)
    found = feature_set.index.set_index(ITEM_ID).reindex(list(item_ids))
    share = float(found[PART].isna().mean())
    if share > max_missing:
        ids = ", ".join(feature_set.index[ITEM_ID].head(3))
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
    rows = {*feature_set.index[ITEM_ID]}
    if rows.issuperset(item_ids):
        return
    rows |= {*store.read_rejected(feature_set.uri)[ITEM_ID]}
    outside = [item for item in item_ids if item not in rows]
    if not outside:
        return
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


def _width(feature_set: FeatureSet, name: str) -> int:
    return math.prod(feature_set.recipe.shape(parse_feature(name)))


def _item_shape(chosen: Sequence[tuple[FeatureSet, Sequence[str]]]) -> tuple[int, ...]:
    """The shape of an item's frames where they are all that was chosen."""
    shapes = [feature_set.recipe.shape(parse_feature(name)) for feature_set, names in chosen for name in names]
    return shapes[0] if len(shapes) == 1 and len(shapes[0]) > 1 else ()


def _distinct_names(chosen: Sequence[tuple[FeatureSet, Sequence[str]]]) -> tuple[str, ...]:
    """Column names; of several feature sets with the set's name in front. Raises `InputError` on a set given twice."""
    folders = [feature_set.uri.rstrip("/").rsplit("/", 1)[-1] for feature_set, _ in chosen]
    if len(set(folders)) < len(folders):
        raise InputError(f"features: {', '.join(folders)}: a feature set is given twice")
    if len(chosen) == 1:
        return tuple(chosen[0][1])
    return tuple(f"{folder}:{name}" for folder, (_, names) in zip(folders, chosen, strict=True) for name in names)


def _fill(array: np.ndarray, first: int, feature_set: FeatureSet, names: Sequence[str], found: pd.DataFrame) -> None:
    """Copy the columns of one feature set part by part into `array` [I + 1, L, D], from column `first` on."""
    bits = array.dtype != np.uint16 and feature_set.recipe.dtype == "bfloat16"  # among sets of other dtypes
    rows_of = found.assign(item_index=range(1, len(found) + 1)).dropna(subset=[PART])
    for part, rows in rows_of.groupby(PART, sort=True):
        table = storage.read_table(storage.join(feature_set.uri, store.PARTS, str(part)), names)
        picked = table.take(rows[ROW].astype("int64").to_numpy())
        for column, name in enumerate(names, first):
            flat = picked[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            values = flat.reshape(len(rows), -1)
            if bits:
                values = torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy()
            array[rows["item_index"].to_numpy(), column, : values.shape[1]] = values


def _new_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A memory-mapped array of zeros whose room on the disk is taken: a page without ends the process by a signal."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


@contextmanager
def publishing(folder: Path, about: Mapping[str, Any]) -> Iterator[Path]:
    """A working folder that is renamed to `folder` when its content is whole: others see all of it or nothing."""
    working = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        with writing(str(folder)):
            with suppress(FileExistsError):  # a file, which the next line says
                folder.parent.mkdir(parents=True, exist_ok=True)
            working.mkdir()
            yield working
            (working / ABOUT).write_text(json.dumps(about))
            if not folder.exists():
                working.rename(folder)
    except OSError:
        if not (folder / ABOUT).exists():  # else another process finished the same content first
            raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
