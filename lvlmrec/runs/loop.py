"""The training loop: epochs, validation, early stopping, state, the result. Knows torch.distributed, not Ray.

Every worker knows the whole global batch (it and its drawn negatives come from a shared seed), encodes its unique
items and computes the loss of its own users against all of them. So negatives are gathered without communication, and
the sum of the workers' losses is the loss of one worker: the result does not depend on the number of workers. Only the
uniformity of queries needs those of the other workers, and items whose frames are encoded are shared out and gathered.
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
from lvlmrec.features.array import FeatureArray
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.losses import LossInputs, alignment, uniformity
from lvlmrec.models.sequential.fusions.video import Video
from lvlmrec.models.sequential.histories import pack
from lvlmrec.models.sequential.recommender import Recommender
from lvlmrec.runs import checkpoint, pretrained
from lvlmrec.runs.batches import Batch, Positions, Shared, batches_of_epoch, item_features, made_ahead
from lvlmrec.runs.divergence import STEPS_BETWEEN_CHECKS, Diverged, check_steps, check_weights, longest, remedy
from lvlmrec.runs.experiment import Experiment, TrainConfig, TrainingConfig, TrainingData, build_model, summary

VIDEO_ENCODER = "item_encoder.encoder."  # what the names of its weights begin with
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

    log_popularity: Tensor  # [I + 1]

    def __init__(self, model: Recommender, settings: TrainingConfig, train_counts: np.ndarray) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        shares = np.maximum(train_counts, 1) / train_counts.sum()
        self.register_buffer("log_popularity", torch.from_numpy(np.log(shares)).float(), persistent=False)

    def forward(self, shared: Shared, mine: Positions) -> Tensor:
        """Sum of the loss over this worker's positions."""
        items = encode_items(self.model, shared.item_index, shared.features)
        rows = torch.searchsorted(shared.item_index, mine.inputs)
        queries = self.model.encode_sequences(functional.embedding(rows, items), mine.histories)
        catalogue = items, shared.item_index, shared.counts, self.log_popularity[shared.item_index]
        given = LossInputs(queries, mine.labels, mine.own, *catalogue, mine.negatives, shared.num_trained)
        loss = self.settings.loss.sum(given)
        if self.settings.alignment:
            loss = loss + self.settings.alignment * alignment(given)
        if self.settings.uniformity:
            loss = loss + self.settings.uniformity * self._uniformity(given)
        if not len(queries):  # a worker without a user: its gradients are zeros, not missing
            loss = loss + sum(parameter.sum() * 0.0 for parameter in self.model.parameters())
        return loss

    def _uniformity(self, given: LossInputs) -> Tensor:
        """This worker's share of the mean uniformity of queries and items, times the global number of positions.

        Every worker has the same value of both. That of the items carries its whole gradient on each, so a share by
        positions adds up to one; that of the queries only the gradient of the worker's own, which counts in full.
        """
        own = given.queries
        everyones = _with_other_workers(own)
        queries, items = uniformity(everyones), uniformity(given.items[given.counts > 0])
        return (len(own) * (items + queries.detach()) + len(everyones) * (queries - queries.detach())) / 2


def new_state(config: TrainConfig, data: TrainingData, features: FeatureArray | None, device: torch.device) -> State:
    """A freshly initialised run; every worker gets the same weights."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(data.item_ids), config.dataset.max_length, features).to(device)
    if isinstance(model.item_encoder, Video) and config.model.item_encoder.pretrained:
        model.item_encoder.start_from(*pretrained.read(config.model.item_encoder.pretrained))
    return State(model, _optimizer(model, config.training), {}, Progress())


def _optimizer(model: Recommender, settings: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW; a video encoder that is trained may have a learning rate of its own."""
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
    """Train until the last epoch or until the validation metric of the split stops rising, HR@10 or Recall@20.

    `report` is called after every epoch. Raises `Diverged`, on every worker alike, before the epoch is reported: what
    was saved before stays good.
    """
    rank, world = _rank_and_world()
    loss: nn.Module = Loss(state.model, config.training, data.train_counts).to(device)
    if world > 1:
        loss = DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)
    settings, selected_by = config.training, config.dataset.selected_by
    while not state.progress.finished(settings.epochs, settings.patience):
        epoch = state.progress.epoch
        started = time.perf_counter()
        torch.manual_seed(int(np.random.SeedSequence((config.seed, epoch, rank)).generate_state(1)[0]))
        batches = batches_of_epoch(config, data, features, epoch, device, rank, world)
        try:
            train_loss = train_epoch(config.training, made_ahead(batches), loss, state.optimizer, device)
            seconds = time.perf_counter() - started
            validation = _validate(state.model, data, features, device)
        except Diverged as error:
            raise Diverged(f"epoch {epoch + 1}, {error}; {remedy(config, features)}") from None
        progress = state.progress
        progress.epoch, progress.train_seconds = epoch + 1, progress.train_seconds + seconds
        if not progress.best or validation[selected_by] > progress.best[selected_by]:
            progress.best, progress.best_epoch = validation, progress.epoch
            state.best_weights = _weights(state.model)
        prefixed = {f"validation/{name}": value for name, value in validation.items()}
        report({"epoch": epoch + 1, "train_loss": train_loss, "epoch_seconds": seconds, **prefixed}, state)


def publish(experiment: Experiment, weights: Mapping[str, Tensor], progress: Progress) -> dict[str, Any]:
    """Publish the best epoch's weights as the run's checkpoint, and give what its result says."""
    result = {
        "validation": progress.best,
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "seconds_per_epoch": round(progress.train_seconds / progress.epoch, 4),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        **summary(experiment),
    }
    checkpoint.publish(experiment.checkpoint, experiment.config, experiment.data, experiment.features, weights, result)
    return result


