"""The training loop: epochs, validation, early stopping, state. Knows torch.distributed, not Ray.

Every worker knows the whole global batch (it and its drawn negatives come from a shared seed), encodes its unique
items and computes the loss of its own users against all of them. So negatives are gathered without communication, and
the sum of the workers' losses is the loss of one worker: the result does not depend on the number of workers. Only the
uniformity of queries needs those of the other workers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lvlmrec.data.split import Holdout
from lvlmrec.evaluation.metrics import metrics
from lvlmrec.evaluation.ranking import rank_targets
from lvlmrec.experiment import TrainConfig, TrainingConfig, TrainingData, build_model
from lvlmrec.features.compact import FeatureArray
from lvlmrec.models.losses import LossInputs, SampledLossConfig, alignment, uniformity
from lvlmrec.models.recommender import Recommender

SELECTED_BY = "hr@10"
ROWS_AT_ONCE = 4096
USERS_AT_ONCE = 512


@dataclass
class Progress:
    """What early stopping and resuming need to know, beside weights and optimiser."""

    epoch: int = 0  # epochs finished
    best_epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0

    def finished(self, epochs: int, patience: int) -> bool:
        return self.epoch >= epochs or self.epoch - self.best_epoch >= patience


@dataclass
class State:
    """A run between two epochs."""

    model: Recommender
    optimizer: torch.optim.Optimizer
    best_weights: dict[str, Tensor]
    progress: Progress

    def save(self, folder: Path) -> None:
        """Write everything a bit-equal continuation needs; randomness is derived from seed, epoch and worker."""
        save_file(_weights(self.model), folder / "last.safetensors")
        save_file(self.best_weights, folder / "best.safetensors")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "progress.json").write_text(json.dumps(vars(self.progress)))

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        self.model.load_state_dict(load_file(folder / "last.safetensors"))
        self.best_weights = load_file(folder / "best.safetensors")
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        self.progress = Progress(**json.loads((folder / "progress.json").read_text()))


class Loss(nn.Module):
    """The recommender with its loss as one forward, so that DistributedDataParallel sees every parameter."""

    def __init__(self, model: Recommender, settings: TrainingConfig, log_popularity: Tensor) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.log_popularity = log_popularity  # [I + 1]

    def forward(
        self,
        item_index: Tensor,
        features: Tensor | None,
        counts: Tensor,
        sequences: Tensor,
        negatives: Tensor | None,
    ) -> Tensor:
        """Sum of the loss over the real positions of `sequences` [B, S + 1]; the rest as in `LossInputs`."""
        items = self.model.encode_items(item_index, features)
        with_padding = torch.cat([items.new_zeros(1, items.shape[1]), items])
        inputs = sequences[:, :-1].contiguous()
        row = torch.where(inputs > 0, torch.searchsorted(item_index, inputs) + 1, 0)
        hidden = self.model.encode_sequences(with_padding[row], inputs > 0)
        popularity, num_items = self.log_popularity[item_index], len(self.log_popularity) - 1
        given = LossInputs(hidden, items, item_index, counts, popularity, sequences, negatives, num_items)
        loss = self.settings.loss.sum(given)
        if self.settings.alignment:
            loss = loss + self.settings.alignment * alignment(given)
        if self.settings.uniformity:
            loss = loss + self.settings.uniformity * self._uniformity(given)
        return loss

    def _uniformity(self, given: LossInputs) -> Tensor:
        """This worker's share of the mean uniformity of queries and items, times the global number of positions.

        Every worker has the same value of both. That of the items carries its whole gradient on each, so a share by
        positions adds up to one; that of the queries only the gradient of the worker's own, which counts in full.
        """
        own, _ = given.labelled()
        everyones = _with_other_workers(own)
        queries, items = uniformity(everyones), uniformity(given.items[given.counts > 0])
        return (len(own) * (items + queries.detach()) + len(everyones) * (queries - queries.detach())) / 2


def new_state(config: TrainConfig, data: TrainingData, features: FeatureArray | None, device: torch.device) -> State:
    """A freshly initialised run; every worker gets the same weights."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(data.item_ids), config.dataset.max_length, features).to(device)
    settings = config.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    return State(model, optimizer, {}, Progress())


