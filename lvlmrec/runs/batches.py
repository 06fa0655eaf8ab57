"""The batches of an epoch: the items of each global batch, the same on every worker, and the worker's own positions.

Shapes: B users of the global batch, S inputs of a user at most, P real (not padded) positions of this worker, M items
that the loss reads, N negatives of a position, I items, T items that occur in training.
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

ROWS_PER_COPY = 1024  # to a device
MAX_FEATURE_SHARE = 0.5  # of a device's free memory, for the features of the whole catalogue


class BatchItems(NamedTuple):
    """The items that the loss of a global batch reads, the same on every worker.

    item_index   int64 [M]: the items of the sequences and the negatives, or all T items of training; sorted, unique
    counts       int64 [M]: how often each occurs in the sequences of the batch
    features     of these M items; None for models of ids alone
    num_trained  T
    """

    item_index: Tensor
    counts: Tensor
    features: ItemFeatures | None
    num_trained: int


class LocalPositions(NamedTuple):
    """The real positions of this worker's users, in packed order.

    inputs, labels int64 [P]: the item read and the one that follows it
    user_items     int64 [P, S + 1]: all items of the position's user, padding 0
    negatives      int64 [P, N]; None for a loss that draws none
    histories      the packing of `inputs`
    """

    inputs: Tensor
    labels: Tensor
    user_items: Tensor
    negatives: Tensor | None
    histories: Histories


class Batch(NamedTuple):
    """One global batch as one worker sees it.

    num_positions  real positions of all workers
    progress       share of the steps of all epochs that come before this batch, 0..1
    """

    items: BatchItems
    local: LocalPositions
    num_positions: int
    progress: float


def batches_of_epoch(
    config: TrainConfig,
    data: TrainingData,
    features: FeatureArray | None,
    epoch: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The global batches of an epoch, as worker `rank` of `world_size` sees them; seed and epoch give their order."""
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
            user_items = _items_of_users(data.user_items, data.owners[chosen])
            lengths = (sequences[:, :-1] > 0).sum(1)
            negatives = draw_negatives(rng, user_items, lengths, trained, loss.negatives)
        mask = _batch_item_mask(sequences, negatives, len(data.item_ids))
        mask[trained] |= loss.whole_catalogue
        items = _batch_items(sequences, np.flatnonzero(mask), features, device, len(trained))
        local = _local_positions(sequences, negatives, device, rank, world_size)
        yield Batch(items, local, num_positions, (epoch + number / len(starts)) / config.training.epochs)


def prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each made by a thread while the one before is in use, so that reading features costs no time.

    An error in making a batch is raised when that batch is asked for.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming = thread.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = thread.submit(next, batches, None)
            yield batch


def draw_negatives(
    rng: np.random.Generator, user_items: np.ndarray, positions: np.ndarray, trained: np.ndarray, number: int
) -> np.ndarray:
    """`number` item indices for each position, drawn uniformly from the items of `trained` that its user does not have.

    user_items [B, X]: each user's items in any order, padding 0. positions [B]: the number of positions of each user.
    trained int64 [T]: item indices, ascending; each user lacks at least one. Returns int64 [P, N], user by user.
    """
    rank = np.searchsorted(trained, user_items)  # among the trained items
    is_trained = trained[np.minimum(rank, len(trained) - 1)] == user_items
    rank = np.sort(np.where(is_trained, rank, len(trained)), axis=1)
    repeated = np.zeros_like(is_trained)
    repeated[:, 1:] = rank[:, 1:] == rank[:, :-1]
    rank = np.sort(np.where(repeated, len(trained), rank), axis=1)
    others = len(trained) - (rank < len(trained)).sum(1)
    # `before`: how many items that the user lacks come before each item of the user. The c-th item that the user lacks
    # then stands in `trained` at c plus the number of the user's items before it.
    before = np.where(rank < len(trained), rank - np.arange(rank.shape[1]), len(trained))
    before = np.repeat(before.astype(np.int32), positions, axis=0)
    drawn = rng.integers(0, np.repeat(others, positions)[:, None], (len(before), number), dtype=np.int32)
    own = torch.searchsorted(torch.from_numpy(before), torch.from_numpy(drawn), right=True, out_int32=True)
    return trained[drawn + own.numpy()]


