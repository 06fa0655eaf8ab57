"""The training loop: epochs, validation, early stopping, state, the result. Uses torch.distributed, not Ray.

Every worker draws the same global batch and negatives from a shared seed, encodes all their unique items and computes
the loss of its own users against them. Negatives are thereby gathered without communication, and the sum of the
workers' losses is the loss that a single worker computes: the result does not depend on the number of workers. Two
things are gathered: queries, for `uniformity`, and items whose frames are encoded, of which each worker encodes a part.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lvlmrec.data.split import Holdout
from lvlmrec.evaluation.metrics import metrics
from lvlmrec.evaluation.ranking import rank_targets
from lvlmrec.evaluation.slices import slice_metrics, slices_of
from lvlmrec.features.array import FeatureArray
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.losses import LossInputs, alignment, uniformity
from lvlmrec.models.sequential.fusions.video import Video
from lvlmrec.models.sequential.histories import pack
from lvlmrec.models.sequential.recommender import Recommender
from lvlmrec.runs import checkpoint, pretrained
from lvlmrec.runs.batches import Batch, BatchItems, LocalPositions, batches_of_epoch, item_features, prefetch
from lvlmrec.runs.divergence import STEPS_BETWEEN_CHECKS, Diverged, check_steps, check_weights, largest_norm, remedy
from lvlmrec.runs.experiment import Experiment, TrainConfig, TrainingConfig, TrainingData, build_model, summary

VIDEO_ENCODER = "item_encoder.encoder."  # prefix of the names of its weights
ITEMS_PER_CHUNK = 4096
USERS_AT_ONCE = 512


@dataclass
class Progress:
    """How far a run is: what early stopping and resuming need beside weights and optimiser."""

    epoch: int = 0  # epochs finished
    best_epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)  # validation metrics of the best epoch
    best_slices: dict[str, dict[str, float]] = field(default_factory=dict)  # the same by slice of the users
    train_seconds: float = 0.0  # of all finished epochs, without validation

    def finished(self, epochs: int, patience: int) -> bool:
        """After `epochs` epochs, or `patience` epochs without a better one."""
        return self.epoch >= epochs or self.epoch - self.best_epoch >= patience


@dataclass
class State:
    """A run between two epochs: weights, optimiser, weights of the best epoch on the CPU, progress."""

    model: Recommender
    optimizer: torch.optim.Optimizer
    best_weights: dict[str, Tensor]
    progress: Progress

    def save(self, folder: Path) -> None:
        """Write what a bit-equal continuation needs; random numbers are derived from seed, epoch and worker."""
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

    log_popularity: Tensor  # [I + 1]

    def __init__(self, model: Recommender, settings: TrainingConfig, train_counts: np.ndarray) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        shares = np.maximum(train_counts, 1) / train_counts.sum()
        self.register_buffer("log_popularity", torch.from_numpy(np.log(shares)).float(), persistent=False)

    def forward(self, batch_items: BatchItems, local: LocalPositions) -> Tensor:
        """The loss, a scalar: the sum over this worker's positions."""
        items = encode_items(self.model, batch_items.item_index, batch_items.features)
        rows = torch.searchsorted(batch_items.item_index, local.inputs)
        queries = self.model.encode_sequences(functional.embedding(rows, items), local.histories)
        inputs = LossInputs(
            queries=queries,
            labels=local.labels,
            user_items=local.user_items,
            items=items,
            item_index=batch_items.item_index,
            counts=batch_items.counts,
            log_popularity=self.log_popularity[batch_items.item_index],
            negatives=local.negatives,
            num_items=batch_items.num_trained,
        )
        loss = self.settings.loss.sum(inputs)
        if self.settings.alignment:
            loss = loss + self.settings.alignment * alignment(inputs)
        if self.settings.uniformity:
            loss = loss + self.settings.uniformity * self._uniformity(inputs)
        if not len(queries):  # a worker without a user: its gradients are zeros, not missing
            loss = loss + sum(parameter.sum() * 0.0 for parameter in self.model.parameters())
        return loss

    def _uniformity(self, inputs: LossInputs) -> Tensor:
        """This worker's part of the mean uniformity of queries and items, times the global number of positions.

        All workers compute the same two values. The uniformity of the items has its whole gradient on every worker, so
        each counts it in proportion to its own positions. That of the queries has on each worker the gradient of the
        local queries alone, which counts in full.
        """
        local_queries = inputs.queries
        global_queries = _gather_queries(local_queries)
        queries, items = uniformity(global_queries), uniformity(inputs.items[inputs.counts > 0])
        value = len(local_queries) * (items + queries.detach())
        return (value + len(global_queries) * (queries - queries.detach())) / 2


