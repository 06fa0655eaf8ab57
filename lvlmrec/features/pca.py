"""Principal components of features, fitted on training items alone.

Each column is centred and turned onto its own components of largest variance. With `feature_scaling: standardize`,
which follows, that is PCA whitening; with `none` the variances stay as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from lvlmrec.errors import InputError
from lvlmrec.features import compact
from lvlmrec.features.compact import FeatureArray, Projection, derive, publishing

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
    items = hashlib.blake2b(np.asarray(item_index, dtype=np.int64).tobytes(), digest_size=8).hexdigest()
    folder = array.path.parent.with_name(f"{array.digest}-fit-{num_components}-{items}")
    if not Path(folder, compact.ABOUT).exists():
        projection = fit(array, item_index, num_components)
        with publishing(folder, {"num_components": num_components}) as working:
            Path(working, FILE).write_bytes(save(projection._asdict()))
    return project(array, Projection(**load(Path(folder, FILE).read_bytes())))


def fit(array: FeatureArray, item_index: np.ndarray, num_components: int) -> Projection:
    """The components of largest variance over the items at `item_index` that have features."""
    columns = [_fit_column(array.select([name]), np.asarray(item_index), num_components) for name in array.names]
    means, components = zip(*columns, strict=True)
    return Projection(torch.stack(means), torch.stack(components))


def project(array: FeatureArray, projection: Projection) -> FeatureArray:
    """`array` turned onto the components: float32 [I + 1, L, P]."""

    def turn(column: int, item_index: np.ndarray) -> np.ndarray:
        rows = array.select([array.names[column]]).rows(item_index)[:, 0]
        return ((rows - projection.mean[column]) @ projection.components[column]).numpy()

    key = hashlib.blake2b(save(projection._asdict()), digest_size=8).hexdigest()
    return derive(array, f"pca-{key}", projection.components.shape[-1], turn, projection)


def _fit_column(one: FeatureArray, item_index: np.ndarray, num_components: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and components [D, P] of the only column of `one`; memory O(D^2) whatever the number of items."""
    width, dim = one.widths[0], one.shape[2]
    index = item_index[~one.is_missing(item_index)[:, 0]]
    mean = one.compute_moments(index)[0][0]
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, len(index), compact.ROWS_AT_ONCE):
        centred = one.rows(index[start : start + compact.ROWS_AT_ONCE])[:, 0, :width].double() - mean[:width]
        covariance += centred.T @ centred
    variances, directions = torch.linalg.eigh(covariance / len(index))
    variances, directions = variances.flip(0)[:num_components], directions.flip(1)[:, :num_components]
    # An eigenvector has no sign of its own: its largest entry becomes positive.
    peaks = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = torch.where(variances > NO_VARIANCE * variances[0], directions * peaks.sign(), 0.0)
    components = torch.zeros(dim, num_components)
    components[:width] = directions.float()
    return mean.float(), components
