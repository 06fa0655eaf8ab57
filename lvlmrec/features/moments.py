"""Sums over the features of many items, in memory that neither their number nor their width changes.

Shapes: T items stored, L columns, D dim of the widest, N items read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BYTES_AT_ONCE = 64 << 20
BYTES_OF_A_VALUE = 12  # as float64, and as it is stored beside it


def sums(columns: Sequence[Tensor], rows: Tensor, dim: int, rows_at_once: int) -> tuple[Tensor, Tensor]:
    """The sum of the features and that of their squares over `rows` [N] of `columns`, float64 [L, D] each.

    columns: L x [T, their width]; behind a width below `dim`, D, the sums are zeros. A block is some rows of some of
    the L x D dimensions. Those of a row stand side by side over the edges of columns, in a number of them that is a
    power of two: so the sums are the same, to the last bit, as those of whole rows.
    """
    width = _width(rows_at_once)
    total, squares = torch.zeros(2, len(columns) * dim, dtype=torch.float64)
    for start in range(0, len(rows), rows_at_once):
        chosen = rows[start : start + rows_at_once]
        for begin in range(0, len(total), width):
            part = slice(begin, min(begin + width, len(total)))
            values = _read(columns, chosen, dim, part)
            total[part] += values.sum(0)
            squares[part] += values.square_().sum(0)
    return total.view(-1, dim), squares.view(-1, dim)


def _width(rows_at_once: int) -> int:
    """The dimensions of a block."""
    fitting = max(64, BYTES_AT_ONCE // (rows_at_once * BYTES_OF_A_VALUE))
    return 1 << (fitting.bit_length() - 1)


def _read(columns: Sequence[Tensor], rows: Tensor, dim: int, part: slice) -> Tensor:
    """float64 [N, part]: some of the L x D dimensions of `rows`."""
    values = torch.zeros(len(rows), part.stop - part.start, dtype=torch.float64)
    for place in range(part.start // dim, -(-part.stop // dim)):
        first, last = max(part.start, place * dim), min(part.stop, place * dim + columns[place].shape[1])
        if first < last:
            inside = slice(first - place * dim, last - place * dim)
            target = slice(first - part.start, last - part.start)
            values[:, target] = columns[place][:, inside].index_select(0, rows)
    return values
