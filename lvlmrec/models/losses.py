"""Training losses, one line each in LOSSES. Each is a sum over the real positions of this worker; the loss of a batch
is this sum over all workers, divided by the global number of real positions.

Shapes: B users of this worker, S inputs per user, E embedding, M items that the loss reads, P real positions of this
worker, N negatives of a position. s+ is the score h . e of a position's label, s_k that of its negative k.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lvlmrec.config import option


@dataclass(frozen=True)
class LossInputs:
    """What a loss may read.

    hidden [B, S, E]: output s has read inputs 0..s. items [M, E]: embeddings of item_index.
    item_index [M] int64: sorted, each once: the real items of the global batch and all negatives, or all items.
    counts [M]: how often each occurs in the sequences of the global batch.
    log_popularity [M]: log of each item's share of the training interactions.
    sequences [B, S + 1] int64: item indices, padding 0 on the left; input s stands at s, its label at s + 1.
    negatives [B, S, N] int64: item indices drawn for each position, none of the user's own; None: none were drawn.
    num_items: I, the size of the catalogue.
    """

    hidden: Tensor
    items: Tensor
    item_index: Tensor
    counts: Tensor
    log_popularity: Tensor
    sequences: Tensor
    negatives: Tensor | None
    num_items: int

    def labelled(self) -> tuple[Tensor, Tensor]:
        """The real positions: queries [P, E] and the row of each one's label in `items` [P]."""
        real = self.sequences[:, :-1] > 0
        return self.hidden[real], torch.searchsorted(self.item_index, self.sequences[:, 1:][real])

    def sampled_scores(self) -> tuple[Tensor, Tensor]:
        """s+ [P] and s_k [P, N] in float32 or wider."""
        assert self.negatives is not None
        queries, labels = self.labelled()
        rows = torch.searchsorted(self.item_index, self.negatives[self.sequences[:, :-1] > 0])
        positive = (queries * self.items[labels]).sum(-1)
        negative = torch.einsum("pe,pne->pn", queries, self.items[rows])
        return _precise(positive), _precise(negative)


@dataclass(frozen=True)
class LossConfig(ABC):
    """One entry of LOSSES. `whole_catalogue`: it reads all items, not those of the batch alone."""

    name: str
    whole_catalogue: ClassVar[bool] = False

    @abstractmethod
    def sum(self, inputs: LossInputs) -> Tensor:
        """The loss, summed over the real positions of `inputs`; zero with a zero gradient when there are none."""


@dataclass(frozen=True)
class InBatchSoftmaxConfig(LossConfig):
    """-log softmax over the items of the batch: `in_batch_softmax`."""

    name: str = option("in_batch_softmax", "softmax over the items of the batch, the user's own left out")
    log_popularity_correction: bool = option(True, "subtract log popularity from the logits")

    def sum(self, inputs: LossInputs) -> Tensor:
        log_popularity = inputs.log_popularity if self.log_popularity_correction else None
        batch = inputs.item_index, inputs.counts, inputs.sequences
        return in_batch_softmax(inputs.hidden, inputs.items, *batch, log_popularity)


@dataclass(frozen=True)
class FullSoftmaxConfig(LossConfig):
    """-s+ + log sum_j exp(s_j) over all items j of the catalogue."""

    name: str = option("full_softmax", "softmax over the whole catalogue, all of which is encoded at each step")
    whole_catalogue: ClassVar[bool] = True

    def sum(self, inputs: LossInputs) -> Tensor:
        queries, labels = inputs.labelled()
        return functional.cross_entropy(_precise(queries @ inputs.items.T), labels, reduction="sum")


@dataclass(frozen=True)
class SampledLossConfig(LossConfig):
    """A loss over negatives drawn for each position, uniformly from the items that the user does not have."""

    name: str
    negatives: int = option(1, "items drawn for each position", minimum=1)


@dataclass(frozen=True)
class BPRConfig(SampledLossConfig):
    """-(1 / N) sum_k log sigmoid(s+ - s_k) (Rendle et al., 2009)."""

    name: str = option("bpr", "the label above drawn items, pair by pair")

    def sum(self, inputs: LossInputs) -> Tensor:
        positive, negative = inputs.sampled_scores()
        return -functional.logsigmoid(positive[:, None] - negative).mean(-1).sum()


@dataclass(frozen=True)
class SampledSoftmaxConfig(SampledLossConfig):
    """-s+ + log(exp(s+) + (I - 1) / N sum_k exp(s_k)): each negative stands for (I - 1) / N items of the catalogue."""

    name: str = option("sampled_softmax", "softmax over the label and drawn items, each standing for many")
    negatives: int = option(256, "items drawn for each position", minimum=1)

    def sum(self, inputs: LossInputs) -> Tensor:
        positive, negative = inputs.sampled_scores()
        each_stands_for = (inputs.num_items - 1) / self.negatives
        logits = torch.cat([positive[:, None], negative + math.log(each_stands_for)], dim=1)
        return (logits.logsumexp(-1) - positive).sum()


