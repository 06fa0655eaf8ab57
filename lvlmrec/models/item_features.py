"""The features of a batch's items, read where they are stored, and the weighted sum of their layers.

Shapes: N items of the batch, T items stored, L feature layers of all feature sets, D dim of the widest feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Values in a block of items: conversion, product and sum stay in a core's cache; on a GPU, few large kernels.
VALUES_PER_BLOCK = {"cpu": 1 << 17, "cuda": 1 << 28}


class ItemFeatures(NamedTuple):
    """Features of N items, converted and scaled only when they are read: stored they take half the memory, or less.

    stored    one tensor per feature set with the features of all items, perhaps memory-mapped: [T, its layers, its
              dim], with several tokens per item [T, its layers, tokens, its dim]; float16, bfloat16 or float32,
              frames uint8
    row       int64 [N]: each item's row of `stored`
    mean, std [L, D]: a feature is read as (stored - mean) / std; both None: as stored
    missing   bool [N, L]: the item lacks this feature, which is read as zeros; `stored` has zeros there too
    """

    stored: Sequence[Tensor]
    row: Tensor
    mean: Tensor | None
    std: Tensor | None
    missing: Tensor

    def take(self, items: slice) -> ItemFeatures:
        """The features of a slice of the N items."""
        return self._replace(row=self.row[items], missing=self.missing[items])

    def as_stored(self, number: int) -> Tensor:
        """One layer's features [N, its dim], or [N, tokens, its dim], in the stored dtype, unscaled."""
        return self._layers(range(number, number + 1))[:, 0].index_select(0, self.row)

    def layer(self, number: int, dtype: torch.dtype) -> Tensor:
        """One layer's features [N, its dim], or [N, tokens, its dim], scaled."""
        values = self.as_stored(number).to(dtype)
        if self.mean is None or self.std is None:
            return values
        mean, std = (part[number, : values.shape[-1]].to(dtype) for part in (self.mean, self.std))
        missing = self.missing[:, number].view(-1, *[1] * (values.ndim - 1))
        return ((values - mean) / std).masked_fill_(missing, 0.0)

    def dim(self, layers: range) -> int:
        """The dim of some layers of one feature set."""
        return self._layers(layers).shape[-1]

    def unscaled_blocks(self, layers: range, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of items with `layers` of one feature set, not scaled: slices of the N items, [block, layers, dim].

        The next block overwrites the tensor; the caller may too.
        """
        stored = self._layers(layers)
        shape = stored.shape[1:]
        block = max(1, VALUES_PER_BLOCK.get(stored.device.type, 1 << 28) // shape.numel())
        # One buffer for all blocks: allocating one each costs more than the work on it.
        values = stored.new_empty(block, *shape, dtype=dtype)
        for start in range(0, len(self.row), block):
            row = self.row[start : start + block]
            target = values[: len(row)]
            if stored.dtype == dtype:
                torch.index_select(stored, 0, row, out=target)
            else:  # a single item is converted where it is stored
                target.copy_(stored[int(row[0])] if block == 1 else stored.index_select(0, row))
            yield slice(start, start + block), target

    def _layers(self, layers: range) -> Tensor:
        """The stored tensor's view of `layers`, which belong to one feature set: [T, layers, ...]."""
        first = 0
        for stored in self.stored:
            if layers.start < first + stored.shape[1]:
                return stored[:, layers.start - first : layers.stop - first]
            first += stored.shape[1]
        raise IndexError(f"layer {layers.start} of {first}")


def sum_of_layers(weights: Tensor, features: ItemFeatures, layers: range) -> Tensor:
    """sum_l w_l h_l over `layers` of one feature set, scaled: weights [len(layers)] -> [N, its dim], in their dtype.

    Equal to summing `weights[l] * features.layer(l)`, gradients too, but in blocks of items instead of all at once.
    """
    return _SumOfLayers.apply(weights, features, layers)


class _SumOfLayers(torch.autograd.Function):
    """With m and s the mean and deviation of layer l, p_nl whether item n has it, x the stored feature:

    out_n = sum_l w_l p_nl (x_nl - m_l) / s_l = sum_l x_nl (w_l / s_l) - sum_l p_nl (w_l m_l / s_l)
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, features: ItemFeatures, layers: range) -> Tensor:
        ctx.features, ctx.layers = features, layers
        mean, inverse, present = _scaling(features, layers, weights.dtype)
        scales = weights[:, None] * inverse
        out = -(present * weights) @ (mean * inverse)
        for rows, values in features.unscaled_blocks(layers, weights.dtype):
            out[rows] += values.mul_(scales).sum(1)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        features, layers = ctx.features, ctx.layers
        (gradient,) = gradients
        mean, inverse, present = _scaling(features, layers, gradient.dtype)
        sums = -mean * (present.T @ gradient)
        for rows, values in features.unscaled_blocks(layers, gradient.dtype):
            if len(values) == 1:  # large features come in blocks of one item: one pass instead of three
                sums.addcmul_(values[0], gradient[rows])
            else:
                sums += values.mul_(gradient[rows, None]).sum(0)
        return (sums * inverse).sum(1), None, None


def _scaling(features: ItemFeatures, layers: range, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """mean and 1 / std, each [len(layers), D]; present [N, len(layers)]: 1 where an item has the layer, else 0."""
    chosen, dim = list(layers), features.dim(layers)
    present = (~features.missing[:, chosen]).to(dtype)
    if features.mean is None or features.std is None:
        shape = len(chosen), dim
        return present.new_zeros(shape), present.new_ones(shape), present
    return features.mean[chosen, :dim].to(dtype), 1 / features.std[chosen, :dim].to(dtype), present
