"""The local memory-mapped copy of a feature set's columns, in item_index order, that training reads.

One `.npy` of [I + 1, L, D] per (feature set, columns, id map); row 0 is the padding item. Processes of one machine
share it through the page cache, so that trials and workers do not each load the features.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lvlmrec import storage
from lvlmrec.columns import ITEM_ID, PART, ROW
from lvlmrec.errors import InputError
from lvlmrec.features import store
from lvlmrec.features.store import FeatureSet
from lvlmrec.taps import READS_TEXT, parse_feature

ARRAY = "features.npy"
ABOUT = "about.json"
MAX_MISSING = 0.05  # above this share of items without features, the set belongs to another catalogue
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class FeatureArray:
    """Features of a catalogue, read in place.

    digest  16 hex digits of feature set, columns and id map
    recipe  fingerprint of the feature set's recipe
    names   the L columns, `prompt/tap/pooling`
    missing bool [I + 1], items without features: their rows are zeros (after scaling: the mean)
    order   int64 [I + 1], the row read for each item; None: its own (a control gives items the rows of others)
    mean, std float32 [L, D], the scaling applied by `rows`; None leaves features as they are
    """

    path: Path
    digest: str
    recipe: str
    names: tuple[str, ...]
    columns: tuple[int, ...]
    dtype: str
    missing: np.ndarray
    order: np.ndarray | None = None
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(I + 1, L, D)"""
        items, _, dim = np.load(self.path, mmap_mode="r").shape
        return items, len(self.columns), dim

    def rows(self, item_index: np.ndarray) -> torch.Tensor:
        """float32 [N, L, D]: the features of the items at `item_index` [N], scaled."""
        # Reopened at each call: a mapping is cheap to open and must not be pickled to a worker with its content.
        array = np.load(self.path, mmap_mode="r")
        row = np.asarray(item_index) if self.order is None else self.order[item_index]
        picked = np.ascontiguousarray(array[row[:, None], np.asarray(self.columns)[None, :]])
        values = torch.from_numpy(picked)
        values = values.view(torch.bfloat16).float() if self.dtype == "bfloat16" else values.float()
        if self.mean is not None and self.std is not None:
            values = (values - self.mean) / self.std
            values[torch.from_numpy(self.missing[row])] = 0.0
        return values

    def select(self, names: Sequence[str]) -> FeatureArray:
        """The same array with the columns `names` only."""
        kept = [self.names.index(name) for name in names]
        return replace(
            self,
            names=tuple(names),
            columns=tuple(self.columns[i] for i in kept),
            mean=None if self.mean is None else self.mean[kept],
            std=None if self.std is None else self.std[kept],
        )

    def shuffled(self, seed: int) -> FeatureArray:
        """A control: every item gets the features of another, drawn once; what features say of an item is gone."""
        order = np.concatenate([[0], 1 + np.random.default_rng(seed).permutation(len(self.missing) - 1)])
        return replace(self, order=order, digest=f"{self.digest}-shuffled-{seed}")

    def standardized(self, item_index: np.ndarray) -> FeatureArray:
        """Scaled per dimension to mean 0 and variance 1 over the items at `item_index` (those of training)."""
        row = np.asarray(item_index) if self.order is None else self.order[item_index]
        index = np.asarray(item_index)[~self.missing[row]]
        raw = replace(self, mean=None, std=None)
        total = squares = torch.zeros(self.shape[1:], dtype=torch.float64)
        for start in range(0, len(index), ROWS_AT_ONCE):
            values = raw.rows(index[start : start + ROWS_AT_ONCE]).double()
            total, squares = total + values.sum(0), squares + values.square().sum(0)
        mean = total / len(index)
        variance = (squares / len(index) - mean.square()).clamp_min(0.0)
        # A dimension that does not vary carries nothing; dividing by its rounding noise would make it loud.
        std = torch.where(variance > 1e-12 * squares / len(index), variance.sqrt(), torch.inf)
        return replace(self, mean=mean.float(), std=std.float())


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
        raise InputError(f"feature_columns {list(patterns)!r}: match no column; columns: {', '.join(names)}")
    widths = {feature_set.recipe.shape(parse_feature(name))[-1] for name in chosen}
    if len(widths) > 1:
        raise InputError(f"feature_columns {list(patterns)!r}: match features of different widths {sorted(widths)}")
    chosen.sort(key=lambda name: (parse_feature(name).prompt, parse_feature(name).pooling, parse_feature(name).tap))
    return [max(chosen, key=lambda name: parse_feature(name).tap)] if layers == "one" else chosen


def compact(feature_set: FeatureSet, names: Sequence[str], item_ids: Sequence[str], cache: str) -> FeatureArray:
    """Make, or find, the memory-mapped array of columns `names` for the items `item_ids` (item_index 1..I).

    Raises `InputError` when more than 5 % of the items have no features: the set is of another catalogue.
    """
    found = feature_set.index.set_index(ITEM_ID).reindex(list(item_ids))
    missing = np.concatenate([[True], found[PART].isna().to_numpy()])
    share = float(missing[1:].mean())
    if share > MAX_MISSING:
        raise InputError(
            f"features {feature_set.uri!r}: {share:.1%} of the dataset's {len(item_ids)} items have no features there; "
            f"it is a feature set of another catalogue (its ids: {', '.join(feature_set.index[ITEM_ID].head(3))}, ...)"
        )
    key = "\n".join([feature_set.digest, *names, "", *item_ids])
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    folder = Path(storage.absolute(cache), digest)
    if not (folder / ABOUT).exists():
        _write(feature_set, names, found, folder)
    return FeatureArray(
        folder / ARRAY,
        digest,
        feature_set.recipe.fingerprint,
        tuple(names),
        tuple(range(len(names))),
        feature_set.recipe.dtype,
        missing,
    )


def _write(feature_set: FeatureSet, names: Sequence[str], found, folder: Path) -> None:  # type: ignore[no-untyped-def]
    """Fill the array part by part in a folder of its own, then rename it: others see it whole or not at all."""
    (dim,) = feature_set.recipe.shape(parse_feature(names[0]))
    element = store.schema(feature_set.recipe).field(names[0]).type.value_type.to_pandas_dtype()
    working = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    working.mkdir(parents=True)
    try:
        shape = (len(found) + 1, len(names), dim)
        array = np.lib.format.open_memmap(working / ARRAY, mode="w+", dtype=element, shape=shape)
        rows_of = found.assign(item_index=range(1, len(found) + 1)).dropna(subset=[PART])
        for part, rows in rows_of.groupby(PART, sort=True):
            table = storage.read_table(storage.join(feature_set.uri, store.PARTS, str(part)), names)
            picked = table.take(rows[ROW].astype("int64").to_numpy())
            for column, name in enumerate(names):
                flat = picked[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                array[rows["item_index"].to_numpy(), column] = flat.reshape(-1, dim)
        array.flush()
        (working / ABOUT).write_text(json.dumps({"feature_set": feature_set.uri, "names": list(names), "shape": shape}))
        if not folder.exists():
            working.rename(folder)
    except OSError:
        if not (folder / ABOUT).exists():  # else another process finished the same array first
            raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