def _items_of_users(user_items: UserItems, users: np.ndarray) -> np.ndarray:
    """The items of `users` [B], int64 [B, X], padded with 0 on the right."""
    starts, ends = user_items.offsets[users], user_items.offsets[users + 1]
    places = starts[:, None] + np.arange(int((ends - starts).max()))
    real = places < ends[:, None]
    return np.where(real, user_items.items[np.where(real, places, 0)], 0).astype(np.int64)


def item_features(features: FeatureArray | None, item_index: np.ndarray, device: torch.device) -> ItemFeatures | None:
    """The features of the items at `item_index` [N] as models read them; None for ids alone.

    On the CPU they stay in the memory-mapped files until a layer is read, frames also for a GPU. A GPU keeps the
    features of the whole catalogue where there is room, else those of these items are copied to it.
    """
    if features is None:
        return None
    row = torch.from_numpy(features.row(item_index))
    if device.type == "cpu" or features.item_shape:
        stored: Sequence[Tensor] = features.stored()
    else:
        copies = columns_on_device(features.files, device)
        if copies is None:
            stored = [each.index_select(0, row).to(device) for each in features.stored()]
            row = torch.arange(len(row), device=device)
        else:
            stored, row = copies, row.to(device)
    missing = torch.from_numpy(features.is_missing(item_index)).to(device)
    mean, std = (None if part is None else part.to(device) for part in (features.mean, features.std))
    return ItemFeatures(stored, row, mean, std, missing)


@lru_cache(maxsize=1)  # one run at a time: the next run's features replace them
def columns_on_device(files: tuple[tuple[tuple[Path, ...], str], ...], device: torch.device) -> list[Tensor] | None:
    """A device's copy of each feature set's columns, [I + 1, columns, D]; None where it takes too much memory."""
    stored = [side_by_side(paths, dtype) for paths, dtype in files]
    size = sum(each.numel() * each.element_size() for each in stored)
    if size > MAX_FEATURE_SHARE * free_memory(device):
        return None
    copies = [torch.empty(each.shape, dtype=each.dtype, device=device) for each in stored]
    for source, target in zip(stored, copies, strict=True):
        for start in range(0, len(source), ROWS_PER_COPY):
            target[start : start + ROWS_PER_COPY] = source[start : start + ROWS_PER_COPY].to(device)
    return copies


def free_memory(device: torch.device) -> int:
    """Bytes of free memory; 0 for the CPU, which needs no copy."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _batch_item_mask(sequences: np.ndarray, negatives: np.ndarray | None, num_items: int) -> np.ndarray:
    """bool [I + 1]: which items are in the sequences or drawn as negatives; padding is not."""
    mask = np.zeros(num_items + 1, dtype=bool)
    mask[sequences.ravel()] = True
    if negatives is not None:
        mask[negatives.ravel()] = True
    mask[0] = False
    return mask


def _batch_items(
    sequences: np.ndarray,
    item_index: np.ndarray,
    features: FeatureArray | None,
    device: torch.device,
    num_trained: int,
) -> BatchItems:
    """`item_index` [M], sorted, with counts in `sequences` [B, S + 1] and features, on the device."""
    counts = np.bincount(sequences.ravel(), minlength=int(item_index[-1]) + 1)[item_index]
    return BatchItems(
        torch.from_numpy(item_index).to(device),
        torch.from_numpy(counts).to(device),
        item_features(features, item_index, device),
        num_trained,
    )


def _local_positions(
    sequences: np.ndarray, negatives: np.ndarray | None, device: torch.device, rank: int, world_size: int
) -> LocalPositions:
    """This worker's users of `sequences` [B, S + 1]; `negatives` [all workers' positions, N] user by user."""
    local = torch.from_numpy(sequences[rank::world_size])
    inputs, labels = local[:, :-1], local[:, 1:]
    histories = pack(inputs > 0)
    drawn = None
    if negatives is not None:  # rows of `negatives` for this worker's positions, in packed order
        real = sequences[:, :-1] > 0
        places = (real.ravel().cumsum() - 1).reshape(real.shape)[rank::world_size].ravel()[histories.grid_index.numpy()]
        drawn = torch.from_numpy(negatives[places]).to(device)
    return LocalPositions(
        inputs.flatten()[histories.grid_index].to(device),
        labels.flatten()[histories.grid_index].to(device),
        local[histories.grid_index // inputs.shape[1]].to(device),
        drawn,
        histories.to(device),
    )
