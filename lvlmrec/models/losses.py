"""Training losses.

Shapes: B users of this worker, S inputs per user, E embedding, M unique real items of the global batch,
P real positions of this worker.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def in_batch_softmax(
    hidden: Tensor,
    items: Tensor,
    item_index: Tensor,
    counts: Tensor,
    sequences: Tensor,
    log_popularity: Tensor | None = None,
) -> Tensor:
    """MicroLens' in-batch softmax, summed over the real positions of this worker; its global mean is this sum
    over all workers, divided by the global number of real positions.

    MicroLens' columns are the items of all positions of the global batch, one column per occurrence: the label's
    own column, and every column whose item is neither padding nor in the row user's own sequence. An item that
    occurs n times is here one column with log n added to its logit, which is the same sum of exponentials.

    hidden [B, S, E]: output s has read inputs 0..s. items [M, E]: embeddings of item_index.
    item_index [M] int64: the real items of the global batch, sorted, each once.
    counts [M]: how often each occurs in the sequences of the global batch.
    sequences [B, S + 1] int64: item indices, padding 0 on the left; input s stands at s, its label at s + 1.
    log_popularity [M]: log of each item's share of the training interactions, subtracted from its logit
    (MicroLens does so for its id models; DFF does not), or None.
    """
    user_P, step_P = torch.nonzero(sequences[:, :-1], as_tuple=True)
    columns = torch.searchsorted(item_index, sequences)
    label_P1 = columns[user_P, step_P + 1][:, None]

    own = _own_columns(columns, sequences > 0, len(item_index))[user_P].scatter_(1, label_P1, False)
    logits = hidden[user_P, step_P] @ items.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a softmax in half precision loses the tail
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