def fit(
    config: TrainConfig,
    data: TrainingData,
    features: FeatureArray | None,
    state: State,
    report: Callable[[dict[str, float], State], None],
    device: torch.device,
) -> None:
    """Train until the last epoch or until validation HR@10 stops rising; `report` is called after every epoch."""
    rank, world = _rank_and_world()
    shares = np.maximum(data.train_counts, 1) / data.train_counts.sum()
    loss: nn.Module = Loss(state.model, config.training, torch.from_numpy(np.log(shares)).float().to(device))
    if world > 1:
        loss = DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)
    settings = config.training
    while not state.progress.finished(settings.epochs, settings.patience):
        epoch = state.progress.epoch
        started = time.perf_counter()
        torch.manual_seed(int(np.random.SeedSequence((config.seed, epoch, rank)).generate_state(1)[0]))
        order = np.random.default_rng((config.seed, epoch)).permutation(len(data.sequences))
        batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
        global_batches = _global_batches(config, data, features, batches, device, epoch)
        train_loss = _train_epoch(config.training, global_batches, loss, state.optimizer, device)
        seconds = time.perf_counter() - started
        validation = _validate(state.model, data, features, device)
        progress = state.progress
        progress.epoch, progress.train_seconds = epoch + 1, progress.train_seconds + seconds
        if not progress.best or validation[SELECTED_BY] > progress.best[SELECTED_BY]:
            progress.best, progress.best_epoch = validation, progress.epoch
            state.best_weights = _weights(state.model)
        prefixed = {f"validation/{name}": value for name, value in validation.items()}
        report({"epoch": epoch + 1, "train_loss": train_loss, "epoch_seconds": seconds, **prefixed}, state)


@torch.inference_mode()
def encode_catalogue(model: Recommender, num_items: int, features: FeatureArray | None, device: torch.device) -> Tensor:
    """Embeddings of all items, [I + 1, E]; row 0, the padding, is zero."""
    chunks = []
    for start in range(1, num_items + 1, ROWS_AT_ONCE):
        index = np.arange(start, min(start + ROWS_AT_ONCE, num_items + 1))
        rows = features.rows(index).to(device) if features else None
        chunks.append(model.encode_items(torch.from_numpy(index).to(device), rows).float())
    items = torch.cat(chunks)
    return torch.cat([items.new_zeros(1, items.shape[1]), items])


@torch.inference_mode()
def rank_holdout(model: Recommender, item_embeddings: Tensor, holdout: Holdout) -> np.ndarray:
    """The item rank of each user's target over the full catalogue, int64 [U]."""
    model.eval()
    ranks = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(holdout.targets), USERS_AT_ONCE):
        users = slice(start, start + USERS_AT_ONCE)
        inputs = torch.from_numpy(holdout.inputs[users].astype(np.int64)).to(item_embeddings.device)
        queries = model.encode_sequences(item_embeddings[inputs], inputs > 0)[:, -1]
        ranks.append(rank_targets(queries, item_embeddings, holdout.targets[users], holdout.histories[users]))
    return np.concatenate(ranks)


@dataclass(frozen=True)
class _Batch:
    sequences: Tensor  # int64 [B, S + 1] of all workers
    negatives: Tensor | None  # int64 [B, S, N], when the loss draws some
    item_index: Tensor  # int64 [M], the unique real items and negatives, or the catalogue; sorted
    counts: Tensor  # int64 [M], how often each occurs in `sequences`
    features: Tensor | None  # float32 [M, L, D]
    num_positions: int  # positions with a real input and a real next item


