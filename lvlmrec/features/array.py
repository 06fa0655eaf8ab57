"""Features of a catalogue, read in place: one memory-mapped file per column, in item_index order.

Shapes: I items, row 0 is the padding item; L columns; T tokens of an item (a pooled vector is one token); D dim of the
widest column; N items asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import pad

from lvlmrec.features import moments
from lvlmrec.features.cache import ARRAY, Cache, InUse, digest_of, key_of
from lvlmrec.features.mapping import side_by_side

ROWS_AT_ONCE = 4096
MOMENTS = "moments.safetensors"
NO_VARIANCE = 1e-12  # of the mean square: below it is rounding noise


class Projection(NamedTuple):
    """What features were turned by: (h - mean [L, D]) @ components [L, D, P]."""

    mean: Tensor
    components: Tensor


@dataclass(frozen=True)
class Column:
    """One column of the copy.

    name    `prompt/tap/pooling`; of several feature sets `feature_set:prompt/tap/pooling`
    number  of its feature set
    key     names its content, and as `read` by items: those of a control read the rows of others
    width   D of this column
    sizes   the entry of how many tokens were merged into each [I + 1, T]; empty where none were
    in_use  keeps its entries in the cache as long as this column is in use
    """

    name: str
    number: int
    key: str
    read: str
    width: int
    dtype: str
    sizes: str = ""
    in_use: tuple[InUse, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class FeatureArray:
    """Features of a catalogue.

    digest  names feature sets, columns and id map
    recipe  fingerprints of the feature sets' recipes
    segments of each feature set's index, those that were read
    tokens  T
    missing bool [I + 1, L], no feature: zeros (after scaling: the mean)
    order   int64 [I + 1], the row read for each item; None: its own (a control gives items the rows of others)
    mean, std float32 [L, D], the scaling applied by `rows`; None leaves features as they are
    projection what the features in the files were made by, None when they are as stored
    item_shape (F, 3, H, W) of an item's frames, each a token in its row; (): no frames
    mixed   in what parts of a feature set were made differently, as `store.FeatureSet.mixed`
    """

    cache: Cache
    columns: tuple[Column, ...]
    digest: str
    recipe: str
    missing: np.ndarray
    tokens: int = 1
    order: np.ndarray | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    projection: Projection | None = None
    item_shape: tuple[int, ...] = ()
    segments: tuple[str, ...] = ()
    mixed: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(column.width for column in self.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """(I + 1, L, D), of several tokens (I + 1, L, T, D)."""
        tokens = (self.tokens,) if self.tokens > 1 else ()
        return len(self.missing), len(self.columns), *tokens, max(self.widths)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(columns, dim) of each feature set."""
        return [(len(columns), columns[0].width) for columns in self._by_set()]

    @property
    def files(self) -> tuple[tuple[tuple[Path, ...], str], ...]:
        """The files of each feature set's columns, and their dtype."""
        return tuple((self._paths([c.key for c in columns]), columns[0].dtype) for columns in self._by_set())

    def stored(self) -> list[Tensor]:
        """The columns of each feature set as they are stored, [I + 1, columns, D], of several tokens [.., T, D].

        Rows are as `row` says.
        """
        return [side_by_side(paths, dtype) for paths, dtype in self.files]

    def rows(self, item_index: np.ndarray) -> Tensor:
        """float32 [N, L, D], of several tokens [N, L, T, D]: the features of the items at `item_index` [N], scaled."""
        row, dim = torch.from_numpy(self.row(item_index)), max(self.widths)
        parts = [stored.index_select(0, row).float() for stored in self.stored()]
        values = torch.cat([pad(part, (0, dim - part.shape[-1])) for part in parts], dim=1)
        if self.mean is None or self.std is None:
            return values
        if self.tokens == 1:
            values = (values - self.mean) / self.std
            values[torch.from_numpy(self.is_missing(item_index))] = 0.0
        else:
            values = (values - self.mean[:, None]) / self.std[:, None]
            values[self.sizes(item_index) == 0] = 0.0
        return values

    def sizes(self, item_index: np.ndarray) -> Tensor:
        """float32 [N, L, T]: how many tokens were merged into each; 1 of what was not merged, 0 where there is none."""
        row, present = torch.from_numpy(self.row(item_index)), torch.from_numpy(~self.is_missing(item_index)).float()
        parts, first = [], 0
        for columns in self._by_set():
            if columns[0].sizes:
                parts.append(side_by_side(self._paths([c.sizes for c in columns]), "float32").index_select(0, row))
            else:
                parts.append(present[:, first : first + len(columns), None].repeat(1, 1, self.tokens))
            first += len(columns)
        return torch.cat(parts, dim=1)

    def is_missing(self, item_index: np.ndarray) -> np.ndarray:
        """bool [N, L]: the items at `item_index` [N] that have no feature, by column."""
        return self.missing[self.row(item_index)]

    def row(self, item_index: np.ndarray) -> np.ndarray:
        """int64 [N]: the rows of the files that the items at `item_index` [N] read."""
        return np.asarray(item_index if self.order is None else self.order[item_index], dtype=np.int64)

    def is_here(self) -> bool:
        """Whether this machine has the files."""
        return all(path.exists() for paths, _ in self.files for path in paths)

    def select(self, names: Sequence[str]) -> FeatureArray:
        """The same array with the columns `names` only."""
        kept = [self.names.index(name) for name in names]
        part = "" if list(names) == list(self.names) else f"-{key_of(*names)}"
        return replace(
            self,
            digest=f"{self.digest}{part}",
            columns=tuple(self.columns[number] for number in kept),
            missing=self.missing[:, kept],
            mean=None if self.mean is None else self.mean[kept],
            std=None if self.std is None else self.std[kept],
            projection=None if self.projection is None else Projection(*(part[kept] for part in self.projection)),
        )

    def shuffled(self, seed: int) -> FeatureArray:
        """A control: every item gets the features of another, drawn once; what features say of an item is gone."""
        order = np.concatenate([[0], 1 + np.random.default_rng(seed).permutation(len(self.missing) - 1)])
        mark = f"-shuffled-{seed}"
        columns = tuple(replace(column, read=column.read + mark) for column in self.columns)
        return replace(self, columns=columns, order=order, digest=self.digest + mark)

    def standardized(self, item_index: np.ndarray) -> FeatureArray:
        """Scaled per dimension to mean 0 and variance 1 over the items at `item_index` (those of training)."""
        mean, variance, squares = self.moments(item_index)
        # A dimension that does not vary carries nothing; dividing by its rounding noise would make it loud.
        std = torch.where(variance > NO_VARIANCE * squares, variance.sqrt(), torch.inf)
        return replace(self, mean=mean.float(), std=std.float())

    def moments(self, item_index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and mean square of the unscaled features of the items that have them, float64 [L, D].

        Of merged tokens, each counts as often as tokens were merged into it. They are kept in the cache, for every run
        on the array needs those of the same items.
        """
        key = key_of(self.digest, "moments", digest_of(item_index))
        if in_use := self.cache.use(key):
            found = load((in_use.about.parent / MOMENTS).read_bytes())
            return found["mean"], found["variance"], found["squares"]
        made = self.compute_moments(item_index)
        kept = dict(zip(("mean", "variance", "squares"), made, strict=True))
        # A cache that others filled may be read-only.
        with suppress(OSError), self.cache.publishing(key, {"moments_of": self.digest}) as working:
            (working / MOMENTS).write_bytes(save(kept))
        return made

    def compute_moments(self, item_index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The same, not kept."""
        index = np.asarray(item_index)
        if self.tokens > 1:
            total, squares, count = self._sums_of_tokens(index)
        else:
            columns = [column for stored in self.stored() for column in stored.unbind(1)]
            rows = torch.from_numpy(self.row(index))
            total, squares = moments.sums(columns, rows, max(self.widths), ROWS_AT_ONCE)  # zeros where there is none
            count = torch.from_numpy((~self.is_missing(index)).sum(0))[:, None]
        count = count.clamp_min(1)
        mean, squares = total / count, squares / count
        return mean, (squares - mean.square()).clamp_min(0.0), squares

    def _sums_of_tokens(self, item_index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of tokens and of their squares, float64 [L, D], and the number of tokens merged into them [L, 1]."""
        raw, (_, num_columns, _, dim) = replace(self, mean=None, std=None), self.shape
        total, squares = torch.zeros(2, num_columns, dim, dtype=torch.float64)
        count = torch.zeros(num_columns, 1, dtype=torch.float64)
        at_once = max(1, moments.BYTES_AT_ONCE // (num_columns * self.tokens * dim * moments.BYTES_OF_A_VALUE))
        for start in range(0, len(item_index), at_once):
            block = item_index[start : start + at_once]
            values, sizes = raw.rows(block).double(), raw.sizes(block).double()
            total += torch.einsum("nlt,nltd->ld", sizes, values)
            squares += torch.einsum("nlt,nltd->ld", sizes, values.square_())
            count += sizes.sum((0, 2))[:, None]
        return total, squares, count

    def _paths(self, keys: Sequence[str]) -> tuple[Path, ...]:
        return tuple(self.cache.entry(key) / ARRAY for key in keys)

    def _by_set(self) -> list[list[Column]]:
        """The columns of each feature set."""
        return [
            list(group)
            for _, group in itertools.groupby(self.columns, key=lambda column: (column.number, column.width))
        ]
