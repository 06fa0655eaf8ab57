"""Training losses, one line each in LOSSES. Each is a sum over this worker's real positions; the loss of a batch is the
sum of the workers' sums, divided by the global number of real positions.

Shapes: P real (not padded) positions of this worker, S inputs of a user at most, E embedding, M items that the loss
reads, N negatives of a position. s+ is the score h . e of a position's label, s_k that of its negative k.
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
from lvlmrec.models.softmax import softmax_loss


@dataclass(frozen=True)
class LossInputs:
    """What a loss may read.

    queries [P, E]             of each position, after the user's items up to it
    labels int64 [P]           item index of the item that follows
    user_items int64 [P, S+1]  all items of the position's user, labels too; padding 0
    items [M, E]               embeddings of the items at `item_index`
    item_index int64 [M]       sorted, unique: the items of the global batch and all negatives; for `whole_catalogue`
                               all items that occur in training
    counts int64 [M]           how often each item occurs in the sequences of the global batch
    log_popularity [M]         log of each item's share of the training interactions
    negatives int64 [P, N]     item indices drawn for each position, none of its user's; None: the loss draws none
    num_items                  I, the number of items that occur in training: negatives are drawn from these
    """

    queries: Tensor
    labels: Tensor
    user_items: Tensor
    items: Tensor
    item_index: Tensor
    counts: Tensor
    log_popularity: Tensor
    negatives: Tensor | None
    num_items: int

    def rows(self, item_index: Tensor) -> Tensor:
        """Item indices of any shape, all among `self.item_index` -> their rows of `items`, the same shape."""
        return torch.searchsorted(self.item_index, item_index)

    def label_items(self) -> Tensor:
        """The embedding of each position's label, [P, E]."""
        return functional.embedding(self.rows(self.labels), self.items)

    def sampled_scores(self) -> tuple[Tensor, Tensor]:
        """s+ [P] and s_k [P, N] in float32 or wider."""
        assert self.negatives is not None
        positive = (self.queries * self.label_items()).sum(-1)
        negative = torch.einsum("pe,pne->pn", self.queries, functional.embedding(self.rows(self.negatives), self.items))
        return _at_least_float32(positive), _at_least_float32(negative)


@dataclass(frozen=True)
class LossConfig(ABC):
    """One entry of LOSSES.

    whole_catalogue     it reads all items that occur in training, not only those of the batch. An item that never
                        occurs is nobody's label: a loss that read it could only lower its scores
    format              part of the names of runs with this loss, incremented when it learns something else than before
    in_batch_negatives  its negatives are the items of the batch's other users
    """

    name: str
    whole_catalogue: ClassVar[bool] = False
    format: ClassVar[int] = 0
    in_batch_negatives: ClassVar[bool] = False

    @abstractmethod
    def sum(self, inputs: LossInputs) -> Tensor:
        """The loss, a scalar summed over the P positions of `inputs`; zero with a zero gradient when P is 0."""


@dataclass(frozen=True)
class InBatchSoftmaxConfig(LossConfig):
    """-log softmax over the items of the batch: `in_batch_softmax`."""

    name: str = option("in_batch_softmax", "softmax over the items of the batch, the user's own left out")
    log_popularity_correction: bool = option(True, "subtract log popularity from the logits")
    in_batch_negatives: ClassVar[bool] = True

    def sum(self, inputs: LossInputs) -> Tensor:
        return in_batch_softmax(inputs, self.log_popularity_correction)


@dataclass(frozen=True)
class FullSoftmaxConfig(LossConfig):
    """-s+ + log sum_j exp(s_j) over all items j that occur in training."""

    name: str = option("full_softmax", "softmax over all items of training, which are all encoded at each step")
    whole_catalogue: ClassVar[bool] = True
    format: ClassVar[int] = 1

    def sum(self, inputs: LossInputs) -> Tensor:
        return softmax_loss(inputs.queries, inputs.items, inputs.rows(inputs.labels))


@dataclass(frozen=True)
class SampledLossConfig(LossConfig):
    """A loss over negatives drawn for each position, uniformly from the trained items that the user does not have."""

    format: ClassVar[int] = 1
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
    """-s+ + log(exp(s+) + (I - 1) / N sum_k exp(s_k)): each negative stands for (I - 1) / N trained items."""

    name: str = option("sampled_softmax", "softmax over the label and drawn items, each standing for many")
    negatives: int = option(256, "items drawn for each position", minimum=1)

    def sum(self, inputs: LossInputs) -> Tensor:
        positive, negative = inputs.sampled_scores()
        items_per_negative = (inputs.num_items - 1) / self.negatives
        logits = torch.cat([positive[:, None], negative + math.log(items_per_negative)], dim=1)
        return (logits.logsumexp(-1) - positive).sum()


@dataclass(frozen=True)
class GBCEConfig(SampledLossConfig):
    """-(beta log sigmoid(s+) + sum_k log(1 - sigmoid(s_k))) / (N + 1) (gSASRec; Petrov and Macdonald, 2023).

    beta = a (t (1 - 1 / a) + 1 / a), a = N / (I - 1) the share of the negatives that is drawn: t 0 is plain binary
    cross-entropy, t 1 undoes the overconfidence that drawing few negatives brings.
    """

    name: str = option("gbce", "binary cross-entropy over drawn items, calibrated for their number")
    negatives: int = option(256, "items drawn for each position", minimum=1)
    calibration: float = option(0.75, "t: 0 is binary cross-entropy, 1 full calibration", minimum=0, maximum=1)

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
    pairs = _at_least_float32(inputs.queries), _at_least_float32(inputs.label_items())
    queries, labels = (functional.normalize(vectors, dim=-1) for vectors in pairs)
    return (queries - labels).square().sum()


def uniformity(vectors: Tensor) -> Tensor:
    """log mean exp(-2 |x - y|^2) over all pairs of different `vectors` [P, E], normalised to length 1; 0 for P < 2."""
    directions = functional.normalize(_at_least_float32(vectors), dim=-1)
    count = len(directions)
    if count < 2:
        return directions.sum() * 0.0
    # |x - y|^2 = 2 - 2 x . y; a vector with itself adds exp(0), which the diagonal takes out.
    kernel = torch.exp(4 * (directions @ directions.T - 1))
    return ((kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))).log()


def in_batch_softmax(inputs: LossInputs, log_popularity_correction: bool) -> Tensor:
    """MicroLens' in-batch softmax, summed over the P positions.

    MicroLens has one column per occurrence of an item in the global batch. A position is compared with its label's
    column and with every column whose item is neither padding nor in its user's sequence. An item that occurs n times
    is here one column with log n added to its logit, which gives the same sum of exponentials; the label counts once.

    log_popularity_correction: subtract the log of each item's share of the training interactions from its logit
    (MicroLens does so for its id models; DFF does not).
    """
    log_counts = inputs.counts.to(inputs.log_popularity.dtype).log()
    correction = inputs.log_popularity if log_popularity_correction else torch.zeros_like(log_counts)
    labels = inputs.rows(inputs.labels)
    # padding becomes the label, which is compared in any case
    excluded = torch.where(inputs.user_items > 0, inputs.rows(inputs.user_items), labels[:, None])
    return softmax_loss(inputs.queries, inputs.items, labels, log_counts - correction, -correction, excluded)


def _at_least_float32(scores: Tensor) -> Tensor:
    """The same scores in float32, or wider if they are: a softmax in half precision loses small probabilities."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
