"""Divergence: the first step whose loss, gradient, weights or scores are not finite, and advice against it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lvlmrec.errors import JobFailed
from lvlmrec.features.array import FeatureArray
from lvlmrec.runs.experiment import TrainConfig

STEPS_BETWEEN_CHECKS = 100  # of losses and gradients; each check waits for the GPU


class Diverged(JobFailed):
    """A loss, a gradient, a weight or a score is not finite; the message names epoch, step and what would help."""


def check_steps(steps_before: int, steps: list[tuple[Tensor, Tensor]], world_size: int) -> None:
    """Raises `Diverged` that names the first step that is not finite, on all `world_size` workers alike.

    steps_before  number of the steps of this epoch that were checked already
    steps         of each step after them the loss of this worker, and the norm of the gradient of all workers, scalars
    """
    if not steps:
        return
    losses, norms = (torch.stack(values) for values in zip(*steps, strict=True))
    if world_size > 1:
        dist.all_reduce(losses)
    finite = torch.isfinite(losses) & torch.isfinite(norms)
    if not finite.all():
        first = int(finite.int().argmin())
        name, values = ("gradient", norms) if torch.isfinite(losses[first]) else ("loss", losses)
        raise Diverged(f"step {steps_before + first + 1}: the {name} is {float(values[first])}")


def check_weights(model: nn.Module) -> None:
    """Raises `Diverged` when a weight is not finite."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise Diverged(f"last step: the weights of {name} are not finite")


def largest_norm(vectors: Tensor) -> Tensor:
    """The largest norm of vectors [N, E]; 0 where there are none, not finite where an entry is not."""
    return vectors.norm(dim=-1).max() if len(vectors) else vectors.new_zeros(())


def remedy(config: TrainConfig, features: FeatureArray | None) -> str:
    """What may keep a run from diverging, for the error's message."""
    advice = [f"lower training.lr ({config.training.lr:g})"]
    if config.training.precision != "float32":
        advice.append("set training.precision=float32")
    if features is not None:
        advice.append("look for features that are not finite or very large")
    return ", or ".join(advice)
