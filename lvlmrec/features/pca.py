"""Principal components of features, fitted on training items alone.

Each column is centred and turned onto its own components of largest variance. With `feature_scaling: standardize`,
which follows, that is PCA whitening; with `none` the variances stay as they are. Of several tokens each is a row of
the fit, as often as tokens were merged into it. Fit and result are kept for each column by itself.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from lvlmrec.errors import InputError
from lvlmrec.features import array as arrays
from lvlmrec.features.array import FeatureArray, Projection
from lvlmrec.features.cache import digest_of, key_of
from lvlmrec.features.compact import derive

FILE = "pca.safetensors"
NO_VARIANCE = 1e-12  # of the largest variance: below it is rounding noise, which whitening would make loud


def reduce(array: FeatureArray, item_index: np.ndarray, num_components: int) -> FeatureArray:
    """`array` on the `num_components` components of the items at `item_index`; both are made once and then found.

    Raises `InputError` when a column has fewer dimensions, or there are not more items than components.
    """
    narrowest, with_features = min(array.widths), int((~array.is_missing(item_index)).sum(0).min())
    most = max(0, min(narrowest, with_features - 1))
    if num_components > most:
        raise InputError(
            f"feature_pca: {num_components}: the features have {narrowest} dimensions and {with_features} training "
            f"items; choices: 0 (off) to {most}"
        )
    return project(array, fit(array, item_index, num_components))


def fit(array: FeatureArray, item_index: np.ndarray, num_components: int) -> Projection:
    """The components of largest variance over the items at `item_index` that have features; found where they are kept.

    mean [L, D], components [L, D, num_components]; zeros behind the width of a column.
    """
    items, dim = np.asarray(item_index), max(array.widths)
    mean = torch.zeros(len(array.columns), dim)
    components = torch.zeros(len(array.columns), dim, num_components)
    for number, name in enumerate(array.names):
        one = array.select([name])
        mean[number, : one.widths[0]], components[number, : one.widths[0]] = _kept_fit(one, items, num_components)
    return Projection(mean, components)


def project(array: FeatureArray, projection: Projection) -> FeatureArray:
    """`array` turned onto the components: float32 [I + 1, L, P], of several tokens [I + 1, L, T, P]."""
    narrow = [
        (projection.mean[number, :width].contiguous(), projection.components[number, :width].contiguous())
        for number, width in enumerate(array.widths)
    ]

    def turn(column: int, item_index: np.ndarray) -> np.ndarray:
        mean, components = narrow[column]
        return ((array.select([array.names[column]]).rows(item_index)[:, 0] - mean) @ components).numpy()

    keys = [
        key_of(column.read, "pca", _content(Projection(*parts)))
        for column, parts in zip(array.columns, narrow, strict=True)
    ]
    turned = derive(array, keys, f"pca-{_content(projection)}", projection.components.shape[-1], turn)
    return replace(turned, projection=projection)


def _content(projection: Projection) -> str:
    return hashlib.blake2b(save(projection._asdict()), digest_size=8).hexdigest()


def _kept_fit(one: FeatureArray, item_index: np.ndarray, num_components: int) -> tuple[Tensor, Tensor]:
    """`_fit_column`, made once for a column, its items and the number of components."""
    key = key_of(one.columns[0].read, f"fit-{num_components}", digest_of(item_index))
    if in_use := one.cache.use(key):
        found = load(Path(in_use.about.parent, FILE).read_bytes())
        return found["mean"], found["components"]
    mean, components = _fit_column(one, item_index, num_components)
    about = {"fit_of": one.columns[0].name, "num_components": num_components}
    # A cache that others filled may be read-only.
    with suppress(OSError), one.cache.publishing(key, about) as working:
        Path(working, FILE).write_bytes(save({"mean": mean, "components": components}))
    return mean, components


def _fit_column(one: FeatureArray, item_index: np.ndarray, num_components: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and components [D, P] of the only column of `one`; memory O(D^2) whatever the number of items."""
    index = item_index[~one.is_missing(item_index)[:, 0]]
    mean = one.compute_moments(index)[0][0]
    covariance, count = torch.zeros(len(mean), len(mean), dtype=torch.float64), 0.0
    at_once = max(1, arrays.ROWS_AT_ONCE // one.tokens)
    for start in range(0, len(index), at_once):
        block = index[start : start + at_once]
        centred = one.rows(block)[:, 0].double() - mean
        if one.tokens == 1:
            covariance += centred.T @ centred
            count += len(block)
        else:
            sizes = one.sizes(block)[:, 0].double()
            centred = (centred * sizes.sqrt()[..., None]).flatten(0, 1)
            covariance += centred.T @ centred
            count += float(sizes.sum())
    variances, directions = torch.linalg.eigh(covariance / count)
    variances, directions = variances.flip(0)[:num_components], directions.flip(1)[:, :num_components]
    # An eigenvector has no sign of its own: its largest entry becomes positive.
    peaks = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = torch.where(variances > NO_VARIANCE * variances[0], directions * peaks.sign(), 0.0)
    return mean.float(), directions.float().contiguous()
