"""Histories without their padding: what the sequence encoders read.

Shapes: B histories of up to S items each, P real positions of all of them, E embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Histories(NamedTuple):
    """Where the P real positions of B left-padded histories stand, once padding is gone.

    Users of one length stand side by side, the shortest first, each user's positions oldest first. So the rows of a
    run of users are [users * length, E], a view of [users, length, E], and no work is done on padding.

    place    int64 [P]: of each packed position its place in the flattened grid [B, S]
    age      int64 [P]: 0 for a user's last item, 1 for the one before it, ...
    runs     (length, users) of each run; their products add up to P
    ends     int64 [users with a history]: the packed position of each one's last item, in packed order
    users    int64 [users with a history]: who they are, 0..B-1
    """

    place: Tensor
    age: Tensor
    runs: list[tuple[int, int]]
    ends: Tensor
    users: Tensor

    def to(self, device: torch.device) -> Histories:
        """The same on `device`."""
        place, age, ends, users = (tensor.to(device) for tensor in (self.place, self.age, self.ends, self.users))
        return Histories(place, age, self.runs, ends, users)


def pack(mask: Tensor) -> Histories:
    """The layout of histories with `mask` [B, S], True at real items, which stand on the right."""
    lengths, users = mask.sum(1).sort(stable=True)
    users, lengths = users[lengths > 0], lengths[lengths > 0]
    width = mask.shape[1]
    ages = torch.arange(width - 1, -1, -1, device=mask.device).expand(len(users), width)
    real = ages < lengths[:, None]
    place = users[:, None] * width + (width - 1 - ages)
    length, count = lengths.unique_consecutive(return_counts=True)
    runs = list(zip(length.tolist(), count.tolist(), strict=True))
    return Histories(place[real], ages[real], runs, lengths.cumsum(0) - 1, users)


def split_runs(rows: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    """rows [P, E] -> [users, length, E] of each run."""
    parts = rows.split([length * users for length, users in runs])
    return [part.unflatten(0, (users, length)) for part, (length, users) in zip(parts, runs, strict=True)]


def join_runs(parts: list[Tensor], like: Tensor) -> Tensor:
    """[users, length, E] of each run -> [P, E]; `like` [P, E] keeps the graph where there is no run."""
    return torch.cat([part.flatten(0, 1) for part in parts]) if parts else like
