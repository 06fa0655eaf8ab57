"""Packed histories: the real positions of left-padded histories, without padding, as sequence encoders read them.

Shapes: B histories of up to S items each, P real positions of all of them, E embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Histories(NamedTuple):
    """The packing of the P real positions of B histories.

    Packed order: users sorted by history length, the shortest first, each user's positions oldest first. Users of one
    length are a *run*: their rows [users * length, E] are a view of [users, length, E], and padding costs no work.

    grid_index  int64 [P]: each packed position's index in the flattened grid [B, S]
    age         int64 [P]: 0 for a user's last item, 1 for the one before it, ...
    runs        (length, users) of each run; their products add up to P
    ends        int64 [users with a history]: packed position of each user's last item, in packed order
    users       int64 [users with a history]: their rows in the grid, 0..B-1, in packed order
    """

    grid_index: Tensor
    age: Tensor
    runs: list[tuple[int, int]]
    ends: Tensor
    users: Tensor

    def to(self, device: torch.device) -> Histories:
        """A copy on `device`."""
        grid_index, age, ends, users = (
            tensor.to(device) for tensor in (self.grid_index, self.age, self.ends, self.users)
        )
        return Histories(grid_index, age, self.runs, ends, users)


def pack(mask: Tensor) -> Histories:
    """The packing of histories padded on the left; mask bool [B, S] is True at real items."""
    lengths, users = mask.sum(1).sort(stable=True)
    users, lengths = users[lengths > 0], lengths[lengths > 0]
    width = mask.shape[1]
    ages = torch.arange(width - 1, -1, -1, device=mask.device).expand(len(users), width)
    real = ages < lengths[:, None]
    grid_index = users[:, None] * width + (width - 1 - ages)
    length, count = lengths.unique_consecutive(return_counts=True)
    runs = list(zip(length.tolist(), count.tolist(), strict=True))
    return Histories(grid_index[real], ages[real], runs, lengths.cumsum(0) - 1, users)


def split_runs(rows: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    """Packed rows [P, E] -> one view [users, length, E] per run."""
    parts = rows.split([length * users for length, users in runs])
    return [part.unflatten(0, (users, length)) for part, (length, users) in zip(parts, runs, strict=True)]


def join_runs(parts: list[Tensor], like: Tensor) -> Tensor:
    """One [users, length, E] per run -> packed rows [P, E]. Without runs `like` [0, E], so that gradients flow."""
    return torch.cat([part.flatten(0, 1) for part in parts]) if parts else like
