"""What every worker knows of each global batch of users, and its own part of it.

Shapes: B users of the global batch, S inputs of a user at most, P real positions of this worker, M items that the loss
reads, N negatives of a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lvlmrec.experiment import TrainConfig, TrainingData
from lvlmrec.features.compact import FeatureArray, read_stored
from lvlmrec.models.histories import Histories, pack
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.losses import SampledLossConfig

ROWS_AT_ONCE = 1024
SHARE_FOR_FEATURES = 0.5  # of a device's free memory


class Shared(NamedTuple):
    """The items of the global batch, the same for every worker.

    item_index int64 [M]: the real items and negatives, or the catalogue; sorted, each once
    counts     int64 [M]: how often each occurs in the sequences
    features   of the same items
    """

    item_index: Tensor
    counts: Tensor
    features: ItemFeatures | None


class Positions(NamedTuple):
    """The real positions of this worker's users, in packed order.

    inputs, labels int64 [P]: the item read and the one that follows it
    own            int64 [P, S + 1]: all items of the position's user, padding 0
    negatives      int64 [P, N], when the loss draws some
    """

    inputs: Tensor
    labels: Tensor
    own: Tensor
    negatives: Tensor | None
    histories: Histories


class Batch(NamedTuple):
    """`num_positions`: the real positions of all workers; `progress`: the share of all epochs' steps before it."""

    shared: Shared
    mine: Positions
    num_positions: int
    progress: float


def batches_of_epoch(
    config: TrainConfig,
    data: TrainingData,
    features: FeatureArray | None,
    epoch: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """The global batches of one epoch, in the order of seed and epoch, as worker `rank` of `world` sees them."""
    size, loss, num_items = config.training.batch_size, config.training.loss, len(data.item_ids)
    order = np.random.default_rng((config.seed, epoch)).permutation(len(data.sequences))
    starts = range(0, len(order), size)
    for number, start in enumerate(starts):
        sequences = data.sequences[order[start : start + size]].astype(np.int64)
        num_positions = int((sequences[:, :-1] > 0).sum())
        negatives = None
        if isinstance(loss, SampledLossConfig):
            rng = np.random.default_rng((config.seed, epoch, number))
            negatives = draw_negatives(rng, sequences, num_items, loss.negatives)
        shared = _shared(sequences, negatives, num_items, loss.whole_catalogue, features, device)
        progress = (epoch + number / len(starts)) / config.training.epochs
        yield Batch(shared, _positions(sequences, negatives, device, rank, world), num_positions, progress)


def made_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each made by a thread while the one before is in use: features are read meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def draw_negatives(rng: np.random.Generator, sequences: np.ndarray, num_items: int, number: int) -> np.ndarray:
    """Items for each real position, uniformly from those not in the user's sequence, int64 [positions, N].

    sequences int64 [B, S + 1], padding 0 on the left; the positions user by user, oldest first.
    """
    own = np.sort(sequences, axis=1)
    own[:, 1:][own[:, 1:] == own[:, :-1]] = 0  # each once
    own = np.sort(np.where(own == 0, num_items + 1, own), axis=1)
    own = np.repeat(own, (sequences[:, :-1] > 0).sum(1), axis=0)
    choices = num_items - (own <= num_items).sum(1)
    drawn = rng.integers(1, choices[:, None] + 1, (len(own), number))
    for column in own.T:  # from the c-th of the other items to its index: step over each own item up to it
        drawn += drawn >= column[:, None]
    return drawn


def item_features(features: FeatureArray | None, item_index: np.ndarray, device: torch.device) -> ItemFeatures | None:
    """The features of the items at `item_index` [N] as the models read them; None for ids alone.

    On the CPU they stay in the memory-mapped file until a layer of them is read; frames do so for every device. Another
    device holds those of the whole catalogue where there is room, else it is sent those of the items.
    """
    if features is None:
        return None
    row, columns = torch.from_numpy(features.row(item_index)), features.columns
    if device.type == "cpu" or features.item_shape:
        stored = features.stored()
    else:
        held = held_by_device(features.path, features.dtype, columns, device)
        if held is None:
            stored = features.stored()[row[:, None], list(columns)].to(device)
            row = torch.arange(len(row), device=device)
        else:
            stored, row = held, row.to(device)
        columns = tuple(range(len(columns)))
    missing = torch.from_numpy(features.is_missing(item_index)).to(device)
    mean, std = (None if part is None else part.to(device) for part in (features.mean, features.std))
    return ItemFeatures(stored, row, columns, mean, std, missing)


@lru_cache(maxsize=1)  # until the next run asks for its own
def held_by_device(path: Path, dtype: str, columns: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Some columns of a file of features on a device, [T, len(columns), D]; None where they take too much of it."""
    stored = read_stored(path, dtype)
    num_rows, _, dim = stored.shape
    size = num_rows * len(columns) * dim * stored.element_size()
    if size > SHARE_FOR_FEATURES * free_memory(device):
        return None
    held = torch.empty(num_rows, len(columns), dim, dtype=stored.dtype, device=device)
    for start in range(0, num_rows, ROWS_AT_ONCE):
        held[start : start + ROWS_AT_ONCE] = stored[start : start + ROWS_AT_ONCE, list(columns)].to(device)
    return held


def free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _shared(
    sequences: np.ndarray,
    negatives: np.ndarray | None,
    num_items: int,
    whole_catalogue: bool,
    features: FeatureArray | None,
    device: torch.device,
) -> Shared:
    read = np.zeros(num_items + 1, dtype=bool)
    read[1:] = whole_catalogue
    read[sequences.ravel()] = True
    if negatives is not None:
        read[negatives.ravel()] = True
    read[0] = False
    item_index = np.flatnonzero(read)
    counts = np.bincount(sequences.ravel(), minlength=num_items + 1)[item_index]
    return Shared(
        torch.from_numpy(item_index).to(device),
        torch.from_numpy(counts).to(device),
        item_features(features, item_index, device),
    )


def _positions(
    sequences: np.ndarray, negatives: np.ndarray | None, device: torch.device, rank: int, world: int
) -> Positions:
    mine = torch.from_numpy(sequences[rank::world])
    inputs, labels = mine[:, :-1], mine[:, 1:]
    histories = pack(inputs > 0)
    drawn = None
    if negatives is not None:  # of the positions in packed order, their places among those of all workers
        real = sequences[:, :-1] > 0
        places = (real.ravel().cumsum() - 1).reshape(real.shape)[rank::world].ravel()[histories.place.numpy()]
        drawn = torch.from_numpy(negatives[places]).to(device)
    return Positions(
        inputs.flatten()[histories.place].to(device),
        labels.flatten()[histories.place].to(device),
        mine[histories.place // inputs.shape[1]].to(device),
        drawn,
        histories.to(device),
    )