@torch.inference_mode()
def encode_catalogue(model: Recommender, num_items: int, features: FeatureArray | None, device: torch.device) -> Tensor:
    """Embeddings of all items, [I + 1, E]; row 0, the padding, is zero."""
    chunks = []
    for start in range(1, num_items + 1, ROWS_AT_ONCE):
        index = np.arange(start, min(start + ROWS_AT_ONCE, num_items + 1))
        rows = item_features(features, index, device)
        chunks.append(encode_items(model, torch.from_numpy(index).to(device), rows).float())
    items = torch.cat(chunks)
    return torch.cat([items.new_zeros(1, items.shape[1]), items])


@torch.inference_mode()
def rank_holdout(model: Recommender, item_embeddings: Tensor, holdout: Holdout) -> np.ndarray:
    """The item rank of each user's target over the full catalogue, int64 [U]."""
    queries = encode_users(model, item_embeddings, holdout.inputs)
    return rank_targets(queries, item_embeddings, holdout.targets, holdout.histories)


@torch.inference_mode()
def encode_users(model: Recommender, item_embeddings: Tensor, inputs: np.ndarray) -> Tensor:
    """The query of each user, [U, E], after histories `inputs` [U, L] of item indices, padded with 0 on the left."""
    model.eval()
    queries = [item_embeddings[:0]]
    for start in range(0, len(inputs), USERS_AT_ONCE):
        grid = torch.from_numpy(inputs[start : start + USERS_AT_ONCE].astype(np.int64))
        histories = pack(grid > 0)
        items = grid.flatten()[histories.place].to(item_embeddings.device)
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
    """One pass; returns the mean loss over all positions of all workers. Raises `Diverged`."""
    _, world = _rank_and_world()
    autocast = torch.autocast(device.type, torch.bfloat16) if settings.precision == "bfloat16" else nullcontext()
    total, positions, step = torch.zeros((), device=device), 0, 0
    unchecked: list[tuple[Tensor, Tensor]] = []  # loss and length of the gradient of the last steps
    loss.train()
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = group["highest_lr"] * learning_rate_factor(batch.progress, settings.schedule, settings.warmup)
        with autocast:
            summed = loss(batch.shared, batch.mine)
        optimizer.zero_grad(set_to_none=True)
        (summed * (world / batch.num_positions)).backward()  # DDP averages over workers: sum / positions
        norm = torch.nn.utils.clip_grad_norm_(loss.parameters(), settings.gradient_clip or math.inf)
        optimizer.step()
        total, positions = total + summed.detach(), positions + batch.num_positions
        unchecked.append((summed.detach(), norm))
        if step % STEPS_BETWEEN_CHECKS == 0:
            check_steps(step - len(unchecked), unchecked, world)
            unchecked = []
    check_steps(step - len(unchecked), unchecked, world)
    if world > 1:
        dist.all_reduce(total)
    return float(total) / positions


def learning_rate_factor(progress: float, schedule: str, warmup: float) -> float:
    """The share of the highest learning rate after `progress` (0..1) of all steps.

    It rises from 0 over the share `warmup` of the steps, then stays, or falls to 0 in a line or half a cosine.
    """
    if progress < warmup:
        return progress / warmup
    left = (1 - progress) / (1 - warmup) if warmup < 1 else 0.0
    return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]


def encode_items(model: Recommender, item_index: Tensor, features: ItemFeatures | None) -> Tensor:
    """Embeddings [N, E] of the items at `item_index` [N], which every worker asks for alike.

    Items whose frames have to be encoded are shared out: each worker encodes its part, and all get all embeddings.
    """
    rank, world = _rank_and_world()
    if world == 1 or not model.reads_frames or features is None:
        return model.encode_items(item_index, features)
    ends = [len(item_index) * worker // world for worker in range(world + 1)]
    mine = slice(ends[rank], ends[rank + 1])
    own = model.encode_items(item_index[mine], features.take(mine))
    if not len(own):  # fewer items than workers: gradients are zeros, not missing
        own = own + sum(parameter.sum() * 0.0 for parameter in model.item_encoder.parameters())
    return _Gather.apply(own, ends)


class _Gather(torch.autograd.Function):
    """Every worker's rows own [n, E] -> those of all [N, E], which start at `ends`.

    The sum of the workers' losses is the loss, so the gradient of a row is the sum of what all workers have for it.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, ends: list[int]) -> Tensor:
        ctx.ends = ends
        sizes = [stop - start for start, stop in itertools.pairwise(ends)]
        padded = own.new_zeros(max(sizes), own.shape[1])
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rank, _ = _rank_and_world()
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed[ctx.ends[rank] : ctx.ends[rank + 1]], None


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
    """Metrics over all users; each worker ranks its share. Raises `Diverged` when weights or scores are not finite."""
    rank, world = _rank_and_world()
    model.eval()
    check_weights(model)
    catalogue = encode_catalogue(model, len(data.item_ids), features, device)
    shares = [data.validation.share(worker, world) for worker in range(world)]
    own = shares[rank]
    queries = encode_users(model, catalogue, own.inputs)
    largest = float(longest(queries) * longest(catalogue))  # no score is larger
    found: list[Any] = [(rank_targets(queries, catalogue, own.targets, own.histories), largest)]
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, found[0])
        found = gathered
    if not all(math.isfinite(largest) for _, largest in found):
        raise Diverged("validation: the scores are not finite")
    users = [share.users for share in shares if share.users is not None]
    return metrics(np.concatenate([ranks for ranks, _ in found]), users=np.concatenate(users) if users else None)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