def _train_epoch(
    settings: TrainingConfig,
    batches: Iterator[_Batch],
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> float:
    """One pass; returns the mean loss over all positions of all workers."""
    rank, world = _rank_and_world()
    autocast = torch.autocast(device.type, torch.bfloat16) if settings.precision == "bfloat16" else nullcontext()
    total, positions = torch.zeros((), device=device), 0
    loss.train()
    for batch in batches:
        mine = batch.sequences[rank::world].contiguous()
        negatives = None if batch.negatives is None else batch.negatives[rank::world]
        with autocast:
            summed = loss(batch.item_index, batch.features, batch.counts, mine, negatives)
        optimizer.zero_grad(set_to_none=True)
        (summed * (world / batch.num_positions)).backward()  # DDP averages over workers: sum / positions
        torch.nn.utils.clip_grad_norm_(loss.parameters(), settings.gradient_clip)
        optimizer.step()
        total, positions = total + summed.detach(), positions + batch.num_positions
    if world > 1:
        dist.all_reduce(total)
    return float(total) / positions


def _global_batches(
    config: TrainConfig,
    data: TrainingData,
    features: FeatureArray | None,
    batches: list[np.ndarray],
    device: torch.device,
    epoch: int,
) -> Iterator[_Batch]:
    """What every worker knows of each batch of users."""
    _, world = _rank_and_world()
    loss, num_items = config.training.loss, len(data.item_ids)
    for number, users in enumerate(batches):
        rows = data.sequences[users].astype(np.int64)
        rows = np.pad(rows, ((0, max(0, world - len(rows))), (0, 0)))  # padding for workers without a user
        negatives = np.zeros((*rows[:, :-1].shape, 0), dtype=np.int64)
        if isinstance(loss, SampledLossConfig):
            rng = np.random.default_rng((config.seed, epoch, number))
            negatives = draw_negatives(rng, rows, num_items, loss.negatives)
        read = np.arange(num_items + 1) if loss.whole_catalogue else np.concatenate([rows.ravel(), negatives.ravel()])
        item_index = np.unique(read[read > 0])
        counts = np.bincount(rows.ravel(), minlength=num_items + 1)[item_index]
        yield _Batch(
            sequences=torch.from_numpy(rows).to(device),
            negatives=torch.from_numpy(negatives).to(device) if negatives.size else None,
            item_index=torch.from_numpy(item_index).to(device),
            counts=torch.from_numpy(counts).to(device),
            features=features.rows(item_index).to(device) if features else None,
            num_positions=int((rows[:, :-1] > 0).sum()),
        )


def draw_negatives(rng: np.random.Generator, sequences: np.ndarray, num_items: int, number: int) -> np.ndarray:
    """Items for each position, uniformly from those not in the user's sequence, int64 [B, S, N]; 0 at padding.

    sequences int64 [B, S + 1], padding 0.
    """
    own = np.sort(sequences, axis=1)
    own[:, 1:][own[:, 1:] == own[:, :-1]] = 0  # each once
    own = np.sort(np.where(own == 0, num_items + 1, own), axis=1)
    choices = num_items - (own <= num_items).sum(1)
    drawn = rng.integers(1, choices[:, None, None] + 1, (len(own), own.shape[1] - 1, number))
    for column in own.T:  # from the c-th of the other items to its index: step over each own item up to it
        drawn += drawn >= column[:, None, None]
    return drawn * (sequences[:, :-1, None] > 0)


def _with_other_workers(queries: Tensor) -> Tensor:
    """The queries [P, E] of all workers; only this worker's own carry a gradient."""
    rank, world = _rank_and_world()
    if world == 1:
        return queries
    sizes = queries.new_zeros(world, dtype=torch.int64)
    sizes[rank] = len(queries)
    dist.all_reduce(sizes)
    padded = queries.new_zeros(int(sizes.max()), queries.shape[1])
    padded[: len(queries)] = queries.detach()
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    parts = [part[:size] for part, size in zip(gathered, sizes.tolist(), strict=True)]
    parts[rank] = queries
    return torch.cat(parts)


def _validate(
    model: Recommender, data: TrainingData, features: FeatureArray | None, device: torch.device
) -> dict[str, float]:
    """Metrics over all users; each worker ranks its share."""
    rank, world = _rank_and_world()
    model.eval()
    catalogue = encode_catalogue(model, len(data.item_ids), features, device)
    holdout = data.validation
    share = Holdout(holdout.inputs[rank::world], holdout.targets[rank::world], holdout.histories[rank::world])
    ranks: list[Any] = [rank_holdout(model, catalogue, share)]
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, ranks[0])
        ranks = gathered
    return metrics(np.concatenate(ranks))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
