"""The micro-world: a small catalogue of real videos, and users whose tastes are known, made from a seed.

It stands in for a dataset where none can be shipped, so it has what makes the real ones hard: a long tail of
popularity, short histories, tastes that drift (so order matters), a trend that no pixel shows (so ids matter), and
items first met as somebody's test target (so content matters).
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lvlmrec.config import option
from lvlmrec.data import micro_videos
from lvlmrec.data.micro_videos import BACKGROUNDS, COLOURS, COUNTS, MOTIONS, SHAPES, TEMPI, Scene
from lvlmrec.errors import InputError

FORMAT = 1  # counted up when the same configuration makes another world
MARKER = "micro_world.json"
PAIRS, TITLES = "MicroLens-sample_pairs.tsv", "MicroLens-sample_titles.csv"

FACTORS = {
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "shape": SHAPES,
    "count": COUNTS,
    "motion": MOTIONS,
    "tempo": TEMPI,
}
NUM_COMMUNITIES = 10
# what a match is worth to a user, in the logit of the choice
_TASTE = {"colour": 1.9, "background": 1.7, "shape": 1.3, "count": 1.0, "motion": 0.3, "tempo": 0.3}
_COMMUNITY_TASTE = 2.0
_NEAR = 0.35  # share of a match that the next value of the ring gets
_DRIFT = 0.4  # chance per interaction that a taste moves on to the next value of its ring
_POPULARITY_SPREAD = 0.8  # standard deviation of log popularity
_SHORTEST = 5  # interactions of a user at least: the split drops shorter histories
_COLD_ITEMS = 0.11  # share of the catalogue
_COLD_TARGETS = 0.125  # share of the users


@dataclass(frozen=True)
class MicroWorldConfig:
    """The size of a micro-world, and its seed."""

    num_items: int = option(360, "videos", minimum=40)
    num_users: int = option(2400, "users", minimum=40)
    seed: int = option(0, "decides the whole world", minimum=0)
    frame_side: int = option(128, "width and height of a video, even", minimum=32)
    fps: int = option(8, "frames per second", minimum=1)
    clip_seconds: float = option(3.0, "length of a video", minimum=0.25)


@dataclass(frozen=True)
class World:
    """I items and U users with all that is true of them.

    item_ids     [I] str, not dense
    factors      int64 [I, 6]: values of `FACTORS`, in its order
    communities  int64 [I]: the trend an item belongs to; shown in no video and no title
    popularity   float64 [I]: the part of the logit that all users share
    cold         bool [I]: met only as the last interaction of a user
    histories    per user the positions of the items met, oldest first
    """

    item_ids: list[str]
    factors: NDArray[np.int64]
    communities: NDArray[np.int64]
    popularity: NDArray[np.float64]
    cold: NDArray[np.bool_]
    histories: list[list[int]]


def draw(config: MicroWorldConfig) -> World:
    """The world that `config` decides."""
    rng = np.random.default_rng(config.seed)
    n = config.num_items
    numbers = rng.choice(2 * n, size=n, replace=False) + 1
    cold = np.zeros(n, dtype=bool)
    cold[rng.choice(n, size=round(_COLD_ITEMS * n), replace=False)] = True
    world = World(
        item_ids=[str(number) for number in numbers],
        factors=np.stack([_balanced(rng, len(values), n) for values in FACTORS.values()], axis=1),
        communities=_balanced(rng, NUM_COMMUNITIES, n),
        popularity=rng.normal(0, _POPULARITY_SPREAD, size=n),
        cold=cold,
        histories=[],
    )
    return World(**(vars(world) | {"histories": _live(rng, world, config.num_users)}))


def _balanced(rng: np.random.Generator, num_values: int, n: int) -> NDArray[np.int64]:
    """`n` values, each of `num_values` about equally often, in random order."""
    return rng.permutation(np.arange(n) % num_values)


def _live(rng: np.random.Generator, world: World, num_users: int) -> list[list[int]]:
    """All users meet items step by step: a draw from the softmax of popularity and taste, without repeats."""
    num_items = len(world.item_ids)
    longest = min(60, num_items // 4)
    lengths = np.minimum(_SHORTEST + np.exp(rng.normal(0.6, 0.95, size=num_users)).astype(np.int64), longest)
    sizes = np.array([*(len(values) for values in FACTORS.values()), NUM_COMMUNITIES])
    tastes = rng.integers(sizes, size=(num_users, len(sizes)))  # [U, 7] the value each user likes now
    ends_cold = np.zeros(num_users, dtype=bool)
    ends_cold[rng.choice(num_users, size=round(_COLD_TARGETS * num_users), replace=False)] = True
    met = np.zeros((num_users, num_items), dtype=bool)
    histories: list[list[int]] = [[] for _ in range(num_users)]
    for step in range(lengths.max()):
        users = np.flatnonzero(lengths > step)
        from_cold = ends_cold[users] & (lengths[users] == step + 1)
        logits = score(world, tastes[users], visible_only=from_cold)
        closed = np.where(from_cold[:, None], ~world.cold, world.cold) | met[users]
        # the largest logit plus Gumbel noise is a draw from the softmax
        items = np.where(closed, -np.inf, logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
        met[users, items] = True
        for user, item in zip(users, items, strict=True):
            histories[user].append(int(item))
        tastes = (tastes + (rng.random(tastes.shape) < _DRIFT)) % sizes
    return histories


def score(world: World, tastes: NDArray[np.int64], visible_only: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What each user would choose: logits [U, I] for `tastes` [U, 7], a value per factor and a community.

    Where `visible_only` [U] the community does not count.
    """
    logits = np.broadcast_to(world.popularity, (len(tastes), len(world.popularity))).copy()
    values = np.column_stack([world.factors, world.communities])
    weights = [*_TASTE.values(), _COMMUNITY_TASTE]
    sizes = [*(len(names) for names in FACTORS.values()), NUM_COMMUNITIES]
    for k, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        ahead = (values[:, k] - tastes[:, k, None]) % size  # [U, I] steps along the ring
        match = (ahead == 0) + _NEAR * (ahead == 1)
        logits += weight * match * (np.where(visible_only, 0, 1)[:, None] if k == len(FACTORS) else 1)
    return logits