@dataclass(frozen=True)
class GBCEConfig(SampledLossConfig):
    """-(beta log sigmoid(s+) + sum_k log(1 - sigmoid(s_k))) / (N + 1) (gSASRec; Petrov and Macdonald, 2023).

    beta = a (t (1 - 1 / a) + 1 / a), a = N / (I - 1) the share of the negatives that is drawn: t 0 is plain binary
    cross-entropy, t 1 undoes the overconfidence that drawing few negatives brings.
    """

    name: str = option("gbce", "binary cross-entropy over drawn items, calibrated for their number")
    negatives: int = option(256, "items drawn for each position", minimum=1)
    calibration: float = option(0.75, "t: 0 is binary cross-entropy, 1 full calibration", minimum=0)

    def sum(self, inputs: LossInputs) -> Tensor:
        positive, negative = inputs.sampled_scores()
        share = min(1.0, self.negatives / (inputs.num_items - 1))
        beta = share * (self.calibration * (1 - 1 / share) + 1 / share)
        terms = beta * functional.logsigmoid(positive) + functional.logsigmoid(-negative).sum(-1)
        return -terms.sum() / (self.negatives + 1)


LOSSES: dict[str, type[LossConfig]] = {
    "in_batch_softmax": InBatchSoftmaxConfig,
    "full_softmax": FullSoftmaxConfig,
    "bpr": BPRConfig,
    "sampled_softmax": SampledSoftmaxConfig,
    "gbce": GBCEConfig,
}


def alignment(inputs: LossInputs) -> Tensor:
    """sum |h / |h| - e+ / |e+||^2 over the real positions (Wang and Isola, 2020)."""
    queries, labels = inputs.labelled()
    directions = functional.normalize(_precise(queries), dim=-1), functional.normalize(_precise(inputs.items), dim=-1)
    return (directions[0] - directions[1][labels]).square().sum()


def uniformity(points: Tensor) -> Tensor:
    """log mean exp(-2 |x - y|^2) over all pairs of two of the points [P, E], each of length 1; 0 for less than two."""
    directions = functional.normalize(_precise(points), dim=-1)
    count = len(directions)
    if count < 2:
        return directions.sum() * 0.0
    # |x - y|^2 = 2 - 2 x . y; a point with itself adds exp(0).
    kernel = torch.exp(4 * (directions @ directions.T - 1))
    return ((kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))).log()


def in_batch_softmax(
    hidden: Tensor,
    items: Tensor,
    item_index: Tensor,
    counts: Tensor,
    sequences: Tensor,
    log_popularity: Tensor | None = None,
) -> Tensor:
    """MicroLens' in-batch softmax.

    MicroLens' columns are the items of all positions of the global batch, one column per occurrence: the label's
    own column, and every column whose item is neither padding nor in the row user's own sequence. An item that
    occurs n times is here one column with log n added to its logit, which is the same sum of exponentials.

    The arguments are those of `LossInputs`, with the real items of the global batch as item_index.
    log_popularity [M]: log of each item's share of the training interactions, subtracted from its logit
    (MicroLens does so for its id models; DFF does not), or None.
    """
    user_P, step_P = torch.nonzero(sequences[:, :-1], as_tuple=True)
    columns = torch.searchsorted(item_index, sequences)
    label_P1 = columns[user_P, step_P + 1][:, None]

    own = _own_columns(columns, sequences > 0, len(item_index))[user_P].scatter_(1, label_P1, False)
    logits = _precise(hidden[user_P, step_P] @ items.T)
    log_counts = counts.to(logits.dtype).log()
    bias = log_counts if log_popularity is None else log_counts - log_popularity
    logits = (logits + bias).masked_fill_(own, -torch.inf)
    logits.scatter_add_(1, label_P1, -log_counts[label_P1])  # the label counts once
    return functional.cross_entropy(logits, label_P1[:, 0], reduction="sum")


def _own_columns(columns: Tensor, real: Tensor, num_columns: int) -> Tensor:
    """[B, M]: True where a column's item stands in the user's own sequence."""
    spare = columns.masked_fill(~real, num_columns)  # padding falls into one column too many, cut off again
    own = torch.zeros(len(columns), num_columns + 1, dtype=torch.bool, device=columns.device)
    return own.scatter_(1, spare, True)[:, :num_columns]


def _precise(scores: Tensor) -> Tensor:
    """At least float32: a softmax in half precision loses the tail."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
