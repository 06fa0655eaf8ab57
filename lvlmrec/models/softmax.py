"""Cross-entropy of queries against items in blocks of queries: the matrix of all logits never exists.

Shapes: P queries, M items, E embedding, X excluded items of a query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 27}  # numbers: what the cache of a core holds; half a gigabyte


def softmax_loss(
    queries: Tensor,
    items: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    label_bias: Tensor | None = None,
    excluded: Tensor | None = None,
) -> Tensor:
    """sum_p -log softmax(h_p . e_j + bias_j)[label_p], in float32 or wider, with gradients for queries and items.

    queries [P, E], items [M, E], labels [P] rows of items; bias [M]; label_bias [M] in place of `bias` for the label
    of a query; excluded [P, X] rows of items that a query is not compared with (its label is, even if named there).
    """
    if torch.is_autocast_enabled(queries.device.type):
        half = torch.get_autocast_dtype(queries.device.type)
        queries, items = queries.to(half), items.to(half)
    return _SoftmaxLoss.apply(queries, items, labels, bias, label_bias, excluded)


class _SoftmaxLoss(torch.autograd.Function):
    """The loss is a sum, so its gradient is known up to the factor that comes from above: it is made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        items: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        label_bias: Tensor | None,
        excluded: Tensor | None,
    ) -> Tensor:
        dtype = torch.promote_types(queries.dtype, torch.float32)
        total = queries.new_zeros((), dtype=dtype)
        query_gradient = torch.empty_like(queries)
        item_gradient = torch.zeros_like(items, dtype=dtype)
        block = max(1, LOGITS_AT_ONCE.get(queries.device.type, 1 << 27) // max(1, len(items)))
        for start in range(0, len(queries), block):
            rows = slice(start, start + block)
            asked, label = queries[rows], labels[rows, None]
            logits = (asked @ items.T).to(dtype)
            own = logits.gather(1, label)
            if bias is not None:
                logits += bias.to(dtype)
                own = own + (bias if label_bias is None else label_bias).to(dtype)[label]
            if excluded is not None:
                logits.scatter_(1, excluded[rows], -torch.inf)
            logits.scatter_(1, label, own)
            largest = logits.amax(1, keepdim=True)
            shares = torch.softmax(logits, dim=1, out=logits)
            # The largest share is exp(largest - logsumexp) and at least 1 / M: its log loses nothing.
            total += (largest - shares.amax(1, keepdim=True).log() - own).sum()
            shares.scatter_add_(1, label, torch.full_like(own, -1.0))
            gradient = shares.to(queries.dtype)
            torch.mm(gradient, items, out=query_gradient[rows])
            item_gradient += gradient.T @ asked
        ctx.save_for_backward(query_gradient, item_gradient.to(items.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_gradient, item_gradient = ctx.saved_tensors
        (factor,) = gradients
        return query_gradient * factor, item_gradient * factor, None, None, None, None
