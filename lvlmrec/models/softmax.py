"""Cross-entropy of queries against items, in blocks of queries: the matrix of all logits is never in memory.

Shapes: P queries, M items, E embedding, X excluded items of a query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 27}  # a block fits a core's cache (2 MB), half a GB on a GPU


def softmax_loss(
    queries: Tensor,
    items: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    label_bias: Tensor | None = None,
    excluded: Tensor | None = None,
) -> Tensor:
    """sum_p -log softmax(h_p . e_j + bias_j)[label_p]: a scalar in float32 or wider, differentiable by h and e.

    queries [P, E]       h
    items [M, E]         e
    labels int64 [P]     rows of `items`
    bias [M]             of each item; None: 0
    label_bias [M]       in place of `bias` where the item is the query's label
    excluded int64 [P, X]  rows of `items` that a query is not compared with; its label is, even if named there
    """
    if torch.is_autocast_enabled(queries.device.type):
        dtype = torch.get_autocast_dtype(queries.device.type)
        queries, items = queries.to(dtype), items.to(dtype)
    return _SoftmaxLoss.apply(queries, items, labels, bias, label_bias, excluded)


class _SoftmaxLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass: the loss is a sum, so backward only multiplies it by a scalar."""

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
            block_queries, label = queries[rows], labels[rows, None]
            logits = (block_queries @ items.T).to(dtype)
            label_logits = logits.gather(1, label)
            if bias is not None:
                logits += bias.to(dtype)
                label_logits = label_logits + (bias if label_bias is None else label_bias).to(dtype)[label]
            if excluded is not None:
                logits.scatter_(1, excluded[rows], -torch.inf)
            logits.scatter_(1, label, label_logits)
            largest = logits.amax(1, keepdim=True)
            shares = torch.softmax(logits, dim=1, out=logits)
            # The largest share is exp(largest - logsumexp) and at least 1 / M: its log loses nothing.
            total += (largest - shares.amax(1, keepdim=True).log() - label_logits).sum()
            shares.scatter_add_(1, label, torch.full_like(label_logits, -1.0))
            gradient = shares.to(queries.dtype)
            torch.mm(gradient, items, out=query_gradient[rows])
            item_gradient += gradient.T @ block_queries
        ctx.save_for_backward(query_gradient, item_gradient.to(items.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_gradient, item_gradient = ctx.saved_tensors
        (factor,) = gradients
        return query_gradient * factor, item_gradient * factor, None, None, None, None