def new_state(config: TrainConfig, data: TrainingData, features: FeatureArray | None, device: torch.device) -> State:
    """A run before its first epoch; every worker initialises the same weights."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(data.item_ids), config.dataset.max_length, features).to(device)
    if isinstance(model.item_encoder, Video) and config.model.item_encoder.pretrained:
        model.item_encoder.load_published(*pretrained.read(config.model.item_encoder.pretrained))
    return State(model, _optimizer(model, config.training), {}, Progress())


def _optimizer(model: Recommender, settings: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW; with `training.encoder_lr` the video encoder has a learning rate of its own."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if settings.encoder_lr:
        named = list(model.named_parameters())
        encoder = [weight for name, weight in named if name.startswith(VIDEO_ENCODER)]
        others = [weight for name, weight in named if not name.startswith(VIDEO_ENCODER)]
        groups = [{"params": encoder, "lr": settings.encoder_lr}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["highest_lr"] = group["lr"]
    return optimizer


def fit(
    config: TrainConfig,
    data: TrainingData,
    features: FeatureArray | None,
    state: State,
    report: Callable[[dict[str, float], State], None],
    device: torch.device,
) -> None:
    """Train `state` until the last epoch, or until the validation metric (HR@10 or Recall@20) stops rising.

    `report` is called after every epoch with its metrics and the state. Raises `Diverged`, on all workers alike and
    before the epoch is reported, so that the state saved last is good.
    """
    rank, world_size = _rank_and_world_size()
    loss: nn.Module = Loss(state.model, config.training, data.train_counts).to(device)
    if world_size > 1:
        loss = DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)
    settings, selected_by, holdout = config.training, config.dataset.selected_by, data.validation
    slices = slices_of(holdout.targets, data.train_counts, holdout.histories)
    while not state.progress.finished(settings.epochs, settings.patience):
        epoch = state.progress.epoch
        started = time.perf_counter()
        torch.manual_seed(int(np.random.SeedSequence((config.seed, epoch, rank)).generate_state(1)[0]))
        batches = batches_of_epoch(config, data, features, epoch, device, rank, world_size)
        try:
            train_loss = train_epoch(config.training, prefetch(batches), loss, state.optimizer, device)
            seconds = time.perf_counter() - started
            ranks = _validate(state.model, data, features, device)
        except Diverged as error:
            raise Diverged(f"epoch {epoch + 1}, {error}; {remedy(config, features)}") from None
        progress, validation = state.progress, metrics(ranks, users=holdout.users)
        progress.epoch, progress.train_seconds = epoch + 1, progress.train_seconds + seconds
        if not progress.best or validation[selected_by] > progress.best[selected_by]:
            progress.best, progress.best_epoch = validation, progress.epoch
            progress.best_slices = slice_metrics(ranks, slices, users=holdout.users)
            state.best_weights = _weights(state.model)
        prefixed = {f"validation/{name}": value for name, value in validation.items()}
        report({"epoch": epoch + 1, "train_loss": train_loss, "epoch_seconds": seconds, **prefixed}, state)


def publish(experiment: Experiment, weights: Mapping[str, Tensor], progress: Progress) -> dict[str, Any]:
    """Publish the best epoch's weights as the run's checkpoint; returns the content of its result.json."""
    result = {
        "validation": progress.best,
        "validation_slices": progress.best_slices,
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "seconds_per_epoch": round(progress.train_seconds / progress.epoch, 4),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        **summary(experiment),
    }
    checkpoint.publish(experiment.checkpoint, experiment.config, experiment.data, experiment.features, weights, result)
    return result


def of_slices(result: Mapping[str, Any], metric: str) -> dict[str, float]:
    """One metric of a result's slices of validation, as `hr@10 of cold`; those without users are left out.

    Empty for a run of an earlier version, which has none.
    """
    slices = result.get("validation_slices", {})
    return {
        f"{metric} of {name}": part[metric] for name, part in slices.items() if metric in part and name != "overall"
    }


@torch.inference_mode()
def encode_catalogue(model: Recommender, num_items: int, features: FeatureArray | None, device: torch.device) -> Tensor:
    """Embeddings of all items, float32 [I + 1, E]; row 0, the padding, is zero."""
    chunks = []
    for start in range(1, num_items + 1, ITEMS_PER_CHUNK):
        index = np.arange(start, min(start + ITEMS_PER_CHUNK, num_items + 1))
        rows = item_features(features, index, device)
        chunks.append(encode_items(model, torch.from_numpy(index).to(device), rows).float())
    items = torch.cat(chunks)
    return torch.cat([items.new_zeros(1, items.shape[1]), items])


@torch.inference_mode()
def rank_holdout(model: Recommender, item_embeddings: Tensor, holdout: Holdout) -> np.ndarray:
    """The item rank of each of the U targets over the full catalogue, int64 [U]; item_embeddings [I + 1, E]."""
    queries = encode_users(model, item_embeddings, holdout.inputs)
    return rank_targets(queries, item_embeddings, holdout.targets, holdout.histories)


@torch.inference_mode()
def encode_users(model: Recommender, item_embeddings: Tensor, inputs: np.ndarray) -> Tensor:
    """Queries [U, E] of users with histories `inputs` [U, S], item indices padded with 0 on the left.

    item_embeddings [I + 1, E]. Puts the model in evaluation mode.
    """
    model.eval()
    queries = [item_embeddings[:0]]
    for start in range(0, len(inputs), USERS_AT_ONCE):
        grid = torch.from_numpy(inputs[start : start + USERS_AT_ONCE].astype(np.int64))
        histories = pack(grid > 0)
        items = grid.flatten()[histories.grid_index].to(item_embeddings.device)
        histories = histories.to(item_embeddings.device)
        queries.append(model.encode_queries(item_embeddings[items], histories, len(grid)))
    return torch.cat(queries)


def train_epoch(
    settings: TrainingConfig,
    batches: Iterable[Batch],
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> float:
    """Train on `batches` once; returns the mean loss over the positions of all workers. Raises `Diverged`."""
    _, world_size = _rank_and_world_size()
    autocast = torch.autocast(device.type, torch.bfloat16) if settings.precision == "bfloat16" else nullcontext()
    total, positions, step = torch.zeros((), device=device), 0, 0
    unchecked: list[tuple[Tensor, Tensor]] = []  # loss and gradient norm of the steps since the last check
    loss.train()
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = group["highest_lr"] * learning_rate_factor(batch.progress, settings.schedule, settings.warmup)
        with autocast:
            loss_sum = loss(batch.items, batch.local)
        optimizer.zero_grad(set_to_none=True)
        (loss_sum * (world_size / batch.num_positions)).backward()  # DDP averages over workers: sum / positions
        norm = torch.nn.utils.clip_grad_norm_(loss.parameters(), settings.gradient_clip or math.inf)
        optimizer.step()
        total, positions = total + loss_sum.detach(), positions + batch.num_positions
        unchecked.append((loss_sum.detach(), norm))
        if step % STEPS_BETWEEN_CHECKS == 0:
            check_steps(step - len(unchecked), unchecked, world_size)
            unchecked = []
    check_steps(step - len(unchecked), unchecked, world_size)
    if world_size > 1:
        dist.all_reduce(total)
    return float(total) / positions


def learning_rate_factor(progress: float, schedule: str, warmup: float) -> float:
    """The learning rate after `progress` (0..1) of all steps, as a share of the highest.

    It rises linearly from 0 over the share `warmup` of the steps, then is constant, or falls to 0 by `schedule`.
    """
    if progress < warmup:
        return progress / warmup
    remaining = (1 - progress) / (1 - warmup) if warmup < 1 else 0.0
    return {"constant": 1.0, "linear": remaining, "cosine": (1 - math.cos(math.pi * remaining)) / 2}[schedule]


def encode_items(model: Recommender, item_index: Tensor, features: ItemFeatures | None) -> Tensor:
    """Embeddings [N, E] of the items at `item_index` [N], which is the same on every worker.

    Where frames are encoded, each worker encodes a part of the items, and all workers gather all embeddings.
    """
    rank, world_size = _rank_and_world_size()
    if world_size == 1 or not model.reads_frames or features is None:
        return model.encode_items(item_index, features)
    ends = [len(item_index) * worker // world_size for worker in range(world_size + 1)]
    local = slice(ends[rank], ends[rank + 1])
    local_rows = model.encode_items(item_index[local], features.take(local))
    if not len(local_rows):  # fewer items than workers: gradients are zeros, not missing
        local_rows = local_rows + sum(parameter.sum() * 0.0 for parameter in model.item_encoder.parameters())
    return _GatherRows.apply(local_rows, ends)


class _GatherRows(torch.autograd.Function):
    """local_rows [n, E] of each worker -> the rows of all workers [N, E]; worker k's are `ends[k]:ends[k + 1]`.

    The loss is the sum of the workers' losses, so a row's gradient is the sum of its gradients on all workers.
    """

    @staticmethod
    def forward(ctx: Any, local_rows: Tensor, ends: list[int]) -> Tensor:
        ctx.ends = ends
        sizes = [stop - start for start, stop in itertools.pairwise(ends)]
        padded = local_rows.new_zeros(max(sizes), local_rows.shape[1])
        padded[: len(local_rows)] = local_rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rank, _ = _rank_and_world_size()
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed[ctx.ends[rank] : ctx.ends[rank + 1]], None


def _gather_queries(queries: Tensor) -> Tensor:
    """Local queries [P, E] -> the queries of all workers, [sum of P, E]; only the local ones carry a gradient."""
    rank, world_size = _rank_and_world_size()
    if world_size == 1:
        return queries
    sizes = queries.new_zeros(world_size, dtype=torch.int64)
    sizes[rank] = len(queries)
    dist.all_reduce(sizes)
    padded = queries.new_zeros(int(sizes.max()), queries.shape[1])
    padded[: len(queries)] = queries.detach()
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded)
    parts = [part[:size] for part, size in zip(gathered, sizes.tolist(), strict=True)]
    parts[rank] = queries
    return torch.cat(parts)


def _validate(
    model: Recommender, data: TrainingData, features: FeatureArray | None, device: torch.device
) -> np.ndarray:
    """The item rank of each validation target, int64 [T]; each worker ranks a part.

    Raises `Diverged` when weights or scores are not finite.
    """
    rank, world_size = _rank_and_world_size()
    model.eval()
    check_weights(model)
    catalogue = encode_catalogue(model, len(data.item_ids), features, device)
    local = data.validation.share(rank, world_size)
    queries = encode_users(model, catalogue, local.inputs)
    bound = float(largest_norm(queries) * largest_norm(catalogue))  # no score is larger
    ranks_and_bounds: list[Any] = [(rank_targets(queries, catalogue, local.targets, local.histories), bound)]
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, ranks_and_bounds[0])
        ranks_and_bounds = gathered
    if not all(math.isfinite(bound) for _, bound in ranks_and_bounds):
        raise Diverged("validation: the scores are not finite")
    ranks = np.empty(len(data.validation.targets), np.int64)
    for worker, (of_share, _) in enumerate(ranks_and_bounds):
        ranks[worker::world_size] = of_share
    return ranks


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy on the CPU."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}


def _rank_and_world_size() -> tuple[int, int]:
    """Of this worker; (0, 1) outside torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
