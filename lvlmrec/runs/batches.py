"""What every worker knows of each global batch of users, and its own part of it.

Shapes: B users of the global batch, S inputs of a user at most, P real positions of this worker, M items that the loss
reads, N negatives of a position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lvlmrec.data.split import UserItems
from lvlmrec.features.array import FeatureArray
from lvlmrec.features.mapping import side_by_side
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.losses import SampledLossConfig
from lvlmrec.models.sequential.histories import Histories, pack
from lvlmrec.runs.experiment import TrainConfig, TrainingData

ROWS_AT_ONCE = 1024
SHARE_FOR_FEATURES = 0.5  # of a device's free memory


class Shared(NamedTuple):
    """The items of the global batch, the same for every worker.

    item_index int64 [M]: the real items and negatives, or all that are trained; sorted, each once
    counts     int64 [M]: how often each occurs in the sequences
    features   of the same items
    num_trained: how many items occur in training
    """

    item_index: Tensor
    counts: Tensor
    features: ItemFeatures | None
    num_trained: int


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
    size, loss, trained = config.training.batch_size, config.training.loss, data.trained_items()
    order = np.random.default_rng((config.seed, epoch)).permutation(len(data.sequences))
    starts = range(0, len(order), size)
    for number, start in enumerate(starts):
        chosen = order[start : start + size]
        sequences = data.sequences[chosen].astype(np.int64)
        num_positions = int((sequences[:, :-1] > 0).sum())
        negatives = None
        if isinstance(loss, SampledLossConfig):
            rng = np.random.default_rng((config.seed, epoch, number))
            owned, lengths = _owned(data.user_items, data.owners[chosen]), (sequences[:, :-1] > 0).sum(1)
            negatives = draw_negatives(rng, owned, lengths, trained, loss.negatives)
        read = _items_read(sequences, negatives, len(data.item_ids))
        read[trained] |= loss.whole_catalogue
        shared = _shared(sequences, np.flatnonzero(read), features, device, len(trained))
        progress = (epoch + number / len(starts)) / config.training.epochs
        yield Batch(shared, _positions(sequences, negatives, device, rank, world), num_positions, progress)


def made_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each made by a thread while the one before is in use: features are read meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def draw_negatives(
    rng: np.random.Generator, owned: np.ndarray, positions: np.ndarray, trained: np.ndarray, number: int
) -> np.ndarray:
    """Items for each position, uniformly from those of `trained` that its user does not have, int64 [P, N].

    owned [B, X]: each user's items, in any order, padding 0; positions [B]: how many each user has, which come user by
    user; trained int64 [T]: item indices, ascending, some of which each user lacks.
    """
    rank = np.searchsorted(trained, owned)  # of an own item among the trained ones
    is_trained = trained[np.minimum(rank, len(trained) - 1)] == owned
    rank = np.sort(np.where(is_trained, rank, len(trained)), axis=1)
    repeated = np.zeros_like(is_trained)
    repeated[:, 1:] = rank[:, 1:] == rank[:, :-1]
    rank = np.sort(np.where(repeated, len(trained), rank), axis=1)
    others = len(trained) - (rank < len(trained)).sum(1)
    # The number of other items before each own one, so that of the c-th other item it is known how many own ones are.
    before = np.where(rank < len(trained), rank - np.arange(rank.shape[1]), len(trained))
    before = np.repeat(before.astype(np.int32), positions, axis=0)
    drawn = rng.integers(0, np.repeat(others, positions)[:, None], (len(before), number), dtype=np.int32)
    own = torch.searchsorted(torch.from_numpy(before), torch.from_numpy(drawn), right=True, out_int32=True)
    return trained[drawn + own.numpy()]


def _owned(user_items: UserItems, users: np.ndarray) -> np.ndarray:
    """The items of `users` [B], int64 [B, X], padding 0 on the right."""
    starts, ends = user_items.offsets[users], user_items.offsets[users + 1]
    places = starts[:, None] + np.arange(int((ends - starts).max()))
    real = places < ends[:, None]
    return np.where(real, user_items.items[np.where(real, places, 0)], 0).astype(np.int64)


def item_features(features: FeatureArray | None, item_index: np.ndarray, device: torch.device) -> ItemFeatures | None:
    """The features of the items at `item_index` [N] as the models read them; None for ids alone.

    On the CPU they stay in the memory-mapped file until a layer of them is read; frames do so for every device. Another
    device holds those of the whole catalogue where there is room, else it is sent those of the items.
    """
    if features is None:
        return None
    row = torch.from_numpy(features.row(item_index))
    if device.type == "cpu" or features.item_shape:
        stored: Sequence[Tensor] = features.stored()
    else:
        held = held_by_device(features.files, device)
        if held is None:
            stored = [each.index_select(0, row).to(device) for each in features.stored()]
            row = torch.arange(len(row), device=device)
        else:
            stored, row = held, row.to(device)
    missing = torch.from_numpy(features.is_missing(item_index)).to(device)
    mean, std = (None if part is None else part.to(device) for part in (features.mean, features.std))
    return ItemFeatures(stored, row, mean, std, missing)


@lru_cache(maxsize=1)  # until the next run asks for its own
def held_by_device(files: tuple[tuple[tuple[Path, ...], str], ...], device: torch.device) -> list[Tensor] | None:
    """Columns of feature sets on a device, [I + 1, columns, D] each; None where they take too much of it."""
    stored = [side_by_side(paths, dtype) for paths, dtype in files]
    size = sum(each.numel() * each.element_size() for each in stored)
    if size > SHARE_FOR_FEATURES * free_memory(device):
        return None
    held = [torch.empty(each.shape, dtype=each.dtype, device=device) for each in stored]
    for source, target in zip(stored, held, strict=True):
        for start in range(0, len(source), ROWS_AT_ONCE):
            target[start : start + ROWS_AT_ONCE] = source[start : start + ROWS_AT_ONCE].to(device)
    return held


def free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _items_read(sequences: np.ndarray, negatives: np.ndarray | None, num_items: int) -> np.ndarray:
    """bool [I + 1]: the real items of the batch and the negatives."""
    read = np.zeros(num_items + 1, dtype=bool)
    read[sequences.ravel()] = True
    if negatives is not None:
        read[negatives.ravel()] = True
    read[0] = False
    return read


def _shared(
    sequences: np.ndarray,
    item_index: np.ndarray,
    features: FeatureArray | None,
    device: torch.device,
    num_trained: int,
) -> Shared:
    counts = np.bincount(sequences.ravel(), minlength=int(item_index[-1]) + 1)[item_index]
    return Shared(
        torch.from_numpy(item_index).to(device),
        torch.from_numpy(counts).to(device),
        item_features(features, item_index, device),
        num_trained,
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
